"""The run of a recipe in flax, with checkpoints by orbax, in one process.

A run starts from the parameters that torch draws, and so agrees with the run in torch to rounding. Features and gains
are measured on that torch model, with the current weights (:mod:`structlin_nn.convert`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import torch
from flax import nnx
from jax import Array
from torch import Tensor, nn

from structlin_nn.checkpoints import CHECKPOINTS
from structlin_nn.convert import to_flax, to_torch
from structlin_nn.flax import optimizer_for
from structlin_nn.models.flax import MODELS
from structlin_nn.recipes._config import RunConfig, require
from structlin_nn.recipes._probe import Probe
from structlin_nn.recipes._processes import ALONE
from structlin_nn.recipes._run import Options, hardware
from structlin_nn.recipes._torch import Steps, base_of, common_state, count_run, layers_of, restore_common
from structlin_nn.torch import parameter_groups

CLIP_EPSILON = 1e-6  # torch's, in clip_grad_norm_


class FlaxConfig:
    """Mixin of the configurations of recipes in flax. It is no dataclass, so that it changes no default."""

    compiles: ClassVar[bool] = False

    def _check(self: Any) -> None:
        super()._check()  # type: ignore[misc]
        for name, value in {"precision": "float32", "compile": False, "recompute": False}.items():
            found = getattr(self, name)
            require(found == value, f"{name} must be {value!r} in flax, got {found!r}")
        require(self.is_named, f"model must be {' or '.join(self.named)} in flax, got {self.model!r}")
        require(self.optimizer != "muon", "optimizer='muon' is for the recipes in torch")


class FlaxRun(Steps):
    """A run in flax (`structlin_nn.recipes._run.Run`).

    `twin` is the torch model with the same parameters, as they were drawn or last written to it. `graph`, `params` and
    `rest` are the parts of the flax model, `moments` is the state of the optimiser, and `average` that of the weights.
    """

    versions = ("torch", "jax", "flax", "optax", "orbax-checkpoint")

    def __init__(self, config: RunConfig, options: Options, watch: Any = None) -> None:
        super().__init__(config, options, ALONE, watch)
        require(options.init_from is None, "init_from is for the recipes in torch")
        kind, _, number = config.device.partition(":")
        try:
            self.device = jax.devices(kind)[int(number or 0)]
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"jax does not have the device {config.device!r}: {error}") from error

    def start(
        self, build: Callable[..., nn.Module], outputs: int, *, steps: int, warmup: int, sample: Tensor, probe: Tensor,
        data: dict[str, Any], generators: Mapping[str, torch.Generator] | None = None,
        extra_multipliers: Mapping[Any, float] | None = None, decay: Sequence[str] = ("factor", "weight"),
    ) -> None:  # fmt: skip
        """Make model and optimiser, start the record, or restore what the checkpoint holds.

        The arguments are those of `structlin_nn.recipes._torch.TorchRun.start`; `build` makes the torch models.
        """
        config, self.warmup, self.generators = self.config, warmup, dict(generators or {})
        torch.manual_seed(config.seed)
        twin: Any = build(config, outputs)
        base: Any = base_of(build, config, outputs)
        kind: Any = MODELS[config.model]
        model, dense = (nnx.eval_shape(lambda own=m.config: kind(own, rngs=nnx.Rngs(0))) for m in (twin, base))
        aware: dict[str, Any] = {"optimizer": config.optimizer, "structure_aware": config.structure_aware}
        # At a learning rate of 1: steps multiply by theirs.
        self.tx = optimizer_for(
            model, dense, lr=1.0, weight_decay=config.weight_decay, extra_multipliers=extra_multipliers, decay=decay,
            independent_decay=config.independent_decay, betas=config.betas, **aware,
        )  # fmt: skip
        to_flax(twin.state_dict(), model)
        self.twin = twin
        split: Any = nnx.split(model, nnx.Param, ...)
        self.graph, params, rest = split
        self.params, self.rest = jax.device_put((nnx.as_pure(params), nnx.as_pure(rest)), self.device)
        self.moments = jax.device_put(self.tx.init(self.params), self.device)  # else the second step compiles again
        self.average = self.params if config.ema else None
        self.sums, self.probe = np.zeros(3), Probe(twin, self.call, probe)
        groups = parameter_groups(twin, base, lr=1.0, extra_multipliers=extra_multipliers, **aware)
        machine = hardware(config.threads or torch.get_num_threads(), self.device.platform)
        self.begin(
            steps=steps, counts=count_run(build, config, outputs, steps, sample), outputs=outputs, data=data,
            structures=layers_of(twin, groups), hardware={**machine, "processes": 1, "parallel": None},
        )  # fmt: skip
        if self.state is not None:
            place = self.folder / CHECKPOINTS / f"{self.step:09d}" / "orbax"
            try:
                with ocp.StandardCheckpointer() as reader:
                    tree = reader.restore(place.resolve(), jax.tree.map(ocp.utils.to_shape_dtype_struct, self._tree()))
            except (ValueError, KeyError, OSError) as error:
                raise ValueError(f"the checkpoint {place} is damaged or of another model: {error}") from error
            self.params, self.moments = tree["params"], tree["moments"]
            self.average = tree.get("average")
            self.sums = np.array(self.state["sums"])
            restore_common(self, self.state)

    def model(self, params: Any) -> Any:
        """Return the flax model with parameters."""
        return nnx.merge(self.graph, params, self.rest)

    def make_step(self, loss: Callable[[Any, Any, Any], tuple[Array, Any]]) -> Callable[..., tuple[Array, Array, Any]]:
        """Return a step on the equally large parts of a batch, by the mean of their gradients.

        `loss` maps (model, inputs, targets) to the mean loss, and to what else is wanted of a part. The step maps
        (inputs, targets) as NumPy arrays to the mean loss, the norm of the gradient, and what else, by parts.
        """
        config, tx = self.config, self.tx

        @jax.jit
        def step(params: Any, moments: Any, average: Any, parts: Any, rate: Any) -> Any:
            def of_parameters(params: Any, x: Array, y: Array) -> tuple[Array, Any]:
                return loss(self.model(params), x, y)

            found = [jax.value_and_grad(of_parameters, has_aux=True)(params, *part) for part in parts]
            gradients = jax.tree.map(lambda *each: sum(each) / len(each), *(gradient for _, gradient in found))
            norm = optax.tree.norm(gradients)
            if config.clip:
                shrink = jnp.minimum(1.0, config.clip / (norm + CLIP_EPSILON))
                gradients = jax.tree.map(lambda gradient: gradient * shrink, gradients)
            updates, moments = tx.update(gradients, moments, params)
            params = jax.tree.map(lambda p, update: p + rate * update, params, updates)
            if average is not None:
                average = jax.tree.map(lambda a, p: a + (1 - config.ema) * (p - a), average, params)
            value = jnp.stack([value for (value, _), _ in found]).mean()
            return params, moments, average, value, norm, [aux for (_, aux), _ in found]

        def take(inputs: np.ndarray, targets: np.ndarray) -> tuple[Array, Array, Any]:
            split = zip(np.split(inputs, config.accumulate), np.split(targets, config.accumulate), strict=True)
            parts = jax.device_put(list(split), self.device)
            rate = np.float32(config.lr * self.share(self.step))
            found = step(self.params, self.moments, self.average, parts, rate)
            self.params, self.moments, self.average = found[:3]
            return found[3:]

        return take

    def call(self, *inputs: Any, **options: Any) -> Any:
        """Return the forward pass of the torch model, with the current parameters."""
        self.twin.load_state_dict(to_torch(self.model(self.params)))
        return self.twin(*inputs, **options)

    @contextmanager
    def evaluation(self) -> Any:
        """Set `params` to the averaged ones, if there is an average, within the block."""
        kept = self.params
        self.params = kept if self.average is None else self.average
        try:
            yield
        finally:
            self.params = kept

    def _tree(self) -> dict[str, Any]:
        average = {} if self.average is None else {"average": self.average}
        return {"params": self.params, "moments": self.moments, **average}

    def write(self, folder: Path) -> dict[str, Any]:
        try:
            with ocp.StandardCheckpointer() as writer:
                writer.save(folder.resolve() / "orbax", self._tree())
        except ValueError as error:
            # orbax reports so what the system said of a file, and its number within the text.
            found = re.search(r"(?:os_error_code='|OS error )(\d+)", str(error))
            number = int(found[1]) if found else None
            raise OSError(number, str(error) if number is None else os.strerror(number)) from error
        return {"tensors": {}, "build": None, "layout": None, "init_from": None, **common_state(self, self.twin)}

    def not_finite(self) -> str | None:
        leaves = jax.tree_util.tree_leaves_with_path(self.params)
        bad = [path for path, leaf in leaves if not bool(jnp.isfinite(leaf).all())]
        return jax.tree_util.keystr(bad[0]) if bad else None
