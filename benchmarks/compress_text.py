"""Perplexity of a small GPT-2 after compression by several methods, before and after fine-tuning, with seeds.

    python benchmarks/compress_text.py --out compress_text

The text is the documentation of Python, which is part of every installation (`pydoc_data.topics`), as bytes. A dense
GPT-2 is trained on its first nine tenths. Each method compresses all linear layers except the head to the same fraction
of their MACs, which is also the fraction of their parameters. Then all models are trained further on the same batches.
The methods are:

- `svd`: truncated singular value decomposition with one ratio for all layers;
- `asvd`: the same for the weight times the root of the RMS of each input (Yuan et al., ASVD, 2023);
- `svd-llm`: the same for the weight times a Cholesky factor of the second moments of the inputs (Wang et al., 2024);
- `blast`: BLAST fitted to the weight alone (Lee et al., 2024), here by alternating least squares;
- `monarch`: the nearest Monarch matrix to the weight (Dao et al., 2022);
- `ours, ...`: `project_linear` with one budget for all layers, with and without calibration.

    python benchmarks/compress_text.py --study --depth 2 --steps 250 --seeds 0 1 2 --out compress_text_study

compares numbers of calibration vectors for each layer, and dampings, for low rank at one half of the MACs.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _measure import machine, result_path, write_result
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import structlin
from structlin_nn.torch import StructuredLinear, parameter_groups, project_linear
from structlin_nn.torch._modules import linear_sizes
from structlin_nn.torch._project_calibration import gather

CONTEXT, BATCH, DAMPING = 128, 16, 0.01
LAYERS = "transformer.h.*"
Method = Callable[[nn.Module, float, list[Tensor]], Any]


def text() -> tuple[Tensor, Tensor]:
    """Return bytes for training and for validation."""
    from pydoc_data.topics import topics

    tokens = torch.tensor(list("\n\n".join(topics[key] for key in sorted(topics)).encode()))
    return tokens[: len(tokens) * 9 // 10], tokens[len(tokens) * 9 // 10 :]


def batches(tokens: Tensor, seed: int) -> Iterator[Tensor]:
    """Yield random sequences indefinitely."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(tokens) - CONTEXT, (BATCH,), generator=generator)
        yield torch.stack([tokens[start : start + CONTEXT] for start in starts.tolist()])


