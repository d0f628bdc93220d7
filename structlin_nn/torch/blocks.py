"""MLPs and projections whose layers run as one pass over the tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from structlin.execution._guard import transforming
from structlin.execution.blocks import torch_block, trains
from structlin.structure import Structure
from structlin_nn._text import check_known
from structlin_nn.torch._block_operator import TOKENS, graph_pass
from structlin_nn.torch._modules import check_model
from structlin_nn.torch.experts import StructuredExperts
from structlin_nn.torch.linear import StructuredLinear, cast_to, values

__all__ = ["ACTIVATIONS", "StructuredMLP", "fuse_mlps", "mlp", "projections"]

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
"""Activation functions by name: ``gelu`` (exact), ``gelu_tanh`` (approximate), ``relu`` and ``silu``."""

_PLAIN = (Tensor, nn.Parameter)  # no subclass, such as quantised or distributed parameters
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def mlp(
    x: Tensor, up: nn.Module, down: nn.Module, activation: str = "gelu", *, gate: nn.Module | None = None,
    norm: nn.Module | None = None, residual: bool = False,
) -> Tensor:  # fmt: skip
    """Return ``down(activation(up(x)))``, or with a gate ``down(activation(gate(x)) * up(x))``.

    The result equals that of the modules called one after the other. If all layers are :class:`StructuredLinear` on a
    CPU and it is faster, they run as one compiled pass over blocks of a few tokens. The hidden features are then not
    stored; the backward pass computes them again from ``x``. Under autocast the products run in its dtype, and the norm
    and the sum with ``x`` are not part of the pass.

    Under ``torch.compile`` the pass is one node of the graph, if it is faster. The layers run one after the other under
    export, ``torch.func`` transformations and dispatch modes, if a module has hooks, and for other devices, dtypes and
    structures.

    Parameters
    ----------
    x
        Floating tensor of shape (..., d).
    up, down
        Layers d -> hidden and hidden -> d_out.
    activation
        A name in :data:`ACTIVATIONS`.
    gate
        Layer d -> hidden of a gated MLP (Shazeer, *GLU Variants Improve Transformer*, 2020).
    norm
        Module that is applied to ``x`` first. ``nn.LayerNorm`` and ``nn.RMSNorm`` over the last axis can be part of the
        pass.
    residual
        Add ``x`` to the result. This requires d_out = d.

    Examples
    --------
    >>> up, down = (StructuredLinear(*s, structure="monarch", blocks=4) for s in ((32, 128), (128, 32)))
    >>> x = torch.randn(3, 7, 32)
    >>> torch.allclose(mlp(x, up, down), down(F.gelu(up(x))), atol=1e-5)
    True
    """
    function, autocast, h = _function(activation), torch.is_autocast_enabled("cpu"), x
    if norm is not None and autocast:  # its dtype differs from that of the products, as does that of the sum with x
        h, norm = norm(x), None
    first, inside = [up] if gate is None else [gate, up], residual and not autocast
    found = _one_pass(h, first, down, activation, norm, inside)
    if found is not None:
        y = found[0]
    else:
        h = h if norm is None else norm(h)
        y = down(function(up(h)) if gate is None else function(gate(h)) * up(h))
    if residual and (found is None or not inside):
        if y.shape != x.shape:
            raise ValueError(
                f"residual needs an output of the shape of the input, {tuple(x.shape)}, got {tuple(y.shape)}"
            )
        y = x + y
    return y


def projections(x: Tensor, layers: Sequence[nn.Module], norm: nn.Module | None = None) -> tuple[Tensor, ...]:
    """Return ``layer(norm(x))`` for each of several layers, such as query, key and value of an attention layer.

    The layers run as one pass over ``x``, of shape (..., d), if that is possible and faster, as in :func:`mlp`.

    Examples
    --------
    >>> layers = [StructuredLinear(32, size, structure="monarch", blocks=4) for size in (32, 16, 16)]
    >>> [tuple(y.shape) for y in projections(torch.randn(5, 32), layers)]
    [(5, 32), (5, 16), (5, 16)]
    """
    if norm is not None and torch.is_autocast_enabled("cpu"):  # its dtype differs from that of the products
        x, norm = norm(x), None
    found = _one_pass(x, layers, None, None, norm, False)
    if found is not None:
        return found
    h = x if norm is None else norm(x)
    return tuple(layer(h) for layer in layers)


class StructuredMLP(nn.Module):
    """MLP of structured layers, computed by :func:`mlp`: (..., in_features) -> (..., out_features).

    It is built from existing layers. ``names`` are the attributes under which the layers are registered, so the state
    dict can be that of the module that it replaces: ``("fc1", "fc2")`` in timm, ``("c_fc", "c_proj")`` in GPT-2 of
    transformers, ``("up_proj", "down_proj", "gate_proj")`` in Llama.

    Parameters
    ----------
    up, down, gate, activation
        As in :func:`mlp`.
    names
        Names of up, down and gate.
    dropout
        Probability of the dropout after the last layer in training.

    Examples
    --------
    >>> up, down = (StructuredLinear(*s, structure="monarch", blocks=4) for s in ((32, 128), (128, 32)))
    >>> block = StructuredMLP(up, down, names=("fc1", "fc2"))
    >>> block(torch.ones(3, 32)).shape, sorted(block.state_dict())[0]
    (torch.Size([3, 32]), 'fc1.bias')
    """

    def __init__(
        self, up: nn.Module, down: nn.Module, activation: str = "gelu", *, gate: nn.Module | None = None,
        names: Sequence[str] = (), dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        _function(activation)
        layers = [up, down] if gate is None else [up, down, gate]
        names = tuple(names) or ("up", "down", "gate")[: len(layers)]
        if len(names) != len(layers):
            raise ValueError(f"names must have one entry for each of the {len(layers)} layers, got {names}")
        sizes = [(getattr(layer, "in_features", None), getattr(layer, "out_features", None)) for layer in layers]
        if sizes[0][1] != sizes[1][0] or (gate is not None and sizes[2] != sizes[0]):
            raise ValueError(
                f"the sizes of the layers do not match: (in, out) of {', '.join(names)} are "
                f"{', '.join(map(str, sizes))}"
            )
        self.activation, self.names = activation, names
        for name, layer in zip(names, layers, strict=True):
            self.add_module(name, layer)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Apply the MLP: (..., in_features) -> (..., out_features)."""
        up, down, *gate = (self.get_submodule(name) for name in self.names)
        y = mlp(x, up, down, self.activation, gate=gate[0] if gate else None)
        return F.dropout(y, self.dropout, self.training) if self.dropout else y

    def __prepare_scriptable__(self) -> StructuredMLP:
        """Raise TypeError: the passes over a block are not in the subset of Python that ``torch.jit`` compiles."""
        raise TypeError("torch.jit.script cannot compile a StructuredMLP; use torch.export.export, or replace_linear "
                        "without fuse=True")  # fmt: skip

    def extra_repr(self) -> str:
        """Describe the block for ``print``."""
        return f"activation={self.activation!r}" + (f", dropout={self.dropout}" if self.dropout else "")


