"""The schedule against torch's own."""

import pytest
import torch

from structlin_nn.training.schedule import cosine


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (7, 0), (50, 0), (50, 10), (5, 4)])
def test_against_torch(total: int, warmup: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total - warmup)
    for step in range(total + 1):
        if step < warmup:
            assert cosine(step, total, warmup) == pytest.approx((step + 1) / (warmup + 1), abs=1e-12)
            continue
        assert cosine(step, total, warmup) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        annealing.step()
    assert cosine(total, total, warmup) == 0


@pytest.mark.parametrize("arguments", [(-1, 5), (6, 5), (0, 5, 5), (0, 5, -1), (0, 0)])
def test_outside_the_run(arguments: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="0 <= step <= total"):
        cosine(*arguments)
