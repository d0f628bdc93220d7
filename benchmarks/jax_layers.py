"""Structured contractions under jax.jit against the dense product and against other orders of the same contraction.

    python benchmarks/jax_layers.py --out jax_layers
    XLA_FLAGS="--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1" python benchmarks/jax_layers.py
    python benchmarks/jax_layers.py --sizes 1024 4096 --tokens 1024 16384 --dtype bfloat16

In each row all implementations are timed in turn. The result has medians over rounds of the speed-up over the dense
product and of the efficiency, which is the speed-up divided by the ratio of MACs, dense to structured. It also has the
number of transposed arrays that the compiled program writes, forward and forward+backward (its `transpose` operations
that do not only change a layout). Each is a pass over an activation.

- `structlin`: the flax layer, on a CPU by the chosen way, which the result names (STRUCTLIN_EXECUTION);
- `products`: the flax layer by single products, with tokens as the last axis between them;
- `einsum`: one `jnp.einsum` for each step, with tokens as the first axis;
- `dot_general`: the same products in the order of axes of the results of `lax.dot_general`, and one transposition at
  the end.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from _measure import aligned, describe, keep_memory, machine, ratio, result_path, timings, write_result

import structlin
from structlin import Structure
from structlin._arrays import ops
from structlin.execution import decisions
from structlin.execution.compiled.xla import threads
from structlin.execution.products import products

CASES: dict[str, tuple[str, dict[str, object]]] = {
    "low_rank": ("low_rank", {"rank_fraction": 0.125}),
    "kronecker": ("kronecker", {}),
    "monarch_4": ("monarch", {"blocks": 4}),
    "monarch_16": ("monarch", {"blocks": 16}),
    "tt_8": ("tensor_train", {"rank": 8}),
    "btt_1": ("block_tensor_train", {"rank": 1}),
    "btt_2": ("block_tensor_train", {"rank": 2}),
    "btt_4": ("block_tensor_train", {"rank": 4}),
    "btt_16": ("block_tensor_train", {"rank": 16}),
}
Contraction = Callable[[Sequence[jax.Array], jax.Array], jax.Array]


def by_structlin(structure: Structure) -> Contraction:
    return structure.apply


def by_products(structure: Structure) -> Contraction:
    def run(factors: Sequence[jax.Array], x: jax.Array) -> jax.Array:
        return products(structure, factors, x, ops("jax"))

    return run


def by_einsum(structure: Structure) -> Contraction:
    sizes = dict(structure.sizes)

    def run(factors: Sequence[jax.Array], x: jax.Array) -> jax.Array:
        tokens = len(x)
        for step, factor in zip(structure.steps, factors, strict=True):
            x = x.reshape(tokens, *(sizes[axis] for axis in step.input))
            x = jnp.einsum(f"Z{step.input},{step.factor}->Z{step.output}", x, factor)
        return x.reshape(tokens, -1)

    return run


def by_dot_general(structure: Structure) -> Contraction:
    sizes = dict(structure.sizes)

    def run(factors: Sequence[jax.Array], x: jax.Array) -> jax.Array:
        labels, tokens = "*" + structure.steps[0].input, len(x)
        x = x.reshape([sizes.get(axis, tokens) for axis in labels])
        for step, factor in zip(structure.steps, factors, strict=True):
            batch, contracted = ([a for a in labels if a in role] for role in (step.batch, step.contracted))
            rest = [a for a in labels if a not in batch and a not in contracted]
            where = [([t.index(a) for a in contracted], [t.index(a) for a in batch]) for t in (labels, step.factor)]
            x = jax.lax.dot_general(x, factor, ((where[0][0], where[1][0]), (where[0][1], where[1][1])))
            labels = "".join([*batch, *rest, *(a for a in step.factor if a in step.free)])
        x = x.transpose([labels.index(axis) for axis in "*" + structure.steps[-1].output])
        return x.reshape(tokens, -1)

    return run


IMPLEMENTATIONS = {
    "structlin": by_structlin,
    "products": by_products,
    "einsum": by_einsum,
    "dot_general": by_dot_general,
}


def dense(factors: Sequence[jax.Array], x: jax.Array) -> jax.Array:
    return x @ factors[0].T


def with_backward(contraction: Contraction) -> Contraction:
    """Return the contraction and its gradients for a fixed gradient of the output."""

    def run(factors: Sequence[jax.Array], x: jax.Array) -> jax.Array:
        y, back = jax.vjp(contraction, factors, x)
        return y, back(jnp.ones_like(y))

    return run


def transposes(program: str) -> int:
    """Return the number of arrays that a compiled program writes in another order than it reads them.

    XLA's text calls a `transpose` that only renames the axes of a layout a bitcast, so it is not counted.
    """
    return len(re.findall(r" transpose\(", program))


def measure(label: str, size: int, tokens: int, dtype: str, repeats: int) -> dict[str, object]:
    name, options = CASES[label]
    structure = structlin.design(name, (size, size), **options)
    rng = np.random.default_rng(0)
    factors = [jnp.asarray(f, dtype) for f in structlin.random_factors(structure, seed=0)]
    x = jnp.asarray(rng.standard_normal((tokens, size)), dtype)
    weight = [jnp.asarray(rng.standard_normal((size, size)) / size**0.5, dtype)]
    contractions = {implementation: make(structure) for implementation, make in IMPLEMENTATIONS.items()}
    expected = np.asarray(contractions["einsum"](factors, x), np.float64)
    for implementation, contraction in contractions.items():
        error = np.linalg.norm(np.asarray(contraction(factors, x), np.float64) - expected) / np.linalg.norm(expected)
        if not error < (3e-2 if dtype == "bfloat16" else 1e-4):
            raise AssertionError(f"{implementation} of {label} {size}: relative error {error}")

    saved = size * size / structure.macs
    found: dict[str, dict[str, float]] = {implementation: {} for implementation in contractions}
    seconds: dict[str, float] = {}
    for kind, change in (("forward", lambda f: f), ("forward_backward", with_backward)):
        compiled = [jax.jit(change(dense)).lower(weight, x).compile()]
        compiled += [jax.jit(change(c)).lower(factors, x).compile() for c in contractions.values()]
        given = [weight] + [factors] * len(contractions)
        calls = [lambda c=c, f=f: jax.block_until_ready(c(f, x)) for c, f in zip(compiled, given, strict=True)]
        times = timings(calls, repeats)
        seconds[kind] = statistics.median(times[0])
        for implementation, program, taken in zip(contractions, compiled[1:], times[1:], strict=True):
            found[implementation] |= {
                f"{kind}_speed_up": ratio(times[0], taken),
                f"{kind}_efficiency": ratio(times[0], taken) / saved,
                f"{kind}_transposes": transposes(program.as_text()),
            }
    return {
        "structure": label, "options": options, "size": size, "tokens": tokens, "macs": structure.macs,
        "mac_ratio": saved, "dense_seconds": seconds, "implementations": found,
        "ways": sorted(set(decisions([structure]).values())),
    }  # fmt: skip


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Format the efficiency forward / forward+backward, with transposes in brackets."""
    lines = [["structure", "size", "tokens", "MAC ratio", *IMPLEMENTATIONS]]
    for row in rows:
        cells = []
        for implementation in IMPLEMENTATIONS:
            f = row["implementations"][implementation]  # type: ignore[index]
            cells.append(
                f"{f['forward_efficiency']:.2f} / {f['forward_backward_efficiency']:.2f} "
                f"({f['forward_transposes']} / {f['forward_backward_transposes']})"
            )
        lines.append([str(row["structure"]), str(row["size"]), str(row["tokens"]), f"{row['mac_ratio']:.1f}", *cells])
    return aligned(lines)


