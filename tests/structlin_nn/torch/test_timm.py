"""timm: its factory of optimisers, averages of weights, and checkpoints of its train script."""

import warnings

import pytest
import torch

from structlin_nn.torch import RatesWarning, StructuredLinear, parameter_groups, replace_linear

timm = pytest.importorskip("timm")


def build(seed: int = 0):
    torch.manual_seed(seed)
    sizes = {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 2, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    replace_linear(model, "low_rank", rank=2)
    return model


def test_optimizer_average_and_checkpoint(tmp_path):
    from timm.models import load_checkpoint
    from timm.optim import create_optimizer_v2
    from timm.utils import CheckpointSaver, ModelEmaV3

    model, rule = build(), {"lr": 1e-3, "weight_decay": 0.05}
    optimizer = create_optimizer_v2(model, "adamw", **rule, param_group_fn=lambda m: parameter_groups(m, **rule))
    assert len({group["multiplier"] for group in optimizer.param_groups}) > 1
    average = ModelEmaV3(model, decay=0.5)
    x = torch.randn(2, 3, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RatesWarning)
        before = model.blocks[0].mlp.fc1.factors[0].detach().clone()
        model(x).square().mean().backward()
        optimizer.step()
        average.update(model)
    after = model.blocks[0].mlp.fc1.factors[0]
    torch.testing.assert_close(average.module.blocks[0].mlp.fc1.factors[0], (before + after) / 2)
    assert isinstance(average.module.blocks[0].mlp.fc1, StructuredLinear)

    saver = CheckpointSaver(
        model, optimizer, model_ema=average, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path)
    )
    saver.save_checkpoint(0, metric=1.0)
    again = build(seed=1)
    load_checkpoint(again, str(tmp_path / "last.pth.tar"), use_ema=False, weights_only=False)
    assert torch.equal(again.eval()(x), model.eval()(x))


def test_its_own_groups_cause_a_warning():
    from timm.optim import create_optimizer_v2

    model = build()
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    with pytest.warns(RatesWarning, match="structured layers at the rate of dense weights"):
        optimizer.step()
