"""Lists of what is refused, a line each."""

import pytest


def refused(error, words, call, *arguments, **options):
    """A call raises ``error``, and its message matches ``words``."""
    with pytest.raises(error, match=words):
        call(*arguments, **options)
