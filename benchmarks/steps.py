"""Training steps and inference of whole models, structured against dense at equal MACs and at equal width.

    python benchmarks/steps.py --out steps --plot steps.png
    python benchmarks/steps.py --models gpt2 llama --dtype bfloat16 --threads 2 --out steps-bfloat16
    python benchmarks/steps.py --latency --out steps-latency

A step is the forward pass, the loss, the backward pass and AdamW. Each structured model is timed in turns with a dense
model of about the same MACs, which is narrower, and with one of the same width. The result has, as medians of the
ratios of each round,

- the time per MAC relative to the dense model of equal MACs: 1 means that saved MACs are saved time;
- the speed-up over the dense model of equal width;
- the same with each layer run separately (the policy `-block`), which shows the gain of passes over whole blocks;
- GFLOP/s (two operations for each MAC, three forward passes for a step) and those of one large dense product, and the
  peak memory of a step relative to the dense model of equal width: of what the step allocates (activations, gradients
  and temporary memory), also with the policy `-kept`, which stores no hidden features, and of that with parameters and
  the state of AdamW.

MACs are those that structlin counts, attention included. `llama` is a model of transformers, which must be installed.
`--latency` times single layers for a few tokens instead. `--both-allocators` times everything again with a C library
that keeps freed memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _measure import (
    aligned,
    describe,
    keep_memory,
    machine,
    peak_memory,
    peak_rate,
    ratio,
    result_path,
    timings,
    write_result,
)
from plot_steps import plot
from torch import Tensor, nn
from torch.nn import functional as F

from structlin import execution
from structlin.execution import choice
from structlin_nn.models.factory import StructureConfig
from structlin_nn.models.networks import GPT2, MLP, GPT2Config, MLPConfig, ViT, ViTConfig
from structlin_nn.torch import StructuredLinear, count, parameter_groups, replace_linear

DENSE = StructureConfig()
KINDS = ("step", "inference")


@dataclass(frozen=True)
class Case:
    """A model: a function of width and structure that builds it, the widths, and its input and target."""

    make: Callable[[int, StructureConfig], nn.Module]
    width: int
    dense_width: int  # of about the same MACs
    rank: int
    batch: Callable[[], tuple[Tensor, Tensor]]
    tokens: int


def vit(width: int, structure: StructureConfig) -> nn.Module:
    """ViT/32 of three blocks; heads have 64 features."""
    return ViT(ViTConfig(width=width, depth=3, heads=width // 64, structure=structure))


def gpt2(width: int, structure: StructureConfig) -> nn.Module:
    return GPT2(
        GPT2Config(width=width, depth=4, heads=width // 64, vocabulary=2048, context=256, structure=structure)
    )  # fmt: skip


def cifar_mlp(width: int, structure: StructureConfig) -> nn.Module:
    return MLP(MLPConfig(width=width, structure=structure))


class Llama(nn.Module):
    """Two decoder layers of transformers' Llama, with logits as output."""

    def __init__(self, width: int, structure: StructureConfig) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=2048, hidden_size=width, intermediate_size=8 * width // 3 // 64 * 64, num_hidden_layers=2,
                num_attention_heads=width // 64, num_key_value_heads=width // 64, use_cache=False,
            )
        )  # fmt: skip
        if structure.name != "dense":
            replace_linear(self.model, structure.name, fuse=True, **structure.options)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens).logits
        return logits


def images(size: int, number: int, classes: int) -> tuple[Tensor, Tensor]:
    return torch.randn(number, 3, size, size), torch.randint(classes, (number,))


def text(number: int, length: int) -> tuple[Tensor, Tensor]:
    return torch.randint(2048, (number, length)), torch.randint(2048, (number, length))


CASES = {
    "vit": Case(vit, 768, 256, 2, partial(images, 224, 16, 1000), 16 * 50),
    "gpt2": Case(gpt2, 512, 256, 4, partial(text, 4, 256), 1024),
    "cifar-mlp": Case(cifar_mlp, 1024, 256, 2, partial(images, 32, 1024, 10), 1024),
    "llama": Case(Llama, 768, 256, 2, partial(text, 4, 256), 1024),
}


