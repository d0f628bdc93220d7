"""The old place of `structlin_nn._files`."""

from structlin_nn._files import atomic_write, sync_folder

__all__ = ["atomic_write", "sync_folder"]
