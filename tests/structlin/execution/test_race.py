"""Timings in turns on an invented clock."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from structlin.execution import race as module
from structlin.execution.race import HOPELESS, LEAST_ROUNDS, MOST_ROUNDS, PATIENCE, race


class Host:
    """A clock that the calls of alternatives advance, by their seconds times the slowness of the host at the time."""

    def __init__(self, slow: Callable[[str, int], float] = lambda name, number: 1.0) -> None:
        self.time, self.slow, self.calls = 0.0, slow, dict[str, int]()

    def call(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            number = self.calls.get(name, 0)
            self.time += seconds * self.slow(name, number)
            self.calls[name] = number + 1

        return run

    def race(self, monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float], budget: float) -> dict[str, float]:
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.time)
        calls = {name: self.call(name, each) for name, each in seconds.items()}
        return race(calls, lambda: self.time, budget)


def test_a_quiet_host_is_timed_for_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host()
    assert host.race(monkeypatch, {"a": 0.010, "b": 0.011}, 0.2) == pytest.approx({"a": 0.010, "b": 0.011})
    assert host.calls == {"a": 10, "b": 10}  # 0.21 s


def test_short_calls_end_after_the_most_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host()
    host.race(monkeypatch, {"a": 1e-5, "b": 1e-5}, 0.2)
    assert host.calls == {"a": MOST_ROUNDS, "b": MOST_ROUNDS}


def test_what_takes_far_too_long_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host()
    found = host.race(monkeypatch, {"a": 0.010, "b": 0.011, "c": 0.010 * HOPELESS + 0.001}, 0.5)
    assert host.calls["c"] == LEAST_ROUNDS
    assert host.calls["a"] > LEAST_ROUNDS
    assert found["c"] == pytest.approx(0.010 * HOPELESS + 0.001)


def test_a_disturbed_time_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """`b` is faster, but all its first calls and all but one of `a` meet a slow host."""

    def slow(name: str, number: int) -> float:
        return 1.0 if number > 4 or (name, number) == ("a", 2) else 1.3 + 0.1 * number

    host = Host(slow)
    found = host.race(monkeypatch, {"a": 0.11, "b": 0.10}, 0.5)
    assert found == pytest.approx({"a": 0.11, "b": 0.10})


def test_clear_differences_need_no_confirmation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times vary by more than AGREE, but those of `b` are all far from those of `a`."""
    host = Host(lambda name, number: 1.0 if name == "a" else 1 + 0.1 * number)
    host.race(monkeypatch, {"a": 0.10, "b": 0.20}, 0.5)
    assert host.calls == {"a": LEAST_ROUNDS, "b": LEAST_ROUNDS}


def test_an_uncertain_race_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(lambda name, number: 1 + 0.1 * number)
    host.race(monkeypatch, {"a": 0.10, "b": 0.101}, 0.3)
    assert 0.3 * PATIENCE < host.time < 0.3 * PATIENCE + 1


def test_long_calls_run_once_or_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host()
    host.race(monkeypatch, {"a": 3.0, "b": 4.0}, 0.25)
    assert host.calls == {"a": 1, "b": 1}
