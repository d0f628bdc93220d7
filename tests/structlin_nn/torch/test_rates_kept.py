"""Learning rates that are lost on the way to the optimiser, or in a schedule: warnings, and what keeps them."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
)

from structlin_nn.torch import (
    MuAdamW,
    Muon,
    RatesWarning,
    StructuredLinear,
    parameter_groups,
    project_linear,
    replace_linear,
    with_multipliers,
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    replace_linear(model, "low_rank", rank=2)
    return model


def step(optimizer, model) -> None:
    model(torch.ones(2, 16)).sum().backward()
    optimizer.step()


def told(optimizer, model, steps: int = 1) -> list[str]:
    """The warnings of steps."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(steps):
            step(optimizer, model)
    return [str(w.message) for w in found if issubclass(w.category, RatesWarning)]


@pytest.mark.parametrize("name", ["AdamW", "Adam", "NAdam", "SGD", "Muon"])
def test_nothing_is_said_of_the_right_groups(name):
    model = network()
    rule = {"SGD": "sgd", "Muon": "muon"}.get(name, "adamw")
    extra = {"adam_lr": 1e-3} if name == "Muon" else {}
    groups = parameter_groups(model, lr=1e-2, weight_decay=0.01, optimizer=rule, **extra)
    optimizer = Muon(groups) if name == "Muon" else getattr(torch.optim, name)(groups)
    assert told(optimizer, model, 3) == []
    assert told(torch.optim.AdamW(parameter_groups(model, lr=torch.tensor(1e-2))), model, 3) == []
    assert told(torch.optim.AdamW(nn.Linear(16, 3).parameters()), model) == []


def test_an_optimizer_without_the_groups():
    model = network()
    (text,) = told(torch.optim.AdamW(model.parameters(), lr=1e-3), model, 3)
    assert "AdamW trains 1 structured layer at the rate of dense weights" in text
    assert "parameter_groups" in text
    assert len(told(torch.optim.SGD(model.parameters(), lr=1e-3), model)) == 1
    again = copy.deepcopy(model)  # a copy is a model of its own
    assert len(told(torch.optim.AdamW(again.parameters(), lr=1e-3), again)) == 1
    dense = nn.Sequential(StructuredLinear(16, 3, structure="dense"))
    assert told(torch.optim.AdamW(dense.parameters(), lr=1e-3), dense) == []


@pytest.mark.parametrize("change", ["replace", "project"])
def test_an_optimizer_made_before_the_replacement(change):
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    assert told(optimizer, model) == []
    if change == "replace":
        replace_linear(model, "low_rank", rank=2)
    else:
        project_linear(model, "low_rank", rank=2)
    (text,) = told(optimizer, model, 2)
    assert "AdamW was created before layers were replaced: 2 of its parameters, of shapes (16, 16), (16,)" in text


def test_an_optimizer_with_a_part_of_the_parameters():
    model = network()
    groups = parameter_groups(model, lr=1e-3)
    left = [g for g in groups if "0.factors.0" not in g["names"]]
    (text,) = told(torch.optim.AdamW(left), model, 3)
    assert "AdamW has only some of the parameters of 1 structured layer, and no optimiser has the others" in text
    rest = [torch.optim.AdamW(left), torch.optim.AdamW([g for g in groups if "0.factors.0" in g["names"]])]
    assert [told(optimizer, model) for _ in range(2) for optimizer in rest] == [[]] * 4
    model[0].factors[0].requires_grad_(False)
    assert told(torch.optim.AdamW(parameter_groups(model, lr=1e-3)), model) == []


def test_rates_that_are_given_and_have_no_effect():
    model = network()
    groups = parameter_groups(model, lr=1e-3, weight_decay=0.1)
    text, other = told(torch.optim.AdamW(groups, lr=3e-4, weight_decay=0.05), model)
    assert "lr=0.0003 of AdamW has no effect" in text
    assert "weight_decay=0.05 of AdamW has no effect" in other
    assert told(torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1), model) == []


def test_groups_of_another_optimizer():
    model = network()
    (text,) = told(torch.optim.SGD(parameter_groups(model, lr=1e-3)), model)
    assert "SGD uses groups for the rule of 'adamw'" in text
    assert "optimizer='sgd'" in text
    assert len(told(torch.optim.Adam(parameter_groups(model, lr=1e-3, optimizer="sgd")), model)) == 1


