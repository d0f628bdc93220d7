"""Sphinx extension: one page for each registered structure, with a picture, written from the register.

Each build writes the pages and pictures to ``structures/generated/``. A new structure gets a page when it is
registered.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

import structlin
from structlin import Structure

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.colors import hsv_to_rgb

TITLES = {"block_tensor_train": "Block Tensor-Train (BTT)", "tensor_train": "Tensor-Train", "blast": "BLAST"}
# The size at which a structure is drawn, and those at which its cost is stated.
DRAWN = {"butterfly": (8, 8), "low_rank": (12, 12)}
SIZES = (256, 1024, 4096)


def title_of(name: str) -> str:
    return TITLES.get(name, name.replace("_", " ").capitalize())


def step_matrices(structure: Structure) -> list[np.ndarray]:
    """Return each step as a matrix (outputs, inputs) with the number of the parameter of each entry, 0 for none."""
    sizes = dict(structure.sizes)
    found = []
    for step, factor in zip(structure.steps, structure.factors, strict=True):
        axes = [sizes[a] for a in step.input]
        basis = np.eye(int(np.prod(axes)), dtype=np.int64).reshape(-1, *axes)
        labels = np.arange(1, factor.numel + 1).reshape(factor.shape)
        made = np.einsum(f"Z{step.input},{step.factor}->Z{step.output}", basis, labels)
        found.append(made.reshape(len(basis), -1).T)
    return found


def coloured(labels: np.ndarray, seed: int) -> np.ndarray:
    """Return a picture in which equal labels have equal colours, and 0 is white."""
    count = int(labels.max(initial=0))
    rng = np.random.default_rng(seed)
    hues = rng.permutation(np.linspace(0, 1, count, endpoint=False))
    colours = hsv_to_rgb(np.stack([hues, rng.uniform(0.35, 0.75, count), rng.uniform(0.6, 0.9, count)], -1))
    return np.concatenate([np.ones((1, 3)), colours])[labels]


def draw(name: str, path: Path) -> str:
    """Draw the matrix and its factors; return the caption."""
    shape = DRAWN.get(name, (16, 16))
    structure = lettered(name, shape)
    panels: list[tuple[str, np.ndarray]]
    if isinstance(structure, Structure):
        factors = structlin.random_factors(structure, seed=1)
        dense = structure.apply(factors, np.eye(shape[1])).T
        steps = step_matrices(structure)
        panels = [
            (f"step {n}: {s}", coloured(m, seed=n)) for n, (s, m) in enumerate(zip(structure.steps, steps, strict=True))
        ][::-1]
    else:
        dense = structlin.structure_class(name).random(shape, seed=1).to_dense()
        panels = []
    figure, axes = plt.subplots(1, 1 + len(panels), figsize=(2.5 * (1 + len(panels)), 2.9), squeeze=False)
    limit = float(np.abs(dense).max())
    axes[0, 0].imshow(dense, cmap="RdBu", vmin=-limit, vmax=limit)
    axes[0, 0].set_title("A, random" + (" =" if panels else ""), fontsize=9)
    for axis, (label, image) in zip(axes[0, 1:], panels, strict=True):
        axis.imshow(image)
        axis.set_title(label, fontsize=8, family="monospace")
    for axis in axes[0]:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    caption = f"A matrix of shape {shape} with random entries"
    if panels:
        caption += (
            ", and its steps as matrices, the one applied first on the right. Within a step, places of one colour hold "
            "the same parameter; white is zero"
        )
    return caption + "."


def cost_table(name: str) -> list[str]:
    """Return a table of parameters, MACs, rank and scale of square matrices with the default options."""
    rows = [
        "| d | parameters | MACs | other FLOPs | rank at most | initial deviation | Adam multiplier |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in SIZES:
        s = structlin.design(name, (size, size))
        other = sum(s.other_flops.values())
        stds = ", ".join(f"{v:.3g}" for v in structlin.init_std(s))
        rates = ", ".join(f"{v:.3g}" for v in structlin.lr_multipliers(s))
        rows.append(
            f"| {size:,} | {s.num_params:,} | {s.macs:,} | {other:,} | {s.rank_bound:,} | {shortened(stds)} "
            f"| {shortened(rates)} |"
        )
    return rows


def shortened(text: str) -> str:
    parts = text.split(", ")
    return text if len(parts) <= 4 else f"{parts[0]}, ... ({len(parts)} factors)"


def page(name: str, caption: str) -> str:
    cls = structlin.structure_class(name)
    options = structlin.structure_options(name)
    lines = [
        f"# {title_of(name)}",
        "",
        f"```{{image}} {name}.png\n:alt: {title_of(name)} as a matrix and as its factors\n```",
        "",
        f"*{caption}*",
        "",
        "Definition\n: " + "\n\n  ".join(f"$\\displaystyle {line}$" for line in definition(name)),
        "",
        *([f"Einsums\n: `{cls.formula}`", ""] if "->" in cls.formula else []),
        f"Parameters\n: ${typeset(cls.parameters)}$",
        "",
        "Options\n: " + (", ".join(f"`{k}={v!r}`" for k, v in options.items()) or "none"),
        "",
        *([f"Source\n: {cls.source}", ""] if cls.source != "-" else []),
        "## Cost and scale",
        "",
        "Square matrices (d, d) with the default options; MACs and FLOPs for one vector.",
        "",
        *cost_table(name),
        "",
        *structure_example(name),
        "## Class",
        "",
        f"```{{eval-rst}}\n.. autoclass:: structlin.{cls.__name__}\n   :members: design, random\n"
        f"   :inherited-members: LinearOperator\n   :exclude-members: {', '.join(hidden(cls))}\n```",
        "",
    ]
    return "\n".join(lines)


def hidden(cls: type) -> list[str]:
    """Return the inherited members of every operator, which the API of StructuredOperator describes."""
    return sorted(n for n, _ in inspect.getmembers(cls) if not n.startswith("_") and n not in ("design", "random"))


def structure_example(name: str) -> list[str]:
    structure = lettered(name, (1024, 1024))
    if not isinstance(structure, Structure):
        return []
    sizes = ", ".join(f"`{axis}` = {size}" for axis, size in structure.sizes)
    axes = [f"The sizes of the axes are {sizes}.", ""] if len(structure.sizes) < 10 else []
    return ["## Its steps at d = 1024", "", *axes, "```text", *str(structure).splitlines(), "```", ""]


def lettered(name: str, shape: tuple[int, int]) -> structlin.AbstractStructure:
    """Return the structure with the letters of its formula, if that has the same steps."""
    found = structlin.design(name, shape)
    formula = structlin.structure_class(name).formula
    if not isinstance(found, Structure) or formula.count("; ") + 1 != len(found.steps):
        return found
    own, wanted = ("; ".join(map(str, found.steps)), formula)
    letters = dict(zip(own, wanted, strict=False))
    if "".join(letters[c] for c in own) != wanted:
        return found
    sizes = {letters[axis]: size for axis, size in found.sizes}
    return Structure.parse(formula, **sizes, d_in=found.d_in, d_out=found.d_out)


def definition(name: str) -> list[str]:
    """Return the definition in TeX: a sum for each einsum of the formula, or the formula itself."""
    formula, _, note = structlin.structure_class(name).formula.partition(", ")
    steps = re.findall(r"(\w+),(\w+)->(\w+)", formula)
    if not steps:
        return [typeset(formula)]
    lines, read = [], "x"
    for k, (given, factor, made) in enumerate(steps):
        written = "y" if k == len(steps) - 1 else "z" if len(steps) == 2 else f"z^{{({k + 1})}}"
        summed = [axis for axis in given if axis in factor and axis not in made]
        total = rf"\sum_{{{', '.join(summed)}}} " if summed else ""
        lines.append(rf"{written}_{{{made}}} = {total}W^{{({k})}}_{{{factor}}} \, {read}_{{{given}}}")
        read = written
    return [*lines[:-1], lines[-1] + (rf" \quad \text{{({note})}}" if note else "")]


def typeset(text: str) -> str:
    r"""Return a formula of a docstring in TeX.

    Examples
    --------
    >>> typeset("y_i = sum_j kernel_(i - j) x_j"), typeset("d_in d_out / b")
    ('y_i = \\sum_j \\mathrm{kernel}_{i - j} x_j', 'd_\\text{in} d_\\text{out} / b')
    """
    text = re.sub(r"_(\w{2,})\((\w)\)", r"_{\\mathrm{\1}(\2)}", text)
    text = re.sub(r"_\(([^)]*)\)", r"_{\1}", text)
    text = re.sub(r"\bd_(in|out)\b", r"d_\\text{\1}", text)
    text = re.sub(r"\bkernel", r"\\mathrm{kernel}", text)
    return text.replace("sum_", "\\sum_").replace("log2(d)", "\\log_2 d").replace(" mod ", " \\bmod ")


def write_pages(app: Any) -> None:
    folder = Path(app.srcdir) / "structures" / "generated"
    folder.mkdir(parents=True, exist_ok=True)
    for name in structlin.structure_names():
        text = page(name, draw(name, folder / f"{name}.png"))
        target = folder / f"{name}.md"
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            target.write_text(text, encoding="utf-8")


def setup(app: Any) -> dict[str, Any]:
    app.connect("builder-inited", write_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