def report(result: dict) -> str:
    """Format a result as the table of the documentation."""
    return table(result["rows"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--structures", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--sizes", nargs="+", type=int, default=[1024])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--keep-memory", action="store_true", help="make the process keep the memory that it frees")
    parser.add_argument("--out", metavar="NAME", help="the JSON file to write, or its name in results/")
    arguments = parser.parse_args()
    flags, devices = os.environ.get("XLA_FLAGS", ""), [device.platform for device in jax.devices()]
    place = {**machine("cpu"), "jax": jax.__version__, "xla_flags": flags, "devices": devices}
    place |= {"cores": threads(), "threads": threads()}
    setting: dict[str, object] = {"dtype": arguments.dtype, "repeats": arguments.repeats}
    setting["allocator"] = "keeps freed memory" if arguments.keep_memory and keep_memory() else "default"
    rows: list[dict[str, object]] = []
    result = {"setting": setting, "machine": place, "rows": rows}
    print(describe(result), flush=True)
    for size in arguments.sizes:
        for tokens in arguments.tokens:
            for label in arguments.structures:
                rows.append(measure(label, size, tokens, arguments.dtype, arguments.repeats))
                print(table(rows[-1:]).splitlines()[-1], flush=True)
                if arguments.out is not None:
                    write_result(result_path(arguments.out), result)
    print("\nefficiency forward / forward+backward (transposed arrays written)\n" + table(rows))


if __name__ == "__main__":
    main()