def train(model: nn.Module, tokens: Tensor, steps: int, lr: float, seed: int) -> None:
    """Train with AdamW at a rate that decreases to zero."""
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=lr, weight_decay=0.01))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / steps))
    for _, batch in zip(range(steps), batches(tokens, seed), strict=False):
        model.train()(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def loss(model: nn.Module, tokens: Tensor) -> float:
    """Return the mean loss of a byte on the validation text."""
    rows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    model.eval()
    return statistics.fmean(float(model(input_ids=part, labels=part).loss) for part in rows[:256].split(BATCH))


def _low_rank(fraction: float) -> Callable[[str, nn.Module], structlin.AbstractStructure]:
    def structure(name: str, linear: nn.Module) -> structlin.AbstractStructure:
        d_in, d_out = linear_sizes(linear) or (0, 0)
        rank = max(1, int(fraction * d_in * d_out / (d_in + d_out)))
        return structlin.design("low_rank", (d_out, d_in), rank=rank)

    return structure


def _blast(fraction: float, blocks: int = 4) -> Callable[[str, nn.Module], structlin.AbstractStructure]:
    def structure(name: str, linear: nn.Module) -> structlin.AbstractStructure:
        d_in, d_out = linear_sizes(linear) or (0, 0)
        rank = max(1, int(fraction * d_in * d_out / (d_in + d_out + blocks**2)))
        return structlin.design("blast", (d_out, d_in), blocks=blocks, rank=rank)

    return structure


def _svd(model: nn.Module, fraction: float, data: list[Tensor]) -> Any:
    return project_linear(model, _low_rank(fraction), layers=LAYERS)


def _asvd(model: nn.Module, fraction: float, data: list[Tensor]) -> Any:
    layers = {m: n for n, m in model.transformer.h.named_modules() if linear_sizes(m) is not None}
    scales = {}
    for linear, moments in gather(model, layers, data, None).items():
        scale = moments.diagonal().sqrt().clamp(min=1e-6).sqrt()
        scales[f"transformer.h.{layers[linear]}"] = scale / scale.mean()
        linear.weight.data.mul_(scales[f"transformer.h.{layers[linear]}"][:, None])
    report = project_linear(model, _low_rank(fraction), layers=LAYERS)
    with torch.no_grad():
        for name, scale in scales.items():
            layer = model.get_submodule(name)
            if isinstance(layer, StructuredLinear):
                layer.factors[0].div_(scale)
            else:
                layer.weight.div_(scale[:, None])
    return report


def _svd_llm(model: nn.Module, fraction: float, data: list[Tensor]) -> Any:
    return project_linear(model, _low_rank(fraction), layers=LAYERS, calibration=data, damping=1e-6)


def _blast_alone(model: nn.Module, fraction: float, data: list[Tensor]) -> Any:
    return project_linear(model, _blast(fraction), layers=LAYERS, max_sweeps=20, restarts=0)


def _ours(name: str, calibrated: bool) -> Method:
    def method(model: nn.Module, fraction: float, data: list[Tensor]) -> Any:
        given = data if calibrated else None
        return project_linear(
            model, name, layers=LAYERS, mac_fraction=fraction, calibration=given, damping=DAMPING, restarts=0
        )

    return method


METHODS: dict[str, Method] = {
    "svd": _svd,
    "asvd": _asvd,
    "svd-llm": _svd_llm,
    "blast": _blast_alone,
    "monarch": _ours("monarch", calibrated=False),
    "ours, low rank, plain": _ours("low_rank", calibrated=False),
    "ours, low rank": _ours("low_rank", calibrated=True),
    "ours, Monarch": _ours("monarch", calibrated=True),
    "ours, Block Tensor-Train": _ours("block_tensor_train", calibrated=True),
}


STUDY = (
    (0, 0.0), (16384, 0.01), (16384, 1e-4), (16384, 0.1), (2048, 0.01), (512, 0.01), (128, 0.01), (128, 0.1),
    (512, 1.0), (256, 1.0), (128, 1.0),
)  # fmt: skip
"""Calibration vectors for each layer (0: none), and damping."""


def trained(seed: int, training: Tensor, arguments: argparse.Namespace) -> GPT2LMHeadModel:
    """Return a dense model that was trained from scratch."""
    torch.manual_seed(seed)
    sizes = {"n_embd": arguments.width, "n_layer": arguments.depth, "n_head": 4, "n_positions": CONTEXT}
    model = GPT2LMHeadModel(
        GPT2Config(**sizes, vocab_size=256, bos_token_id=0, eos_token_id=0, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    )
    train(model, training, arguments.steps, 2e-3, seed)
    return model


def study(seed: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the change of the loss from that of the dense model for each entry of ``STUDY``."""
    training, validation = text()
    model = trained(seed, training, arguments)
    drawn, dense, rows = batches(training, 1000 + seed), loss(model, validation), []
    most = -(-max(vectors for vectors, _ in STUDY) // (BATCH * CONTEXT))
    sequences = torch.cat([next(drawn) for _ in range(most)])
    for vectors, damping in STUDY:
        small = copy.deepcopy(model)
        given = {"calibration": sequences[: vectors // CONTEXT].split(BATCH), "damping": damping} if vectors else {}
        project_linear(small, "low_rank", layers=LAYERS, mac_fraction=0.5, **given)
        rows.append({"seed": seed, "vectors": vectors, "damping": damping, "change": loss(small, validation) - dense})
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def run(seed: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of one seed."""
    training, validation = text()
    model = trained(seed, training, arguments)
    drawn = batches(training, 1000 + seed)
    data = [next(drawn) for _ in range(arguments.calibration)]
    further = copy.deepcopy(model)
    train(further, training, arguments.further, 5e-4, 100 + seed)
    rows = [{"method": "dense", "fraction": 1.0, "seed": seed, "before": loss(model, validation),
             "after": loss(further, validation)}]  # fmt: skip
    for fraction in arguments.fractions:
        for name in arguments.methods:
            small, start = copy.deepcopy(model), time.process_time()
            report = METHODS[name](small, fraction, data)
            seconds, before = time.process_time() - start, loss(small, validation)
            train(small, training, arguments.further, 5e-4, 100 + seed)
            rows.append({
                "method": name, "fraction": fraction, "seed": seed, "before": before, "after": loss(small, validation),
                "mac_fraction": report.macs_after / report.macs_before,
                "param_fraction": report.params_after / report.params_before, "seconds": seconds,
            })  # fmt: skip
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def report(result: dict[str, Any]) -> str:
    """Return the table of the documentation: means and standard deviations over seeds."""
    if "vectors" in result["rows"][0]:
        lines = ["| vectors | damping | change of the loss |", "|---|---|---|"]
        for vectors, damping in dict.fromkeys((r["vectors"], r["damping"]) for r in result["rows"]):
            values = [r["change"] for r in result["rows"] if (r["vectors"], r["damping"]) == (vectors, damping)]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            head = f"{vectors:,} | {damping:g}" if vectors else "- | -"
            lines.append(f"| {head} | {statistics.fmean(values):.4f}{spread} |")
        return "\n".join(lines)
    lines = ["| method | MACs kept | loss | after fine-tuning | seconds |", "|---|---|---|---|---|"]
    for fraction, method in dict.fromkeys((r["fraction"], r["method"]) for r in result["rows"]):
        rows = [r for r in result["rows"] if (r["fraction"], r["method"]) == (fraction, method)]

        def shown(key: str, rows: list[dict[str, Any]] = rows) -> str:
            values = [r[key] for r in rows]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            return f"{statistics.fmean(values):.3f}{spread}"

        kept = "1" if method == "dense" else f"{statistics.fmean(r['mac_fraction'] for r in rows):.3f}"
        seconds = "-" if method == "dense" else f"{statistics.fmean(r['seconds'] for r in rows):.1f}"
        lines.append(f"| {method} | {kept} | {shown('before')} | {shown('after')} | {seconds} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--further", type=int, default=40)
    parser.add_argument("--calibration", type=int, default=8, help="batches of 16 sequences of 128 bytes")
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--study", action="store_true", help="compare calibration vectors and dampings")
    parser.add_argument("--out", metavar="NAME", help="the JSON file to write, or its name in results/")
    arguments = parser.parse_args()
    setting = {key: value for key, value in vars(arguments).items() if key != "out"}
    rows = [row for seed in arguments.seeds for row in (study if arguments.study else run)(seed, arguments)]
    result = {"setting": setting, "machine": machine("cpu"), "rows": rows}
    print(report(result))
    if arguments.out:
        write_result(result_path(arguments.out), result)


if __name__ == "__main__":
    main()
