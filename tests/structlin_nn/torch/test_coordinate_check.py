"""Coordinate check: does a step of the optimiser move the features by as much at every width?

A residual MLP of two blocks without biases, ``h <- h + W gelu(h)``, on real images: the input layer is fixed, the head
is dense and starts at zero, the square W of the blocks are structured. The change of the last hidden features
over five steps (RMS over images and features, geometric mean over three seeds) must not depend on the width with
the structure-aware learning rates, and falls with it under the naive ones. Small rates, so that the change is
linear in them.
"""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from structlin import execution
from structlin_nn.data import load_images
from structlin_nn.torch import Muon, StructuredLinear, parameter_groups

WIDTHS = (64, 256, 1024)
SEEDS = (0, 1, 2)
STEPS = 5
RATES = {"adam": 1e-3, "sgd": 0.05, "muon": 0.02}


class ResidualMLP(nn.Module):
    def __init__(self, width: int, device: str | None = None, **structure) -> None:
        super().__init__()
        self.input = StructuredLinear(49, width, bias=False, device=device, structure="dense")
        self.blocks = nn.ModuleList(
            StructuredLinear(width, width, bias=False, device=device, **structure) for _ in range(2)
        )
        self.head = StructuredLinear(width, 10, bias=False, device=device, structure="dense", zero_init=True)
        self.input.requires_grad_(False)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        h = self.input(x)
        for block in self.blocks:
            h = h + block(F.gelu(h))
        return h

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


@pytest.fixture(autouse=True, scope="module")
def one_way():
    """Ways to run products are not compared."""
    with execution.using("products"):
        yield


@pytest.fixture(scope="module")
def images() -> tuple[torch.Tensor, torch.Tensor]:
    """128 images, 7 x 7, each pixel standardised; fewer pixels than the smallest width has features."""
    data = load_images("fashion")
    x = F.avg_pool2d(torch.from_numpy(data.train_images[:128]).float(), 4).flatten(1)
    return (x - x.mean(0)) / x.std(0), torch.from_numpy(data.train_labels[:128]).long()


def change(images, width: int, optimizer: str, *, aware: bool = True, extra: dict | None = None, **structure) -> float:
    x, labels = images
    logs = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        model = ResidualMLP(width, **structure)
        groups = parameter_groups(
            model,
            ResidualMLP(64, device="meta", structure="dense"),
            lr=RATES[optimizer],
            optimizer=optimizer,
            structure_aware=aware,
            extra_multipliers=extra,
        )
        steps = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD, "muon": Muon}[optimizer](groups)
        with torch.no_grad():
            before = model.features(x)
        for _ in range(STEPS):
            steps.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            steps.step()
        with torch.no_grad():
            logs.append((model.features(x) - before).square().mean().sqrt().log().item())
    return math.exp(sum(logs) / len(logs))


def assert_flat(values: list[float]) -> None:
    assert max(values) < 2 * min(values), values


def assert_falls(values: list[float]) -> None:
    """By a third or more for each factor of 4 in width; width**-1/2 would be by a half."""
    for narrow, wide in itertools.pairwise(values):
        assert wide < 0.67 * narrow, values


# Monarch has sqrt(width) blocks: with a fixed number of blocks fan_in grows with the width as a dense layer's does,
# and the naive rate is off by a constant alone. The last factor of low rank starts at zero, as in a residual branch;
# otherwise the factor that meets the input moves the features by itself, and its naive rate is the dense one.
STRUCTURES = {
    "block_tensor_train of rank 1": lambda width: {"structure": "block_tensor_train"},
    "block_tensor_train of rank 4": lambda width: {"structure": "block_tensor_train", "rank": 4},
    "kronecker": lambda width: {"structure": "kronecker"},
    "monarch": lambda width: {"structure": "monarch", "blocks": math.isqrt(width)},
    "low_rank": lambda width: {"structure": "low_rank", "zero_init": True, "rule": "rank_corrected"},
}


FAST = ("block_tensor_train of rank 4", "low_rank")
slow = pytest.mark.slow


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else slow) for n in STRUCTURES])
def test_adam(images, name):
    make = STRUCTURES[name]
    assert_flat([change(images, width, "adam", **make(width)) for width in WIDTHS])
    assert_falls([change(images, width, "adam", aware=False, **make(width)) for width in WIDTHS])


@pytest.mark.parametrize("optimizer", ["adam", pytest.param("sgd", marks=slow)])
def test_dense_is_flat_under_both_rules(images, optimizer):
    aware = [change(images, width, optimizer, structure="dense") for width in WIDTHS]
    assert_flat(aware)
    # The rates are the same, so that all is: the widest model, which takes most of the time, would show no more.
    assert [change(images, width, optimizer, structure="dense", aware=False) for width in WIDTHS[:2]] == aware[:2]


@pytest.mark.parametrize("rank", [1, pytest.param(4, marks=slow)])
def test_sgd_needs_the_number_of_blocks(images, rank):
    structure = {"structure": "block_tensor_train", "rank": rank}
    assert_flat([change(images, width, "sgd", **structure) for width in WIDTHS])
    assert_falls([change(images, width, "sgd", aware=False, **structure) for width in WIDTHS])
    without = [change(images, width, "sgd", extra={"blocks.*": 1 / math.isqrt(width)}, **structure) for width in WIDTHS]
    assert_falls(without)


@pytest.mark.parametrize(
    "structure", [{"structure": "kronecker"}, pytest.param({"structure": "tensor_train", "rank": 4}, marks=slow)]
)
def test_sgd_needs_the_number_of_carried_positions(images, structure):
    assert_flat([change(images, width, "sgd", **structure) for width in WIDTHS])
    without = [change(images, width, "sgd", extra={"blocks.*": 1 / math.isqrt(width)}, **structure) for width in WIDTHS]
    assert_falls(without)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else slow) for n in (*STRUCTURES, "dense")])
def test_muon(images, name):
    """Orthogonalised updates of square blocks are right by themselves; the factors of low rank need the multiplier."""
    make = STRUCTURES.get(name, lambda width: {"structure": "dense"})
    assert_flat([change(images, width, "muon", **make(width)) for width in WIDTHS])
    if name == "low_rank":
        naive = [change(images, width, "muon", aware=False, **make(width)) for width in WIDTHS]
        assert naive[-1] < 0.6 * naive[0], naive
