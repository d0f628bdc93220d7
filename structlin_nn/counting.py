"""Parameters and multiply-accumulates (MACs) of torch models, counted from the calls that a forward pass makes.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from structlin.structure import AbstractStructure, Structure
from structlin_nn.models import MODELS, StructureConfig, base_model, build_model
from structlin_nn.torch import StructuredLinear, parameter_groups

aten = torch.ops.aten


@dataclass
class CallCount:
    """Products of one kind in one module, summed over its calls.

    ``kind``: ``linear`` (a weight times activations), ``convolution``, ``attention`` (score and value products) or
    ``product`` (of two activations). ``rows``: vectors that a linear layer was applied to. ``macs`` of the forward,
    ``backward_macs`` of the backward pass; ``other_flops``: work of structured layers that is no product, such as
    FFTs, in FLOPs of the forward pass.
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


@dataclass
class ModelCount:
    """What :func:`count` returns: calls in the order in which they are first made, and totals."""

    calls: list[CallCount]
    trainable_params: int
    embedding_params: int
    uncounted_ops: dict[str, int] = field(default_factory=dict)

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
    with torch.enable_grad(), recorder.hooks(), recorder, _AttentionCalls(recorder):
        model(*inputs, **kwargs)
    embeddings = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters() if p.requires_grad}
    return ModelCount(
        calls=list(recorder.calls.values()),
        trainable_params=sum(p.numel() for p in model.parameters() if p.requires_grad),
        embedding_params=sum(p.numel() for p in embeddings),
        uncounted_ops=dict(sorted(recorder.uncounted.items())),
    )


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
        call.other_flops += rows * sum(structure.other_flops.values()) + sum(structure.setup_flops.values())

    def add(
        self, kind: str, macs: int, backward: int, d_in: int | None = None, d_out: int | None = None, rows: int = 0
    ) -> CallCount:
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
        call.calls += 1
        return call

    def product(self, a: Tensor, b: Tensor) -> None:
        """Count ``a @ b``, of shapes (..., n, k) and (..., k, m), or (n, k) and (k,)."""
        columns = b.shape[-1] if b.ndim > 1 else 1
        macs = a.numel() * columns
        backward = macs * (a.requires_grad + b.requires_grad)
        if self._is_weight(b):
            self.add("linear", macs, backward, a.shape[-1], columns, a.numel() // a.shape[-1])
        elif self._is_weight(a):
            self.add("linear", macs, backward, a.shape[-1], a.shape[-2] if a.ndim > 1 else 1, columns)
        else:
            self.add("product", macs, backward)

    def convolution(self, x: Tensor, weight: Tensor, output: Tensor, transposed: bool) -> None:
        """Each output element (transposed: input element) meets one kernel over the channels of its group."""
        macs = (x if transposed else output).numel() * math.prod(weight.shape[1:])
        backward = macs * (x.requires_grad + weight.requires_grad)
        self.add("convolution", macs, backward, x.shape[1], output.shape[1])

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Scores (queries times keys) and values (weights times values), of shape (..., tokens, size)."""
        pairs = q.numel() // q.shape[-1] * k.shape[-2]
        scores, values = pairs * q.shape[-1], pairs * v.shape[-1]
        flows = q.requires_grad or k.requires_grad
        self.add(
            "attention",
            scores + values,
            scores * (q.requires_grad + k.requires_grad) + values * (flows + v.requires_grad),
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
        self.recorder.opaque += 1
        try:
            return func(*args, **kwargs)
        finally:
            self.recorder.opaque -= 1


def count_model(
    name: str,
    *,
    width: int,
    base_width: int | None = None,
    structure: str = "dense",
    rank: int | Sequence[int] | None = None,
    rank_fraction: float | None = None,
    blocks: int | None = None,
    factorization: str | None = None,
    options: Mapping[str, Any] | None = None,
    rms_cap: bool = False,
    rule: str = "paper",
    layers: str | None = None,
    optimizer: str = "adam",
    num_classes: int | None = None,
    heads: int | None = None,
    head_dim: int | None = None,
    **sizes: Any,
) -> dict[str, Any]:
    """Count one of :data:`structlin_nn.models.MODELS`, for one sample (GPT-2: one sequence of full length).

    Args:
        name: ``cifar-mlp``, ``cifar-vit``, ``imagenet-vit`` or ``gpt2``.
        width: features of the residual stream.
        base_width: width at which the learning rate was tuned; default: the paper's.
        structure: a registered name.
        rank, rank_fraction, blocks, factorization: options of the structure; None: its default.
        options: further options of the structure, by name.
        rms_cap, rule, layers: as in :class:`structlin_nn.models.StructureConfig`.
        optimizer: whose learning-rate multipliers to list (:func:`structlin.lr_multipliers`).
        num_classes, heads, head_dim: sizes of the model; None: the named model's.
        **sizes: further sizes (``MODELS[name].options``).

    Returns:
        A record that ``json.dumps`` takes. ``forward_macs`` and ``training_macs`` (forward and backward) are MACs;
        ``attention_macs`` (scores and values) and ``head_macs`` are parts of ``forward_macs``, ``embedding_params``
        is a part of ``trainable_params``. ``layers`` lists every linear layer, in order, with its factors in the
        order in which they are applied; ``params`` includes bias and gains. ``other_params`` lists the rest, so
        that the ``params`` of the layers and the sizes of ``other_params`` add up to ``trainable_params``.
        ``uncounted_ops`` names operations that are no products, and how often they run.

    Raises:
        ValueError: unknown model, structure, preset or size; an option that the structure or model does not have;
            sizes that do not fit.

    >>> record = count_model("cifar-mlp", width=128, structure="block_tensor_train", rank=1, factorization="greedy")
    >>> record["trainable_params"], record["forward_macs"], len(record["layers"])
    (96266, 93440, 8)
    >>> record["layers"][0]["factors"][1]["lr_multiplier"]
    1.6
    """
    given = {"rank": rank, "rank_fraction": rank_fraction, "blocks": blocks, "factorization": factorization}
    chosen = {key: value for key, value in given.items() if value is not None}
    if twice := chosen.keys() & (options or {}):
        raise ValueError(f"options {', '.join(sorted(twice))} are given twice")
    config = StructureConfig(structure, {**chosen, **(options or {})}, layers=layers, rms_cap=rms_cap, rule=rule)
    named = {"num_classes": num_classes, "heads": heads, "head_dim": head_dim}
    sizes |= {key: value for key, value in named.items() if value is not None}

    model = build_model(name, width=width, structure=config, device="meta", **sizes)
    base = base_model(name, base_width, **sizes)
    spec = MODELS[name]
    groups = parameter_groups(model, base, lr=1.0, optimizer=optimizer, extra_multipliers=spec.extra_multipliers)
    multipliers = {n: group["multiplier"] for group in groups for n in group["names"]}
    counted = count(model, model.example_input(device="meta"))
    calls = {call.name: call for call in counted.calls if call.kind == "linear"}
    linear = {n: m for n, m in model.named_modules() if isinstance(m, StructuredLinear)}
    owned = {id(p) for m in linear.values() for p in m.parameters()}
    rows = [_layer(calls[n], m, multipliers) for n, m in linear.items()]
    return {
        "model": name,
        "structure": structure,
        "options": dict(config.options),
        "layers_preset": layers or spec.layers,
        "rms_cap": rms_cap,
        "rule": rule,
        "optimizer": optimizer,
        "width": width,
        "base_width": base.config.width,
        "sizes": {key: getattr(model.config, key) for key in spec.options},
        "trainable_params": counted.trainable_params,
        "embedding_params": counted.embedding_params,
        "head_params": rows[-1]["params"],
        "forward_macs": counted.macs(),
        "attention_macs": counted.macs("attention"),
        "head_macs": rows[-1]["macs"],
        "training_macs": counted.training_macs,
        "other_flops": counted.other_flops,
        "tokens": max(row["rows"] for row in rows),
        "layers": rows,
        "attention": [{"name": c.name, "macs": c.macs} for c in counted.calls if c.kind == "attention"],
        "other_params": [
            {"name": n, "shape": list(p.shape), "lr_multiplier": multipliers[n]}
            for n, p in model.named_parameters()
            if id(p) not in owned
        ],
        "uncounted_ops": counted.uncounted_ops,
    }


def _layer(call: CallCount, layer: StructuredLinear, multipliers: Mapping[str, float]) -> dict[str, Any]:
    factors = [(f, std) for f, std in zip(layer.structure.factors, layer.init_std, strict=True) if f.trainable]
    return {
        "name": call.name,
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "params": call.params,
        "macs": call.macs,
        "rows": call.rows,
        "bias": layer.bias is not None,
        "gains": 0 if layer.gains is None else len(layer.gains),
        "factors": [
            {
                "numel": f.numel,
                "fan_in": f.fan_in,
                "fan_out": f.fan_out,
                "blocks": f.blocks,
                "init_std": std,
                "lr_multiplier": multipliers[f"{call.name}.factors.{number}"],
            }
            for number, (f, std) in enumerate(factors)
        ],
    }


def format_count(record: Mapping[str, Any]) -> str:
    """A record of :func:`count_model` as a table to read.

    >>> print(format_count(count_model("cifar-mlp", width=64, depth=1)))  # doctest: +ELLIPSIS
    cifar-mlp, width 64 (base 64), dense
    ...
    """
    options = "".join(f" {key}={value}" for key, value in record["options"].items())
    cap = ", RMS-capped" if record["rms_cap"] else ""
    lines = [
        f"{record['model']}, width {record['width']} (base {record['base_width']}), {record['structure']}{options}"
        f"{cap}",
        "",
    ]
    table = [("layer", "in", "out", "params", "MACs", "factor", "numel", "fan in", "fan out", "blocks", "init std",
              f"lr ({record['optimizer']})")]  # fmt: skip
    for layer in record["layers"]:
        head = (layer["name"], *(f"{layer[key]:,}" for key in ("in_features", "out_features", "params", "macs")))
        for number, f in enumerate(layer["factors"]):
            cells = (str(number), *(f"{f[key]:,}" for key in ("numel", "fan_in", "fan_out", "blocks")))
            scale = (f"{f['init_std']:.4g}", f"{f['lr_multiplier']:.4g}")
            table.append((*(head if number == 0 else ("",) * 5), *cells, *scale))
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines += [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in table
    ]
    totals = (
        ("trainable parameters", "trainable_params"),
        ("  of them embeddings", "embedding_params"),
        ("  of them head", "head_params"),
        ("forward MACs, one sample", "forward_macs"),
        ("  of them attention", "attention_macs"),
        ("  of them head", "head_macs"),
        ("training MACs, one sample", "training_macs"),
        ("other FLOPs of structures", "other_flops"),
    )
    lines += ["", *(f"{label:<28}{record[key]:>18,}" for label, key in totals)]
    uncounted = ", ".join(f"{name} x{number}" for name, number in record["uncounted_ops"].items())
    return "\n".join([*lines, f"not counted (no products): {uncounted}"])
