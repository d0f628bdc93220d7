"""The page about runs: every number on it is that of the records, and nothing on it comes from elsewhere."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from structlin_nn.records import FAILED, RecordWriter
from structlin_nn.report import report, runs_of
from structlin_nn.tables import group_rows, read_rows


class Page(HTMLParser):
    """Tables by the heading above them, text, and what the page refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: list[str] = []
        self.targets: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self._heading = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.targets += [v or "" for k, v in attrs if k in ("href", "src", "xlink:href", "data")]
        self.ids += [v or "" for k, v in attrs if k == "id"]
        if tag == "h2":
            self._heading = ""
        if tag == "tr":
            self.tables.setdefault(self._heading, []).append([])
        if tag in ("td", "th"):
            self.tables[self._heading][-1].append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        last = self.tags[-1] if self.tags else ""
        if last == "h2" and data.strip():
            self._heading = data.strip()
        if last in ("td", "th") and data.strip():
            self.tables[self._heading][-1][-1] += data


@pytest.fixture
def runs(write_run: Callable[..., Path], tmp_path: Path) -> Path:
    for width, error in ((16, 0.4), (32, 0.3), (64, 0.24)):
        for structure, times in (("dense", 4), ("monarch", 1)):
            write_run(structure, width, errors=(0.9, 0.6, error), macs=times * width**2 * 1000)
    write_run("dense", 128, errors=(0.9, 0.5), macs=10**8, last_step=4)
    return tmp_path


def test_numbers(runs: Path) -> None:
    page = Page(report([runs], samples=50))
    rows = page.tables["Runs"]
    assert rows[0][:5] == ["run", "group", "width", "parameters", "test error"]
    assert len(rows) == 8
    for row in rows[1:]:
        number = int(row[2])
        times = {"dense": 4, "monarch": 1}[row[1]]
        macs = 10**8 if number == 128 else times * number**2 * 1000
        assert float(row[5]) == pytest.approx(2 * macs, rel=5e-3)
        assert row[8] == ("not finished" if number == 128 else "finished")
        assert int(row[3].replace(",", "")) == 10 * number
    laws = page.tables["Scaling laws"]
    assert [row[:2] for row in laws[1:]] == [["dense", "3"], ["monarch", "3"]]
    assert float(laws[1][2]) == pytest.approx(float(laws[2][2])), "the same errors at a quarter of the compute"
    (multiplier,) = page.tables["Less compute than dense"][1:2]
    assert multiplier[4] == "4 x"
    assert multiplier[6] == "4 x"
    assert "not finished, and left out of the laws: run6.jsonl" in page.text
    assert (
        "not fitted, which needs runs of several lengths: a law of 7 parameters needs more than 7 points" in page.text
    )


def test_nothing_from_elsewhere(runs: Path) -> None:
    text = report([runs], samples=50, title='<script>alert("1")</script>')
    page = Page(text)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "img" not in page.tags
    assert page.targets
    assert all(target.startswith("#") for target in page.targets)
    assert not re.search(r"url\((?!#)|@import", text)
    assert len(page.ids) == len(set(page.ids)), "figures do not share names"
    assert {target[1:] for target in page.targets} <= set(page.ids)
    drawings = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(drawings) == 3
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        assert root.attrib["role"] == "img"
        assert root.attrib["aria-label"]
    assert text == report([runs], samples=50, title='<script>alert("1")</script>'), "the same records, the same page"


