"""A linear layer whose weight is a structured matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import structlin
from structlin._arrays import ops
from structlin.structure import AbstractStructure

__all__ = ["StructuredLinear"]

_TORCH = ops("torch")


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
    is used, with a learned scalar gain for each factor (Qiu et al., *Compute Better Spent*, ICML 2024, section 4.3).

    Args:
        in_features: size of the last axis of the input.
        out_features: size of the last axis of the output.
        bias: add a learned bias.
        device: of the parameters; ``"meta"`` allocates nothing (then ``to_empty`` and :meth:`reset_parameters`).
        dtype: of the parameters.
        structure: a registered name (:func:`structlin.names`), or a structure of shape (out_features, in_features).
        rms_cap: hold the RMS of every factor at or below sigma (``cap_sigma``), its initial deviation.
        gain: learned gains; the default (None) is to have them where the factors are capped.
        rule: scale rule, ``paper`` or ``rank_corrected`` (:mod:`structlin.scale`).
        zero_init: start the factor applied last at zero (output layers, query projections, the last layer of a
            residual branch). Its sigma is the deviation that it would otherwise have.
        **options: options of the named structure (:func:`structlin.options`), for example ``rank=2``.

    Attributes:
        structure: what A is made of; ``factors``, ``gains``, ``bias``: its parameters (gains and bias may be None).
        init_std: deviation at which each factor of the structure is drawn; 0 for zero-initialised and index factors.
        cap_sigma: sigma of each factor; 0 for index factors.

    Raises:
        ValueError: an unknown structure, rule or option; sizes that the structure can not have, or other than those
            of the structure given; options beside a structure; ``gain=True`` without ``rms_cap``; ``rms_cap`` or
            ``zero_init`` where there are no trainable factors. In the forward pass: an input of wrong size or dtype.
        TypeError: a ``structure`` that is neither a name nor a structure.

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
        **options: object,
    ) -> None:  # fmt: skip
        super().__init__()
        self._operator_class = structlin.get(structure) if isinstance(structure, str) else structlin.StructuredOperator
        self.structure = _structure(structure, (out_features, in_features), options)
        self.in_features, self.out_features = self.structure.d_in, self.structure.d_out
        self.options, self.rule, self.zero_init, self.rms_cap = dict(options), rule, zero_init, rms_cap
        if gain and not rms_cap:
            raise ValueError("gain=True needs rms_cap=True: only capped factors have gains")
        if (rms_cap or zero_init) and not any(f.trainable for f in self.structure.factors):
            option = "rms_cap" if rms_cap else "zero_init"
            raise ValueError(f"{option}=True, but {self.structure!r} has no trainable factors")
        full = structlin.init_std(self.structure, rule=rule)
        self.init_std = structlin.init_std(self.structure, rule=rule, zero_last=zero_init)
        self.cap_sigma = tuple(own or std for own, std in zip(self.init_std, full, strict=True))
        self._index_at = tuple(n for n, f in enumerate(self.structure.factors) if not f.trainable)
        self._is_dense = self.structure == structlin.design("dense", self.structure.shape)

        self.factors = nn.ParameterList()
        self.gains = nn.ParameterList() if rms_cap and gain is not False else None
        for number, spec in enumerate(self.structure.factors):
            if spec.trainable:
                self.factors.append(nn.Parameter(torch.empty(spec.shape, device=device, dtype=dtype)))
                if self.gains is not None:
                    self.gains.append(nn.Parameter(torch.empty((), device=device, dtype=dtype)))
            else:
                self.register_buffer(f"index{number}", torch.empty(spec.shape, device=device, dtype=torch.int64))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(self.out_features, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the factors (index factors: random permutations) and set the bias to 0 and the gains to 1.

        ``generator`` is one of the parameters' device; by default torch's global one, so that ``torch.manual_seed``
        reproduces the draw.
        """
        factors = iter(self.factors)
        for number, (spec, std) in enumerate(zip(self.structure.factors, self.init_std, strict=True)):
            if spec.trainable:
                factor = next(factors)
                factor.normal_(0, std, generator=generator) if std else factor.zero_()
            elif not (index := self.get_buffer(f"index{number}")).is_meta:
                index.copy_(torch.randperm(spec.numel, generator=generator, device=index.device).view(spec.shape))
        for gain in self.gains or ():
            gain.fill_(1.0)
        if self.bias is not None:
            self.bias.zero_()

    def effective_factors(self) -> tuple[Tensor, ...]:
        """The factors that A is the product of: capped where ``rms_cap`` is set, index factors in their places."""
        factors: list[Tensor] = list(self.factors)
        if self.rms_cap:
            sigmas = [sigma for n, sigma in enumerate(self.cap_sigma) if n not in self._index_at]
            gains = [1.0] * len(factors) if self.gains is None else list(self.gains)
            factors = [structlin.rms_cap(f, s, g) for f, s, g in zip(factors, sigmas, gains, strict=True)]
        for number in self._index_at:
            factors.insert(number, getattr(self, f"index{number}"))
        return tuple(factors)

    @property
    def operator(self) -> structlin.StructuredOperator:
        """A as a CoLA operator of shape (out_features, in_features), on the live (capped) factors, without a copy.

        Differentiable in the parameters. Build it anew after a step of the optimiser where the factors are capped.
        """
        dtype = self.bias.dtype if self.bias is not None and not len(self.factors) else None
        return self._operator_class._build(self.structure, self.effective_factors(), dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features) -> (..., out_features)``."""
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(
                f"the last axis of the input must have size in_features = {self.in_features}, "
                f"got shape {tuple(x.shape)}"
            )
        factors = self.effective_factors()
        bias: Tensor | None = self.bias
        dtype = _autocast_dtype(x)
        if dtype is not None:
            x, factors = _cast(x, dtype), tuple(_cast(f, dtype) for f in factors)
            bias = None if bias is None else _cast(bias, dtype)
        for parameter in (*factors, bias):
            if parameter is not None and parameter.dtype != x.dtype and parameter.dtype != torch.int64:
                raise ValueError(
                    f"the input is {x.dtype}, the parameters are {parameter.dtype}: convert one of them, "
                    "or use torch.autocast"
                )
        if self._is_dense:
            return F.linear(x, factors[0], bias)
        y = self.structure._rows(factors, x.reshape(-1, self.in_features), _TORCH)
        y = y.reshape(*x.shape[:-1], self.out_features)
        return y if bias is None else y + bias

    def extra_repr(self) -> str:
        if issubclass(self._operator_class, structlin.NamedOperator):
            name = self._operator_class.name + "".join(f" {k}={v}" for k, v in self.options.items())
        else:
            name = repr(self.structure)
        parts = [f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"]
        parts.append(f"structure={name}")
        if self.rms_cap:
            parts.append(f"rms_cap=True, gain={self.gains is not None}")
        parts += [f"rule={self.rule}"] if self.rule != "paper" else []
        parts += ["zero_init=True"] if self.zero_init else []
        return ", ".join(parts)


def _structure(structure: object, shape: tuple[int, int], options: dict[str, object]) -> AbstractStructure:
    if isinstance(structure, str):
        return structlin.design(structure, shape, **options)
    if not isinstance(structure, AbstractStructure):
        raise TypeError(f"structure must be a name or an AbstractStructure, got {structure!r}")
    if options:
        raise ValueError(f"options {', '.join(options)} go with the name of a structure, not with {structure!r}")
    if structure.shape != shape:
        raise ValueError(f"a layer of shape (out_features, in_features) = {shape} can not hold {structure!r}, "
                         f"which has shape {structure.shape}")  # fmt: skip
    return structure


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast what autocast casts: float32 and half precision."""
    return x.to(dtype) if x.dtype in (torch.float32, torch.float16, torch.bfloat16) else x
