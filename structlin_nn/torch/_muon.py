"""Muon for structured matrices: updates with orthogonalised blocks, and AdamW for parameters that are not matrices."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from structlin.structure import AbstractStructure, Structure

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class Matrices(NamedTuple):
    """Layout of ``blocks`` matrices of shape (fan_out, fan_in) in a parameter: permute by ``order``, then reshape."""

    order: tuple[int, ...]
    blocks: int
    fan_out: int
    fan_in: int

    def view(self, x: Tensor) -> Tensor:
        """Return a view of shape (blocks, fan_out, fan_in)."""
        return x.permute(self.order).reshape(self.blocks, self.fan_out, self.fan_in)

    def stacked(self, number: int) -> Matrices:
        """Return the layout in ``number`` such parameters stacked along a new first axis."""
        return Matrices((0, *(axis + 1 for axis in self.order)), number * self.blocks, self.fan_out, self.fan_in)

    def back(self, matrices: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the parameter of ``shape`` that has these matrices, the inverse of :meth:`view`."""
        inverse = [self.order.index(axis) for axis in range(len(self.order))]
        return matrices.reshape([shape[axis] for axis in self.order]).permute(inverse)


def factor_matrices(structure: AbstractStructure) -> tuple[Matrices | None, ...]:
    """Return the layout of the matrices in each factor of a chain; None for a factor of another structure."""
    if not isinstance(structure, Structure):
        return (None,) * len(structure.factors)
    return tuple(
        Matrices(
            tuple(step.factor.index(a) for roles in (step.batch, step.free, step.contracted) for a in roles),
            factor.blocks, factor.fan_out, factor.fan_in,
        )
        for step, factor in zip(structure.steps, structure.factors, strict=True)
    )  # fmt: skip


def muon_multiplier(matrices: Matrices, base_d_in: int, base_d_out: int, count: int = 1) -> float:
    r"""Return the multiplier of one of ``count`` factors for the rate tuned for the dense layer at base width.

    The spectral condition (Yang, Simon, Bernstein, *A Spectral Condition for Feature Learning*, 2023) requires an
    update of norm :math:`\sqrt{\mathrm{fan\_out} / \mathrm{fan\_in}}` for each block. An orthogonalised update has norm
    1. A block-diagonal matrix has the norm of its largest block, and carried positions do not change the norm. So the
    multiplier is :math:`\sqrt{\mathrm{fan\_out} / \mathrm{fan\_in}}`, relative to that of the base layer. It is divided
    by the number of factors, as in the rule of Adam, because the contributions of the factors to the product add up.
    """
    own, base = matrices.fan_out / matrices.fan_in, base_d_out / base_d_in
    return math.sqrt(own / base) / count


def orthogonalized(x: Tensor, steps: int = 5) -> Tensor:
    """Return an approximation of U V^T for matrices U S V^T of shape (..., m, n), by Newton-Schulz iterations.

    With these coefficients the singular values lie between 0.7 and 1.2 after few steps (Jordan et al., *Muon: An
    optimizer for hidden layers in neural networks*, 2024). The iteration runs in bfloat16 on CUDA, in float32
    otherwise.
    """
    a, b, c = NEWTON_SCHULZ
    given, dtype = x, torch.bfloat16 if x.is_cuda else torch.float32
    x = x.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if tall else x).to(given.dtype)


