"""Figures show the numbers of the records, and are written whole in each format."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from structlin_nn.cli import main
from structlin_nn.cli.figure import FIGURES
from structlin_nn.figures.compute import compute_figure, curves_figure
from structlin_nn.figures.scale import delta_h_figure, landscape_figure
from structlin_nn.figures.style import STYLES, new_figure, save, series
from structlin_nn.laws import fit_groups
from structlin_nn.tables import group_rows, read_rows

WriteRun = Callable[..., Path]


def lines(figure: Figure, panel: int = 0) -> dict[str, tuple[list[float], list[float]]]:
    """Labelled lines of a panel: their x and y."""
    axes = figure.axes[panel]
    return {
        str(line.get_label()): (list(map(float, line.get_xdata())), list(map(float, line.get_ydata())))
        for line in axes.lines
        if not str(line.get_label()).startswith("_")
    }


def statistics(change: float | None, gains: dict[str, float] | None = None) -> dict:
    return {"feature_change": change, "measured_steps": 0 if change is None else 4, "gains": gains or {}}


@pytest.fixture
def runs(write_run: WriteRun, tmp_path: Path) -> Path:
    """Two structures, three widths, both rules, two rates."""
    for structure in ("dense", "monarch"):
        for width in (16, 32, 64):
            for aware in (True, False):
                for lr in (1e-3, 1e-2):
                    error = (
                        (0.5 if structure == "dense" else 0.4) * (16 / width) ** 0.2 * (1 + abs(math.log10(lr / 1e-3)))
                    )
                    gains = {"input": 1.0, "output": 0.5 if aware else 0.25}
                    write_run(
                        structure, width, errors=(0.9, error), macs=width**2 * 3000, structure_aware=aware, lr=lr,
                        statistics=statistics(0.1 if aware else 0.1 * 4 / width**0.5, gains),
                    )  # fmt: skip
    return tmp_path


def test_delta_h(runs: Path) -> None:
    figure = delta_h_figure(group_rows(read_rows([runs], evaluations="all"), ["structure"]))
    found = lines(figure)
    assert list(found) == ["dense", "dense, naive", "Monarch", "Monarch, naive"]
    assert found["dense"] == ([16, 32, 64], pytest.approx([0.1, 0.1, 0.1]))
    assert found["Monarch, naive"][1] == pytest.approx([0.1, 0.1 / math.sqrt(2), 0.05])


def test_changes_are_weighted_by_steps(write_run: WriteRun) -> None:
    rows = read_rows([write_run(width=16, errors=(0.9, 0.5, 0.4))], evaluations="all")
    for row, (change, steps) in zip(rows, ((None, 0), (0.1, 1), (0.4, 2)), strict=True):
        row.update(feature_change=change, measured_steps=steps)
    assert lines(delta_h_figure({"dense": rows}))["dense"] == ([16], [pytest.approx(0.3)])
    for row in rows:
        row["feature_change"] = None
    with pytest.raises(ValueError, match=r"run0.jsonl measured no change of features"):
        delta_h_figure({"dense": rows})


def test_landscape(runs: Path) -> None:
    rows = [row for row in read_rows([runs]) if row["structure"] == "monarch"]
    figure = landscape_figure(rows, y="train_error")
    assert [axes.get_title() for axes in figure.axes] == ["structure-aware learning rates", "naive learning rates"]
    found = lines(figure, 1)
    assert list(found) == ["16", "32", "64"]
    assert found["16"] == ([1e-3, 1e-2], pytest.approx([0.4, 0.8]))
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()
    assert len(landscape_figure([r for r in rows if r["structure_aware"]], y="train_error").axes) == 1
    dense = [row for row in read_rows([runs]) if row["structure"] == "dense"]
    assert landscape_figure(dense, y="train_error").axes[0].get_title() == ""


def test_ends_of_nearly_one_cost_stand_beside_each_other() -> None:
    rows = {
        name: [{"record": name, "width": 8, "training_macs": 9.0, "forward_macs": cost, "loss": 1.0}]
        for name, cost in (("dense", 570.0), ("monarch", 586.0))
    }
    low, high = curves_figure(rows, x="training_macs", y="loss").axes[1].get_xlim()
    assert high / low == pytest.approx(16)
    assert low < 570 < 586 < high


def test_a_run_that_diverged_does_not_flatten_the_landscape() -> None:
    errors = {(16, 1e-3): 1.5, (16, 1e-2): 1.3, (64, 1e-3): 1.1, (64, 1e-2): 29.0}
    rows = [{"width": width, "lr": rate, "loss": error} for (width, rate), error in errors.items()]
    low, high = landscape_figure(rows, y="loss").axes[0].get_ylim()
    assert low == pytest.approx(1.1, abs=0.05)
    assert high == pytest.approx(1.35 * 1.3, abs=0.05)
    assert landscape_figure(rows[:3], y="loss").axes[0].get_ylim()[1] == pytest.approx(1.5, abs=0.05)
    alone = landscape_figure(rows[:1], y="loss").axes[0].get_ylim()
    assert alone[0] < 1.5 < alone[1]


def test_compute(runs: Path) -> None:
    rows = [row for row in read_rows([runs]) if row["config.lr"] == 1e-3 and row["structure_aware"]]
    laws, _ = fit_groups(group_rows(rows, ["structure"]), "training_macs", "test_error", samples=20)
    figure = compute_figure(laws, x="training_macs", y="test_error")
    found = lines(figure)
    assert found["dense"][0] == [16**2 * 3000, 32**2 * 3000, 64**2 * 3000]
    assert [bar.get_width() for bar in figure.axes[1].patches] == pytest.approx([0.1, 0.1])
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("training compute (MACs)", "test error")


def test_curves(runs: Path) -> None:
    rows = [row for row in read_rows([runs], evaluations="all") if row["config.lr"] == 1e-3]
    figure = curves_figure(group_rows(rows, ["structure"]), x="training_macs", y="test_error")
    assert len(figure.axes[0].lines) == 12
    assert lines(figure, 1)["dense"][1] == pytest.approx([0.5 * (16 / w) ** 0.2 for w in (16, 32, 64)])
    # Here every run has one evaluation after its start: a point. With another one it is a line.
    assert "" not in {line.get_marker() for line in figure.axes[0].lines}
    halves = [{**row, "training_macs": row["training_macs"] / 2} for row in rows]
    more = curves_figure(group_rows([*halves, *rows], ["structure"]), x="training_macs", y="test_error")
    assert {line.get_marker() for line in more.axes[0].lines} == {""}
    with pytest.raises(ValueError, match="dense has no evaluation after the start of a run"):
        curves_figure({"dense": [r for r in rows if not r["training_macs"]]}, x="training_macs", y="test_error")


class TestStyle:
    def test_no_two_series_look_alike(self) -> None:
        names = ["dense", *(f"monarch, blocks {b}" for b in (2, 4, 8, 16)), "blast", "butterfly", "toeplitz"]
        found = series(names)
        looks = [(s.colour, s.marker, s.line, s.filled) for s in found.values()]
        assert len(set(looks)) == len(names)
        assert found["dense"].label == "dense"
        assert found["monarch, blocks 4"].face == "white"

    def test_colours_differ_in_lightness_or_hue_for_all(self) -> None:
        """The palette of Okabe and Ito, once each."""
        palette = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}
        colours = [colour for _, colour, _ in STYLES.values()]
        assert set(colours) <= palette
        assert len(set(colours)) == len(colours)

    @pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
    def test_formats_and_the_same_file_again(self, suffix: str, magic: bytes, tmp_path: Path) -> None:
        files = []
        for name in ("a", "b"):
            figure = new_figure()
            figure.subplots().plot([1, 2], [3, 4])
            save(figure, tmp_path / f"{name}.{suffix}")
            files.append((tmp_path / f"{name}.{suffix}").read_bytes())
        assert files[0] == files[1]
        assert files[0].startswith(magic)


@pytest.mark.parametrize("name", [name for name in FIGURES if name not in ("landscape", "imagenet", "gpt2")])
def test_command(name: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / f"{name}.png"
    words = ["figure", name, str(runs), "--out", str(out), "--where", "config.lr=0.001"]
    assert main([*words, *(["--samples", "20"] if name in ("compute", "cifar") else [])]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out == f"{out}\n"
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("delta", "unknown figure 'delta' (did you mean delta-h?)"),
        ("landscape", "a landscape is of one group, got dense, monarch; choose one with --where"),
        ("compute --y eror", "a row has no 'eror'"),
        ("gpt2", "a row has no 'val_loss'"),
        ("delta-h --floor", "delta-h draws no laws: --frontier, --floor and --noise are for compute and cifar"),
        ("curves --out curves.gif", "figures are written as .png, .svg or .pdf, got 'curves.gif'"),
        ("curves --out missing/curves.png", "missing"),
    ],
)
def test_misuse(words: str, message: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                cli) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    name, *rest = words.split()
    out = [] if "--out" in rest else ["--out", "figure.png"]
    out_text, err = cli("figure", name, runs, *rest, *out, code=2)
    assert message in err
    assert out_text == ""
    assert err.count("\n") == 1
    assert not list(tmp_path.glob("*.png"))
