"""What a pipeline has of its own: data, loss and evaluation. The loop (`structlin_nn.training.loop`) has the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from structlin_nn.training.base import RunConfig
from structlin_nn.training.distributed import Processes
from structlin_nn.training.schedule import learning_rate

__all__ = ["Task", "make_task"]


class Task(ABC):
    """The part of a run that its pipeline decides.

    A step takes ``config.batch_size`` samples; each process has an equal, contiguous share of them, in
    ``config.accumulate`` equal parts. What is computed does not depend on how a batch is shared.

    Attributes:
        config: of the run.
        processes: of the run.
        outputs: number of classes, or of the tokens that the model knows.
        steps: of the whole run.
        digest: sha256 sum of the data.
    """

    unit: ClassVar[str] = "img"
    """What a sample is called in the progress bar."""
    sums: ClassVar[int]
    """Size of the vector that `add` adds to."""

    config: RunConfig
    processes: Processes
    outputs: int
    steps: int
    warmup: int
    digest: str

    def share(self, step: int) -> float:
        """The share of the learning rate that a step takes."""
        return learning_rate(self.config.schedule, step, self.steps, self.warmup, self.config.final_lr)

    def part_size(self) -> int:
        """Samples in a part of a process's share of a step.

        Raises:
            ValueError: a batch that cannot be split equally.
        """
        own = self.processes.parts(self.config.batch_size, "batch_size")
        if own % self.config.accumulate:
            raise ValueError(f"{own} samples in a process's share cannot be split into {self.config.accumulate} parts")
        return own // self.config.accumulate

    @abstractmethod
    def described(self) -> dict[str, Any]:
        """The data as the header of a record has them."""

    @abstractmethod
    def introduction(self) -> str:
        """The data in a line for the reader."""

    @abstractmethod
    def parts(self) -> list[Any]:
        """This process's parts of the next batch."""

    @abstractmethod
    def loss(self, model: nn.Module, part: Any) -> tuple[Tensor, Tensor]:
        """Mean loss of a part, and a vector of statistics that are summed over parts and processes."""

    @abstractmethod
    def add(self, sums: Tensor, loss: Tensor, statistics: Tensor) -> None:
        """Take a step's mean loss and statistics, of all processes, into the sums since the last evaluation."""

    @abstractmethod
    def evaluates(self, step: int) -> bool:
        """Whether there is an evaluation after so many steps; there is one after the last."""

    @abstractmethod
    def evaluate(self, model: Callable[..., Any], step: int, sums: list[float]) -> dict[str, Any]:
        """What the record has of an evaluation, apart from what all pipelines have. Called in all processes."""

    @abstractmethod
    def summary(self, evaluation: dict[str, Any]) -> str:
        """An evaluation in one line."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Position in the data and state of random generators, the same in all processes."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of `state_dict`."""

    @abstractmethod
    def probe(self) -> Tensor:
        """A fixed batch on which features and gains are measured, the same in all processes."""

    def measures(self, step: int) -> bool:
        """Whether the change of features in step number `step` (from 1) is measured."""
        return self.evaluates(step)


def make_task(config: RunConfig, processes: Processes, **data: Any) -> Task:
    """The task of a configuration.

    Args:
        config: of any pipeline.
        processes: of the run.
        **data: where the data are, as the pipeline's task takes it.

    Raises:
        FileNotFoundError: data that are not there.
        ValueError: damaged data, or a batch that cannot be shared.
    """
    if config.task == "cifar":
        from structlin_nn.training.cifar import CifarTask as kind
    elif config.task == "imagenet":
        from structlin_nn.training.imagenet import ImageNetTask as kind  # type: ignore[assignment]
    else:
        from structlin_nn.training.gpt2 import GPT2Task as kind  # type: ignore[assignment]
    return kind(config, processes, **data)


def split(tensor: Tensor, processes: Processes, parts: int) -> list[Tensor]:
    """A process's share of a whole batch, in equal parts."""
    return list(processes.share(tensor).chunk(parts))
