"""Every example in a docstring of the two packages runs and shows what it prints."""

import doctest
import importlib
import importlib.util
from pathlib import Path

import pytest


def modules_with_examples() -> list[str]:
    names = []
    for package in ("structlin", "structlin_nn"):
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        folder = Path(spec.origin).parent
        for source in sorted(folder.rglob("*.py")):
            if ">>> " in source.read_text(encoding="utf-8"):
                parts = source.relative_to(folder.parent).with_suffix("").parts
                names.append(".".join(parts).removesuffix(".__init__"))
    return names


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for library in ("peft", "transformers"):  # what the last part of the name says is not always installed
        if name.endswith(f".torch.{library}"):
            pytest.importorskip(library)
    module = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0, f"{name} has examples that are in no docstring"
    assert result.failed == 0, capsys.readouterr().out