SCHEDULES = {
    "one cycle": (OneCycleLR, {"max_lr": 1e-2, "total_steps": 8}),
    "cyclic": (CyclicLR, {"base_lr": 1e-3, "max_lr": 1e-2, "step_size_up": 3}),
    "cosine to a least rate": (CosineAnnealingLR, {"T_max": 6, "eta_min": 1e-3}),
}
KEEPING = {
    "lambda": (LambdaLR, {"lr_lambda": lambda n: min(1, n / 3)}),
    "linear": (LinearLR, {"total_iters": 4}),
    "exponential": (ExponentialLR, {"gamma": 0.5}),
    "cosine": (CosineAnnealingLR, {"T_max": 6}),
}


def rates(kind, options, model, groups, make) -> list[list[float]]:
    optimizer = torch.optim.SGD(groups, momentum=0.9) if kind is CyclicLR else torch.optim.AdamW(groups)
    scheduler = make(kind, optimizer, **options)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RatesWarning)
        for _ in range(6):
            found.append([g["lr"] for g in optimizer.param_groups])
            step(optimizer, model)
            scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([g["lr"] for g in optimizer.param_groups])
    return found


@pytest.mark.parametrize("name", SCHEDULES | KEEPING)
def test_with_multipliers_keeps_them(name):
    kind, options = (SCHEDULES | KEEPING)[name]
    rule = "sgd" if kind is CyclicLR else "adamw"
    model = network()
    groups = parameter_groups(model, lr=1e-2, optimizer=rule)
    found = rates(kind, options, model, groups, with_multipliers)
    dense = nn.Sequential(nn.Linear(16, 3))
    alone = rates(kind, options, dense, [{"params": list(dense.parameters()), "lr": 1e-2}], lambda k, o, **m: k(o, **m))
    assert len({g["multiplier"] for g in groups}) > 1
    for own, (base,) in zip(found, alone, strict=True):
        assert own == pytest.approx([base * g["multiplier"] for g in groups], rel=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_that_loses_multipliers_causes_one_warning(name):
    kind, options = SCHEDULES[name]
    model = network()
    rule = "sgd" if kind is CyclicLR else "adamw"
    groups = parameter_groups(model, lr=1e-2, optimizer=rule)
    optimizer = torch.optim.SGD(groups, momentum=0.9) if rule == "sgd" else torch.optim.AdamW(groups)
    scheduler = kind(optimizer, **options)
    found = told(optimizer, model)
    for _ in range(4):
        scheduler.step()
        found += told(optimizer, model)
    (text,) = found
    assert "have lost the multipliers of their groups (lr / multiplier is between" in text
    assert "with_multipliers" in text


@pytest.mark.parametrize("name", KEEPING)
def test_a_schedule_that_keeps_them_causes_no_warning(name):
    kind, options = KEEPING[name]
    model = network()
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    scheduler = kind(optimizer, **options)
    for _ in range(5):
        assert told(optimizer, model) == []
        scheduler.step()


def test_schedules_of_muon_have_two_rates():
    model = network()
    groups = parameter_groups(model, lr=0.02, optimizer="muon", adam_lr=1e-3)
    optimizer = Muon(groups)
    scheduler = with_multipliers(CosineAnnealingLR, optimizer, T_max=4, eta_min=5e-4)
    for _ in range(4):
        assert told(optimizer, model) == []
        scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([5e-4 * g["multiplier"] for g in groups])


def test_state_of_a_schedule():
    def made():
        model = network()
        optimizer = MuAdamW(model, lr=1e-2)
        return model, optimizer, with_multipliers(OneCycleLR, optimizer, max_lr=1e-2, total_steps=20)

    model, optimizer, scheduler = made()
    for _ in range(5):
        step(optimizer, model)
        scheduler.step()
    _, other, resumed = made()
    other.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    for _ in range(3):
        optimizer.step()
        scheduler.step()
        other.step()
        resumed.step()
        for own, its in zip(optimizer.param_groups, other.param_groups, strict=True):
            assert (own["lr"], own["betas"]) == (its["lr"], its["betas"])
    assert isinstance(resumed, torch.optim.lr_scheduler.LRScheduler)


def test_plateau_and_functions_that_make_schedulers():
    model = network()
    optimizer = MuAdamW(model, lr=1e-2)
    scheduler = with_multipliers(ReduceLROnPlateau, optimizer, patience=0, factor=0.1)
    for _ in range(3):
        step(optimizer, model)
        scheduler.step(1.0)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(1e-4 * group["multiplier"])
    scheduler = with_multipliers(
        lambda o: ChainedScheduler([LinearLR(o, 0.5, total_iters=2), ExponentialLR(o, 0.9)], o), optimizer
    )
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-3 * optimizer.param_groups[0]["multiplier"])
    with pytest.raises(ValueError, match="group 0 of the optimiser has no multiplier"):
        with_multipliers(ExponentialLR, torch.optim.AdamW(model.parameters()), 0.9)


