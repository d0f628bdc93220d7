"""The steps and evaluations of a run in flax; everything else of the run is what it is in torch.

A run in flax starts from the parameters that torch draws, and has the same batches, schedule, record and checkpoint:
a checkpoint holds the parameters and Adam's moments under torch's names and in torch's layouts
(:mod:`structlin_nn.convert`), so that either framework can go on from it, and `structlin_nn.training.run.load_trained`
gives the torch model of it. Features and gains (`structlin_nn.training.statistics`) are measured on the torch model
with the weights of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from torch import Tensor, nn

from structlin_nn.convert import to_flax, to_torch
from structlin_nn.flax import optimizer_for
from structlin_nn.flax.models import base_model, build_model
from structlin_nn.training.base import RunConfig
from structlin_nn.training.config import TrainConfig
from structlin_nn.training.distributed import Processes
from structlin_nn.training.model import INPUT_LAYERS, model_sizes, structure_of
from structlin_nn.training.run import Run

__all__ = ["FlaxAverage", "FlaxRun", "FlaxStepper"]

_CLIP_EPSILON = 1e-6  # torch's, in clip_grad_norm_


class FlaxAverage:
    """Exponential moving average of the parameters of a stepper; `FlaxStepper` updates it."""

    def __init__(self, stepper: FlaxStepper) -> None:
        self.stepper, self.tree = stepper, stepper.params

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While the block lasts, the model has the averaged weights."""
        kept, self.stepper.params = self.stepper.params, self.tree
        try:
            yield
        finally:
            self.stepper.params = kept


