"""The framework-independent part of a structured layer: its structure and the scales of its factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlin
from structlin.structure import AbstractStructure


@dataclass(frozen=True)
class LayerPlan:
    """The structure of a layer (`structure`, `operator_class`) and what follows from its arguments.

    Of each factor: `init_std`, the deviation at which it is drawn (0 for zero-initialised and index factors), and
    `cap_sigma`, the RMS at which it is capped (0 for index factors). `gains`: whether each trainable factor has a
    learned gain; `index_at`: places of the index factors; `is_dense`: whether the one factor is the matrix itself.
    """

    structure: AbstractStructure
    operator_class: type[structlin.StructuredOperator]
    init_std: tuple[float, ...]
    cap_sigma: tuple[float, ...]
    gains: bool
    index_at: tuple[int, ...]
    is_dense: bool


def plan_layer(
    in_features: int,
    out_features: int,
    structure: str | AbstractStructure,
    options: Mapping[str, Any],
    *,
    rms_cap: bool,
    gain: bool | None,
    rule: str,
    zero_init: bool,
) -> LayerPlan:
    """Check the arguments of a layer (`structlin_nn.torch.StructuredLinear` lists the errors), and derive its plan."""
    shape = (out_features, in_features)
    made = structure_of(structure, shape, options)
    trainable = [f.trainable for f in made.factors]
    if gain and not rms_cap:
        raise ValueError("gain=True needs rms_cap=True: only capped factors have gains")
    if (rms_cap or zero_init) and not any(trainable):
        option = "rms_cap" if rms_cap else "zero_init"
        raise ValueError(f"{option}=True, but {made!r} has no trainable factors")
    full = structlin.init_std(made, rule=rule)
    init = structlin.init_std(made, rule=rule, zero_last=zero_init)
    return LayerPlan(
        structure=made,
        operator_class=structlin.structure_class(structure)
        if isinstance(structure, str)
        else structlin.StructuredOperator,
        init_std=init,
        cap_sigma=tuple(own or std for own, std in zip(init, full, strict=True)),
        gains=rms_cap and gain is not False,
        index_at=tuple(n for n, own in enumerate(trainable) if not own),
        is_dense=made == structlin.design("dense", made.shape),
    )


def tuples(value: Any) -> Any:
    """Return a value with its lists as tuples, at all levels."""
    return tuple(map(tuples, value)) if isinstance(value, list | tuple) else value


class PlannedLayer:
    """The part of a layer that follows from its plan, the same for every framework."""

    if TYPE_CHECKING:  # torch.jit does not know these annotations
        _plan: LayerPlan
        factors: Any
        gains: Any
        bias: Any
        options: Any
        rms_cap: bool
        rule: str
        zero_init: bool

    def _values(self, parameters: Any) -> Sequence[Any]:
        """Return the arrays of a list of parameters."""
        raise NotImplementedError

    def _index(self, number: int) -> Any:
        return getattr(self, f"index{number}")

    def _dtype_without_factors(self) -> Any:
        raise NotImplementedError

    def _capped(self, factor: Any, sigma: float, gain: Any) -> Any:
        return structlin.rms_cap(factor, sigma, gain)

    def effective_factors(self) -> tuple[Any, ...]:
        """Return all factors of A, index factors included; trainable ones are capped if ``rms_cap`` is set."""
        factors, plan = list(self._values(self.factors)), self._plan
        if self.rms_cap:
            sigmas = [sigma for n, sigma in enumerate(plan.cap_sigma) if n not in plan.index_at]
            gains = [1.0] * len(factors) if self.gains is None else self._values(self.gains)
            factors = [self._capped(f, s, g) for f, s, g in zip(factors, sigmas, gains, strict=True)]
        for number in plan.index_at:
            factors.insert(number, self._index(number))
        return tuple(factors)

    @property
    def operator(self) -> structlin.StructuredOperator:
        """The matrix A as an operator of shape (out_features, in_features), without a copy of the factors.

        It is differentiable in the parameters. With ``rms_cap`` it contains the capped factors, so access it again
        after each step of the optimiser; in jax, access it inside the function that is differentiated.
        """
        dtype = None if len(self.factors) else self._dtype_without_factors()
        return self._plan.operator_class._build(self._plan.structure, self.effective_factors(), dtype)

    def _described(self) -> str:
        """Return the arguments of the layer as they stand in its representation."""
        plan = self._plan
        if issubclass(plan.operator_class, structlin.NamedOperator):
            name = plan.operator_class.name + "".join(f" {k}={v}" for k, v in self.options.items())
        else:
            name = repr(plan.structure)
        about = f"in_features={plan.structure.d_in}, out_features={plan.structure.d_out}, bias={self.bias is not None}"
        about += f", structure={name}"
        if self.rms_cap:
            about += f", rms_cap=True, gain={plan.gains}"
        if self.rule != "paper":
            about += f", rule={self.rule}"
        return about + (", zero_init=True" if self.zero_init else "")


def structure_of(structure: object, shape: tuple[int, int], options: Mapping[str, Any]) -> AbstractStructure:
    """Return the structure of a layer by its name with options, or one that is given; ValueError for another shape."""
    if isinstance(structure, str):
        return structlin.design(structure, shape, **options)
    if not isinstance(structure, AbstractStructure):
        raise TypeError(f"structure must be a name or an AbstractStructure, got {structure!r}")
    if options:
        raise ValueError(f"options {', '.join(options)} go with the name of a structure, not with {structure!r}")
    if structure.shape != shape:
        raise ValueError(f"a layer of shape (out_features, in_features) = {shape} cannot hold {structure!r}, "
                         f"which has shape {structure.shape}")  # fmt: skip
    return structure