def write_sizes(folder: Path, flat: bool = False) -> None:
    """GPT-2 runs of several lengths, planned for twice what was spent of one; if ``flat``, losses are noise."""
    generator = np.random.default_rng(0)
    for structure, gain in (("dense", 1.0), ("monarch", 2.0)):
        for macs in (1e8, 3e8, 1e9, 3e9):
            for samples in (1e5, 4e5, 1.6e6):
                loss = 1.7 + 400 * (gain * macs) ** -0.3 + 300 * samples**-0.35
                if flat:
                    loss = 1.7 + 0.05 * generator.standard_normal() + 0.2 * macs**-0.01
                noise = np.random.default_rng(int(macs * samples) % 97).standard_normal()
                total = 3 * macs * samples
                counts = {
                    "params": macs / 2, "forward_macs": macs, "training_macs": 3 * macs, "steps": 10,
                    "total_training_macs": total,
                }  # fmt: skip
                header = {key: {} for key in ("data", "versions", "hardware")} | {
                    "started": "", "task": "gpt2", "seed": 0, "structures": [], "counts": counts,
                    "config": {"structure": structure, "width": round(macs**0.5), "options": {}},
                }  # fmt: skip
                writer = RecordWriter.create(folder / f"{structure}-{macs:g}-{samples:g}.jsonl", header)
                last = 5 if (structure, macs, samples) == ("dense", 3e9, 1.6e6) else 10
                for step in (1, last):
                    value = loss * (1 + 0.0005 * noise) + (1 - step / last)
                    writer.append({
                        "step": step, "samples": samples * step / 10, "training_macs": total * step / 10, "lr": 1e-3,
                        "batch_loss": value, "seconds": total * step / 9e14, "training_seconds": total * step / 1e15,
                        "statistics": {}, "tokens": 1, "train_loss": value, "val_loss": value,
                        "val_perplexity": 1.0, "val_tokens": 1,
                    })  # fmt: skip


def test_law_in_two_sizes_and_what_was_spent(tmp_path: Path) -> None:
    write_sizes(tmp_path)
    text = report([tmp_path], samples=50)
    page = Page(text)
    law = page.tables["Law in model and data"]
    assert [row[0] for row in law] == ["group", "dense", "monarch", "group", "monarch"]
    assert float(law[1][4].split()[0]) == pytest.approx(0.3, abs=0.05)
    assert float(law[4][2].split()[0]) == pytest.approx(2, rel=0.1), "compute is N D"
    spent = {row[0]: row for row in page.tables["Compute and time"][1:]}
    planned = sum(6 * n * d for n in (1e8, 3e8, 1e9, 3e9) for d in (1e5, 4e5, 1.6e6))
    assert float(spent["monarch"][2]) == pytest.approx(planned, rel=1e-2)
    assert spent["monarch"][4] == "100.0 %"
    share = 1 - 6 * 3e9 * 1.6e6 / 2 / planned
    assert spent["dense"][4] == f"{100 * share:.1f} %"
    assert "less time (law)" in page.text


def test_a_law_without_an_optimum_is_shown_without_comparisons(tmp_path: Path) -> None:
    """Losses hardly depend on the sizes, so the fit has an exponent of 0."""
    write_sizes(tmp_path, flat=True)
    page = Page(report([tmp_path], samples=20))
    assert [row[0] for row in page.tables["Law in model and data"]] == ["group", "dense", "monarch"]
    assert "nothing is compared with dense: all coefficients and exponents must be positive" in page.text


def test_a_reference_that_cannot_be_fitted_leaves_the_other_laws(
    write_run: Callable[..., Path], tmp_path: Path
) -> None:
    for width, error in ((16, 0.4), (32, 0.3), (64, 0.24)):
        write_run("monarch", width, errors=(0.9, error), macs=width**2 * 1000)
    write_run("dense", 16, errors=(0.9, 0.4), macs=10**6)
    page = Page(report([tmp_path], samples=20, reference="dense"))
    assert "nothing is compared with dense: dense cannot be fitted" in page.text
    assert [row[0] for row in page.tables["Scaling laws"]] == ["group", "monarch"]