class Muon(Optimizer):
    """Optimiser that updates matrices by Muon, block by block, and all other parameters by AdamW.

    ``torch.optim.Muon`` supports parameters with two axes. A factor of a structured layer contains several matrices.
    The update of a parameter is ``lr`` times its Nesterov momentum, whose blocks are orthogonalised. The multipliers of
    :func:`parameter_groups` determine its scale. Weight decay is decoupled. Sharded parameters (DTensors) are gathered
    one at a time.

    Parameters
    ----------
    params
        Groups of ``parameter_groups(..., optimizer="muon")``. A group with a list ``matrices``, the layout of the
        matrices in each of its ``params``, is updated by Muon, any other group by AdamW.
    lr
        Learning rate of groups without a rate.
    weight_decay
        Weight decay of groups without one.
    momentum
        Momentum of Muon.
    nesterov
        Use Nesterov momentum.
    ns_steps
        Number of Newton-Schulz iterations.
    betas, eps
        Options of AdamW.

    Examples
    --------
    >>> layer = torch.nn.Linear(4, 3, bias=False)
    >>> group = {"params": [layer.weight], "matrices": [Matrices((0, 1), blocks=1, fan_out=3, fan_in=4)]}
    >>> optimizer, before = Muon([group], lr=0.1), layer.weight.detach().clone()
    >>> layer(torch.randn(5, 4)).square().sum().backward()
    >>> optimizer.step()
    >>> bool(torch.linalg.matrix_norm(layer.weight - before, 2) < 0.13)
    True
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        if not (lr >= 0 and weight_decay >= 0 and eps >= 0):
            raise ValueError(f"lr, weight_decay and eps must not be negative, got {lr}, {weight_decay} and {eps}")
        for name, value in (("momentum", momentum), ("betas[0]", betas[0]), ("betas[1]", betas[1])):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {value}")
        if ns_steps < 1:
            raise ValueError(f"ns_steps must be at least 1, got {ns_steps}")
        defaults = {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps,
            "betas": betas, "eps": eps, "matrices": None,
        }  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with the checks of the constructor."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["matrices"] is None:
            return
        if len(group["matrices"]) != len(group["params"]):
            raise ValueError(
                f"a group must have one entry of matrices for each parameter, got {len(group['params'])} params and "
                f"{len(group['matrices'])} matrices"
            )
        # Plain tuples, so that torch.load(weights_only=True) reads the state of the optimiser.
        group["matrices"] = [tuple(m) for m in group["matrices"]]
        for p, (order, blocks, fan_out, fan_in) in zip(group["params"], group["matrices"], strict=True):
            if p.is_complex():
                raise ValueError("Muon does not support complex parameters; name their layers in adam_layers")
            if p.ndim != len(order) or p.numel() != blocks * fan_out * fan_in:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} does not hold {blocks} matrices of ({fan_out}, {fan_in})"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["matrices"] is None:
                self._adam(group)
            else:
                for parameter, matrices in zip(group["params"], group["matrices"], strict=True):
                    if parameter.grad is not None:
                        self._muon(parameter, Matrices(*matrices), group)
        return loss

    def _muon(self, parameter: Tensor, matrices: Matrices, group: dict[str, Any]) -> None:
        grad, state = parameter.grad, self.state[parameter]
        assert grad is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        buffer = state["momentum_buffer"]
        buffer.lerp_(grad, 1 - group["momentum"])
        update: Any = grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
        sharded: Any = sys.modules.get("torch.distributed.tensor")
        is_sharded = sharded is not None and isinstance(update, sharded.DTensor)
        whole = update.full_tensor() if is_sharded else update
        whole = matrices.back(orthogonalized(matrices.view(whole), group["ns_steps"]), whole.shape)
        if is_sharded:  # all processes have the same values; each keeps its shard
            whole = sharded.distribute_tensor(
                whole.contiguous(), update.device_mesh, update.placements, src_data_rank=None
            )
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(whole, alpha=-group["lr"])

    def _adam(self, group: dict[str, Any]) -> None:
        kinds: dict[Any, list[Any]] = {}  # the fused kernel takes sharded or whole parameters, and no complex ones
        for p in group["params"]:
            if p.grad is not None:
                kinds.setdefault((type(p.data), p.is_complex()), []).append(p)
        for (_, is_complex), parameters in kinds.items():
            for p in parameters:
                state = self.state[p]
                if not state:
                    state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                state["step"] = state["step"].to("cpu" if is_complex else p.device, torch.float32)
            states = [self.state[p] for p in parameters]
            adamw(
                parameters,
                [p.grad for p in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=not is_complex,
                has_complex=is_complex,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