def trainer(model: nn.Module, x: Tensor, target: Tensor, compiled: bool) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-4), fused=True)
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        loss = F.cross_entropy(forward(x).flatten(0, -2).float(), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def answerer(model: nn.Module, x: Tensor, compiled: bool) -> Callable[[], object]:
    forward = torch.compile(model) if compiled else model

    def answer() -> None:
        with torch.no_grad():
            forward(x)

    return answer


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one model in turns: structured, dense of equal MACs, and dense of equal width."""
    case, dtype = CASES[name], getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    torch._dynamo.reset()
    structure = StructureConfig("block_tensor_train", {"rank": case.rank})
    models = {
        "structured": case.make(case.width, structure),
        "dense": case.make(case.dense_width, DENSE),
        "wide": case.make(case.width, DENSE),
    }
    x, target = case.batch()
    x = x.to(dtype) if x.is_floating_point() else x
    models = {label: model.to(dtype) for label, model in models.items()}
    macs = {label: count(model, x[:1]).macs() * len(x) for label, model in models.items()}
    found: dict[str, Any] = {
        "model": name, "width": case.width, "dense_width": case.dense_width, "rank": case.rank, "tokens": case.tokens,
        "forward_macs": macs, "parameters": {k: sum(p.numel() for p in m.parameters()) for k, m in models.items()},
    }  # fmt: skip
    for kind in KINDS:
        calls = {
            label: (trainer(model, x, target, arguments.compiled) if kind == "step"
                    else answerer(model, x, arguments.compiled))
            for label, model in models.items()
        }  # fmt: skip
        contexts: dict[str, Callable[[], Any]] = dict.fromkeys(calls, nullcontext)
        if not arguments.compiled:  # the way of a block is part of a compiled graph
            calls["separate"] = calls["structured"]
            contexts["separate"] = partial(execution.using, f"{arguments.execution},-block")
        around = [contexts[label] for label in calls]
        times = dict(
            zip(calls, timings(list(calls.values()), arguments.repeats, clock=arguments.clock, around=around),
                strict=True)
        )  # fmt: skip
        found[kind] = compared(times, macs, 3 if kind == "step" else 1)
        if kind == "step":
            memory = {label: peak_of(call, contexts[label]) for label, call in calls.items()}
            if "separate" in calls:
                recomputing = partial(execution.using, f"{arguments.execution},-kept")
                memory["recomputed"] = peak_of(calls["structured"], recomputing)
                found["recomputed_to_wide"] = memory["recomputed"] / memory["wide"]
            found["memory_bytes"] = memory
            found["memory_to_wide"] = memory["structured"] / memory["wide"]
            fixed = {label: 3 * bytes_of(models[label]) for label in ("structured", "wide")}  # AdamW has two moments
            found["whole_memory_to_wide"] = (memory["structured"] + fixed["structured"]) / (
                memory["wide"] + fixed["wide"]
            )
            found["memory_to_separate"] = memory["structured"] / memory.get("separate", memory["structured"])
    return found


def bytes_of(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def peak_of(call: Callable[[], object], context: Callable[[], Any]) -> int:
    with context():
        return peak_memory(call)


def compared(times: Mapping[str, Sequence[float]], macs: Mapping[str, int], passes: int) -> dict[str, Any]:
    seconds = {label: statistics.median(found) for label, found in times.items()}
    relative = macs["dense"] / macs["structured"]
    found: dict[str, Any] = {
        "seconds": seconds,
        "time_per_mac": ratio(times["structured"], times["dense"]) * relative,
        "speed_up": ratio(times["wide"], times["structured"]),
        "gflops": {
            label: 2e-9 * passes * macs.get(label, macs["structured"]) / taken for label, taken in seconds.items()
        },
    }
    if "separate" in times:
        found["separate_time_per_mac"] = ratio(times["separate"], times["dense"]) * relative
        found["block_speed_up"] = ratio(times["separate"], times["structured"])
    return found


def latency(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time a call of one layer for a few tokens against `nn.Linear`."""
    rows, dtype = [], getattr(torch, arguments.dtype)
    for size in arguments.sizes:
        for label, options in (("btt_1", {"rank": 1}), ("btt_4", {"rank": 4})):
            for tokens in arguments.tokens:
                torch.manual_seed(0)
                dense = nn.Linear(size, size).to(dtype)
                layer = StructuredLinear(size, size, structure="block_tensor_train", **options).to(dtype)  # type: ignore[arg-type]
                x = torch.randn(tokens, size).to(dtype)
                calls = [answerer(layer, x, False), answerer(dense, x, False)]
                mine, theirs = timings(calls, arguments.repeats, clock=arguments.clock)
                rows.append(
                    {
                        "structure": label, "size": size, "tokens": tokens, "seconds": statistics.median(mine),
                        "dense_seconds": statistics.median(theirs), "speed_up": ratio(theirs, mine),
                        "mac_ratio": size * size / layer.structure.macs,
                    }
                )  # fmt: skip
                print(latency_table(rows[-1:]), flush=True)
    return rows


def latency_table(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [["structure", "d", "tokens", "us", "nn.Linear us", "speed-up", "MACs"]]
    cells += [
        [r["structure"], str(r["size"]), str(r["tokens"]), f"{1e6 * r['seconds']:.1f}",
         f"{1e6 * r['dense_seconds']:.1f}", f"{r['speed_up']:.1f}", f"1/{r['mac_ratio']:.0f}"]
        for r in rows
    ]  # fmt: skip
    return aligned(cells)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format a result as the table of the documentation."""
    cells = [["model", "kind", "ms, dense of equal MACs", "time per MAC", "(separate)", "speed-up at equal width",
              "GFLOP/s, dense", "memory to dense of equal width (nothing stored), to separate layers",
              "with parameters"]]  # fmt: skip
    for row in rows:
        for kind in KINDS:
            found = row[kind]
            least = f" ({row['recomputed_to_wide']:.2f})" if "recomputed_to_wide" in row else ""
            whole = f"{row['whole_memory_to_wide']:.2f}" if kind == "step" and "whole_memory_to_wide" in row else ""
            memory = f"{row['memory_to_wide']:.2f}{least}, {row['memory_to_separate']:.2f}" if kind == "step" else ""
            cells.append(
                [row["model"], kind,
                 f"{1e3 * found['seconds']['structured']:.0f}, {1e3 * found['seconds']['dense']:.0f}",
                 f"{found['time_per_mac']:.2f}",
                 f"({found['separate_time_per_mac']:.2f})" if "separate_time_per_mac" in found else "",
                 f"{found['speed_up']:.2f}", f"{found['gflops']['structured']:.0f}, {found['gflops']['dense']:.0f}",
                 memory, whole]
            )  # fmt: skip
    return aligned(cells)


def report(result: Mapping[str, Any]) -> str:
    """Format a result as the table of the documentation."""
    rows = result["rows"]
    return latency_table(rows) if rows and "dense_seconds" in rows[0] else table(rows)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit", "gpt2", "cifar-mlp"], choices=list(CASES))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compiled", action="store_true", help="all models under torch.compile")
    parser.add_argument("--execution", default="compare", metavar="POLICY", help="compare, estimate, measure, ways")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: CPU time, for one thread")
    parser.add_argument("--both-allocators", action="store_true", help="again with freed memory kept")
    parser.add_argument("--latency", action="store_true", help="single layers for a few tokens")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096], help="with --latency")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32], help="with --latency")
    parser.add_argument("--out", metavar="NAME", help="where to write the JSON: a file, or a name in results/")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    if arguments.clock == "cpu" and arguments.threads > 1:
        parser.error("--clock cpu is for --threads 1: it adds up the time of all threads")
    if arguments.latency and (arguments.compiled or arguments.both_allocators):
        parser.error("--latency takes no --compiled or --both-allocators")
    try:
        choice.policy_of(arguments.execution)
    except ValueError as error:
        parser.error(f"--execution: {error}")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    os.environ["STRUCTLIN_EXECUTION"] = arguments.execution
    options = ("dtype", "threads", "repeats", "clock", "execution", "compiled")
    setting = {option: getattr(arguments, option) for option in options} | {"allocator": "default"}
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {"setting": setting, "machine": machine(), "rows": rows}
    print(describe(result), flush=True)

    def save() -> None:
        if arguments.out:
            write_result(result_path(arguments.out), result)

    def draw() -> None:
        if arguments.plot:
            plot(result, arguments.plot)

    if arguments.latency:
        rows += latency(arguments)
        print("\n" + latency_table(rows))
        save()
        return draw()
    result["peak_gflops"] = peak_rate(getattr(torch, arguments.dtype))
    for kept in (False, True) if arguments.both_allocators else (False,):
        if kept and not keep_memory():
            print("the C library has no setting to keep freed memory")
            break
        held = result["rows_with_memory_kept"] = [] if kept else rows
        if not kept:
            del result["rows_with_memory_kept"]
        for name in arguments.models:
            held.append(measure(name, arguments))
            print(table(held[-1:]), flush=True)
            save()
    print(f"\n{table(rows)}\none dense product of 2048 x 2048: {result['peak_gflops']:.0f} GFLOP/s")
    return draw()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("STRUCTLIN_CACHE", folder)  # results do not depend on earlier timings
        sys.exit(main())
