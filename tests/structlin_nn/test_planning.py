"""Plans of models: what is planned is within the budget, what comes next is not, and both are counted in full."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from structlin_nn.cli import main
from structlin_nn.counting import count_model
from structlin_nn.planning import parse_structure, plan_for_error, plan_model, plan_models

GPT2 = {"heads": 2, "vocabulary": 50, "context": 8}


def spent(plan: Any, resource: str, width: int, rank: int | None = None, **sizes: Any) -> float:
    options = plan.options if rank is None else {**plan.options, "rank": rank}
    record = count_model(plan.model, width=width, structure=plan.structure, options=options, **sizes)
    if resource == "bytes":
        return record["bytes"]["total"]
    if resource == "training_flops":
        return 2 * 1000 * record["training_macs"]
    return record[{"params": "trainable_params"}.get(resource, resource)]


@pytest.mark.parametrize(
    ("name", "structure", "options", "resource", "budget", "keywords", "sizes"),
    [
        ("cifar-mlp", "dense", {}, "forward_macs", 1e6, {}, {}),
        ("cifar-mlp", "monarch", {"blocks": 4}, "params", 1e5, {"multiple_of": 4}, {}),
        ("cifar-mlp", "block_tensor_train", {"rank": 2}, "forward_macs", 1e6, {}, {"depth": 5}),
        ("cifar-vit", "low_rank", {}, "training_flops", 2e10, {"samples": 1000}, {}),
        ("gpt2", "kronecker", {}, "bytes", 3e6, {"multiple_of": 2}, {**GPT2, "depth": 6}),
    ],
)
def test_width(
    name: str, structure: str, options: dict, resource: str, budget: float, keywords: dict, sizes: dict
) -> None:
    plan = plan_model(
        name, budget, resource=resource, structure=structure, options=options, **keywords, **sizes
    )  # fmt: skip
    assert plan.planned == "width"
    found = spent(plan, resource, plan.width, **sizes)
    assert found <= budget < spent(plan, resource, plan.next, **sizes)
    assert plan.share == pytest.approx(found / budget)
    assert plan.width % keywords.get("multiple_of", 1) == 0
    if structure in ("block_tensor_train", "kronecker"):
        assert math.isqrt(plan.width) ** 2 == plan.width
        assert math.isqrt(plan.next) > math.isqrt(plan.width)


def test_rank_at_a_width() -> None:
    plan = plan_model("cifar-mlp", 1e6, structure="block_tensor_train", width=256, options={"factorization": "greedy"})
    assert plan.planned == "rank"
    assert plan.width == 256
    assert plan.next == plan.options["rank"] + 1
    assert spent(plan, "forward_macs", 256) == plan.forward_macs <= 1e6
    assert spent(plan, "forward_macs", 256, rank=plan.next) > 1e6


def test_widths_that_can_not_be_built() -> None:
    """Heads need a width of at least their number; a butterfly a power of two, and square layers."""
    plan = plan_model("cifar-vit", 1e6, heads=7)
    assert spent(plan, "forward_macs", plan.width, heads=7) <= 1e6
    uneven = plan_model("cifar-mlp", 1e6, structure="block_tensor_train", any_width=True)
    assert spent(uneven, "forward_macs", uneven.width) <= 1e6


def test_table_of_equal_compute() -> None:
    chosen = [("dense", {}), ("block_tensor_train", {"rank": 1}), ("kronecker", {})]
    plans, left_out = plan_models("cifar-mlp", 3e5, chosen, num_classes=100)
    assert [p.structure for p in plans] == ["dense", "block_tensor_train", "kronecker"]
    assert left_out == {}
    assert all(0.7 < p.share <= 1 for p in plans)
    plans, left_out = plan_models("cifar-mlp", 5_000, chosen)
    assert [p.structure for p in plans] == ["dense"]
    assert "needs at least" in left_out["block_tensor_train"]


def laws() -> dict[str, Any]:
    def group(exponent: float, level: float, floor: float = 0.0) -> dict[str, Any]:
        return {"log_coefficient": math.log(level), "exponent": {"value": exponent}, "floor": {"value": floor},
                "compute_range": [1e5, 1e7]}  # fmt: skip

    return {
        "x": "forward_macs", "y": "test_error",
        "groups": {"dense": group(0.1, 1.2), "monarch, blocks 4": group(0.12, 1.2), "low_rank": group(0.1, 1, 0.4)},
    }  # fmt: skip


def test_cheapest_structure_for_an_error() -> None:
    monarch, dense, low_rank = plan_for_error("cifar-mlp", laws(), 0.3)
    assert (monarch["group"], dense["group"], low_rank["group"]) == ("monarch, blocks 4", "dense", "low_rank")
    assert monarch["compute"] == pytest.approx((1.2 / 0.3) ** (1 / 0.12))
    assert monarch["plan"].options == {"blocks": 4}
    assert monarch["plan"].forward_macs <= monarch["compute"]
    assert (monarch["extrapolated"], low_rank["extrapolated"]) == (False, True)
    assert low_rank["compute"] is None
    assert low_rank["plan"] is None
    training = plan_for_error("cifar-mlp", laws() | {"x": "total_training_macs"}, 0.3, samples=2)
    assert training[0]["plan"].training_flops <= 2 * monarch["compute"]
    with pytest.raises(ValueError, match="laws of 'seconds' give no budget; one of forward_macs"):
        plan_for_error("cifar-mlp", laws() | {"x": "seconds"}, 0.3)
    with pytest.raises(ValueError, match="the error must be positive, got 0"):
        plan_for_error("cifar-mlp", laws(), 0)


def test_structures_as_text() -> None:
    assert parse_structure("dense") == ("dense", {})
    assert parse_structure("low_rank:rank_fraction=0.5") == ("low_rank", {"rank_fraction": 0.5})
    with pytest.raises(ValueError, match="must be NAME=VALUE, got 'rank' in 'low_rank:rank'"):
        parse_structure("low_rank:rank")


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"name": "cifar"}, "unknown model 'cifar'"),
        ({"structure": "btt"}, "unknown structure 'btt'"),
        ({"resource": "macs"}, "unknown resource 'macs'; one of forward_macs"),
        ({"budget": -1}, "the budget must be positive, got -1"),
        ({"budget": 10}, "cifar-mlp with dense needs at least .* forward_macs, the budget is 10"),
        ({"resource": "training_flops"}, "needs the number of samples"),
        ({"multiple_of": 0}, "multiple_of must be a positive integer, got 0"),
        ({"width": 64}, "at a given width the rank is planned, and dense  leaves none"),
        ({"width": 64, "structure": "low_rank", "options": {"rank": 2}}, "leaves none to choose"),
        ({"heads": 2}, "model 'cifar-mlp' has no size 'heads'"),
    ],
)
def test_refused(keywords: dict[str, Any], message: str) -> None:
    arguments = {"name": "cifar-mlp", "budget": 1e6} | keywords
    with pytest.raises(ValueError, match=message):
        plan_model(arguments.pop("name"), arguments.pop("budget"), **arguments)


class TestCommand:
    def output(self, capsys: pytest.CaptureFixture[str], *words: object) -> str:
        code = main(["plan", *map(str, words)])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    def test_layer(self, capsys: pytest.CaptureFixture[str]) -> None:
        out = self.output(capsys, "layer", "--shape", "3072,768", "--macs", "3e5")
        assert "low_rank            rank 78    299,520" in out
        words = ("layer", "--shape", "12,18", "--bytes", "400", "--structure", "low_rank", "--json")
        record = json.loads(self.output(capsys, *words, "--dtype", "bfloat16"))
        assert record["plans"][0]["options"] == {"rank": 6}
        assert record["plans"][0]["bytes"] == 360

    def test_model(self, capsys: pytest.CaptureFixture[str]) -> None:
        words = ("cifar-mlp", "--forward-macs", "1e6", "--structure", "dense", "--structure", "monarch:blocks=4")
        assert re.search(r"dense +149 ", self.output(capsys, *words))
        record = json.loads(self.output(capsys, *words, "--json", "--samples", 10))
        assert record["plans"][0]["width"] == 149
        assert record["plans"][1]["training_flops"] == 20 * record["plans"][1]["training_macs"]

    def test_laws(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "laws.json").write_text(json.dumps(laws()))
        words = ("cifar-mlp", "--laws", tmp_path / "laws.json", "--error", "0.3")
        lines = self.output(capsys, *words).splitlines()
        assert [line.split("  ")[0] for line in lines[4:]] == ["monarch, blocks 4", "dense", "low_rank"]
        assert lines[-1].endswith("never reached")
        assert json.loads(self.output(capsys, *words, "--json"))[0]["plan"]["structure"] == "monarch"

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ("cifar-mlp", "one budget is needed: --macs, --forward-macs, --params, --bytes, --training-flops, or"),
            ("cifar-mlp --params 1e6 --bytes 1e6", "one budget is needed"),
            ("cifar-mlp --laws laws.json", "--laws and --error go together"),
            ("cifar-mlp --laws laws.json --error 0.3", "laws.json"),
            ("cifar-mlp --macs 1e6", "the compute of a model is --forward-macs or --training-flops"),
            ("cifar-mlp --params 1e6 --shape 2,3", "--shape is an option of a layer"),
            ("layer --macs 10", "a layer needs --shape OUT,IN"),
            ("layer --macs 10 --shape 2x3", "must be OUT,IN in integers, got '2x3'"),
            ("layer --macs 10 --shape 0,3", "must be OUT,IN in positive integers, got '0,3'"),
            ("layer --macs 10 --shape 2,3 --width 4", "--width is an option of models, not of a layer"),
            ("layer --forward-macs 10 --shape 2,3", "the budget of a layer is --macs, --params or --bytes"),
            ("layer --macs 10 --shape 2,3 --structure low_rnak", "unknown structure 'low_rnak'"),
            ("cifar-mlp --params 1e6 --structure low_rank:rank", "must be NAME=VALUE, got 'rank'"),
            ("cifar-mlp --params 10", "needs at least"),
        ],
    )
    def test_misuse(self, words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["plan", *words.split()]) == 2
        out, err = capsys.readouterr()
        assert message in err
        assert out == ""
        assert err.count("\n") == 1


def test_table_names_the_rank_that_a_structure_has_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    line = "plan cifar-mlp --forward-macs 2e5 --structure tensor_train --structure low_rank"
    assert main([*line.split(), "--structure", "low_rank:rank_fraction=0.25"]) == 0
    rows = [" ".join(row.split()) for row in capsys.readouterr().out.splitlines()[2:]]
    for row, start in zip(
        rows, ("tensor_train rank 8 ", "low_rank rank sqrt(d) ", "low_rank rank_fraction 0.25 "), strict=True
    ):
        assert row.startswith(start)
