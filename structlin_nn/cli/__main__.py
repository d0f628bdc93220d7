"""``python -m structlin_nn.cli`` is ``structlin``; torchrun starts modules this way."""

import sys

from structlin_nn.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
