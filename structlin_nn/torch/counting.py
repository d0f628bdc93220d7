"""Parameters, multiply-accumulates (MACs) and saved activations of torch models, counted from a forward pass.

Structured layers are counted by their structure times the vectors they are called on; every other product
(``nn.Linear``, convolutions, attention, bare matrix products) by the operands that torch is called with. Nothing is
estimated from parameter counts. What is no product (norms, activations, softmax, lookups) is listed by name and
number of calls. Run models on the meta device to count them without allocating anything.

1 MAC = 2 FLOPs. Attention is counted in full, without a discount for a causal mask.

Training: the backward pass has, for each product of the forward pass, one product for each operand that needs a
gradient, so a training step costs three times the forward pass, less the gradients that nobody asks for (that of the
data, those of frozen parameters). Which ones are needed is read off the call. Recomputation, as in
FlashAttention's backward pass or in activation checkpointing, is not included.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from structlin.counting import work as structure_work
from structlin.structure import AbstractStructure, Structure
from structlin_nn.torch.linear import StructuredLinear

__all__ = ["CallCount", "ModelCount", "backward_macs", "count"]

aten = torch.ops.aten


@dataclass
class CallCount:
    """Products of one kind in one module, summed over its calls.

    ``kind``: ``linear`` (a weight times activations), ``convolution``, ``attention`` (score and value products) or
    ``product`` (of two activations). ``rows``: vectors that a linear layer was applied to. ``macs`` of the forward,
    ``backward_macs`` of the backward pass; ``other_flops``: work of structured layers that is no product, such as
    FFTs, in FLOPs of the forward pass. ``moved``: how many numbers the products of the forward pass read and write,
    each of them its operands and its result once, fused attention without the scores.
    """

    name: str
    kind: str
    module: str
    params: int
    in_features: int | None
    out_features: int | None
    macs: int = 0
    backward_macs: int = 0
    other_flops: int = 0
    calls: int = 0
    rows: int = 0
    moved: int = 0

    @property
    def backward_moved(self) -> int:
        """``moved`` of the backward pass: each of its products moves as many numbers as the one it belongs to."""
        return round(self.moved * self.backward_macs / self.macs) if self.macs else 0


@dataclass
class ModelCount:
    """What :func:`count` returns; ``print`` it for a table.

    Attributes:
        calls: in the order in which they are first made.
        params: number of parameters, a shared one once.
        trainable_params: those with a gradient.
        embedding_params: those of nn.Embedding, likewise trainable.
        buffer_bytes: of the module's buffers.
        uncounted_ops: operations that are no products, and how often they run in the forward pass.
        uncounted_moved: numbers that these read and write.
        saved: floating numbers that the forward pass keeps for the backward pass, as these modules on this device
            do it: each array once, without parameters and buffers, attention as where it is fused (queries, keys,
            values, result, and the log-sum-exp of each query).
        saved_bytes: bytes of what is kept beside, such as masks and indices.
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

    def macs(self, kind: str | None = None) -> int:
        """Forward MACs, of all calls or of one kind."""
        return sum(c.macs for c in self.calls if kind in (None, c.kind))

    @property
    def training_macs(self) -> int:
        """MACs of the forward and the backward pass."""
        return sum(c.macs + c.backward_macs for c in self.calls)

    @property
    def other_flops(self) -> int:
        """FLOPs of the forward pass of structured layers that are no products."""
        return sum(c.other_flops for c in self.calls)

    def __str__(self) -> str:
        head = ("module", "kind", "type", "in", "out", "params", "calls", "MACs", "training MACs")
        rows = [
            (
                c.name or "(model)", c.kind, c.module, *("" if n is None else f"{n:,}" for n in (c.in_features,
                c.out_features)), f"{c.params:,}", f"{c.calls:,}", f"{c.macs:,}", f"{c.macs + c.backward_macs:,}",
            )
            for c in self.calls
        ]  # fmt: skip
        widths = [max(map(len, cells)) for cells in zip(head, *rows, strict=True)]
        lines = [
            "  ".join(c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in (head, *rows)
        ]
        kinds = {c.kind: self.macs(c.kind) for c in self.calls}
        lines += ["", f"{'parameters':<24}{self.params:>20,}", f"{'  trainable':<24}{self.trainable_params:>20,}"]
        lines += [f"{'  embeddings':<24}{self.embedding_params:>20,}", f"{'forward MACs':<24}{self.macs():>20,}"]
        lines += [f"{'  ' + kind:<24}{macs:>20,}" for kind, macs in kinds.items()]
        lines += [f"{'training MACs':<24}{self.training_macs:>20,}"]
        uncounted = ", ".join(f"{name} x{number}" for name, number in self.uncounted_ops.items())
        return "\n".join([*lines, f"not counted (no products): {uncounted or 'none'}"])


def count(model: nn.Module, *inputs: Any, **kwargs: Any) -> ModelCount:
    """Count the products of ``model(*inputs, **kwargs)``, module by module.

    The model is run once as it is (device, mode, gradients); tensors on the meta device cost nothing. Totals are
    those of the whole batch that was passed in.

    Raises:
        TypeError: ``model`` is no module.

    >>> model = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), StructuredLinear(5, 6, structure="low_rank", rank=2))
    >>> c = count(model, torch.zeros(3, 8))
    >>> [(call.name, call.macs) for call in c.calls], c.macs(), c.training_macs, c.uncounted_ops
    ([('0', 120), ('2', 66)], 186, 438, {'aten.relu': 1})
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a torch module is needed, got {model!r}")
    recorder = _Recorder(model)
    with torch.enable_grad(), recorder.hooks(), recorder.saving(), recorder, _AttentionCalls(recorder):
        model(*inputs, **kwargs)
    embeddings = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters() if p.requires_grad}
    saved = recorder.saved.values()
    return ModelCount(
        calls=list(recorder.calls.values()),
        params=sum(p.numel() for p in model.parameters()),
        trainable_params=sum(p.numel() for p in model.parameters() if p.requires_grad),
        embedding_params=sum(p.numel() for p in embeddings),
        buffer_bytes=sum(b.numel() * b.element_size() for b in model.buffers()),
        uncounted_ops=dict(sorted(recorder.uncounted.items())),
        uncounted_moved=recorder.moved,
        saved=recorder.saved_more + sum(_elements(t) for t in saved if t.is_floating_point() or t.is_complex()),
        saved_bytes=sum(t.untyped_storage().nbytes() for t in saved if not (t.is_floating_point() or t.is_complex())),
    )


def _elements(x: Tensor) -> int:
    """Numbers in the whole storage, of which a view keeps all."""
    return x.untyped_storage().nbytes() // x.element_size()


def backward_macs(structure: AbstractStructure, needs_input: bool, needs_factors: Sequence[bool]) -> int:
    """MACs of a layer's backward pass, for one vector.

    Step k of a chain multiplies its input and its factor; the gradient of either costs as much as the product. The
    input's is needed where that of the layer's input or of an earlier factor is. A structure that is no chain counts
    as one product.

    >>> chain = Structure.parse("i,ri->r; r,or->o", i=8, r=2, o=6)
    >>> chain.macs, backward_macs(chain, True, (True, True)), backward_macs(chain, False, (True, True))
    (28, 56, 40)
    """
    if not isinstance(structure, Structure):
        return structure.macs * (needs_input + any(needs_factors))
    total, flows = 0, needs_input
    for factor, needed in zip(structure.factors, needs_factors, strict=True):
        total += factor.numel * factor.carried * (flows + needed)
        flows = flows or needed
    return total


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata  # unlike data_ptr(), distinct on the meta device too


class _Recorder(TorchDispatchMode):
    """Counts the products among the operations that reach torch's dispatcher, and notes the other operations."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {module: name for name, module in model.named_modules()}
        self.weights = {id(p) for p in model.parameters()}
        self.stack: list[nn.Module] = []
        self.opaque = 0  # above 0 inside calls that are counted as a whole
        self.calls: dict[tuple[str, str], CallCount] = {}
        self.uncounted: Counter[str] = Counter()
        self.moved = 0
        self.attending = False
        self.own = {_storage(t) for t in (*model.parameters(), *model.buffers())}
        self.saved: dict[int, Tensor] = {}  # by storage; holding the tensor keeps its place from being used again
        self.saved_more = 0

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Note what autograd keeps for the backward pass."""

        def pack(x: Tensor) -> Tensor:
            if not self.attending:
                self.save(x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            yield

    def save(self, x: Tensor) -> None:
        if (where := _storage(x)) not in self.own:
            self.saved[where] = x.detach()

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Follow which module is being called."""
        handles = []
        for module in self.names:
            handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.stack.append(module)
        self.opaque += isinstance(module, StructuredLinear)

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if isinstance(module, StructuredLinear):
            self.opaque -= 1
            self._structured(module, next(iter((*args, *kwargs.values()))))
        self.stack.pop()

    def _structured(self, module: StructuredLinear, x: Tensor) -> None:
        structure = module.structure
        rows = x.numel() // structure.d_in
        parameters = iter(module.factors)
        needed = [f.trainable and next(parameters).requires_grad for f in structure.factors]
        backward = rows * backward_macs(structure, x.requires_grad, needed)
        call = self.add("linear", rows * structure.macs, backward, structure.d_in, structure.d_out, rows)
        call.moved += sum(f.numel for f in structure.factors) + rows * (structure_work(structure).activations or 0)
        call.other_flops += rows * sum(structure.other_flops.values()) + sum(structure.setup_flops.values())

    def add(
        self, kind: str, macs: int, backward: int, d_in: int | None = None, d_out: int | None = None, rows: int = 0,
        moved: int = 0,
    ) -> CallCount:  # fmt: skip
        """Add to the count of the module that is being called."""
        module = self.stack[-1]
        key = (self.names[module], kind)
        if key not in self.calls:
            owned = module.parameters(recurse=isinstance(module, StructuredLinear))
            params = sum(p.numel() for p in owned if p.requires_grad) if kind in ("linear", "convolution") else 0
            self.calls[key] = CallCount(*key, type(module).__name__, params, d_in, d_out)
        call = self.calls[key]
        call.macs += macs
        call.backward_macs += backward
        call.rows += rows
        call.moved += moved
        call.calls += 1
        return call

    def product(self, a: Tensor, b: Tensor) -> None:
        """Count ``a @ b``, of shapes (..., n, k) and (..., k, m), or (n, k) and (k,)."""
        columns = b.shape[-1] if b.ndim > 1 else 1
        macs = a.numel() * columns
        backward = macs * (a.requires_grad + b.requires_grad)
        moved = a.numel() + b.numel() + macs // max(a.shape[-1], 1)
        if self._is_weight(b):
            self.add("linear", macs, backward, a.shape[-1], columns, a.numel() // a.shape[-1], moved)
        elif self._is_weight(a):
            self.add("linear", macs, backward, a.shape[-1], a.shape[-2] if a.ndim > 1 else 1, columns, moved)
        else:
            self.add("product", macs, backward, moved=moved)

    def convolution(self, x: Tensor, weight: Tensor, output: Tensor, transposed: bool) -> None:
        """Each output element (transposed: input element) meets one kernel over the channels of its group."""
        macs = (x if transposed else output).numel() * math.prod(weight.shape[1:])
        backward = macs * (x.requires_grad + weight.requires_grad)
        moved = x.numel() + weight.numel() + output.numel()
        self.add("convolution", macs, backward, x.shape[1], output.shape[1], moved=moved)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Scores (queries times keys) and values (weights times values), of shape (..., tokens, size)."""
        pairs = q.numel() // q.shape[-1] * k.shape[-2]
        scores, values = pairs * q.shape[-1], pairs * v.shape[-1]
        flows = q.requires_grad or k.requires_grad
        self.add(
            "attention",
            scores + values,
            scores * (q.requires_grad + k.requires_grad) + values * (flows + v.requires_grad),
            moved=q.numel() + k.numel() + v.numel() + q.numel() // q.shape[-1] * v.shape[-1],
        )

    def _is_weight(self, x: Tensor) -> bool:
        return id(x) in self.weights or (x._is_view() and id(x._base) in self.weights)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet not in _PRODUCTS and packet not in _FREE:
            with self:
                output = func.decompose(*args, **kwargs)  # without autograd, composite operations arrive whole
            if output is not NotImplemented:
                return output
        output = func(*args, **kwargs)
        if self.opaque:
            return output
        if packet in _PRODUCTS:
            _PRODUCTS[packet](self, args, output)
        elif not func.is_view and packet not in _FREE:
            self.uncounted[str(packet)] += 1
            leaves = torch.utils._pytree.tree_leaves((args, kwargs, output))
            self.moved += sum(x.numel() for x in leaves if isinstance(x, Tensor))
        return output


_PRODUCTS: dict[Any, Callable[[_Recorder, tuple, Any], None]] = {
    aten.mm: lambda recorder, args, output: recorder.product(args[0], args[1]),
    aten.bmm: lambda recorder, args, output: recorder.product(args[0], args[1]),
    aten.mv: lambda recorder, args, output: recorder.product(args[0], args[1]),
    aten.dot: lambda recorder, args, output: recorder.product(args[0], args[1]),
    aten.addmm: lambda recorder, args, output: recorder.product(args[1], args[2]),
    aten.baddbmm: lambda recorder, args, output: recorder.product(args[1], args[2]),
    aten.addmv: lambda recorder, args, output: recorder.product(args[1], args[2]),
    aten.convolution: lambda recorder, args, output: recorder.convolution(args[0], args[1], output, args[6]),
    **{
        getattr(aten, f"_scaled_dot_product_{name}"): lambda recorder, args, output: recorder.attention(*args[:3])
        for name in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
    },
}
# Operations that only name, share or reinterpret memory, beside views.
_FREE = {aten.detach, aten._unsafe_view, aten.alias, aten.lift_fresh, aten.empty, aten.empty_like}


class _AttentionCalls(TorchFunctionMode):
    """Counts scaled_dot_product_attention as a whole: what it is made of depends on device and dtype."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention or self.recorder.opaque:
            return func(*args, **kwargs)
        named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        self.recorder.attention(named["query"], named["key"], named["value"])
        recorder = self.recorder
        before, recorder.attending = recorder.attending, True
        recorder.opaque += 1
        try:
            output = func(*args, **kwargs)
        finally:
            recorder.opaque -= 1
            recorder.attending = before
        if output.requires_grad:
            for x in (named["query"], named["key"], named["value"], output):
                recorder.save(x)
            recorder.saved_more += output.numel() // output.shape[-1]
        return output
