"""Plans of models: what is planned is within the budget, what comes next is not, and both are counted in full."""

import itertools
import json
import math
import random
import re
import warnings
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from structlin.planning import BudgetError
from structlin_nn._planned import Choice, Costs
from structlin_nn.cli import main
from structlin_nn.counting import DEVICES, count, count_model, roofline
from structlin_nn.models import StructureConfig, build_model
from structlin_nn.planning import iso_table, parse_structure, plan_model, plan_models

GPT2 = {"heads": 2, "vocabulary": 50, "context": 8}


@pytest.fixture(autouse=True, scope="module")
def counted_once() -> Iterator[None]:
    """The planner counts a model once for all tests; what tests compare its plans with is counted without it."""
    known: dict[Any, Any] = {}
    counted = Costs._measured

    def once(costs: Costs, choice: Choice, full: bool) -> dict[str, Any]:
        own = [repr(getattr(costs, entry.name)) for entry in fields(Costs) if entry.repr and entry.name != "full"]
        key = full, choice, *own
        if key not in known:
            try:
                known[key] = counted(costs, choice, full), costs._layers[choice]
            except ValueError as error:
                known[key] = error, None
        found, layers = known[key]
        if layers is None:
            raise ValueError(str(found))
        costs._layers[choice] = layers
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Costs, "_measured", once)
        yield


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
        ("cifar-vit", "low_rank", {}, "training_flops", 2e9, {"samples": 1000}, {"depth": 1}),
        ("gpt2", "kronecker", {}, "bytes", 6e4, {"multiple_of": 2}, {**GPT2, "depth": 1}),
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


def test_rank_at_a_width() -> None:
    plan = plan_model("cifar-mlp", 1e6, structure="block_tensor_train", width=256, options={"factorization": "greedy"})
    assert plan.planned == "rank"
    assert plan.width == 256
    assert plan.next == plan.options["rank"] + 1
    assert spent(plan, "forward_macs", 256) == plan.forward_macs <= 1e6
    assert spent(plan, "forward_macs", 256, rank=plan.next) > 1e6


def test_widths_that_cannot_be_built() -> None:
    """Heads need a width of at least their number; a butterfly a power of two, and square layers."""
    plan = plan_model("cifar-vit", 1e6, heads=7, depth=1)
    assert spent(plan, "forward_macs", plan.width, heads=7, depth=1) <= 1e6


def test_table_of_equal_compute() -> None:
    chosen = [("dense", {}), ("block_tensor_train", {"rank": 1}), ("kronecker", {})]
    plans, left_out = plan_models("cifar-mlp", 1e5, chosen, num_classes=100, depth=1)
    assert [p.structure for p in plans] == ["dense", "block_tensor_train", "kronecker"]
    assert left_out == {}
    assert all(0.7 < p.share <= 1 for p in plans)
    plans, left_out = plan_models("cifar-mlp", 5_000, chosen, depth=1)
    assert [p.structure for p in plans] == ["dense"]
    error = left_out["block_tensor_train:rank=1"]
    assert isinstance(error, BudgetError)
    assert error.least > error.budget == 5_000


