"""The command line ``structlin``; see `structlin_nn.cli.main`."""

from structlin_nn.cli.main import main

__all__ = ["main"]
