"""What tests of the choice of a way share."""

import pytest

from structlin.execution import choice, wisdom


@pytest.fixture
def own_wisdom(tmp_path, monkeypatch):
    """No test reads or writes what another one measured."""
    monkeypatch.setenv("STRUCTLIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("STRUCTLIN_EXECUTION", raising=False)
    monkeypatch.setattr(wisdom, "_MEMORY", {})
    monkeypatch.setattr(choice, "_pinned", {})
    monkeypatch.setattr(choice, "_made", {})
    choice.forget()
    yield
    choice.forget()