class Exhaustive:
    """Every choice of a small space, counted without the planner: the best is found by looking at all."""

    def __init__(self) -> None:
        self.costs: dict[Any, dict[str, float] | None] = {}

    def cost(
        self, name: str, structure: str, resource: str, width: int, options: dict[str, Any], sizes: dict[str, Any]
    ) -> float | None:
        """By building and counting, once for all resources."""
        key = name, structure, width, *options.items(), *sizes.items()
        if key not in self.costs:
            try:
                config = StructureConfig(structure, options)
                model = build_model(name, width=width, structure=config, device="meta", **sizes)
                counted = count(model, model.example_input(device="meta"), backward=False)
                macs = counted.macs() + counted.other_flops / 2
                self.costs[key] = {"forward_macs": macs, "params": counted.trainable_params}
            except ValueError:
                self.costs[key] = None
        found = self.costs[key]
        return None if found is None else found[resource]

    def check(
        self, name: str, structure: str, resource: str, budget: float, widest: int, lists: dict[str, list[int]],
        **sizes: Any,
    ) -> bool:  # fmt: skip
        """False where nothing was compared: the best may be wider than the space."""
        found = []
        for values in itertools.product(*lists.values()):
            chosen = dict(zip(lists, values, strict=True))
            own = {**sizes, **{k: v for k, v in chosen.items() if k == "depth"}}
            options = {k: v for k, v in chosen.items() if k != "depth"}
            inside = [
                (width, spent)
                for width in range(1, widest + 1)
                if (spent := self.cost(name, structure, resource, width, options, own)) is not None and spent <= budget
            ]
            if inside:
                found.append((inside[-1][1], inside[-1][0]))
        if any(width > 0.6 * widest for _, width in found):
            return False
        if not found:
            with pytest.raises(ValueError, match=r"needs at least|cannot be built|square|sizes"):
                plan_model(name, budget, structure=structure, resource=resource, **lists, **sizes)
            return True
        plan = plan_model(name, budget, structure=structure, resource=resource, **lists, **sizes)
        assert (plan.share * budget, plan.width) == pytest.approx(max(found), rel=1e-12), (structure, resource, budget)
        return True


MLP = {"depth": 1, "num_classes": 3}
SPACES: list[tuple[str, str, dict[str, list[int]], dict[str, Any]]] = [
    ("cifar-mlp", "dense", {"depth": [1, 2, 5]}, {"num_classes": 3}),
    ("cifar-mlp", "einsum", {}, MLP),
    ("cifar-mlp", "kronecker", {"cores": [2, 3]}, MLP),
    ("cifar-mlp", "block_tensor_train", {"rank": [1, 2, 3]}, MLP),
    ("cifar-mlp", "tensor_train", {"rank": [2], "depth": [1, 3]}, {"num_classes": 3}),
    ("cifar-mlp", "monarch", {"blocks": [2, 3, 4]}, MLP),
    ("cifar-mlp", "low_rank", {}, MLP),
    ("cifar-mlp", "toeplitz", {}, MLP),
    ("cifar-vit", "kronecker", {}, {"depth": 1, "heads": 4}),
    ("cifar-vit", "block_tensor_train", {"rank": [1, 2]}, {"depth": 5, "heads": 3}),
    ("cifar-vit", "blast", {"blocks": [2, 3], "rank": [4]}, {"depth": 1, "heads": 2}),
    ("gpt2", "einsum", {}, {**GPT2, "depth": 2}),
]  # fmt: skip


@pytest.mark.parametrize("space", SPACES[1:4:2], ids=lambda s: s[1])
def test_nothing_wider_fits(space: Any) -> None:
    name, structure, lists, sizes = space
    tried, generator = Exhaustive(), random.Random(structure)
    lists = {key: values[:2] for key, values in lists.items()}
    reach = tried.cost(name, structure, "forward_macs", 36, {k: v[0] for k, v in lists.items() if k != "depth"}, MLP)
    compared = [
        tried.check(name, structure, "forward_macs", generator.uniform(0.1, 0.8) * reach, 72, lists, **sizes)
        for _ in range(5)
    ]
    assert sum(compared) >= 3


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nothing_better_fits_at_500_budgets() -> None:
    tried, generator = Exhaustive(), random.Random(0)
    compared = 0
    while compared < 500:
        name, structure, lists, sizes = generator.choice(SPACES)
        resource = generator.choice(("forward_macs", "params"))
        at = max(tried.cost(name, structure, resource, w, {k: v[0] for k, v in lists.items() if k != "depth"},
                            {**sizes, "depth": lists.get("depth", [sizes.get("depth")])[0]}) or 0
                 for w in (25, 36, 48, 49, 64))  # fmt: skip
        compared += tried.check(name, structure, resource, generator.uniform(0.02, 1) * at, 100, lists, **sizes)


def test_a_cost_that_is_not_monotone() -> None:
    """Of `einsum` 812 = 28 * 29 fits into a budget that is over at 784 < 812 by an uneven split of other layers."""
    plan = plan_model("cifar-mlp", 1e6, structure="einsum")
    assert plan.width == 812
    assert plan.share > 0.99


