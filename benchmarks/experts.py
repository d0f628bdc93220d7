"""Experts of one block of a mixture: packed and dense, one structured layer for each expert, and stacked factors.

    python benchmarks/experts.py --out experts
    python benchmarks/experts.py --tokens 16 --structures monarch

The block has the form of Qwen3-MoE. Tokens choose experts at random. The result has the milliseconds of the packed
experts, by the grouped products of transformers, and the speed-ups of both others, as medians over rounds in which all
run in turn.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from _measure import aligned, describe, keep_memory, machine, peak_rate, ratio, result_path, timings, write_result
from torch import Tensor, nn

from structlin_nn.torch import StructuredExperts, StructuredLinear, replace_linear

SIZES = ((8, 2, 512, 1024), (64, 8, 512, 256))
"""Experts, experts of a token, features, and inner features of an expert."""
OPTIONS: dict[str, dict[str, Any]] = {
    "low_rank": {"rank": 32},
    "monarch": {"blocks": 8},
    "block_tensor_train": {"rank": 2},
}
KINDS = ("packed", "single", "stacked")


class SingleLayers(nn.Module):
    """The experts of a block with a layer for each matrix of each expert."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.act_fn = block.act_fn
        self.up, self.down = (nn.ModuleList(self._parts(layer)) for layer in (block.gate_up_proj, block.down_proj))

    @staticmethod
    def _parts(layer: StructuredExperts) -> list[StructuredLinear]:
        sizes = layer.in_features, layer.out_features
        made = [StructuredLinear(*sizes, bias=False, structure=layer.structure) for _ in range(layer.num_experts)]
        with torch.no_grad():
            for number, one in enumerate(made):
                for own, stacked in zip(one.factors, layer.factors, strict=True):
                    own.copy_(stacked[number])
        return made

    def forward(self, x: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for number, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            token, place = torch.where(chosen == number)
            if len(token):
                gate, hidden = up(x[token]).chunk(2, dim=-1)
                y.index_add_(0, token, down(self.act_fn(gate) * hidden) * share[token, place, None])
        return y


def blocks(experts: int, chosen: int, width: int, inner: int, structure: str) -> list[nn.Module]:
    """Return the packed block, and both with the same structured matrices."""
    from transformers import AutoConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = AutoConfig.for_model(
        "qwen3_moe", hidden_size=width, num_experts=experts, num_experts_per_tok=chosen, moe_intermediate_size=inner
    )
    config._experts_implementation = "grouped_mm"
    packed = Qwen3MoeExperts(config)
    for parameter in packed.parameters():
        nn.init.normal_(parameter, std=width**-0.5)
    model = nn.ModuleDict({"experts": copy.deepcopy(packed)})
    replace_linear(model, structure, layers="*", unpack=True, **OPTIONS[structure])
    return [packed, SingleLayers(model["experts"]), model["experts"]]


def row(sizes: Sequence[int], tokens: int, structure: str, repeats: int, clock: str) -> dict[str, Any]:
    torch.manual_seed(0)
    experts, chosen, width, inner = sizes
    modules = blocks(experts, chosen, width, inner, structure)
    x = torch.randn(tokens, width, requires_grad=True)
    share, index = torch.randn(tokens, experts).softmax(-1).topk(chosen)
    y, other = (module(x, index, share) for module in modules[1:])
    torch.testing.assert_close(y, other, rtol=1e-3, atol=1e-3)
    gradient = torch.randn_like(x)
    names = ("experts", "chosen", "width", "inner")
    found: dict[str, Any] = {**dict(zip(names, sizes, strict=True)), "tokens": tokens, "structure": structure}
    for kind in ("forward", "forward_backward"):

        def call(module: nn.Module, train: bool = kind != "forward") -> None:
            with torch.set_grad_enabled(train):
                y = module(x, index, share)
            if train:
                torch.autograd.grad(y, [x, *module.parameters()], gradient, allow_unused=True)

        times = timings([lambda m=m: call(m) for m in modules], repeats, clock=clock)  # type: ignore[misc]
        found[kind] = {
            "milliseconds": 1e3 * statistics.median(times[0]),
            "speed_up": {name: ratio(times[0], own) for name, own in zip(KINDS[1:], times[1:], strict=True)},
        }
    return found


def report(result: Mapping[str, Any]) -> str:
    """Return a result as a table."""
    head = ["experts", "width", "tokens", "structure"]
    for kind in ("forward", "forward and backward"):
        head += [f"{kind}, packed", "one by one", "stacked"]
    cells = [head]
    for one in result["rows"]:
        line = [f"{one['chosen']} of {one['experts']}", f"{one['width']}, {one['inner']}", str(one["tokens"])]
        line.append(one["structure"])
        for kind in ("forward", "forward_backward"):
            line += [f"{one[kind]['milliseconds']:.1f} ms", *(f"x{v:.2f}" for v in one[kind]["speed_up"].values())]
        cells.append(line)
    return aligned(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 32])
    parser.add_argument("--structures", nargs="+", default=list(OPTIONS), choices=list(OPTIONS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7, help="rounds")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: time on cores, for one thread")
    parser.add_argument("--out", metavar="NAME", help="where to write the JSON: a file, or a name in results/")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    setting = {name: getattr(arguments, name) for name in ("threads", "repeats", "clock")}
    setting |= {"dtype": "float32", "memory_kept": keep_memory()}
    result: dict[str, Any] = {"setting": setting, "machine": machine()}
    result["peak_gflops"] = peak_rate(torch.float32, arguments.clock)
    print(describe(result), flush=True)
    result["rows"] = [
        row(sizes, tokens, structure, arguments.repeats, arguments.clock)
        for sizes in SIZES
        for tokens in arguments.tokens
        for structure in arguments.structures
    ]
    print(report(result))
    if arguments.out:
        write_result(result_path(arguments.out), result)


if __name__ == "__main__":
    main()