def test_schedules_of_timm():
    scheduler = pytest.importorskip("timm.scheduler")
    model = network()
    optimizer = MuAdamW(model, lr=1e-2)
    made = with_multipliers(
        scheduler.CosineLRScheduler, optimizer, t_initial=4, lr_min=1e-3, warmup_t=1, warmup_lr_init=1e-4
    )
    for epoch in range(5):
        assert told(optimizer, model) == []
        made.step(epoch)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx(
        [1e-3 * g["multiplier"] for g in optimizer.param_groups]
    )


def test_mu_adamw():
    model, base = network(), nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = MuAdamW(model, base, lr=1e-2, weight_decay=0.1, betas=(0.8, 0.9), extra_multipliers={"2": 0.5})
    expected = parameter_groups(model, base, lr=1e-2, weight_decay=0.1, extra_multipliers={"2": 0.5})
    for own, group in zip(optimizer.param_groups, expected, strict=True):
        assert {key: own[key] for key in group} == group
        assert own["betas"] == (0.8, 0.9)
    assert told(optimizer, model) == []
    with pytest.raises(TypeError, match="bettas"):
        MuAdamW(model, bettas=1)


@pytest.mark.parametrize("make", [CosineAnnealingLR, OneCycleLR, LinearLR, LambdaLR])
def test_last_epoch_continues_a_schedule(make):
    arguments = {
        CosineAnnealingLR: {"T_max": 20, "eta_min": 1e-4},
        OneCycleLR: {"max_lr": 2e-2, "total_steps": 20},
        LinearLR: {"start_factor": 0.25, "total_iters": 12},
        LambdaLR: {"lr_lambda": lambda epoch: 0.9**epoch},
    }[make]
    model = network()
    optimizer = MuAdamW(model, lr=1e-2)
    plain = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=1e-2)
    schedulers = with_multipliers(make, optimizer, **arguments), make(plain, **arguments)
    for _ in range(5):
        step(optimizer, model)
        plain.step()
        for scheduler in schedulers:
            scheduler.step()
    other = MuAdamW(network(), lr=1e-2)
    other.load_state_dict(optimizer.state_dict())
    resumed = with_multipliers(make, other, last_epoch=4, **arguments)
    (wanted,) = make(plain, last_epoch=4, **arguments).get_last_lr()  # a plain scheduler of the rate at base width
    multipliers = [group["multiplier"] for group in other.param_groups]
    assert len(set(multipliers)) > 1
    assert resumed.get_last_lr() == pytest.approx([wanted * one for one in multipliers])
    with pytest.raises(KeyError, match="initial_lr"):
        with_multipliers(make, MuAdamW(network(), lr=1e-2), last_epoch=4, **arguments)


def test_a_later_schedule_starts_at_the_rate_at_base_width():
    model = network()
    optimizer = MuAdamW(model, lr=1e-2)
    with_multipliers(OneCycleLR, optimizer, max_lr=3e-2, total_steps=20)
    with_multipliers(CosineAnnealingLR, optimizer, 20, 1e-4)
    for group in optimizer.param_groups:
        assert group["initial_lr"] == group["lr"] == pytest.approx(1e-2 * group["multiplier"])


def test_two_calls_with_other_rates_in_one_optimizer():
    """The multipliers of each call are compared; a rate of its own is no lost multiplier."""
    torch.manual_seed(0)
    model = nn.Sequential(network(), nn.Linear(3, 4), nn.Linear(4, 2))
    groups = parameter_groups(model[0], lr=1e-2) + parameter_groups(model[1:], lr=1e-3)
    optimizer = torch.optim.AdamW(groups)
    assert told(optimizer, model, 2) == []
    for group in optimizer.param_groups[:-2]:
        group["lr"] = 1e-2
    assert [text for text in told(optimizer, model) if "have lost the multipliers" in text]