def test_the_result_of_tables_without_a_task(tmp_path: Path) -> None:
    """It is that of the task whose columns there are; an unknown task needs `y`."""
    head = "record,structure,width,training_macs,total_training_macs,finished,val_loss,val_perplexity"
    lines = [f"run{k},dense,16,{10**k},{10**k},True,{3 - k / 10},20" for k in range(6, 10)]
    path = tmp_path / "runs.csv"
    path.write_text("\n".join([head, *lines]) + "\n")
    assert "lowest validation loss" in Page(report([path], samples=0)).text
    path.write_text("\n".join([head + ",task", *(line + ",foo" for line in lines)]) + "\n")
    with pytest.raises(ValueError, match=r"the records are of foo; choose some with --where, or a result with --y"):
        report([path], samples=0)


def test_runs_and_their_rates(runs: Path) -> None:
    rows = read_rows([runs], evaluations="all", unfinished=True)
    found = runs_of(group_rows(rows, ["structure"]), "test_error")
    run = next(r for r in found if r.width == 64 and r.group == "dense")
    assert (run.spent, run.seconds, run.rate) == (2 * 4 * 64**2 * 1000, 1.0, 2 * 4 * 64**2 * 1000)
    assert run.planned is None
    row = {"record": "r", "training_macs": 10.0, "samples": 4, "error": 0.5}
    counts = {"total_training_macs": 20, "training_other_flops": 3, "total_training_flops": 64}
    (with_transforms,) = runs_of({"a": [row | {f"counts.{key}": value for key, value in counts.items()}]}, "error")
    assert (with_transforms.planned, with_transforms.spent) == (64, 2 * 10 + 4 * 3)
    (earlier,) = runs_of({"a": [row | {"counts.total_training_macs": 20}]}, "error")
    assert (earlier.planned, earlier.spent) == (40, 20)
    with pytest.raises(ValueError, match="a report is of run records"):
        runs_of({"a": [{"macs": 1.0}]}, "macs")


def test_a_run_without_an_evaluation_is_named_on_the_page(runs: Path) -> None:
    """Only its header was written, since it failed or was stopped."""
    header = next(runs.glob("*.jsonl")).read_bytes().split(b"\n")[0] + b"\n"
    folders = [runs / name for name in ("failed", "stopped")]
    for folder in folders:
        folder.mkdir()
        (folder / "record.jsonl").write_bytes(header)
    (folders[0] / FAILED).write_text('{"error": "out of\\nmemory"}')
    page = Page(report([runs], samples=20))
    assert len(page.tables["Runs"]) == 8
    left_out = "left out, since the run {} before its first evaluation: {}"
    assert left_out.format("failed (out of memory)", folders[0] / "record.jsonl") in page.text
    assert left_out.format("stopped", folders[1] / "record.jsonl") in page.text
    with pytest.raises(ValueError, match=r"there is no evaluation yet in .*record\.jsonl"):
        report(folders, samples=20)


class TestCommand:
    def test_page(self, runs: Path, tmp_path: Path, cli) -> None:
        out = tmp_path / "page.html"
        assert cli("report", runs, "--out", out, "--samples", "20", "--title", "A & B").out.strip() == str(out)
        assert "<title>A &amp; B</title>" in out.read_text()

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ("--out page.pdf", "a report is written as .html, got 'page.pdf'"),
            ("--y val_loss", "has no 'val_loss' at its last evaluation; choose another result with --y"),
            ("--where structure", "argument --where: must be COLUMN=VALUE, got 'structure'"),
            ("--confidence 2", "--confidence must be between 0 and 1, got 2"),
            ("--reference btt", "there is no group 'btt' to compare with"),
            ("--group structur", "did you mean structure?"),
        ],
    )
    def test_misuse(self, words: str, message: str, runs: Path, cli) -> None:
        out, err = cli("report", runs, "--samples", "5", *words.split(), code=2)
        assert message in err
        assert out == ""
        assert err.count("\n") == 1

    def test_tables_are_no_records(self, tmp_path: Path, cli) -> None:
        (tmp_path / "points.csv").write_text("structure,test_error\ndense,0.5\n")
        assert "a report is of run records" in cli("report", tmp_path / "points.csv", code=2).err
