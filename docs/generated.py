"""Parts of pages that scripts write, between two marks."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Generated:
    """A part of a page, between ``<!-- made by docs/SCRIPT.py -->`` and ``<!-- end -->``.

    Attributes
    ----------
    script
        Path of the script, its ``__file__``.
    page
        Name of the page in docs/.
    make
        Function that returns the text.
    """

    script: str
    page: str
    make: Callable[[], str]

    @property
    def document(self) -> Path:
        """Path of the page."""
        return Path(self.script).parent / self.page

    def _parts(self) -> tuple[str, str, str]:
        """Return the text before, between and after the marks; the outer parts contain the marks."""
        text = self.document.read_text(encoding="utf-8")
        begin, end = f"<!-- made by docs/{Path(self.script).name} -->", "<!-- end -->"
        before, _, rest = text.partition(begin)
        between, mark, after = rest.partition(end)
        if not mark:
            raise ValueError(f"{self.page} must have the lines {begin} and {end}")
        return before + begin, between.strip(), end + after

    @property
    def recorded(self) -> str:
        """Text of the part in the page."""
        return self._parts()[1]

    def main(self, description: str | None) -> None:
        """Print the text, or write it to the page with ``--write``."""
        parser = argparse.ArgumentParser(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )  # fmt: skip
        parser.add_argument("--write", action="store_true", help=f"write it to docs/{self.page} instead of printing it")
        if parser.parse_args().write:
            before, _, after = self._parts()
            self.document.write_text(f"{before}\n\n{self.make()}\n\n{after}", encoding="utf-8")
        else:
            print(self.make())
