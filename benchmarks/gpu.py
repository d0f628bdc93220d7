"""Results and times of chains on a GPU, in one run of a few minutes.

    python benchmarks/gpu.py --minutes 8 --out gpu
    python benchmarks/gpu.py --device cpu --minutes 0.5 --out rehearsal.json

The sections, in this order, are:

1. ``rates``: the quantities that the traffic model assumes: products, copies in memory and in L2, and launches;
2. ``results``: values and gradients of every way, eager, compiled and in CUDA graphs, against float64;
3. ``layers``: times of a dense layer, of every way, of compiled einsums and of the layers of other libraries that are
   installed, forward and with the backward pass, with the prediction of the traffic model;
4. ``steps``: whole training steps of GPT-2 small and ViT-S/32, dense and with Block Tensor-Trains;
5. the timings of the layers as wisdom, in a second file (``execution.import_wisdom`` reads it).

The JSON file is written atomically after each row, so an interrupted run loses nothing. ``left_out`` lists the rows for
which the time did not suffice. The exit status is 1 if a result is wrong. ``--device cpu`` runs the same with tiny
sizes, to test the script; its times are not meaningful.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _implementations import IMPLEMENTATIONS, AbsentError, build
from _measure import describe, machine, result_path, timings, write_result
from torch import Tensor, nn
from torch.nn import functional as F

from structlin import execution
from structlin.execution import choice, traffic, wisdom
from structlin.execution.choice import Problem, Way
from structlin_nn.models import GPT2, GPT2Config, StructureConfig, ViT, ViTConfig
from structlin_nn.torch import StructuredLinear, parameter_groups

CHAINS: dict[str, tuple[str, dict[str, Any]]] = {
    "BTT 1": ("block_tensor_train", {"rank": 1}),
    "BTT 2": ("block_tensor_train", {"rank": 2}),
    "BTT 4": ("block_tensor_train", {"rank": 4}),
    "Monarch 4": ("monarch", {"blocks": 4}),
    "Monarch 16": ("monarch", {"blocks": 16}),
    "low rank": ("low_rank", {"rank": 8}),
    "Kronecker": ("kronecker", {}),
    "TT 4": ("tensor_train", {"rank": 4}),
    "block diagonal": ("block_diagonal", {"blocks": 4}),
}
SPEED = ("BTT 2", "BTT 1", "BTT 4", "Monarch 16", "Monarch 4", "low rank")
EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-11}
# Largest errors in the norm, in units of the dtype, of results that are summed in at least float32: products of factors
# and intermediates are rounded. TF32 rounds operands to 11 bits.
LARGEST_ERROR = 8.0
SHARES = {"rates": 0.05, "results": 0.3, "layers": 0.75, "steps": 1.0}  # of the minutes, by which a section ends


@dataclass(frozen=True)
class Sizes:
    """Cases to run, the most important first. ``shapes``: (d_out, d_in); ``compiled``: chains that torch compiles."""

    result_shape: tuple[int, int]
    result_tokens: tuple[int, ...]
    chains: tuple[str, ...]
    compiled: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    product: int
    copy: int
    gpt2: dict[str, int]
    vit: dict[str, Any]
    batches: tuple[int, int]
    repeats: int


FULL = Sizes(
    result_shape=(768, 1024), result_tokens=(4096, 1, 77), chains=tuple(CHAINS),
    compiled=("BTT 2", "BTT 1", "Monarch 4"),
    # Squares; an up-projection of Llama 3 8B and of Llama 2 7B; the MLP of GPT-2 small; those of ViT-B.
    shapes=((4096, 4096), (1024, 1024), (2048, 2048), (8192, 8192), (14336, 4096), (11008, 4096), (3072, 768),
            (768, 3072), (768, 768)),
    tokens=(4096, 1, 65536, 16, 512), product=8192, copy=1 << 30,
    gpt2={"width": 768}, vit={"width": 384, "heads": 6}, batches=(16, 256), repeats=5,
)  # fmt: skip
TINY = Sizes(
    result_shape=(24, 36), result_tokens=(13, 1), chains=("BTT 2", "Kronecker", "low rank"), compiled=("BTT 2",),
    shapes=((64, 64),), tokens=(16, 1), product=64, copy=1 << 16,
    gpt2={"width": 32, "depth": 1, "heads": 2, "vocabulary": 50, "context": 8},
    vit={"width": 32, "depth": 1, "heads": 2, "num_classes": 10, "input_shape": (3, 32, 32), "patch": 16},
    batches=(2, 2), repeats=1,
)  # fmt: skip


class Run:
    """A result that is written row by row, within a time limit."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device, self.backend = arguments.device, arguments.backend
        self.sizes = FULL if self.device == "cuda" else TINY
        self.path = result_path(arguments.out, self.device)
        self.start, self.minutes = time.monotonic(), arguments.minutes
        setting = {"minutes": arguments.minutes, "device": self.device, "backend": arguments.backend}
        self.result: dict[str, Any] = {
            "setting": setting, "machine": machine(self.device), "model": traffic.device_here().name,
            "rates": [], "results": [], "layers": [], "steps": [], "left_out": [],
        }  # fmt: skip

    def save(self) -> None:
        self.result["seconds"] = round(time.monotonic() - self.start, 1)
        write_result(self.path, self.result)

    def add(self, section: str, row: Mapping[str, Any]) -> None:
        self.result[section].append(dict(row))
        print(section, *(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
                         for key, value in row.items()), flush=True)  # fmt: skip
        self.save()

    def ends(self, section: str) -> bool:
        """Return whether the time of a section is over."""
        return time.monotonic() - self.start > 60 * self.minutes * SHARES[section]

    def each(self, section: str, items: Sequence[Any]) -> Iterator[Any]:
        """Yield the items of a section until its time is over; list the others in ``left_out``."""
        for number, item in enumerate(items):
            if self.ends(section):
                self.result["left_out"] += [f"{section}: {one}" for one in items[number:]]
                self.save()
                return
            yield item

    @contextmanager
    def guarded(self, section: str, row: dict[str, Any]) -> Iterator[None]:
        """Add ``row`` at the end of the block, with the error if one occurs."""
        try:
            yield
        except (RuntimeError, AssertionError, NotImplementedError, AbsentError) as error:  # out of memory is one
            row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
            if self.device == "cuda":
                torch.cuda.empty_cache()
        self.add(section, row)

    def timings(self, functions: Sequence[Callable[[], object]]) -> list[float]:
        return [median(times) for times in timings(functions, self.sizes.repeats, self.device)]