# Attributes of the layers of MLPs in timm (and CLIP), GPT-2 and Llama: up, down, gate.
_SHAPES = (("fc1", "fc2"), ("c_fc", "c_proj"), ("up_proj", "down_proj", "gate_proj"))


def fuse_mlps(model: nn.Module) -> dict[str, str]:
    """Replace each MLP whose layers are structured by a :class:`StructuredMLP`, in place.

    MLPs are found by the names of their layers: ``fc1`` and ``fc2`` (timm, CLIP), ``c_fc`` and ``c_proj`` (GPT-2),
    ``up_proj``, ``down_proj`` and ``gate_proj`` (Llama, Mistral, Qwen). They may also contain an activation function,
    dropout and identities. Names of parameters do not change.

    An MLP is not replaced if its activation function is not in :data:`ACTIVATIONS`, if it or a module in it that is not
    a layer has hooks, if it draws random numbers in training other than by one dropout after its last layer, or if its
    output for random input differs from that of its layers and activation function.

    Returns
    -------
    dict of str to str
        For each MLP that was found, ``fused`` or the reason why it was not replaced.

    Examples
    --------
    >>> from collections import OrderedDict
    >>> layers = [StructuredLinear(*s, structure="monarch", blocks=4) for s in ((32, 128), (128, 32))]
    >>> block = nn.Sequential(OrderedDict(fc1=layers[0], act=nn.GELU(), fc2=layers[1]))
    >>> fuse_mlps(nn.Sequential(block))
    {'0': 'fused'}
    """
    check_model(model, "fuse_mlps")
    found = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, StructuredMLP):
            continue
        names = next((n for n in _SHAPES if all(_is_layer(getattr(module, a, None)) for a in n)), None)
        if names is None or not name:
            continue
        new = _fused(module, names)
        found[name] = "fused" if isinstance(new, StructuredMLP) else new
        if isinstance(new, StructuredMLP):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, new)
    return found


def _is_layer(module: Any) -> bool:
    return isinstance(module, StructuredLinear) and not isinstance(module, StructuredExperts)