def test_transforms_are_not_free() -> None:
    plan = plan_model("cifar-mlp", 5e5, structure="toeplitz", depth=1)
    record = count_model("cifar-mlp", width=plan.width, structure="toeplitz", depth=1)
    assert record["other_flops"] > record["forward_macs"]
    assert plan.forward_macs == record["forward_macs"] + record["other_flops"] / 2 <= 5e5
    trained = plan_model(
        "cifar-mlp", 1e9, structure="toeplitz", depth=1, resource="training_flops", samples=100
    )  # fmt: skip
    record = count_model("cifar-mlp", width=trained.width, structure="toeplitz", depth=1)
    assert trained.training_flops == 100 * (2 * record["training_macs"] + record["training_other_flops"])
    assert record["training_other_flops"] > record["other_flops"] > 0


def test_several_budgets_and_seconds() -> None:
    both = plan_model("cifar-mlp", {"forward_macs": 1e6, "bytes": 5e6}, batch_size=10, depth=1)
    assert both.forward_macs <= 1e6
    assert both.bytes <= 5e6
    assert both.share == pytest.approx(max(both.forward_macs / 1e6, both.bytes / 5e6))
    timed = plan_model(
        "cifar-mlp", 1e-4, resource="step_seconds", device="h100", batch_size=512, multiple_of=32, depth=1
    )
    model = build_model("cifar-mlp", width=timed.width, depth=1, device="meta")
    counted = count(model, model.example_input(512, device="meta"))
    assert timed.step_seconds == pytest.approx(roofline(counted, DEVICES["h100"], "float32").step)
    assert timed.step_seconds <= 1e-4
    assert timed.run_seconds is None
    run = plan_model(
        "cifar-mlp", 1.0, resource="run_seconds", device="h100", batch_size=512, multiple_of=32,
        samples=512 * 10_000, depth=1,
    )  # fmt: skip
    assert run.width == timed.width
    assert run.run_seconds == pytest.approx(10_000 * run.step_seconds)


def test_choices_of_depth_and_cores() -> None:
    chosen = {"width": 64, "rank": [1, 2], "cores": [2, 3], "depth": [1, 2, 3], "structure": "block_tensor_train"}
    plan = plan_model("cifar-mlp", 1.5e5, **chosen)
    costs = {}
    for rank, cores, depth in itertools.product([1, 2], [2, 3], [1, 2, 3]):
        options = {"rank": rank, "cores": cores}
        record = count_model("cifar-mlp", width=64, structure="block_tensor_train", options=options, depth=depth)
        costs[rank, cores, depth] = record["forward_macs"]
    best = max(c for c in costs.values() if c <= 1.5e5)
    assert costs[plan.options["rank"], plan.options["cores"], plan.depth] == best == plan.forward_macs
    largest = plan_model("cifar-mlp", 1.5e5, **chosen, prefer="params")
    assert largest.params >= plan.params


def test_a_model_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_models.py").write_text("""
import torch
from torch import nn

drawn = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))

def mlp(width, depth=1):
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.GELU())]
    return nn.Sequential(nn.Linear(16, width), nn.GELU(), *hidden, nn.Linear(width, 10)), drawn

def attention(width):
    return nn.MultiheadAttention(width, 6, batch_first=True), (torch.zeros(2, 5, width),) * 3

def tied(width):
    table, head = nn.Embedding(10, width), nn.Linear(width, 10, bias=False)
    head.weight = table.weight
    return nn.Sequential(table, nn.Linear(width, width), head), torch.zeros(4, dtype=torch.int64)
