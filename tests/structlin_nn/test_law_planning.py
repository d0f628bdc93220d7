"""Plans from fitted laws: the cheapest structure for an error, and the lowest loss within a budget."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from structlin.scaling_laws import LossLaw
from structlin_nn.cli import main
from structlin_nn.counting import DEVICES, count, roofline
from structlin_nn.law_planning import plan_by_law, plan_for_error
from structlin_nn.models import StructureConfig, build_model

SMALL = {"depth": 1, "num_classes": 3}


def laws() -> dict[str, Any]:
    def group(exponent: float, level: float, floor: float = 0.0) -> dict[str, Any]:
        return {"log_coefficient": math.log(level), "exponent": {"value": exponent}, "floor": {"value": floor},
                "compute_range": [1e5, 1e7]}  # fmt: skip

    return {
        "x": "forward_macs", "y": "test_error",
        "groups": {"dense": group(0.1, 1.2), "monarch, blocks 4": group(0.12, 1.2), "low_rank": group(0.1, 1, 0.4)},
    }  # fmt: skip


def test_cheapest_structure_for_an_error() -> None:
    monarch, dense, low_rank = plan_for_error("cifar-mlp", laws(), 0.3, depth=1)
    assert (monarch["group"], dense["group"], low_rank["group"]) == ("monarch, blocks 4", "dense", "low_rank")
    assert monarch["compute"] == pytest.approx((1.2 / 0.3) ** (1 / 0.12))
    assert monarch["plan"].options == {"blocks": 4}
    assert monarch["plan"].forward_macs <= monarch["compute"]
    assert (monarch["extrapolated"], low_rank["extrapolated"]) == (False, True)
    assert low_rank["compute"] is None
    assert low_rank["plan"] is None
    training = plan_for_error("cifar-mlp", laws() | {"x": "total_training_macs"}, 0.3, samples=2, depth=1)
    assert training[0]["plan"].training_flops <= 2 * monarch["compute"]
    with pytest.raises(ValueError, match="laws in 'seconds' give no budget; fit laws in one of forward_macs"):
        plan_for_error("cifar-mlp", laws() | {"x": "seconds"}, 0.3)
    with pytest.raises(ValueError, match="the error must be positive, got 0"):
        plan_for_error("cifar-mlp", laws(), 0)


TERMS = {
    "dense": LossLaw(0.2, 300.0, 0.5, 90.0, 0.4),
    "monarch, blocks 4": LossLaw(0.2, 150.0, 0.5, 90.0, 0.4),
    "kronecker": LossLaw(0.2, 100.0, 0.5, 90.0, 0.4),
}


def size_laws(size: str = "forward_macs", data: str = "samples") -> dict[str, Any]:
    groups = {
        name: {
            "terms": {term: {"value": getattr(law, term)} for term in ("E", "A", "alpha", "B", "beta")},
            "size_range": [1e4, 1e6], "data_range": [1e3, 1e6],
        }
        for name, law in TERMS.items()
    }  # fmt: skip
    return {"size": size, "data": data, "y": "test_loss", "groups": groups}


def exhaustive(group: str, resource: str, budget: float, batch: int, widest: int) -> tuple[float, int, int]:
    """Loss, width and samples of the best of all widths, each counted without the planner."""
    structure, options = ("monarch", {"blocks": 4}) if "blocks" in group else (group, {})
    found = []
    for width in range(1, widest + 1):
        try:
            config = StructureConfig(structure, options)
            model = build_model("cifar-mlp", width=width, structure=config, device="meta", **SMALL)
        except ValueError:
            continue
        step = count(model, model.example_input(batch, device="meta"))
        seconds = roofline(step, DEVICES["h100"], "float32").step
        if samples := int(budget / {"training_flops": step.training_flops, "run_seconds": seconds}[resource]) * batch:
            found.append((TERMS[group](step.flops / 2 / batch, samples), width, samples))
    best = min(found)
    assert 1 < best[1] < widest / 2, "the space must hold the best"
    return best


@pytest.mark.parametrize(
    ("resource", "budget"), [("training_flops", 1e9), pytest.param("run_seconds", 2e-3, marks=pytest.mark.slow)]
)
def test_lowest_loss_within_a_budget_is_that_of_all_widths(resource: str, budget: float) -> None:
    rows = plan_by_law("cifar-mlp", size_laws(), budget, resource=resource, device="h100", batch_size=16, **SMALL)
    assert [row["loss"] for row in rows] == sorted(row["loss"] for row in rows)
    for row in rows:
        if row["group"] == "kronecker":
            assert math.isqrt(row["plan"].width) ** 2 == row["plan"].width
            continue
        loss, width, samples = exhaustive(
            row["group"], resource, budget, 16, 60 if resource == "training_flops" else 100
        )
        assert (row["plan"].width, row["samples"]) == (width, samples)
        assert row["loss"] == pytest.approx(loss, rel=1e-12)
        assert 0.9 * budget < getattr(row["plan"], resource) <= budget
    assert {row["extrapolated"] for row in rows} <= {True, False}


def test_more_time_gives_a_wider_model_and_more_samples() -> None:
    known = size_laws()
    known["groups"] = {"dense": known["groups"]["dense"]}

    def dense(seconds: float) -> dict[str, Any]:
        (row,) = plan_by_law("cifar-mlp", known, seconds, device="h100", batch_size=64, multiple_of=8, **SMALL)
        return row

    little, much = dense(0.01), dense(0.1)
    assert much["plan"].width > little["plan"].width
    assert much["samples"] > little["samples"]
    assert much["loss"] < little["loss"]
    assert dense(1e-9) == {
        "group": "dense", "loss": None, "samples": None, "extrapolated": None, "plan": None,
        "reason": "no width of cifar-mlp trains for one step within the budget",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("laws_given", "keywords", "message"),
    [
        (size_laws("layers"), {}, "laws in 'layers' and 'samples' give no width and no samples"),
        (size_laws(data="seconds"), {}, "fit laws in one of forward_macs, params, trainable_params, and in samples"),
        (laws(), {}, "laws in None and None"),
        (size_laws(), {"device": None}, "a budget of run_seconds needs a device"),
        (size_laws(), {"budget": math.inf}, "the budget must be positive and finite, got inf"),
        (size_laws(), {"resource": "bytes"}, "unknown resource 'bytes'; one of run_seconds, training_flops"),
    ],
)
def test_refused(laws_given: dict[str, Any], keywords: dict[str, Any], message: str) -> None:
    settings = {"budget": 1.0, "device": "h100"} | keywords
    with pytest.raises(ValueError, match=message):
        plan_by_law("cifar-mlp", laws_given, settings.pop("budget"), **settings)


def output(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    code = main(["plan", *map(str, words)])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def test_laws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "laws.json").write_text(json.dumps(laws()))
    words = ("cifar-mlp", "--laws", tmp_path / "laws.json", "--error", "0.3", "--depth", "1")
    lines = output(capsys, *words).splitlines()
    assert [line.split("  ")[0] for line in lines[4:]] == ["monarch, blocks 4", "dense", "low_rank"]
    assert lines[-1].endswith("never reached")
    assert json.loads(output(capsys, *words, "--json"))[0]["plan"]["structure"] == "monarch"


def test_fit_and_plan_by_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str], cli) -> None:
    lines = ["structure,forward_macs,samples,test_loss"]
    lines += [
        f"{name.partition(',')[0]},{n},{d},{law(n, d)}"
        for name, law in list(TERMS.items())[:2]
        for n in (1e4, 1e5, 1e6)
        for d in (1e3, 1e4, 1e5)
    ]
    (tmp_path / "runs.csv").write_text("\n".join(lines))
    fit = ("--size", "forward_macs", "--data", "samples", "--y", "test_loss", "--samples", "5", "--json")
    (tmp_path / "sizes.json").write_text(cli("fit", tmp_path / "runs.csv", *fit).out)
    words = ("cifar-mlp", "--laws", tmp_path / "sizes.json", "--num-classes", "3", "--batch-size", "16")
    words += ("--multiple-of", "16")
    out = output(capsys, *words, "--run-seconds", "0.001", "--device", "h100")
    assert out.startswith("lowest test_loss first, within 0.001 run seconds\n")
    rows = json.loads(output(capsys, *words, "--training-flops", "2e9", "--json"))
    assert {row["group"] for row in rows} == {"dense", "monarch"}
    assert all(row["plan"]["training_flops"] <= 2e9 for row in rows)
    for more, message in (
        (("--params", "1e6"), "unknown resource 'params'"),
        (("--run-seconds", "1,2", "--device", "h100"), "one budget is needed: --run-seconds or --training-flops"),
        (("--training-flops", "1e10", "--width", "64"), "--width is not used with --laws in two sizes"),
    ):
        assert message in cli("plan", *words, *more, code=2).err
