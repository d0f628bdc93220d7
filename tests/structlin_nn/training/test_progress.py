"""What the progress bar shows."""

import re
import time

import pytest

from structlin_nn.training.progress import Bar


@pytest.mark.parametrize(("peak", "share"), [(None, None), (4e12, "MFU")])
def test_shows_loss_throughput_time_left_and_flops(
    peak: float | None, share: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    bar = Bar("img", flops=10**9, peak=peak)
    bar.start(1000, 200, "dense 64")
    time.sleep(0.25)
    bar.update(100, None)  # a loss that was not fetched changes nothing
    bar.update(300, 1.25)
    bar.say("epoch 1")
    bar.close()
    text = capsys.readouterr().err.replace("\r", "\n")
    assert "epoch 1" in text
    last = [line for line in text.splitlines() if "dense 64" in line][-1]
    found = re.search(r"60%\|.*600/1\.00k \[00:00<00:0\d, .*img/s, loss 1\.2500, ([\d.]+) (T|G)FLOP/s(.*)\]", last)
    assert found is not None, last
    rate = float(found[1]) * {"T": 1e12, "G": 1e9}[found[2]]
    assert 400e9 / 60 < rate <= 400e9 / 0.25  # products of what was done since the start, by the time it took
    if share is None:
        assert found[3] == ""
    else:
        assert float(found[3].removeprefix(", MFU ").removesuffix(" %")) == pytest.approx(100 * rate / 4e12, abs=0.06)


def test_of_a_model_without_counts(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar("seq")
    bar.start(10, 0, "x")
    bar.update(10, 0.5)
    bar.close()
    text = capsys.readouterr().err
    assert "loss 0.5000]" in text
    assert "FLOP" not in text