""")
    monkeypatch.syspath_prepend(tmp_path)
    plan = plan_model("my_own_models:mlp", 1e4)
    assert plan.depth is None
    assert 16 * plan.width + plan.width**2 + 10 * plan.width == plan.forward_macs <= 1e4
    assert 26 * (plan.width + 1) + (plan.width + 1) ** 2 > 1e4
    deep = plan_model("my_own_models:mlp", 1e4, depth=[1, 2, 3], prefer="width", structure="kronecker")
    assert deep.depth == 1
    assert deep.width > plan.width
    heads = plan_model("my_own_models:attention", 1e4)
    assert heads.width % 6 == 0
    capped = plan_model("my_own_models:mlp", 1e4, rms_cap=True)
    assert capped.structure == "dense"
    # A gain for each of the two replaced layers; the last one stays as it is.
    uncapped = Costs("my_own_models:mlp", "dense", {}, {}).measured(Choice(capped.width))
    assert capped.params == uncapped["params"] + 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # narrow layers that cost more than dense ones are only searched
        tied = plan_model("my_own_models:tied", 1e3, structure="low_rank", rank=1, layers="all")
    assert tied.width == 1_000 // (2 + 10), "the head stays dense"
    with pytest.raises(ValueError, match="returns its inputs"):
        plan_model("my_own_models:mlp", 1e5, batch_size=4)


def test_table_of_budgets() -> None:
    chosen = [("dense", {}), ("monarch", {"blocks": 4}), ("monarch", {"blocks": 16})]
    table = iso_table("cifar-mlp", [1e4, 1e5], chosen, depth=1)
    assert [row["budget"] for row in table] == [1e4, 1e5]
    for row in table:
        assert row["plans"].keys() | row["left_out"].keys() == {"dense", "monarch:blocks=4", "monarch:blocks=16"}
        assert all(plan.forward_macs <= row["budget"] for plan in row["plans"].values())
    widths = [row["plans"]["dense"].width for row in table]
    assert widths == sorted(widths)


def test_a_structure_with_different_options() -> None:
    chosen = [("dense", {}), ("monarch", {"blocks": 4}), ("monarch", {"blocks": 16})]
    plans, left_out = plan_models("cifar-mlp", 3100, chosen, depth=1)
    assert [(plan.structure, plan.width) for plan in plans] == [("dense", 1)]
    assert list(left_out) == ["monarch:blocks=4", "monarch:blocks=16"]
    plans, left_out = plan_models("cifar-mlp", 1e6, chosen, depth=1)
    assert [plan.options for plan in plans] == [{}, {"blocks": 4}, {"blocks": 16}]
    assert all(plan.forward_macs <= 1e6 for plan in plans)


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
        ({"budget": -1}, "the budget must be positive and finite, got -1"),
        ({"budget": math.inf}, "the budget must be positive and finite, got inf"),
        ({"budget": math.nan}, "the budget must be positive and finite, got nan"),
        ({"budget": 1e30}, r"fits into 1e\+30 MACs of the forward pass at the largest width, 1,048,576"),
        ({"budget": {}}, "a budget is needed, of forward_macs"),
        ({"budget": {"forward_macs": 1e6, "bytes": 0}}, "the budget of bytes must be positive and finite, got 0"),
        ({"resource": "step_seconds"}, "a budget of step_seconds needs a device"),
        ({"resource": "run_seconds", "device": "h100"}, "run_seconds needs the number of samples"),
        ({"prefer": "best"}, "unknown preference 'best'; one of spent, width, params"),
        ({"rank": [1, 2]}, "structure 'dense' has no option 'rank' to choose"),
        ({"structure": "low_rank", "rank": []}, "there is no rank to choose from"),
        ({"structure": "low_rank", "rank": [0]}, r"rank must be a positive integer, or several, got \[0\]"),
        ({"width": [64, 128], "multiple_of": 2}, "is for widths that are searched"),
        ({"name": "nowhere:model"}, "nowhere:model cannot be imported"),
        ({"name": "math:pi"}, "math:pi must be a function of a width"),
        ({"name": "math:sqrt", "depth": None, "heads": 2}, "'heads' is a size of named models"),
        ({"budget": 10}, "cifar-mlp with dense needs at least 3,106 MACs of the forward pass, the budget is 10"),
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
        assert re.search(r"low_rank +rank 78 +299,520", out)
        words = ("layer", "--shape", "12,18", "--bytes", "400", "--structure", "low_rank", "--json")
        record = json.loads(self.output(capsys, *words, "--dtype", "bfloat16"))
        assert record["plans"][0]["options"] == {"rank": 6}
        assert record["plans"][0]["bytes"] == 360

    def test_layer_with_a_structure_that_does_not_fit(self, capsys: pytest.CaptureFixture[str]) -> None:
        words = ("layer", "--shape", "64,64", "--macs", "300", "--structure", "dense", "--structure", "low_rank")
        out = self.output(capsys, *words)
        assert re.search(r"low_rank +rank 2 +256", out)
        assert out.splitlines()[-1] == "dense of shape (64, 64) needs at least 4,096 MACs, the budget is 300"
        record = json.loads(self.output(capsys, *words, "--json"))
        assert ([plan["structure"] for plan in record["plans"]], [*record["left_out"]]) == (["low_rank"], ["dense"])

    def test_model(self, capsys: pytest.CaptureFixture[str]) -> None:
        words = ("cifar-mlp", "--forward-macs", "1e6", "--structure", "dense", "--structure", "monarch:blocks=4")
        words += ("--depth", "1")
        assert re.search(r"dense +209 ", self.output(capsys, *words))
        record = json.loads(self.output(capsys, *words, "--json", "--samples", 10))
        assert record["plans"][0]["width"] == 209
        assert record["plans"][1]["training_flops"] == 20 * record["plans"][1]["training_macs"]

    def test_table_of_budgets(self, capsys: pytest.CaptureFixture[str]) -> None:
        words = ("cifar-mlp", "--forward-macs", "1e5,1e6", "--structure", "dense", "--structure", "butterfly")
        out = self.output(capsys, *words, "--depth", "1,2", "--prefer", "width")
        assert re.search(r"structure +100000 +1e\+06", out)
        assert re.search(r"dense +30, depth 1 .+ 209, depth 1 ", out)
        assert out.count("a butterfly matrix is square") == 1
        rows = json.loads(self.output(capsys, *words, "--depth", "1", "--json"))
        assert [row["plans"]["dense"]["width"] for row in rows] == [30, 209]
        assert "square" in rows[0]["left_out"]["butterfly"]

    def test_choices_and_several_budgets(self, capsys: pytest.CaptureFixture[str]) -> None:
        budgets = ("--forward-macs", "1e6", "--bytes", "3e6")
        words = ("cifar-mlp", *budgets, "--structure", "low_rank", "--rank", "2:4")
        record = json.loads(self.output(capsys, *words, "--width", "128:1024:128", "--json"))
        (plan,) = record["plans"]
        assert record["budgets"] == {"forward_macs": 1e6, "bytes": 3e6}
        assert (plan["width"] % 128, plan["bytes"] <= 3e6, plan["options"]["rank"] in (2, 3, 4)) == (0, True, True)
        more = ("--width", "256", "--device", "h100", "--batch-size", 64, "--prefer", "params")
        out = self.output(capsys, "cifar-mlp", "--forward-macs", "1e7", *words[5:], *more)
        assert "step at least" in out
        assert "best by params: low_rank" in out

    def test_choices_of_a_layer(self, capsys: pytest.CaptureFixture[str]) -> None:
        words = ("layer", "--shape", "1024,1024", "--macs", "30000", "--structure", "kronecker")
        assert json.loads(self.output(capsys, *words, "--json"))["plans"][0]["options"] == {"cores": 4}
        assert json.loads(self.output(capsys, *words, "--cores", "5", "--json"))["plans"][0]["options"] == {"cores": 5}

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ("cifar-mlp", "a budget is needed: --macs, --forward-macs, --params, --bytes, --training-flops, --step-"),
            ("cifar-mlp --params 1e6,1e7 --bytes 1e6", "give several budgets of one kind, or one budget of each"),
            ("cifar-mlp --forward-macs 0", "the budget must be positive and finite, got 0"),
            ("cifar-mlp --forward-macs inf", "the budget must be positive and finite, got inf"),
            ("cifar-mlp --forward-macs 1e6 --step-seconds 1", "a budget of step_seconds needs a device"),
            ("cifar-mlp --forward-macs 1e30 --structure dense", "fits into 1e+30 MACs of the forward pass at the"),
            ("cifar-mlp --forward-macs many", "must be a number, or several with commas, got 'many'"),
            ("cifar-mlp --params 1e6 --width 4:1", "must be positive, and one at least, got '4:1'"),
            ("cifar-mlp --params 1e6 --rank 1.5", "must be V, V,V,... or FIRST:LAST[:STEP] in integers, got '1.5'"),
            ("cifar-mlp --params 1e6 --structure dense --cores 2,3", "none of the structures has an option 'cores'"),
            ("cifar-mlp --params 1e6 --prefer depth", "unknown preference 'depth'"),
            ("my_module:model --params 1e6", "my_module:model cannot be imported"),
            ("layer --macs 10 --shape 20,30 --rank 2", "--rank of a layer needs --structure"),
            ("cifar-mlp --error 0.3", "--error needs --laws"),
            ("cifar-mlp --laws laws.json --error 0.3 --params 1e6", "--error needs no budget"),
            ("cifar-mlp --laws laws.json --error 0.3", "laws.json"),
            ("cifar-mlp --macs 1e6", "the compute of a model is --forward-macs or --training-flops"),
            ("cifar-mlp --params 1e6 --shape 2,3", "--shape is an option of a layer"),
            ("layer --macs 10", "a layer needs --shape OUT,IN, two positive integers, got None"),
            ("layer --macs 10 --shape 2x3", "must be an integer or several with commas, got '2x3'"),
            ("layer --macs 10 --shape 0,3", "two positive integers, got (0, 3)"),
            ("layer --macs 10 --shape 2,3 --width 4", "--width is an option of models, not of a layer"),
            (
                "layer --forward-macs 10 --shape 2,3",
                "the budget of a layer is one number of --macs, --params or --bytes",
            ),
            ("layer --macs 10 --shape 2,3 --structure low_rnak", "unknown structure 'low_rnak'"),
            ("cifar-mlp --params 1e6 --structure low_rank:rank", "must be NAME=VALUE, got 'rank'"),
            ("cifar-mlp --params 10 --structure dense", "cifar-mlp with dense needs at least 3,138 parameters, the"),
            (
                "cifar-mlp --forward-macs 10",
                "none of the structures fits; the nearest: cifar-mlp with dense needs at least 3,106 MACs of the "
                "forward pass, the budget is 10",
            ),
            ("cifar-mlp --params 10,20", "the nearest: cifar-mlp with kronecker needs at least 458 parameters, the"),
            ("cifar-mlp --params 1e30", "at the largest width, 1,048,576; the other structures have no plan either"),
            (
                "layer --shape 64,64 --macs 1",
                "none of the structures fits; the nearest: block_diagonal of shape (64, 64) needs at least 64 MACs, "
                "the budget is 1",
            ),
            ("layer --shape 64,64 --macs 1 --json", "the nearest: block_diagonal of shape (64, 64) needs at least 64"),
            (
                "layer --shape 64,64 --params 9 --structure dense --structure low_rank",
                "the nearest: low_rank of shape (64, 64) needs at least 128 parameters, the budget is 9",
            ),
            (
                "layer --shape 64,64 --macs 1 --structure dense",
                "dense of shape (64, 64) needs at least 4,096 MACs, the",
            ),
        ],
    )
    def test_misuse(self, words: str, message: str, cli) -> None:
        out, err = cli("plan", *words.split(), code=2)
        assert message in err
        assert out == ""
        assert err.count("\n") == 1


def test_table_names_the_rank_that_a_structure_has_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    line = "plan cifar-mlp --depth 1 --forward-macs 1e5 --structure tensor_train --structure low_rank"
    assert main([*line.split(), "--structure", "low_rank:rank_fraction=0.25"]) == 0
    rows = [" ".join(row.split()) for row in capsys.readouterr().out.splitlines()[2:]]
    for row, start in zip(
        rows, ("tensor_train rank 8 ", "low_rank rank sqrt(d) ", "low_rank rank_fraction 0.25 "), strict=True
    ):
        assert row.startswith(start)
