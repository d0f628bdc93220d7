"""A linear layer whose weight is a structured matrix."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recomputed

from structlin._arrays import ops
from structlin.execution._guard import guard_of, transforming
from structlin.execution.token_major import token_major
from structlin.execution.torch_cuda import node_tokens
from structlin.execution.torch_ways import torch_chain
from structlin.structure import AbstractStructure, Structure
from structlin_nn._layer import PlannedLayer, plan_layer
from structlin_nn.torch._operator import chain, to_text
from structlin_nn.torch._step_check import watch

__all__ = ["FactorList", "StructuredLinear", "fill", "values"]

_TORCH = ops("torch")
_AUTOCAST = ("cpu", "cuda")
_CAST = (torch.float32, torch.float16, torch.bfloat16)  # dtypes that autocast casts


def _is_quantised(value: object) -> bool:
    """Whether a value is a tensor of torchao, which need not be installed."""
    return isinstance(value, Tensor) and type(value).__module__.startswith("torchao.")


class FactorList(nn.ParameterList):
    """A ParameterList whose call returns the factors.

    As in any module, a call runs hooks and a patched ``forward``. Pruning, spectral and weight normalisation set the
    factors in hooks. Offloading loads them before ``forward`` and frees them afterwards.
    """

    _quantised = False  # whether a factor is a quantised tensor of torchao

    def __init__(self, parameters: Iterable[nn.Parameter] = ()) -> None:
        super().__init__(parameters)
        self._names = [str(k) for k in range(len(self))]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if _is_quantised(value):
            self.__dict__["_quantised"] = True

    def __dir__(self) -> list[str]:
        """Return the names of the parameters too, by which ``torchao.quantization.FqnToConfig`` finds them."""
        return [*super().__dir__(), *self._parameters]

    @torch.jit.unused
    def forward(self) -> tuple[Tensor, ...]:
        """Return the factors by name: parameters, or the tensors with which hooks or parametrizations replace them."""
        found = tuple(getattr(self, str(k)) for k in range(len(self)))
        if not self._quantised:
            return found
        return tuple(t.dequantize() if _is_quantised(t) else t for t in found)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module; ``nn.ParameterList`` itself cannot be called."""
        return nn.Module.__call__(self, *args, **kwargs)

    def parameters_of(self, number: int) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters that determine a factor, by name: itself, or those of pruning or a parametrization."""
        own = re.compile(rf"(parametrizations\.)?{number}([._].*)?")
        return ((name, parameter) for name, parameter in self.named_parameters() if own.fullmatch(name))

    def _get_name(self) -> str:
        return "ParameterList"  # so that the repr is that of a ParameterList


def values(factors: Any) -> tuple[Tensor, ...]:
    """Return the values of a list of factors; without hooks and parametrizations in a third of a microsecond."""
    own = factors.__dict__  # faster than attributes of a module
    if factors.__class__ is FactorList and not (
        own["_forward_pre_hooks"]
        or own["_forward_hooks"]
        or own["_backward_pre_hooks"]
        or own["_backward_hooks"]
        or "forward" in own
        or "_quantised" in own
    ):
        held = own["_parameters"]
        try:
            return tuple([held[name] for name in own["_names"]])
        except KeyError:  # a factor is no longer a parameter
            pass
    return factors() if isinstance(factors, FactorList) else tuple(factors)


class StructuredLinear(PlannedLayer, nn.Module):
    r"""Linear layer ``y = A x + b`` with a structured matrix A: (..., in_features) -> (..., out_features).

    It replaces ``nn.Linear`` and has the same positional parameters. The factors of A are parameters (``factors``, in
    the order in which they are applied to the input; index arrays are buffers ``index0``, ...). The layer applies the
    chain of products and never forms A. ``structure.num_params`` and ``structure.macs`` are the numbers of parameters
    and of multiply-accumulates (MACs) for one vector.

    Factors are initialised with the deviations of :func:`structlin.init_std` (spectral scale rule), the bias with 0.

    Dtypes can be floating or complex. The input must have the dtype of the parameters. Under ``torch.autocast``, input,
    factors and bias are cast to its dtype, as in ``nn.Linear``; the parameters keep their dtype.

    With ``rms_cap``, the layer and its operator use :math:`W g \min(1, \sigma / \mathrm{RMS}(W))` in place of each
    factor W, where g is a learned gain of shape (1,) (Qiu et al., *Compute Better Spent*, ICML 2024, section 4.3).

    Parameters
    ----------
    in_features
        Size of the last axis of the input.
    out_features
        Size of the last axis of the output.
    bias
        Add a learned bias.
    device
        Device of the parameters. ``"meta"`` allocates no memory; call ``to_empty`` and :meth:`reset_parameters` later.
    dtype
        Dtype of the parameters.
    structure
        Name of a registered structure (:func:`structlin.structure_names`), or a structure of shape (out_features,
        in_features).
    rms_cap
        Limit the RMS of every factor to sigma (``cap_sigma``), its initial deviation.
    gain
        Use learned gains. Default: only with ``rms_cap``.
    rule
        Scale rule, ``paper`` or ``rank_corrected`` (:mod:`structlin.scale`).
    zero_init
        Initialise the factor that is applied last with zeros (output layers, query projections, the last layer of a
        residual branch). Its sigma is the deviation that it has otherwise.
    checkpoint
        Save only the input for the backward pass, which computes the activations between the factors again. In a
        compiled or exported graph a chain is then one node ``structlin::chain``; a process that loads the graph must
        ``import structlin_nn.torch``. The option has no effect inside ``torch.func`` transformations and forward-mode
        differentiation.
    **options
        Options of the named structure (:func:`structlin.structure_options`), for example ``rank=2``.

    Attributes
    ----------
    structure
        Structure of A.
    factors, gains, bias
        Parameters of the layer; gains and bias may be None.
    init_std
        Initial deviation of each factor; 0 for zero-initialised and index factors.
    cap_sigma
        Sigma of each factor; 0 for index factors.

    Raises
    ------
    ValueError
        If the structure, the rule or an option is unknown, the structure cannot have these sizes, options are given
        together with a structure that is not a name, ``gain`` is True without ``rms_cap``, or ``rms_cap`` or
        ``zero_init`` is True for a structure without trainable factors. In the forward pass, if the input has a wrong
        size, or a factor or the bias has a wrong shape, or a device or dtype other than the input.
    TypeError
        If ``structure`` is neither a name nor a structure, or ``bias`` is not a bool.

    Examples
    --------
    >>> layer = StructuredLinear(768, 1024, structure="block_tensor_train", rank=2)
    >>> layer(torch.randn(4, 7, 768)).shape, layer.structure.macs
    (torch.Size([4, 7, 1024]), 114688)
    >>> torch.allclose(layer.operator.to_dense() @ torch.ones(768), layer(torch.ones(768)), atol=1e-4)
    True
    """

    __jit_unused_properties__ = ("operator",)
    _lead: tuple[int, ...] = ()  # axes of the parameters before those of the factors

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None, *, structure: str | AbstractStructure = "block_tensor_train",
        rms_cap: bool = False, gain: bool | None = None, rule: str = "paper", zero_init: bool = False,
        checkpoint: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        if not isinstance(bias, bool):
            raise TypeError(f"bias must be True or False, got {bias!r}; write structure=... for a structure")
        plan = plan_layer(
            in_features, out_features, structure, options, rms_cap=rms_cap, gain=gain, rule=rule, zero_init=zero_init
        )
        self._plan = plan
        self.structure, self.init_std, self.cap_sigma = plan.structure, plan.init_std, plan.cap_sigma
        self.in_features, self.out_features = plan.structure.d_in, plan.structure.d_out
        self.options, self.rule, self.zero_init, self.rms_cap = dict(options), rule, zero_init, rms_cap
        self.checkpoint = checkpoint
        self._is_dense = plan.is_dense
        self._guard = guard_of(plan.structure)
        self._text, self._token_major, self._chain, self._node_tokens = "", None, None, 0
        if isinstance(plan.structure, Structure):
            self._text, self._token_major = to_text(plan.structure), token_major(plan.structure)
            self._chain = None if plan.is_dense else torch_chain(plan.structure)
            self._node_tokens = node_tokens(plan.structure)
        self._bare = not (rms_cap or plan.index_at)  # the factors are the parameters

        shapes = [(*self._lead, *spec.shape) for spec in self.structure.factors if spec.trainable]
        self.factors = FactorList(nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) for shape in shapes)
        self.gains = None
        if plan.gains:  # not scalars, which FSDP cannot shard
            self.gains = FactorList(
                nn.Parameter(torch.empty((*self._lead, 1), device=device, dtype=dtype)) for _ in shapes
            )
        for number, spec in enumerate(self.structure.factors):
            if not spec.trainable:
                shape = (*self._lead, *spec.shape)
                self.register_buffer(f"index{number}", torch.empty(shape, device=device, dtype=torch.int64))
        shape = (*self._lead, self.out_features)
        self.register_parameter("bias", nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if bias else None)
        self.reset_parameters()
        watch(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        watch(self)  # copies too

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialise the factors (index factors with random permutations), the bias with 0 and the gains with 1.

        Parameters that are sharded over processes (``fully_shard``) get the values that a single process would draw.
        All processes must call this method with the same seed.

        Parameters
        ----------
        generator
            Generator on the device of the parameters. Default: the global generator of torch, whose seed
            ``torch.manual_seed`` sets.
        """
        factors = iter(self.factors)
        for number, (spec, std) in enumerate(zip(self.structure.factors, self.init_std, strict=True)):
            if spec.trainable:
                fill(next(factors), std, generator)
            elif not (index := self.get_buffer(f"index{number}")).is_meta:
                for one in index.view(-1, spec.numel):
                    one.copy_(torch.randperm(spec.numel, generator=generator, device=index.device))
        for gain in self.gains or ():
            gain.fill_(1.0)
        if self.bias is not None:
            self.bias.zero_()

    def _values(self, parameters: Any) -> tuple[Tensor, ...]:
        return values(parameters)

    def _dtype_without_factors(self) -> torch.dtype | None:
        return None if self.bias is None else self.bias.dtype

    @property
    def weight(self) -> Tensor:
        """The dense matrix A of shape (out_features, in_features), for code that reads the weight of a linear layer.

        Each access computes it, which costs ``in_features`` products with A and the memory of a dense matrix. A model
        that multiplies by it saves parameters, but no MACs. It is differentiable in the factors and cannot be assigned.
        In-place changes of it do not change the layer, unless the structure is ``dense``.
        """
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._scripted_weight()
        else:
            return self._dense_weight()

    def _dense_weight(self) -> Tensor:
        return self._dense(self.effective_factors())

    def _dense(self, factors: Sequence[Tensor]) -> Tensor:
        if self._is_dense:
            return factors[0]
        like = next((f for f in factors if f.is_floating_point() or f.is_complex()), self.bias)
        dtype = torch.get_default_dtype() if like is None else like.dtype
        device = factors[0].device if factors else None if like is None else like.device
        identity = torch.eye(self.in_features, dtype=dtype, device=device)
        matrix: Tensor = self.structure._rows(factors, identity, _TORCH)
        return matrix.mT

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(
                f"the weight of a structured layer is computed from its factors and cannot be assigned: "
                f"set its factors, replace the layer by a torch.nn.Linear of {self.in_features} -> {self.out_features} "
                "to tie or load a dense weight, or project a dense weight (structlin_nn.torch.project_linear)"
            )
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (..., in_features) -> (..., out_features)."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._scripted(x)
        else:  # torch.jit compiles what follows an `if`, but not a branch that is never taken
            return self._eager(x)

    def _eager(self, x: Tensor, *groups: Any) -> Tensor:
        if not isinstance(x, Tensor):
            return self._traced(x)  # type: ignore[unreachable]
        if not x.ndim or x.shape[-1] != self.in_features:
            raise ValueError(
                f"the last axis of the input must have size in_features = {self.in_features}, "
                f"got shape {tuple(x.shape)}"
            )
        factors = values(self._modules["factors"]) if self._bare else self.effective_factors()
        try:  # an attribute of a module takes three times as long
            bias: Tensor | None = self._parameters["bias"]
        except KeyError:  # pruned, or with a parametrization
            bias = self.bias
        device = "cpu" if x.is_cpu else x.device.type
        if (device in _AUTOCAST or torch.amp.is_autocast_available(device)) and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            x, factors = cast_to(x, dtype), tuple(cast_to(f, dtype) for f in factors)
            bias = None if bias is None else cast_to(bias, dtype)
            with torch.autocast(device, enabled=False):  # operands are cast already
                return self._affine(x, factors, bias, *groups)
        return self._affine(x, factors, bias, *groups)

    def _traced(self, x: Any) -> Any:
        """Return a node of ``torch.fx`` that calls this layer, for a proxy as input; TypeError for other inputs."""
        fx = sys.modules.get("torch.fx")
        if fx is None or not isinstance(x, fx.Proxy):
            hint = "; convert it with torch.from_numpy" if type(x).__module__ == "numpy" else ""
            raise TypeError(f"the input must be a torch.Tensor, got a {type(x).__name__}{hint}")
        return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})

    def _affine(self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        chain = self._chain
        if chain is not None and not (self.checkpoint or torch.compiler.is_compiling()):  # it checks the operands
            if x.ndim == 2:
                return chain(x, factors, bias)
            return chain(x.reshape(-1, self.in_features), factors, bias).reshape(*x.shape[:-1], self.out_features)
        self._guard.check(x, factors if bias is None else (*factors, bias))
        if self._is_dense:
            return F.linear(x, factors[0], bias)
        if x.ndim == 2:
            return self._product(x, factors, bias)
        lead = x.shape[:-1]
        y = self._product(x.reshape(math.prod(lead), self.in_features), factors, bias)
        return y.reshape(*lead, self.out_features)

    def _pays_as_node(self, x: Tensor) -> bool:
        """Return whether a compiled graph should run the chain as one node structlin::chain."""
        if x.is_cuda:
            return 0 < self._node_tokens <= x.shape[0] and not torch.compiler.is_exporting()
        return self._token_major is not None and self._token_major.pays_as_node(x)

    def _product(self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        """Return (tokens, in_features) -> (tokens, out_features) by the way that :mod:`structlin.execution` chooses.

        A compiler gets the contraction as one node if that is faster, otherwise the single products, which it can fuse.
        """
        structure, plan = self.structure, self._token_major
        compiling = torch.compiler.is_compiling()
        if self._chain is not None and not compiling and not torch.is_grad_enabled():  # a layer with a checkpoint
            return self._chain(x, factors, bias)
        if (
            (self.checkpoint and torch.is_grad_enabled()) or (compiling and plan is not None and self._pays_as_node(x))
        ) and not transforming():
            if plan is not None:
                y = chain(x, list(factors), self._text)
            elif torch.compiler.is_exporting():
                y = structure._rows(factors, x, _TORCH)
            else:
                y = recomputed(structure._rows, factors, x, _TORCH, use_reentrant=False, preserve_rng_state=False)
        elif plan is None:
            y = structure._rows(factors, x, _TORCH)
        elif compiling and plan.is_single(x) and not transforming():
            return plan.single(x, factors, bias)
        else:
            return plan.structure._rows(factors, x, _TORCH, bias)
        return y if bias is None else y + bias

    def __prepare_scriptable__(self) -> StructuredLinear:
        """Add what ``torch.jit.script`` reads, einsums that it can compile; TypeError for a layer that has none.

        ``torch.jit`` is deprecated, so only chains of einsums with their own parameters are supported.
        """
        structure, found, stride = self.structure, self.factors, getattr(self, "stride", ())
        hooks = [key for key, value in vars(found).items() if key.endswith("_hooks") and value]
        if not isinstance(structure, Structure):
            reason = f"the structure is not a chain of einsums: {structure!r}"
        elif self.rms_cap or any(step > 1 for step in stride):
            reason = "it caps its factors" if self.rms_cap else f"it has stride {stride}"
        elif self.checkpoint:
            reason = "it has checkpoint=True"
        elif hooks or list(found._parameters) != [str(k) for k in range(len(structure.steps))]:
            reason = "the factors are changed by hooks, pruning or parametrizations"
        elif any(type(factor.data) is not Tensor for factor in found):
            reason = "the factors are quantised or distributed"
        else:
            sizes = dict(structure.sizes)
            self._equations = [f"...{s.input},{s.factor}->...{s.output}" for s in structure.steps]
            self._sizes = [[sizes[a] for a in s.input] for s in structure.steps]
            self._padding, self._axis = structure.padding[0], -1 - len(stride)
            return self
        raise TypeError(
            f"torch.jit.script cannot compile the layer {self.in_features} -> {self.out_features} ({reason}); "
            "use torch.export.export, which supports all layers"
        )

    def _scripted(self, x: Tensor) -> Tensor:
        """Apply the layer, in the subset of Python that ``torch.jit`` compiles."""
        if x.dim() < -self._axis or x.shape[self._axis] != self.in_features:
            raise ValueError(
                f"axis {self._axis} of the input must have size in_features = {self.in_features}, got shape {x.shape}"
            )
        y = self._products(x.movedim(self._axis, -1))
        if self.bias is not None:
            y = y.add_(self.bias)  # in the dtype to which autocast casts the operands of einsum
        return y.movedim(-1, self._axis)

    def _scripted_weight(self) -> Tensor:
        like = self.factors[0]
        return self._products(torch.eye(self.in_features, dtype=like.dtype, device=like.device)).mT

    def _products(self, x: Tensor) -> Tensor:
        lead = x.shape[:-1]
        y = F.pad(x, [0, self._padding])
        for k, factor in enumerate(self.factors):
            y = torch.einsum(self._equations[k], y.reshape(list(lead) + self._sizes[k]), factor)
        return y.flatten(len(lead))[..., : self.out_features]

    def extra_repr(self) -> str:
        """Describe the layer for ``print``."""
        return self._described() + (", checkpoint=True" if self.checkpoint else "")


def cast_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x`` in the dtype to which autocast casts the operands of a product."""
    return x.to(dtype) if x.dtype in _CAST else x


def fill(parameter: Tensor, std: float, generator: torch.Generator | None) -> None:
    """Fill a tensor in place with normal numbers of deviation ``std``, or zeros if it is 0.

    For a sharded parameter (a DTensor) each process draws the whole tensor, and keeps its shard of the values of the
    first process. So the values do not depend on the number of processes.
    """
    if not std:
        parameter.zero_()
        return
    sharded = sys.modules.get("torch.distributed.tensor")
    if sharded is None or not isinstance(parameter, sharded.DTensor) or parameter.is_meta:
        parameter.normal_(0, std, generator=generator)
        return
    whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.to_local().device)
    whole.normal_(0, std, generator=generator)
    parameter.copy_(sharded.distribute_tensor(whole, parameter.device_mesh, parameter.placements))