# -- rates -------------------------------------------------------------------------------------------------------------


def rates(run: Run) -> None:
    size, device = run.sizes.product, run.device
    for dtype in run.each("rates", ("bfloat16", "float16", "float32")):
        row: dict[str, Any] = {"what": f"product of {size}", "dtype": dtype}
        with run.guarded("rates", row):
            a = torch.randn(size, size, device=device).to(getattr(torch, dtype))
            row["flops_per_second"] = 2 * size**3 / run.timings([partial(torch.mm, a, a)])[0]
    l2 = traffic.device_here().l2 if device == "cuda" else 1 << 16
    for what, count in run.each("rates", (("memory", run.sizes.copy), ("L2", l2 // 8))):
        row = {"what": f"copy in {what}", "bytes": count}
        with run.guarded("rates", row):
            a = torch.empty(count, dtype=torch.uint8, device=device)
            b = torch.empty_like(a)
            row["bytes_per_second"] = 2 * count / run.timings([partial(b.copy_, a)])[0]
    row = {"what": "launch of a product"}
    with run.guarded("rates", row):
        a = torch.ones(8, 8, 8, device=device)
        out = torch.empty_like(a)
        row["seconds"] = run.timings([partial(torch.bmm, a, a, out=out)])[0]


# -- results -----------------------------------------------------------------------------------------------------------


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_dense(layer: StructuredLinear, x: Tensor, gy: Tensor) -> list[Tensor]:
    """Compute the output and all gradients by the dense matrix, in float64 on a CPU."""
    leaves = [t.detach().cpu().double().requires_grad_() for t in (x, *layer.factors, layer.bias)]
    structure, sizes = layer.structure, dict(layer.structure.sizes)
    rows = torch.eye(structure.d_in + structure.padding[0], dtype=torch.float64)
    for step, factor in zip(structure.steps, leaves[1:-1], strict=True):
        rows = rows.reshape(len(rows), *(sizes[a] for a in step.input))
        rows = torch.einsum(f"...{step.input},{step.factor}->...{step.output}", rows, factor)
    matrix = rows.reshape(len(rows), -1)[: structure.d_in, : structure.d_out]
    y = leaves[0] @ matrix + leaves[-1]
    return [y.detach(), *torch.autograd.grad(y, leaves, gy.detach().cpu().double())]


def outcome(call: Callable[[Tensor], Tensor], layer: StructuredLinear, x: Tensor, gy: Tensor) -> list[Tensor]:
    y = call(x)
    return [y, *torch.autograd.grad(y, [x, *layer.factors, layer.bias], gy)]


def in_graph(layer: StructuredLinear, x: Tensor, gy: Tensor) -> list[Tensor]:
    """Record the forward and the backward pass as one CUDA graph each."""
    if not x.is_cuda:
        raise AbsentError("CUDA graphs need CUDA")
    return outcome(torch.cuda.make_graphed_callables(layer, (torch.randn_like(x).requires_grad_(),)), layer, x, gy)


def problem_of(layer: StructuredLinear, tokens: int, dtype: str, train: bool) -> Problem:
    """Return the problem on CUDA, also with ``--device cpu``, so that the same ways run."""
    return Problem(layer.structure, True, "torch", "cuda", dtype, choice.bucket(tokens), torch.get_num_threads(), train)


def ways_of(layer: StructuredLinear, problem: Problem) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return the layer as a function, by each way that can run the problem."""

    def bound(way: Way) -> Callable[[Tensor], Tensor]:
        return lambda x: way.run(layer.structure, list(layer.factors), x, layer.bias, True)

    return {way.name: bound(way) for way in choice.ways("torch") if way.supports(problem)}


def make_layer(chain: str, shape: tuple[int, int], dtype: str, device: str, **more: Any) -> StructuredLinear:
    """Build a layer with a nonzero bias; a low-rank layer has a quarter of its width as rank."""
    name, options = CHAINS[chain]
    if name == "low_rank":
        options = {"rank": min(shape) // 8}
    torch.manual_seed(0)
    layer = StructuredLinear(shape[1], shape[0], structure=name, **{**options, **more})
    with torch.no_grad():
        layer.bias.normal_()
    return layer.to(device=device, dtype=getattr(torch, dtype))


def results(run: Run) -> None:
    sizes = run.sizes
    for tokens, dtype, chain in run.each("results", list(product(sizes.result_tokens, EPS, sizes.chains))):
        with suppress(ValueError):  # sizes that a chain cannot have
            layer = make_layer(chain, sizes.result_shape, dtype, run.device)
            compiles = tokens == sizes.result_tokens[0] and dtype == "bfloat16" and chain in sizes.compiled
            check(run, layer, tokens, dtype, {"chain": chain, "dtype": dtype, "tokens": tokens}, compiles)


def check(run: Run, layer: StructuredLinear, tokens: int, dtype: str, row: dict[str, Any], compiles: bool) -> None:
    """Add rows for all ways and modes of one layer."""
    kind = getattr(torch, dtype)
    x = normal(tokens, layer.in_features).to(run.device, kind).requires_grad_()
    gy = normal(tokens, layer.out_features, seed=1).to(run.device, kind)
    wanted = by_dense(layer, x, gy)
    calls: dict[tuple[str, str], Callable[[], list[Tensor]]] = {
        ("eager", name): partial(outcome, call, layer, x, gy)
        for name, call in ways_of(layer, problem_of(layer, tokens, dtype, True)).items()
    }
    if tokens == run.sizes.result_tokens[0]:
        calls["graph", "chosen"] = partial(in_graph, layer, x, gy)
    if compiles:
        torch._dynamo.reset()
        calls["compiled", "chosen"] = partial(
            outcome, torch.compile(layer, backend=run.backend, dynamic=False), layer, x, gy
        )
    for (mode, way), call in calls.items():
        one = row | {"mode": mode, "way": way}
        with run.guarded("results", one):
            errors = [
                float((a.detach().cpu().double() - b).norm() / b.norm().clamp_min(1e-300))
                for a, b in zip(call(), wanted, strict=True)
            ]
            one |= {"error": errors[0], "gradient_error": max(errors[1:]), "units": max(errors) / EPS[dtype]}
            one["right"] = one["units"] <= LARGEST_ERROR * math.sqrt(len(layer.factors))


# -- times of layers ---------------------------------------------------------------------------------------------------


def with_backward(call: Callable[[Tensor], Tensor], x: Tensor, parameters: Sequence[Tensor]) -> Callable[[], object]:
    def step() -> object:
        y = call(x)
        return torch.autograd.grad(y, [x, *parameters], y.detach())

    return step


def layers(run: Run) -> None:
    asked = [
        (tokens, shape, chain, train)
        for tokens, shape, chain in product(run.sizes.tokens, run.sizes.shapes, SPEED)
        for train in ((False, True) if tokens > 16 else (False,))
    ]
    dtype = "bfloat16" if run.device == "cuda" else "float32"
    for tokens, shape, chain, train in run.each("layers", asked):
        row: dict[str, Any] = {
            "chain": chain, "d_out": shape[0], "d_in": shape[1], "tokens": tokens, "dtype": dtype, "train": train,
        }  # fmt: skip
        with run.guarded("layers", row), torch.set_grad_enabled(train):
            row |= times(run, chain, shape, tokens, dtype, train)


def times(run: Run, chain: str, shape: tuple[int, int], tokens: int, dtype: str, train: bool) -> dict[str, Any]:
    """Return the seconds of a layer by each way and implementation, and the predictions for the ways."""
    layer, kind = make_layer(chain, shape, dtype, run.device), getattr(torch, dtype)
    dense = nn.Linear(shape[1], shape[0], device=run.device, dtype=kind)
    x = torch.randn(tokens, shape[1], device=run.device).to(kind).requires_grad_(train)
    problem, own, absent = problem_of(layer, tokens, dtype, train), list(layer.parameters()), {}
    ways = ways_of(layer, problem)
    functions: dict[str, tuple[Callable[[Tensor], Tensor], list[Tensor]]] = {
        "dense layer": (dense, list(dense.parameters())), **{name: (call, own) for name, call in ways.items()},
    }  # fmt: skip
    compiles = shape == run.sizes.shapes[0] and tokens == run.sizes.tokens[0] and chain in run.sizes.compiled
    for name in IMPLEMENTATIONS:
        if name == "structlin" or ("compiled" in name and not compiles):
            continue
        try:
            other = build(name, [layer], *CHAINS[chain])
        except (AbsentError, ValueError) as error:
            absent[name] = str(error)[:200]
        else:
            functions[name] = other, list(other.parameters())
    if compiles:
        functions["layer compiled"] = torch.compile(layer, backend=run.backend, dynamic=False), own
    calls = {
        name: with_backward(call, x, parameters) if train else partial(call, x)
        for name, (call, parameters) in functions.items()
    }
    for name in list(calls):  # a failure does not affect the others
        try:
            calls[name]()
        except Exception as error:
            absent[name] = f"{type(error).__name__}: {error}"[:200]
            del calls[name]
    seconds = dict(zip(calls, run.timings(list(calls.values())), strict=True))
    known = {way.name: way for way in choice.ways("torch")}
    exact = replace(problem, tokens=tokens)
    predicted = {name: traffic.predict(known[name], exact).seconds for name in ways}
    timed = {name: seconds[name] for name in ways if name in seconds}
    if problem.tokens == tokens and len(timed) > 1:
        wisdom.write(problem.key, timed)
        choice.forget()
    return {"chosen": min(predicted, key=lambda name: predicted[name]), "seconds": seconds, "predicted": predicted,
            "absent": absent}  # fmt: skip


# -- whole steps -------------------------------------------------------------------------------------------------------


def models(run: Run) -> dict[str, tuple[Callable[[StructureConfig], nn.Module], Callable[[], tuple[Tensor, Tensor]]]]:
    sizes, device = run.sizes, run.device
    texts, images = sizes.batches
    gpt2, vit = GPT2Config(**sizes.gpt2), ViTConfig(**sizes.vit)

    def text() -> tuple[Tensor, Tensor]:
        tokens = torch.randint(gpt2.vocabulary, (2, texts, gpt2.context), device=device)
        return tokens[0], tokens[1]

    def pictures() -> tuple[Tensor, Tensor]:
        return (
            torch.randn(images, *vit.input_shape, device=device),
            torch.randint(vit.num_classes, (images,), device=device),
        )

    return {
        "GPT-2 small": (lambda structure: GPT2(replace(gpt2, structure=structure)), text),
        "ViT-S/32": (lambda structure: ViT(replace(vit, structure=structure)), pictures),
    }


def steps(run: Run) -> None:
    structures = {"dense": StructureConfig()} | {
        f"BTT {rank}": StructureConfig("block_tensor_train", {"rank": rank}) for rank in (1, 4)
    }
    asked = [
        (compiled, model, label) for compiled in (False, True) for model in models(run) for label in structures
    ]  # fmt: skip
    for compiled, model, label in run.each("steps", asked):
        row: dict[str, Any] = {"model": model, "structure": label, "compiled": compiled, "dtype": "bfloat16"}
        with run.guarded("steps", row):
            torch.manual_seed(0)
            make, batch = models(run)[model]
            network = make(structures[label]).to(run.device)
            torch._dynamo.reset()
            step = trainer(network, torch.compile(network, backend=run.backend) if compiled else network, *batch())
            if run.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            row["seconds"] = run.timings([step])[0]
            if run.device == "cuda":
                row["peak_bytes"] = torch.cuda.max_memory_allocated()
            row["parameters"] = sum(p.numel() for p in network.parameters())


def trainer(network: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, target: Tensor) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(parameter_groups(network, lr=1e-4), fused=True)

    def step() -> None:
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = F.cross_entropy(forward(x).flatten(0, -2).float(), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


# -- the run -----------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="minutes after which no further row starts (8)")
    parser.add_argument("--out", required=True, help="a file, or a name such as gpu, in the folder of this device")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a test with tiny sizes")
    parser.add_argument("--backend", default="inductor", help="of torch.compile (inductor)")
    found = parser.parse_args(argv)
    if not found.minutes > 0:
        parser.error(f"--minutes must be positive, got {found.minutes}")
    if found.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is available; --device cpu runs a test with tiny sizes")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    run = Run(arguments)
    print(describe(run.result), flush=True)
    run.save()
    for section in (rates, results, layers, steps):
        section(run)
    run.result["wisdom"] = execution.export_wisdom(run.path.with_suffix(".wisdom.json"))
    wrong = [row for row in run.result["results"] if not row.get("right") and "CUDA graphs need" not in str(row)]
    run.result["wrong"] = len(wrong)
    run.save()
    print(f"{len(run.result['results'])} results, {len(wrong)} of them wrong; {run.path}", flush=True)
    for row in wrong:
        print("wrong:", row, flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("STRUCTLIN_CACHE", str(Path(folder)))
        sys.exit(main())
