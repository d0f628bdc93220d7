"""Training runs: configurations (`config`), the loop (`loop`), records (`records`) and checkpoints (`checkpoint`).

`structlin_nn.training.loop` needs torch and is imported by its own name, so that configurations and records can be
read without it.
"""

from structlin_nn.training.config import RECIPES, TrainConfig, recipe
from structlin_nn.training.records import Record, read_record

__all__ = ["RECIPES", "Record", "TrainConfig", "read_record", "recipe"]