def _fused(module: nn.Module, names: tuple[str, ...]) -> StructuredMLP | str:
    """Return the block that replaces a module, or the reason why there is none."""
    rest = [child for name, child in module.named_children() if name not in names]
    if any(_is_watched(one) for one in (module, *(one for child in rest for one in child.modules()))):
        return "it has hooks or a forward of its own, which would be lost"
    others = [child for child in rest if not isinstance(child, nn.Dropout | nn.Identity)]
    if len(others) > 1 or any(p.numel() for child in others for p in child.parameters()):
        return f"it has other modules than its layers: {', '.join(type(child).__name__ for child in others)}"
    layers = [getattr(module, name) for name in names]
    factor = next(layers[0].parameters())
    function = others[0] if others else getattr(module, "act", None) or getattr(module, "act_fn", None)
    activation = _name_of(function)
    if activation is None:
        return f"its activation function is not one of {', '.join(ACTIVATIONS)}"
    up, down, *gate = layers
    if up.out_features != down.in_features:
        return (f"its layers have {up.out_features} outputs and {down.in_features} inputs, as if one layer had both "
                "halves of a gated MLP")  # fmt: skip
    x = torch.randn(3, up.in_features, generator=torch.Generator().manual_seed(0)).to(factor)
    evaluated = _output(module, x, False)
    with _Dropouts() as dropouts, _Seeded() as seeded:
        trained = _output(module, x, True)
    if evaluated is None or trained is None:
        return "it cannot be called with vectors"
    if seeded.any or len(dropouts.calls) > 1 or any(y is not trained for _, y in dropouts.calls):
        return "it has dropout between its layers, or draws other random numbers in training"
    new = StructuredMLP(
        up, down, activation, gate=gate[0] if gate else None, names=names, dropout=sum(p for p, _ in dropouts.calls)
    ).train(module.training)
    if not x.is_meta and not all(_agree(y, _output(new, x, False)) for y in (evaluated, trained)):
        return "its output differs from that of its layers and its activation function"
    return new


def _name_of(function: Any) -> str | None:
    """Return the name of an activation function, found by its values; None if it is not known."""
    if not callable(function):
        return None
    x = torch.linspace(-6, 6, 241, dtype=torch.float64)
    try:
        with torch.no_grad():
            y = function(x)
    except (RuntimeError, TypeError, ValueError):
        return None
    same = (name for name, one in ACTIVATIONS.items() if torch.allclose(y, one(x), rtol=0, atol=1e-9))
    return next(same, None) if isinstance(y, Tensor) and y.shape == x.shape else None


class _Dropouts(TorchFunctionMode):
    """Probabilities and results of the dropouts in training, which copy their input meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[float, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record a call."""
        kwargs = kwargs or {}
        if func is not F.dropout or not kwargs["training"] or not kwargs["p"]:
            return func(*args, **kwargs)
        self.calls.append((kwargs["p"], args[0].clone()))
        return self.calls[-1][1]


