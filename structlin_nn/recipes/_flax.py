"""What the recipes in flax share: the state of a run and its checkpoints by orbax.

A run starts from the parameters that torch draws, so that it is the run in torch to rounding; features and gains are
measured on that torch model, with the weights of the step (:mod:`structlin_nn.convert`). It trains in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import torch
from flax import nnx
from torch import Tensor, nn

from structlin import execution
from structlin_nn.checkpoints import CHECKPOINTS
from structlin_nn.convert import to_flax, to_torch
from structlin_nn.recipes._config import RunConfig, require
from structlin_nn.recipes._probe import Probe
from structlin_nn.recipes._run import Options, Run
from structlin_nn.recipes._telling import hardware
from structlin_nn.recipes._torch import decoded, encoded, layers_of
from structlin_nn.torch import StructuredLinear, parameter_groups

__all__ = ["FlaxRun", "check_flax", "mean_gradients"]

CLIP_EPSILON = 1e-6  # torch's, in clip_grad_norm_


def check_flax(config: RunConfig) -> None:
    """ValueError for what a recipe in flax does not do."""
    for name, value in {"precision": "float32", "compile": False, "recompute": False}.items():
        found = getattr(config, name)
        require(found == value, f"{name} must be {value!r} in flax, got {found!r}")
    require(config.optimizer != "muon", "optimizer='muon' is for the recipes in torch")


def mean_gradients(loss: Callable[..., Any], params: Any, parts: Sequence[Any]) -> tuple[Any, Any, list[Any]]:
    """(mean loss, mean gradients, what the loss returned beside) over the equally large parts of a batch."""
    found = [jax.value_and_grad(loss, has_aux=True)(params, *part) for part in parts]
    gradients = jax.tree.map(lambda *each: sum(each) / len(each), *(gradient for _, gradient in found))
    return jnp.stack([value for (value, _), _ in found]).mean(), gradients, [aux for (_, aux), _ in found]


class FlaxRun(Run):
    """A run in flax (`structlin_nn.recipes._run.Run`).

    Attributes:
        twin: the torch model with the same parameters, as they were drawn or when they were last written to it.
        graph: of the flax model; `params`, `rest`: its state; `moments`: of the optimiser; `average`: of the weights.
    """

    versions = ("torch", "jax", "flax", "optax", "orbax-checkpoint")

    def __init__(self, config: RunConfig, options: Options, watch: Any = None) -> None:
        super().__init__(config, options, None, watch)
        require(options.init_from is None, "init_from is for the recipes in torch")
        kind, _, number = config.device.partition(":")
        try:
            self.device = jax.devices(kind)[int(number or 0)]
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"jax does not have the device {config.device!r}: {error}") from error

    def start(
        self, twin: nn.Module, base: nn.Module, model: nnx.Module, tx: optax.GradientTransformation, *, steps: int,
        counts: dict[str, int], outputs: int, data: dict[str, Any], probe: Tensor, warmup: int = 0,
        extra_multipliers: Mapping[Any, float] | None = None, generators: Mapping[str, torch.Generator] | None = None,
    ) -> None:  # fmt: skip
        """Start the record, or restore what the checkpoint holds.

        Args:
            twin: the torch model, with the first parameters; `base`: the dense one at base width.
            model: the flax model, which may be abstract.
            tx: the optimiser, at a learning rate of 1.
            probe: inputs on which features and gains are measured.
            warmup: steps of the warm-up.
            extra_multipliers: that `tx` was made with.
            generators: of random numbers that the recipe draws from, by name.
        """
        self.twin, self.warmup, self.generators = twin, warmup, dict(generators or {})
        to_flax(twin.state_dict(), model)
        self.graph, params, rest = nnx.split(model, nnx.Param, ...)
        self.params, self.rest = jax.device_put((nnx.as_pure(params), nnx.as_pure(rest)), self.device)
        self.moments = tx.init(self.params)
        self.average = self.params if self.config.ema else None
        self.sums, self.probe = np.zeros(3), Probe(twin, twin, probe)
        groups = parameter_groups(
            twin, base, lr=1.0, optimizer=self.config.optimizer, structure_aware=self.config.structure_aware,
            extra_multipliers=extra_multipliers,
        )  # fmt: skip
        machine = hardware(self.config.threads or torch.get_num_threads(), self.device.platform)
        self.begin(
            steps=steps, counts=counts, outputs=outputs, data=data, structures=layers_of(twin, groups),
            hardware={**machine, "processes": 1, "parallel": None},
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
            self.probe.total, self.probe.count = self.state["probe"]
            for name, generator in self.generators.items():
                generator.set_state(decoded(self.state["generators"][name]))

    def write_to_twin(self) -> None:
        """Give the torch model the parameters."""
        self.twin.load_state_dict(to_torch(nnx.merge(self.graph, self.params, self.rest)))

    @contextmanager
    def evaluation(self) -> Any:
        """While the block lasts, `params` are the averaged ones if there is an average."""
        kept = self.params
        self.params = kept if self.average is None else self.average
        try:
            yield
        finally:
            self.params = kept

    def evaluated(self, found: dict[str, Any], summary: str, metric: str) -> None:
        self.write_to_twin()
        super().evaluated({**found, "statistics": self.probe.statistics()}, summary, metric)

    def _tree(self) -> dict[str, Any]:
        average = {} if self.average is None else {"average": self.average}
        return {"params": self.params, "moments": self.moments, **average}

    def write(self, folder: Path) -> dict[str, Any]:
        with ocp.StandardCheckpointer() as writer:
            writer.save(folder.resolve() / "orbax", self._tree())
        return {"tensors": {}, "build": None, "layout": None}

    def more_state(self) -> dict[str, Any]:
        structures = {m.structure for m in self.twin.modules() if isinstance(m, StructuredLinear)}
        return {
            "init_from": None,
            "generators": {name: encoded(generator.get_state()) for name, generator in self.generators.items()},
            "sums": self.sums.tolist(),
            "probe": [self.probe.total, self.probe.count],
            "execution": execution.decisions(structures),
        }

    def not_finite(self) -> str | None:
        leaves = jax.tree_util.tree_leaves_with_path(self.params)
        bad = [path for path, leaf in leaves if not bool(jnp.isfinite(leaf).all())]
        return jax.tree_util.keystr(bad[0]) if bad else None

    def sums_reset(self) -> None:
        self.sums[:] = 0
