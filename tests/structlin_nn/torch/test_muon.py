"""Muon: orthogonalised updates against singular value decompositions, Adam's part against torch's AdamW."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

import structlin
from structlin.testing import random_chain
from structlin_nn.torch import Muon, StructuredLinear, parameter_groups
from structlin_nn.torch._muon import Matrices, factor_matrices, orthogonalized


@pytest.mark.parametrize("shape", [(7, 5), (3, 5, 7), (2, 4, 6, 6), (1, 9), (4, 9, 1)])
def test_orthogonalized(shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    found = orthogonalized(1e3 * x)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.3
    assert values.max() < 1.25
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    inner = u.mT @ found @ v.mT  # the singular vectors stay: only the diagonal is left
    torch.testing.assert_close(inner, torch.diag_embed(torch.diagonal(inner, dim1=-2, dim2=-1)), rtol=0, atol=2e-3)
    assert not orthogonalized(torch.zeros(shape)).any()


def test_as_torchs_own_muon():
    from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, _zeropower_via_newtonschulz

    torch.manual_seed(0)
    x = torch.randn(12, 8)
    theirs = _zeropower_via_newtonschulz(x, (DEFAULT_A, DEFAULT_B, DEFAULT_C), 5, 1e-7).float()
    torch.testing.assert_close(orthogonalized(x), theirs, rtol=0.05, atol=0.05)  # theirs is bfloat16


def test_matrices_of_a_factor_are_its_blocks():
    """Against the einsum of the step: every block, applied to its part of the vector."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        structure = random_chain(rng)
        factors = structlin.random_factors(structure, backend="torch", seed=0)
        for step, spec, factor, matrices in zip(
            structure.steps, structure.factors, factors, factor_matrices(structure), strict=True
        ):
            view = matrices.view(factor)
            assert view.shape == (spec.blocks, spec.fan_out, spec.fan_in)
            assert torch.equal(matrices.back(view, factor.shape), factor)
            sizes = dict(structure.sizes)
            axes = step.batch, step.free, step.contracted
            dims = [[sizes[a] for a in group] for group in axes]
            split = view.reshape([n for group in dims for n in group])
            order = [step.factor.index(a) for group in axes for a in group]
            assert torch.equal(split, factor.permute(order))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
def test_step_against_formulas(momentum, nesterov):
    torch.manual_seed(0)
    layer = StructuredLinear(15, 12, structure="block_tensor_train", rank=2, bias=False)
    groups = parameter_groups(nn.Sequential(layer), lr=0.1, weight_decay=0.5, optimizer="muon")
    optimizer = Muon(groups, momentum=momentum, nesterov=nesterov)
    wanted = [f.detach().clone() for f in layer.factors]
    buffers = [torch.zeros_like(f) for f in wanted]
    rates = {name: g["lr"] for g in groups for name in g["names"]}
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(20, 15)).sin().sum().backward()
        gradients = [f.grad.clone() for f in layer.factors]
        optimizer.step()
        for k, (gradient, buffer, f, spec) in enumerate(
            zip(gradients, buffers, wanted, layer.structure.factors, strict=True)
        ):
            buffer.mul_(momentum).add_((1 - momentum) * gradient)
            update = (1 - momentum) * gradient + momentum * buffer if nesterov else buffer
            # The axes of these factors stand in the order (batch, free, contracted).
            blocks = update.reshape(spec.blocks, spec.fan_out, spec.fan_in)
            rate = rates[f"0.factors.{k}"]
            f.mul_(1 - rate * 0.5).sub_(rate * orthogonalized(blocks).reshape(f.shape))
            torch.testing.assert_close(layer.factors[k].detach(), f)


def test_norm_of_an_update_is_the_spectral_condition():
    torch.manual_seed(0)
    layer = StructuredLinear(256, 1024, structure="block_tensor_train", rank=4, bias=False)
    before = [f.detach().clone() for f in layer.factors]
    optimizer = Muon(parameter_groups(nn.Sequential(layer), lr=0.1, optimizer="muon"))
    layer(torch.randn(64, 256)).sin().sum().backward()
    optimizer.step()
    for f, old, spec in zip(layer.factors, before, layer.structure.factors, strict=True):
        change = (f.detach() - old).reshape(spec.blocks, spec.fan_out, spec.fan_in)
        norms = torch.linalg.matrix_norm(change, 2) / (0.1 / 2 * (spec.fan_out / spec.fan_in / (1024 / 256)) ** 0.5)
        assert norms.min() > 0.6
        assert norms.max() < 1.25


def test_the_rest_is_adamw():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    twin = copy.deepcopy(model)
    ours = Muon([{"params": list(model.parameters()), "lr": 0.01, "weight_decay": 0.1}])
    theirs = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(4):
        x = torch.randn(5, 6)
        for one, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            one(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(tuple(model.parameters()), tuple(twin.parameters()))


def test_training_closure_schedule_and_resuming():
    torch.manual_seed(0)

    def make():
        torch.manual_seed(1)
        model = nn.Sequential(StructuredLinear(16, 32, structure="monarch", rms_cap=True), nn.GELU(), nn.Linear(32, 4))
        return model, Muon(parameter_groups(model, lr=0.05, optimizer="muon", adam_lr=0.01, adam_layers="2"))

    x, target = torch.randn(40, 16), torch.randn(40, 4)

    def steps(model, optimizer, count):
        def closure():
            optimizer.zero_grad()
            loss = (model(x) - target).square().mean()
            loss.backward()
            return loss

        return [optimizer.step(closure).item() for _ in range(count)]

    model, optimizer = make()
    whole = steps(model, optimizer, 30)
    assert whole[-1] < 0.5 * whole[0]
    model, optimizer = make()
    steps(model, optimizer, 10)
    buffer = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    model, optimizer = make()
    model.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    assert steps(model, optimizer, 20) == whole[10:]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    rates = [g["lr"] for g in optimizer.param_groups]
    steps(model, optimizer, 1)
    schedule.step()
    assert [g["lr"] for g in optimizer.param_groups] == [rate / 2 for rate in rates]


def test_parameters_without_gradient_are_left():
    layer = StructuredLinear(6, 6, structure="low_rank")
    optimizer = Muon(parameter_groups(nn.Sequential(layer), lr=1.0, optimizer="muon", adam_lr=1.0, weight_decay=1.0))
    before = [p.detach().clone() for p in layer.parameters()]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "got -1"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1"),
        ({"betas": (0.9, 1.5)}, r"betas\[1\].*got 1.5"),
        ({"ns_steps": 0}, "at least 1, got 0"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        Muon([{"params": [nn.Parameter(torch.ones(2))]}], **options)


def test_matrices_that_do_not_fit():
    weight = nn.Parameter(torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"\(3, 4\) does not hold 2 matrices of \(3, 4\)"):
        Muon([{"params": [weight], "matrices": [Matrices((0, 1), 2, 3, 4)]}])
    with pytest.raises(ValueError, match="1 params and 2 matrices"):
        Muon([{"params": [weight], "matrices": [Matrices((0, 1), 1, 3, 4)] * 2}])
    with pytest.raises(ValueError, match="does not support complex parameters"):
        Muon([{"params": [nn.Parameter(weight.detach().cfloat())], "matrices": [Matrices((0, 1), 1, 3, 4)]}])