class _Seeded(TorchDispatchMode):
    """Whether an operation of torch draws random numbers."""

    any = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at one operation."""
        self.any |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


def _output(module: nn.Module, x: Tensor, training: bool) -> Tensor | None:
    """Return the output in training or evaluation; None if there is an error, or no tensor."""
    modes = {one: one.training for one in module.modules()}
    try:
        with torch.no_grad():
            y = module.train(training)(x)
    except (RuntimeError, TypeError, ValueError):
        return None
    finally:
        for one, mode in modes.items():
            one.training = mode
    return y if isinstance(y, Tensor) else None


def _agree(expected: Tensor, found: Tensor | None) -> bool:
    """Return whether two outputs are equal to roundoff."""
    if found is None or expected.shape != found.shape:
        return False
    tolerance = 100 * torch.finfo(expected.dtype).eps * float(expected.abs().max())
    return bool(torch.allclose(expected, found, rtol=0, atol=max(tolerance, 1e-30)))


def _function(activation: str) -> Any:
    check_known("activation", activation, ACTIVATIONS)
    return ACTIVATIONS[activation]


def _one_pass(
    x: Tensor, first: Sequence[nn.Module], second: nn.Module | None, activation: str | None, norm: nn.Module | None,
    residual: bool,
) -> tuple[Tensor, ...] | None:  # fmt: skip
    """Return the outputs if the layers can run as one pass and that is faster; otherwise None."""
    layers, compiling = first if second is None else [*first, second], torch.compiler.is_compiling()
    if not layers or not x.is_cpu or _has_any_global_hook() or not all(_is_plain(layer) for layer in layers):
        return None
    if compiling and (torch.compiler.is_exporting() or transforming()):
        return None
    whole = cast(Sequence[StructuredLinear], layers)
    size = whole[0].in_features
    if not x.ndim or x.shape[-1] != size or any(layer.in_features != size for layer in whole[: len(first)]):
        return None  # the layers raise the error
    if second is not None:
        hidden = {layer.out_features for layer in whole[: len(first)]}
        if hidden != {whole[-1].in_features} or (residual and whole[-1].out_features != size):
            return None
    known = _norm(norm, size)
    if known is None:
        return None
    kind, eps, weight, shift = known
    if kind == "rms" and eps is None:
        eps = torch.finfo(x.dtype).eps if x.is_floating_point() else 0.0
    biases = tuple(layer.bias is not None for layer in whole)
    rest = activation, biases, kind, eps or 0.0, (weight is not None, shift is not None), residual
    operands: list[Tensor | None] = [weight, shift, *(layer.bias for layer in whole)]
    for layer in whole:
        operands += values(layer._modules["factors"]) if layer._bare else layer.effective_factors()
    lead = x.shape[:-1]
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        x, operands = cast_to(x, dtype), [None if t is None else cast_to(t, dtype) for t in operands]
    tokens = x if x.ndim == 2 else x.reshape(math.prod(lead), size)
    if compiling:
        found = _in_graph(tokens, operands, whole, second is not None, *rest)
    else:
        structures = tuple(cast(Structure, layer.structure) for layer in whole)
        block = torch_block(structures[: len(first)], None if second is None else structures[-1], *rest)
        with torch.autocast("cpu", enabled=False):  # operands are cast already, so their memory can be read by address
            found = block(tokens, operands)
    if found is None or x.ndim == 2:
        return found
    return tuple(y.reshape(*lead, y.shape[-1]) for y in found)


def _in_graph(
    x: Tensor, operands: Sequence[Tensor | None], layers: Sequence[StructuredLinear], mlp: bool, activation: str | None,
    biases: tuple[bool, ...], norm: str | None, eps: float, affine: tuple[bool, bool], residual: bool,
) -> tuple[Tensor, ...] | None:  # fmt: skip
    """Return the outputs by a node of a graph that is compiled, or None if separate layers are faster."""
    from torch.fx.experimental.symbolic_shapes import guard_scalar, optimization_hint  # it takes a second to import

    given = [t for t in operands if t is not None]
    if not all(type(t) in _PLAIN and t.dtype is x.dtype and t.device == x.device for t in (x, *given)):
        return None
    # These are symbols if shapes are dynamic.
    eps, tokens = guard_scalar(eps), optimization_hint(x.shape[0], fallback=TOKENS)
    texts = tuple(layer._text for layer in layers)
    found = graph_pass(texts, mlp, activation, biases, norm, eps, affine, residual, x.dtype, tokens, trains(x, given))
    if found is None:
        return None
    text, kind, rows, half = found
    if not half:
        return tuple(torch.ops.structlin.block_pass(x, given, text, kind, rows)[: 1 if mlp else len(layers)])
    last = layers[-1]
    given = given[: len(given) - len(last.structure.factors)]
    if biases[-1]:
        given.pop(sum(affine) + sum(biases) - 1)
    y = last(torch.ops.structlin.block_pass(x, given, text, kind, rows)[0])
    return (y + x,) if residual else (y,)


def _is_plain(layer: nn.Module) -> bool:
    """Return whether a call of the layer only computes the products of its chain and adds the bias."""
    return (
        isinstance(layer, StructuredLinear)
        and all(getattr(type(layer), name) is getattr(StructuredLinear, name) for name in ("forward", "_eager"))
        and layer._chain is not None
        and not layer.checkpoint
        and not _is_watched(layer)
    )


def _is_watched(module: nn.Module) -> bool:
    """Return whether a call of the module does more than its class says: it has hooks, or a ``forward`` of its own."""
    return "forward" in module.__dict__ or any(getattr(module, hooks) for hooks in _HOOKS)


def _norm(norm: nn.Module | None, size: int) -> tuple[str | None, float | None, Tensor | None, Tensor | None] | None:
    """Return kind, eps, weight and bias of a norm; None if it cannot be part of a pass."""
    if norm is None:
        return None, 0.0, None, None
    if _is_watched(norm):
        return None
    if type(norm) is nn.LayerNorm and norm.normalized_shape == (size,):
        return "layer", norm.eps, norm.weight, norm.bias
    if type(norm) is nn.RMSNorm and norm.normalized_shape == (size,):
        return "rms", norm.eps, norm.weight, None
    return None
