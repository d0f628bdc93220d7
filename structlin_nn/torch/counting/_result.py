"""Results of a count: products by module, totals, a tree by module, and exports."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import import_module
from itertools import accumulate
from typing import Any

from structlin_nn._text import check_integer, occurrences, table


@dataclass
class CallCount:
    """Products of one kind in one module, summed over its calls.

    ``kind`` is ``linear`` (a weight times activations), ``convolution``, ``attention`` (score and value products),
    ``linalg`` (factorisations, solves), ``fft``, or ``product`` (of two activations). ``macs`` and ``backward_macs``
    are those of the two passes; ``recomputed_macs`` are those of the latter that the forward pass had computed before.
    ``other_flops`` and ``backward_other_flops`` are FLOPs that are no products, such as those of FFTs. ``rows`` are the
    vectors that a linear layer was applied to. ``moved`` and ``backward_moved`` are the numbers that the products read
    and write, each once; fused attention without the scores.
    """

    name: str
    kind: str
    module: str
    params: int
    in_features: int | None
    out_features: int | None
    macs: int = 0
    backward_macs: int = 0
    recomputed_macs: int = 0
    other_flops: int = 0
    backward_other_flops: int = 0
    calls: int = 0
    rows: int = 0
    moved: int = 0
    backward_moved: int = 0

    @property
    def training_macs(self) -> int:
        """MACs of the forward and the backward pass."""
        return self.macs + self.backward_macs


@dataclass
class ModuleCount:
    """Totals of a module and its children; see :meth:`ModelCount.tree`.

    ``share`` is the fraction of the model's forward MACs. ``params`` counts a shared parameter once for each module
    that uses it. Other fields are those of :class:`CallCount`; ``seconds`` is as in :class:`ModelCount`.
    """

    name: str
    module: str
    macs: int = 0
    backward_macs: int = 0
    other_flops: int = 0
    params: int = 0
    share: float = 0.0
    seconds: float | None = None
    children: list[ModuleCount] = field(default_factory=list)

    @property
    def flops_per_second(self) -> float | None:
        """FLOPs of the forward pass per second; None if it was not timed."""
        return (2 * self.macs + self.other_flops) / self.seconds if self.seconds else None

    def walk(self, depth: int = 0) -> Iterator[tuple[int, ModuleCount]]:
        """Yield (depth, count) of the module and of its descendants."""
        yield depth, self
        for child in self.children:
            yield from child.walk(depth + 1)


@dataclass
class ModelCount:
    """Result of :func:`count`. ``print`` shows a table by call, :meth:`format_tree` a table by module.

    Attributes
    ----------
    calls
        Products by module and kind, in the order of their first call.
    params, trainable_params, embedding_params
        Numbers of parameters: all of them (a shared one counts once), those that require a gradient, and those of the
        latter that belong to nn.Embedding.
    buffer_bytes
        Bytes of buffers.
    uncounted_ops, uncounted_moved
        Number of calls in the forward pass of each operation without products, and the numbers that these operations
        read and write.
    saved
        Floating numbers that the forward pass keeps for the backward pass on this device. Each array counts once,
        without parameters and buffers. Attention keeps what fused attention does: queries, keys, values, result, and
        the log-sum-exp of each query.
    saved_bytes
        Bytes of other kept values, such as masks and indices.
    saved_known
        Whether ``saved`` and ``saved_bytes`` were counted. :class:`Counting` does not count them, and they cannot be
        counted if the model uses ``torch.func.grad``.
    unknown_ops
        Number of calls, forward and backward, of each unknown operation. Their work is missing from all totals.
    param_bytes, trainable_bytes, saved_float_bytes
        Bytes of ``params``, ``trainable_params`` and ``saved`` in their own dtypes.
    dtype
        Name of the parameters' dtype; None for several dtypes or no parameters.
    backward_from, unreached_params
        What the backward pass starts from, as text: the loss, a number of results, or nothing; and the number of
        trainable parameters without a gradient.
    modules, seconds
        Type of each module that was called, by name, and the seconds of its forward pass if :func:`time_modules` timed
        it.
    """

    calls: list[CallCount]
    params: int
    trainable_params: int
    embedding_params: int
    buffer_bytes: int
    uncounted_ops: dict[str, int] = field(default_factory=dict)
    uncounted_moved: int = 0
    saved: int = 0
    saved_bytes: int = 0
    saved_known: bool = True
    unknown_ops: dict[str, int] = field(default_factory=dict)
    param_bytes: int = 0
    trainable_bytes: int = 0
    saved_float_bytes: int = 0
    dtype: str | None = None
    backward_from: str = "nothing"
    unreached_params: int = 0
    modules: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def macs(self, kind: str | None = None) -> int:
        """Return the forward MACs of all calls or of one kind."""
        return sum(c.macs for c in self.calls if kind in (None, c.kind))

    @property
    def training_macs(self) -> int:
        """MACs of the forward and the backward pass, including recomputation."""
        return sum(c.training_macs for c in self.calls)

    @property
    def recomputed_macs(self) -> int:
        """MACs of the backward pass that repeat the forward pass, under checkpointing or in fused attention."""
        return sum(c.recomputed_macs for c in self.calls)

    @property
    def other_flops(self) -> int:
        """FLOPs of the forward pass that are not MACs: of FFTs, and elementwise in structured layers."""
        return sum(c.other_flops for c in self.calls)

    @property
    def training_other_flops(self) -> int:
        """``other_flops`` of the forward and the backward pass."""
        return sum(c.other_flops + c.backward_other_flops for c in self.calls)

    @property
    def flops(self) -> int:
        """FLOPs of the forward pass: two for each MAC, plus ``other_flops``."""
        return 2 * self.macs() + self.other_flops

    @property
    def training_flops(self) -> int:
        """FLOPs of the forward and the backward pass: two for each MAC, plus ``training_other_flops``."""
        return 2 * self.training_macs + self.training_other_flops

    def tree(self, depth: int | None = None) -> ModuleCount:
        """Return the counts as a tree of modules, each with the totals of its descendants.

        Parameters
        ----------
        depth
            Number of levels below the model; default all. Deeper modules are included in their ancestors.

        Raises
        ------
        ValueError
            If ``depth`` is not an integer of at least 0.

        Examples
        --------
        >>> import torch
        >>> from torch import nn
        >>> from structlin_nn.torch import count
        >>> model = nn.Sequential(nn.Linear(8, 6), nn.Sequential(nn.ReLU(), nn.Linear(6, 2)))
        >>> [(d, m.name, m.macs, m.share) for d, m in count(model, torch.zeros(1, 8)).tree().walk() if m.macs]
        [(0, '', 60, 1.0), (1, '0', 48, 0.8), (1, '1', 12, 0.2), (2, '1.1', 12, 0.2)]
        """
        if depth is not None:
            check_integer("depth", depth, 0)
        root = ModuleCount("", self.modules.get("", "(all)"), seconds=self.seconds.get(""))
        nodes = {"": root}

        def path(name: str) -> list[ModuleCount]:
            """Return the nodes from the root to a module, or to its ancestor at ``depth``."""
            found, parts = [root], name.split(".")[:depth] if name else []
            for inside in accumulate(parts, "{}.{}".format):
                if inside not in nodes:
                    nodes[inside] = ModuleCount(inside, self.modules.get(inside, ""), seconds=self.seconds.get(inside))
                    found[-1].children.append(nodes[inside])
                found.append(nodes[inside])
            return found

        for name in self.modules:
            path(name)
        for call in self.calls:
            for found in path(call.name):
                found.macs += call.macs
                found.backward_macs += call.backward_macs
                found.other_flops += call.other_flops
                found.params += call.params
        for found in nodes.values():
            found.share = found.macs / root.macs if root.macs else 0.0
        return root

    def format_tree(self, depth: int | None = None) -> str:
        """Return :meth:`tree` as a table of MACs and shares, with time (ms) and GFLOP/s if it was timed."""
        head = ["module", "type", "params", "MACs", "share", "training MACs"]
        head += ["ms", "GFLOP/s"] if self.seconds else []
        rows = []
        for level, m in self.tree(depth).walk():
            cells = ["  " * level + (m.name.rpartition(".")[2] or "(model)"), m.module, f"{m.params:,}"]
            cells += [f"{m.macs:,}", f"{100 * m.share:.1f} %", f"{m.macs + m.backward_macs:,}"]
            cells.append("" if m.seconds is None else f"{1e3 * m.seconds:.3f}")
            cells.append("" if m.flops_per_second is None else f"{m.flops_per_second / 1e9:.3g}")
            rows.append(cells[: len(head)])
        return table(head, rows, left=2, rule=False)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields and totals as a dict that ``json.dumps`` accepts."""
        totals = ("training_macs", "recomputed_macs", "other_flops", "training_other_flops", "flops", "training_flops")
        return asdict(self) | {"macs": self.macs()} | {name: getattr(self, name) for name in totals}

    def to_json(self, **options: Any) -> str:
        """Return :meth:`to_dict` as JSON; ``options`` are those of ``json.dumps``."""
        return json.dumps(self.to_dict(), **options)

    def to_dataframe(self) -> Any:
        """Return a pandas.DataFrame with a row for each entry of ``calls``. ImportError without pandas."""
        try:
            pandas = import_module("pandas")
        except ImportError as error:
            raise ImportError("to_dataframe needs pandas: pip install pandas") from error
        return pandas.DataFrame([asdict(call) | {"training_macs": call.training_macs} for call in self.calls])

    def __str__(self) -> str:
        head = ["module", "kind", "type", "in", "out", "params", "calls", "MACs", "training MACs"]
        rows = []
        for c in self.calls:
            numbers = (c.in_features, c.out_features, c.params, c.calls, c.macs, c.training_macs)
            rows.append([c.name or "(model)", c.kind, c.module, *("" if n is None else f"{n:,}" for n in numbers)])
        missing = format_unknown(self.unknown_ops)
        lines = [*([missing] if missing else []), table(head, rows, left=3, rule=False), ""]
        note = f"  without {missing}" if missing else ""
        reached = f", {self.unreached_params:,} parameters without a gradient" if self.unreached_params else ""
        kinds = dict.fromkeys(c.kind for c in self.calls if c.kind != "fft")
        totals = [
            ("parameters", self.params, ""), ("  trainable", self.trainable_params, ""),
            ("  embeddings", self.embedding_params, ""), ("forward MACs", self.macs(), note),
            *((f"  {kind}", self.macs(kind), "") for kind in kinds),
            ("training MACs", self.training_macs, f"  backward from {self.backward_from}{reached}{note}"),
        ]  # fmt: skip
        if self.recomputed_macs:
            totals.append(("  computed again", self.recomputed_macs, ""))
        if self.other_flops:
            totals.append(("other FLOPs, forward", self.other_flops, ""))
            totals.append(("other FLOPs, training", self.training_other_flops, ""))
        lines += [f"{label:<24}{number:>20,}{more}" for label, number, more in totals]
        return "\n".join([*lines, f"not counted (no products): {occurrences(self.uncounted_ops) or 'none'}"])


def format_unknown(unknown: dict[str, int]) -> str:
    """Return a text that names the operations missing from a total; empty if there are none."""
    return f"UNKNOWN operations: {occurrences(unknown)}" if unknown else ""
