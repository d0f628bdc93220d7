"""A linear layer whose weight is a structured matrix."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recomputed

import structlin
from structlin._arrays import ops
from structlin.execution._guard import guard_of
from structlin.execution.token_major import token_major
from structlin.execution.torch_cuda import node_tokens
from structlin.execution.torch_ways import torch_chain
from structlin.structure import AbstractStructure, Structure
from structlin_nn._layer import describe, plan_layer
from structlin_nn.torch._operator import chain, transformed
from structlin_nn.torch._step_check import watch
from structlin_nn.torch._text import to_text

__all__ = ["FactorList", "StructuredLinear", "fill", "values"]

_TORCH = ops("torch")
_AUTOCAST = ("cpu", "cuda")
_CAST = (torch.float32, torch.float16, torch.bfloat16)  # what autocast casts


class FactorList(nn.ParameterList):
    """A ParameterList that can be called for its parameters, as a layer is for its output.

    Hooks run and a patched ``forward`` is called as in any module: pruning, spectral and weight normalisation set the
    factors in hooks, and offloading loads them before ``forward`` and frees them after it.
    """

    _quantised = False  # whether a factor is a quantised tensor of torchao

    def __init__(self, parameters: Iterable[nn.Parameter] = ()) -> None:
        super().__init__(parameters)
        self._names = [str(k) for k in range(len(self))]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, Tensor) and value.__class__.__module__.startswith("torchao."):
            self.__dict__["_quantised"] = True

    def __dir__(self) -> list[str]:
        """Return the names of the parameters too, by which ``torchao.quantization.FqnToConfig`` finds them."""
        return [*super().__dir__(), *self._parameters]

    def forward(self) -> tuple[Tensor, ...]:
        """Return the factors by name: parameters, or what hooks and parametrizations have put in their places."""
        found = tuple(getattr(self, str(k)) for k in range(len(self)))
        if not self._quantised:
            return found
        return tuple(t.dequantize() if t.__class__.__module__.startswith("torchao.") else t for t in found)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module, although it is a list of parameters."""
        return nn.Module.__call__(self, *args, **kwargs)  # nn.ParameterList refuses to be called

    def _get_name(self) -> str:
        return "ParameterList"  # a repr does not depend on which of the two it is


def values(factors: Any) -> tuple[Tensor, ...]:
    """Return the values of a list of factors; this takes a third of a microsecond if nothing changes them."""
    own = factors.__dict__  # attributes of modules take longer
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
        except KeyError:  # a factor is no parameter any more
            pass
    return factors() if isinstance(factors, FactorList) else tuple(factors)


