"""A module of Lightning with structured layers: trained at the right rates, saved in a checkpoint, and loaded again."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from structlin_nn.torch import MuAdamW, RatesWarning, StructuredLinear, replace_linear, with_multipliers

lightning = pytest.importorskip("lightning")


class Regression(lightning.LightningModule):
    """The example of docs/transformers.md."""

    def __init__(self, rank: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 1))
        replace_linear(self.network, "low_rank", rank=rank)
        self.losses: list[float] = []

    def training_step(self, batch, number):
        x, y = batch
        loss = nn.functional.mse_loss(self.network(x), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        optimizer = MuAdamW(self.network, lr=1e-2)
        scheduler = with_multipliers(torch.optim.lr_scheduler.OneCycleLR, optimizer, max_lr=1e-2, total_steps=40)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def test_lightning_trains_saves_and_loads(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(64, 24)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x[:, :1] * x[:, 1:2]), batch_size=16)
    module = Regression()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_steps=40, accelerator="cpu", enable_checkpointing=False, **quiet)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RatesWarning)
        trainer.fit(module, data)
    assert len(module.losses) == 40
    assert sum(module.losses[-4:]) < 0.8 * sum(module.losses[:4])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = Regression.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert isinstance(again.network[0], StructuredLinear)
    assert torch.equal(again.network(x), module.network(x))
    optimizer = trainer.optimizers[0]
    assert {group["multiplier"] for group in optimizer.param_groups} != {1.0}