class FlaxStepper:
    """Takes the place of `structlin_nn.training.stepper.Stepper`: steps of optax on a flax model.

    Args:
        config: of the run.
        model: the torch model, whose parameters are the first ones.
        outputs: number of classes.
        processes: of the run.

    Raises:
        ValueError: several processes; a device that jax does not have.
    """

    def __init__(self, config: RunConfig, model: nn.Module, outputs: int, processes: Processes) -> None:
        assert isinstance(config, TrainConfig)
        if processes.size > 1:
            raise ValueError(f"framework='flax' trains in one process, got {processes.size}")
        self.config, self.model, self.wrapped = config, model, model
        self.device = _jax_device(processes.device)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=False)
        sizes = model_sizes(config, outputs)
        made = {"width": config.width, "structure": structure_of(config), **sizes}
        self.flax = nnx.eval_shape(lambda: build_model(config.model, rngs=nnx.Rngs(0), **made))
        extra = {INPUT_LAYERS[config.model]: config.input_lr_mult} if config.input_lr_mult != 1 else {}
        self.tx = optimizer_for(
            self.flax,
            base_model(config.model, config.base_width, **sizes),
            lr=1.0,
            weight_decay=config.weight_decay,
            optimizer=config.optimizer,
            structure_aware=config.structure_aware,
            extra_multipliers=extra,
            betas=config.betas,
        )
        self._load()
        self.moments = self.tx.init(self.params)
        self.average = FlaxAverage(self) if config.ema else None
        self._step = jax.jit(self._stepped)
        self._logits = jax.jit(lambda params, rest, x: nnx.merge(self.graph, params, rest)(x))

    def _load(self) -> None:
        """Take over the torch model's parameters."""
        to_flax(self.model.state_dict(), self.flax)
        self.graph, params, rest = nnx.split(self.flax, nnx.Param, ...)
        self.params, self.rest = jax.device_put((nnx.as_pure(params), nnx.as_pure(rest)), self.device)

    def _stepped(self, params: Any, moments: Any, rest: Any, average: Any, parts: Any, rate: Any) -> tuple[Any, ...]:
        def loss(params: Any, inputs: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = nnx.merge(self.graph, params, rest)(inputs)
            return optax.softmax_cross_entropy(logits, targets).mean(), logits

        found = [jax.value_and_grad(loss, has_aux=True)(params, *part) for part in parts]
        gradients = jax.tree.map(lambda *each: sum(each) / len(each), *(gradient for _, gradient in found))
        if self.config.clip:
            norm = optax.tree.norm(gradients)
            shrink = jnp.minimum(1.0, self.config.clip / (norm + _CLIP_EPSILON))
            gradients = jax.tree.map(lambda gradient: gradient * shrink, gradients)
        updates, moments = self.tx.update(gradients, moments, params)
        params = jax.tree.map(lambda p, update: p + rate * update, params, updates)
        if average is not None:
            average = jax.tree.map(lambda a, p: a + (1 - self.config.ema) * (p - a), average, params)
        losses, logits = zip(*(values for values, _ in found), strict=True)
        return params, moments, average, losses, logits

    def autocast(self) -> Any:
        """Nothing: flax computes in float32."""
        return nullcontext()

    def logits(self, inputs: Tensor) -> Tensor:
        """The model's logits, as a tensor where the inputs are."""
        return _tensor(self._logits(self.params, self.rest, self._array(inputs))).to(inputs.device)

    def step(
        self, parts: Sequence[Any], loss: Callable[[Any, Any], tuple[Tensor, Tensor]], share: float
    ) -> tuple[Tensor, Tensor]:
        """One step over the parts of a batch, with the arguments and results of `Stepper.step`.

        Of `loss`, the statistics are taken, from the logits of the step; its value is that of flax.
        """
        arrays = [(self._array(inputs), self._array(targets)) for inputs, targets, *_ in parts]
        rate = np.float32(self.config.lr * share)
        average = None if self.average is None else self.average.tree
        self.params, self.moments, average, losses, logits = self._step(
            self.params, self.moments, self.rest, average, arrays, rate
        )
        if self.average is not None:
            self.average.tree = average
        statistics = []
        for part, found in zip(parts, logits, strict=True):
            tensor = _tensor(found).to(part[0].device)
            statistics.append(loss(lambda _, known=tensor: known, part)[1])
        mean = torch.tensor([float(value) for value in losses], dtype=torch.float64).mean()
        return mean, torch.stack(statistics).sum(0)

    def write_to_model(self) -> None:
        """Give the torch model the parameters of the flax model."""
        self.model.load_state_dict(self._torch(self.params))

    def state(self) -> dict[str, Any]:
        """What `Stepper.state` returns: Adam's moments and the average under torch's names."""
        adam = _adam(self.moments)
        first, second = self._torch(adam.mu), self._torch(adam.nu)
        count = torch.tensor(float(adam.count))
        names = [name for name, _ in self.model.named_parameters()]
        moments = {n: {"step": count.clone(), "exp_avg": first[n], "exp_avg_sq": second[n]} for n in names}
        average = {} if self.average is None else self._torch(self.average.tree)
        return {
            "optimizer": moments if int(adam.count) else {},
            "average": {name: average[name] for name in names if name in average},
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state`, or that of a torch stepper, returned; the torch model has its parameters.

        Raises:
            ValueError: parameters of which the optimiser made different numbers of steps.
        """
        self._load()
        moments = state["optimizer"]
        counts = {float(entries["step"]) for entries in moments.values()} or {0.0}
        if len(counts) > 1:
            raise ValueError(f"the parameters of the checkpoint are at different steps, {sorted(counts)}")
        zero = {name: torch.zeros_like(p) for name, p in self.model.named_parameters()}

        def tree(key: str) -> Any:
            return self._tree({name: moments[name][key] if name in moments else zero[name] for name in zero})

        adam = optax.ScaleByAdamState(
            count=jax.device_put(jnp.asarray(int(counts.pop()), jnp.int32), self.device),
            mu=tree("exp_avg"),
            nu=tree("exp_avg_sq"),
        )
        kept = tuple(adam if isinstance(part, optax.ScaleByAdamState) else part for part in self.moments)
        self.moments = kept
        if self.average is not None:
            self.average.tree = self._tree(state["average"])

    def _array(self, tensor: Tensor) -> jax.Array:
        return jax.device_put(tensor.detach().cpu().numpy(), self.device)

    def _torch(self, params: Any) -> dict[str, Tensor]:
        return to_torch(nnx.merge(self.graph, params, self.rest))

    def _tree(self, tensors: dict[str, Tensor]) -> Any:
        """Tensors by torch's names as a tree like the parameters."""
        holder = nnx.merge(self.graph, self.params, self.rest)
        to_flax({**self.model.state_dict(), **tensors}, holder)
        return jax.device_put(nnx.as_pure(nnx.state(holder, nnx.Param)), self.device)


class FlaxRun(Run):
    """A run whose `stepper` is a `FlaxStepper`; `model` is the torch model that its weights are written to."""

    stepper: Any

    def call(self, *inputs: Any, **options: Any) -> Any:
        """The forward pass for evaluation; with options, that of the torch model with the same weights."""
        if options:
            self.stepper.write_to_model()
            return self.model.forward(*inputs, **options)
        return self.stepper.logits(*inputs)

    def evaluate(self) -> dict[str, Any]:
        self.stepper.write_to_model()
        return super().evaluate()

    def save(self) -> None:
        self.stepper.write_to_model()
        super().save()


def _adam(moments: Any) -> optax.ScaleByAdamState:
    (found,) = (part for part in moments if isinstance(part, optax.ScaleByAdamState))
    return found


def _tensor(array: jax.Array) -> Tensor:
    return torch.from_numpy(np.array(array))


def _jax_device(device: torch.device) -> Any:
    try:
        return jax.devices(device.type)[device.index or 0]
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"jax does not have the device {str(device)!r}: {error}") from error