class StructuredLinear(nn.Module):
    """``y = A x + b`` with a structured matrix A: ``(..., in_features) -> (..., out_features)``.

    Takes the place of ``nn.Linear``, whose positional arguments it has. The factors of A are plain parameters
    (``factors``, in the order in which they meet the input; arrays of indices are buffers ``index0``, ...), and the
    chain of products runs over them: A itself is never formed. Parameters and multiply-accumulates (MACs) per vector
    are ``structure.num_params`` and ``structure.macs``.

    Factors are drawn from torch's generator with the deviations of :func:`structlin.init_std` (muP spectral scale);
    the bias starts at zero, for the rule has no place for a random one.

    Floating and complex dtypes. The input has the dtype of the parameters; under ``torch.autocast`` input, factors
    and bias are cast to its dtype, as ``nn.Linear`` does it, and the parameters stay as they are.

    With ``rms_cap`` each factor W is used as ``W * gain * min(1, sigma / RMS(W))`` wherever the layer or its operator
    is used, with a learned gain of shape (1,) for each factor (Qiu et al., *Compute Better Spent*, ICML 2024, section
    4.3).

    Parameters
    ----------
    in_features
        Size of the last axis of the input.
    out_features
        Size of the last axis of the output.
    bias
        Add a learned bias.
    device
        Of the parameters; ``"meta"`` allocates nothing (then ``to_empty`` and :meth:`reset_parameters`).
    dtype
        Of the parameters.
    structure
        A registered name (:func:`structlin.structure_names`), or a structure of shape (out_features, in_features).
    rms_cap
        Hold the RMS of every factor at or below sigma (``cap_sigma``), its initial deviation.
    gain
        Learned gains; the default (None) is to have them where the factors are capped.
    rule
        Scale rule, ``paper`` or ``rank_corrected`` (:mod:`structlin.scale`).
    zero_init
        Start the factor applied last at zero (output layers, query projections, the last layer of a residual branch).
        Its sigma is the deviation that it would otherwise have.
    checkpoint
        Keep the input alone for the backward pass, and compute the activations between the factors again. A chain of
        einsums is then one node ``structlin::chain`` of a compiled or exported graph, whose loading needs ``import
        structlin_nn.torch``. Inside of ``torch.func`` transformations and forward-mode differentiation it has no
        effect.
    **options
        Options of the named structure (:func:`structlin.structure_options`), for example ``rank=2``.

    Attributes
    ----------
    structure
        What A is made of; ``factors``, ``gains``, ``bias``: its parameters (gains and bias may be None).
    init_std
        Deviation at which each factor of the structure is drawn; 0 for zero-initialised and index factors.
    cap_sigma
        Sigma of each factor; 0 for index factors.

    Raises
    ------
    ValueError
        An unknown structure, rule or option; sizes that the structure cannot have, or other than those of the structure
        given; options beside a structure; ``gain=True`` without ``rms_cap``; ``rms_cap`` or ``zero_init`` where there
        are no trainable factors. In the forward pass: an input of wrong size; a factor or a bias of wrong shape, or of
        another device or dtype than the input.
    TypeError
        A ``structure`` that is neither a name nor a structure.

    Examples
    --------
    >>> layer = StructuredLinear(768, 1024, structure="block_tensor_train", rank=2)
    >>> layer(torch.randn(4, 7, 768)).shape, layer.structure.macs
    (torch.Size([4, 7, 1024]), 114688)
    >>> torch.allclose(layer.operator.to_dense() @ torch.ones(768), layer(torch.ones(768)), atol=1e-4)
    True
    """

    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None, *, structure: str | AbstractStructure = "block_tensor_train",
        rms_cap: bool = False, gain: bool | None = None, rule: str = "paper", zero_init: bool = False,
        checkpoint: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        plan = plan_layer(
            in_features, out_features, structure, options, rms_cap=rms_cap, gain=gain, rule=rule, zero_init=zero_init
        )
        self._plan = plan
        self.structure, self.init_std, self.cap_sigma = plan.structure, plan.init_std, plan.cap_sigma
        self.in_features, self.out_features = plan.structure.d_in, plan.structure.d_out
        self.options, self.rule, self.zero_init, self.rms_cap = dict(options), rule, zero_init, rms_cap
        self.checkpoint = checkpoint
        self._is_dense = plan.is_dense
        self._text = to_text(plan.structure) if isinstance(plan.structure, Structure) else ""
        self._token_major = token_major(plan.structure) if isinstance(plan.structure, Structure) else None
        self._guard = guard_of(plan.structure)
        self._chain = (
            torch_chain(plan.structure) if isinstance(plan.structure, Structure) and not plan.is_dense else None
        )
        self._node_tokens = node_tokens(plan.structure) if isinstance(plan.structure, Structure) else 0
        self._bare = not (rms_cap or plan.index_at)  # the factors are the parameters

        shapes = [spec.shape for spec in self.structure.factors if spec.trainable]
        self.factors = FactorList(nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) for shape in shapes)
        self.gains = None
        if plan.gains:  # not scalars, which FSDP cannot shard
            self.gains = FactorList(nn.Parameter(torch.empty(1, device=device, dtype=dtype)) for _ in shapes)
        for number, spec in enumerate(self.structure.factors):
            if not spec.trainable:
                self.register_buffer(f"index{number}", torch.empty(spec.shape, device=device, dtype=torch.int64))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(self.out_features, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()
        watch(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        watch(self)  # copies too

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the factors (index factors: random permutations) and set the bias to 0 and the gains to 1.

        ``generator`` is one of the parameters' device; by default torch's global one, so that ``torch.manual_seed``
        reproduces the draw. Parameters that are sharded over processes (``fully_shard``) get the values that one
        process would have drawn; all processes call this with the same seed.
        """
        factors = iter(self.factors)
        for number, (spec, std) in enumerate(zip(self.structure.factors, self.init_std, strict=True)):
            if spec.trainable:
                fill(next(factors), std, generator)
            elif not (index := self.get_buffer(f"index{number}")).is_meta:
                index.copy_(torch.randperm(spec.numel, generator=generator, device=index.device).view(spec.shape))
        for gain in self.gains or ():
            gain.fill_(1.0)
        if self.bias is not None:
            self.bias.zero_()

    def effective_factors(self) -> tuple[Tensor, ...]:
        """Return the factors of A, capped if ``rms_cap`` is set, with index factors in their places."""
        factors = list(values(self.factors))
        if self.rms_cap:
            sigmas = [sigma for n, sigma in enumerate(self.cap_sigma) if n not in self._plan.index_at]
            gains = [1.0] * len(factors) if self.gains is None else values(self.gains)
            factors = [structlin.rms_cap(f, s, g) for f, s, g in zip(factors, sigmas, gains, strict=True)]
        for number in self._plan.index_at:
            factors.insert(number, getattr(self, f"index{number}"))
        return tuple(factors)

    @property
    def operator(self) -> structlin.StructuredOperator:
        """A as a CoLA operator of shape (out_features, in_features), on the live (capped) factors, without a copy.

        Differentiable in the parameters. Build it anew after a step of the optimiser where the factors are capped.
        """
        dtype = self.bias.dtype if self.bias is not None and not len(self.factors) else None
        return self._plan.operator_class._build(self.structure, self.effective_factors(), dtype)

    @property
    def weight(self) -> Tensor:
        """A as a matrix, (out_features, in_features), for code that reads the weight of a linear layer.

        Computed anew at each access, differentiable in the factors, and not to be assigned to. It costs
        ``in_features`` products with A and the memory of the dense matrix, so a model that multiplies by it saves
        parameters and nothing else. A change of the result in place changes nothing in the layer, unless its structure
        is ``dense``.
        """
        factors = self.effective_factors()
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
                f"set its factors, put a torch.nn.Linear of {self.in_features} -> {self.out_features} in its place to "
                "tie or load a dense weight, or project that (structlin_nn.torch.project_linear)"
            )
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features) -> (..., out_features)``."""
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
            with torch.autocast(device, enabled=False):  # the products need not look at each operand again
                return self._affine(x, factors, bias)
        return self._affine(x, factors, bias)

    def _traced(self, x: Any) -> Any:
        """Return a node of a graph of ``torch.fx`` that calls this layer, as for nn.Linear; TypeError otherwise."""
        fx = sys.modules.get("torch.fx")
        if fx is None or not isinstance(x, fx.Proxy):
            hint = ": torch.from_numpy makes one of it" if type(x).__module__ == "numpy" else ""
            raise TypeError(f"the input must be a torch.Tensor, got a {type(x).__name__}{hint}")
        return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})

    def _affine(self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        compiling = torch.compiler.is_compiling()
        if compiling or self._chain is None or self.checkpoint:  # the chain itself looks at its operands
            self._guard.check(x, factors if bias is None else (*factors, bias))
        if self._is_dense:
            return F.linear(x, factors[0], bias)
        if x.ndim == 2:
            return self._product(x, factors, bias)
        lead = x.shape[:-1]
        y = self._product(x.reshape(math.prod(lead), self.in_features), factors, bias)
        return y.reshape(*lead, self.out_features)

    def _pays_as_node(self, x: Tensor) -> bool:
        """Whether a compiled graph is to run the chain as the one node structlin::chain."""
        if x.is_cuda:
            return 0 < self._node_tokens <= x.shape[0] and not torch.compiler.is_exporting()
        return self._token_major is not None and self._token_major.pays_as_node(x)

    def _product(self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        """(tokens, in_features) -> (tokens, out_features) by the way that :mod:`structlin.execution` chooses.

        A compiler gets the contraction as one node where that pays: on a CPU for many tokens, on a GPU where it would
        otherwise copy the activation between two products. If not, it gets the single products, so that it can fuse
        what stands between.
        """
        structure, plan = self.structure, self._token_major
        compiling = torch.compiler.is_compiling()
        if self._chain is not None and not compiling and not (self.checkpoint and torch.is_grad_enabled()):
            return self._chain(x, factors, bias)
        if (
            (self.checkpoint and torch.is_grad_enabled()) or (compiling and plan is not None and self._pays_as_node(x))
        ) and not transformed():
            if plan is not None:
                y = chain(x, list(factors), self._text)
            elif torch.compiler.is_exporting():
                y = structure._rows(factors, x, _TORCH)
            else:
                y = recomputed(structure._rows, factors, x, _TORCH, use_reentrant=False, preserve_rng_state=False)
        elif plan is None:
            y = structure._rows(factors, x, _TORCH)
        elif compiling and plan.is_single(x):
            return plan.single(x, factors, bias)
        else:
            return plan.structure._rows(factors, x, _TORCH, bias)
        return y if bias is None else y + bias

    def extra_repr(self) -> str:
        """Describe the layer for ``print``."""
        text = describe(
            self._plan, self.options, bias=self.bias is not None, rms_cap=self.rms_cap, rule=self.rule,
            zero_init=self.zero_init,
        )  # fmt: skip
        return f"{text}, checkpoint=True" if self.checkpoint else text


def cast_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` as autocast hands it to a product."""
    return x.to(dtype) if x.dtype in _CAST else x


def fill(parameter: Tensor, std: float, generator: torch.Generator | None) -> None:
    """Fill a tensor with normal numbers of deviation ``std`` (zeros if it is 0), in place.

    A sharded parameter (a DTensor) gets its part of what a whole one would get: each process draws all of it, so that
    the values do not depend on the number of processes, and keeps its own part of the first process' numbers.
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
