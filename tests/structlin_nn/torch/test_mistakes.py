"""Sixty mistakes of a first day: each message names what was wrong, and what would be right."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import structlin
from structlin_nn.torch import (
    MuAdamW,
    ParameterRule,
    StructuredLinear,
    StructuredMLP,
    StructuredPointwise,
    fuse_mlps,
    load_structured,
    pack_linear,
    parameter_groups,
    project_linear,
    read_structured,
    replace_linear,
    save_structured,
    to_dense_linear,
    unpack_linear,
    with_multipliers,
)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def layer(**options) -> StructuredLinear:
    return StructuredLinear(12, 16, **{"structure": "low_rank", "rank": 2, **options})


def ready() -> nn.Sequential:
    model = net()
    replace_linear(model, "low_rank", rank=2)
    return model


def adam() -> torch.optim.Optimizer:
    return torch.optim.Adam(parameter_groups(ready(), lr=1e-3))


def low(**options):
    return lambda: replace_linear(net(), "low_rank", **{"rank": 2, **options})


def near(**options):
    return lambda: project_linear(net(), "low_rank", **options)


def groups(**options):
    return lambda: parameter_groups(ready(), **{"lr": 1e-3, **options})


X = torch.ones(5, 12)
MISTAKES = (
    (low(layers=nn.Linear), TypeError,
     "layers must be 'all', 'all_but_last', 'intermediate', patterns of names, or a function of name and layer, got "
     "the class Linear; its instances are chosen by lambda name, layer: isinstance(layer, Linear)"),
    (low(layers=[3]), TypeError, "a pattern is a string (glob) or a compiled regular expression, got 3"),
    (low(zero_init="4"), ValueError, "zero_init: no linear layer matches '4'; the linear layers are 0, 2"),
    (low(layers="head"), ValueError, "layers: no linear layer matches 'head'; the linear layers are 0, 2, 4"),
    (low(layers=0), TypeError, "a pattern is a string (glob) or a compiled regular expression, got 0"),
    (low(exclude="nothing*"), ValueError, "exclude: no linear layer matches 'nothing*'; the linear layers are 0, 2, 4"),
    (low(layers="0", exclude="0"), ValueError, "layers='0' leaves no layer to replace; the linear layers are 0, 2, 4"),
    (low(rank=0), ValueError, "layer '0' (12 -> 16): rank must be a positive integer, got 0"),
    (low(rank="2"), ValueError, "layer '0' (12 -> 16): rank must be a positive integer, got '2'"),
    (low(rnk=2), ValueError,
     "layer '0' (12 -> 16): structure 'low_rank' has no option 'rnk'; its options are rank, rank_fraction"),
    (low(rule="mup"), ValueError, "layer '0' (12 -> 16): unknown rule 'mup'; one of paper, rank_corrected"),
    (low(impossible="ignore"), ValueError, "impossible must be one of 'skip', 'error', got 'ignore'"),
    (
        lambda: replace_linear(nn.Sequential(nn.Linear(2, 512), nn.Linear(512, 3)), "kronecker", impossible="error"),
        ValueError,
        "layer '0' (2 -> 512): 2 cannot be split into 2 factors by rule 'balanced'; the nearest sizes that can are 4",
    ),
    (low(dearer="no"), ValueError, "dearer must be one of 'warn', 'error', 'skip', 'allow', got 'no'"),
    (low(shared_weights="keep"), ValueError, "shared_weights must be one of 'error', 'skip', got 'keep'"),
    (low(gain=True), ValueError, "layer '0' (12 -> 16): gain=True needs rms_cap=True: only capped factors have gains"),
    (low(overrides={"0": 4}), TypeError, "overrides['0'] must be a mapping of options, got 4"),
    (low(overrides={"head": {"rank": 4}}), ValueError,
     "overrides: no linear layer matches 'head'; the linear layers are 0, 2"),
    (low(overrides={"0": {"rnk": 4}}), ValueError,
     "overrides['0'] has the unknown option rnk; known are structure, rms_cap, gain, rule, checkpoint, ze"),
    (low(zero_init="head"), ValueError, "zero_init: no linear layer matches 'head'; the linear layers are 0, 2"),
    (low(rank=1000, dearer="error"), ValueError,
     "layer '0' (12 -> 16) would cost more than dense: 28,000 multiply-accumulates instead of 192, 28,0"),
    (low(min_features=1000), ValueError,
     "no selected layer can be replaced (0: it has fewer than 1000 features: 12 -> 16; 2: it has"),
    (lambda: replace_linear(net(), "lowrank", rank=2), ValueError,
     "layer '0' (12 -> 16): unknown structure 'lowrank'; one of dense, low_rank, block_diagonal, kronec"),
    (lambda: replace_linear(net(), "btt", rank=2), ValueError,
     "layer '0' (12 -> 16): unknown structure 'btt' ('block_tensor_train' has these initials); one of d"),
    (lambda: replace_linear(net(), 3), TypeError,
     "layer '0' (12 -> 16): structure must be a name or an AbstractStructure, got 3"),
    (lambda: replace_linear(nn.Linear(4, 4), "low_rank", rank=2), ValueError,
     "the model itself is a linear layer and cannot be replaced in place; put it in a container"),
    (lambda: replace_linear(nn.Linear, "low_rank", rank=2), TypeError,
     "replace_linear takes a torch.nn.Module, got a type: it is a class; pass an instance, Linear(...)"),
    (lambda: replace_linear(net().parameters(), "low_rank", rank=2), TypeError,
     "replace_linear takes a torch.nn.Module, got a generator: pass the model, not its parameters; "),
    (lambda: replace_linear(nn.Sequential(nn.ReLU()), "low_rank", rank=2), ValueError,
     "the model has no linear layers (nn.Linear, or Conv1D of transformers)"),
    (lambda: replace_linear(net(), structlin.design("low_rank", (5, 7), rank=2)), ValueError,
     "layer '0' (12 -> 16): a layer of shape (out_features, in_features) = (16, 12) cannot hold Structu"),
    (near(rank=2, mac_fraction=0.5), ValueError,
     "give at most one of rank, target_error, max_macs, mac_fraction, max_params, param_fraction, got rank, mac"),
    (near(mac_fraction=2), ValueError, "mac_fraction must lie in (0, 1], got 2"),
    (near(mac_fraction=1e-6), ValueError,
     "the cheapest forms of the chosen layers need 52 MACs, more than the budget of 0"),
    (near(max_macs=1.5), TypeError, "max_macs must be an integer, got 1.5"),
    (near(target_error=-1), ValueError, "target_error must be a number of at least 0, got -1"),
    (near(rank=2, calibration=X), TypeError,
     "calibration must be an iterable of batches, got an array of shape (5, 12), whose rows would be"),
    (near(rank=2, calibration=[]), ValueError, "calibration has no batches"),
    (near(rank=2, calibration=[torch.full((5, 12), math.nan)]), ValueError, "the inputs of layer '0' are not finite"),
    (near(rank=2, forward=lambda model, batch: model(batch)), ValueError,
     "forward runs batches of calibration, which is missing"),
    (near(rank=2, damping=-1), ValueError, "damping must be a number of at least 0, got -1"),
    (near(rank=2, max_sweeps=0), ValueError, "max_sweeps must be an integer of at least 1, got 0"),
    (near(rank=2, tolerance=2), ValueError, "tolerance must lie in [0, 1), got 2"),
    (near(rank=8), ValueError,
     "the structure saves nothing in any layer: '0' takes 192 MACs, structured 224; choose a smaller rank"),
    (lambda: project_linear(net().to("meta"), "low_rank", rank=2), ValueError,
     "layer '0' is on the meta device and has no values to project"),
    (lambda: project_linear(net(), structlin.design("low_rank", (16, 12), rank=2), mac_fraction=0.5), ValueError,
     "mac_fraction chooses ranks, so structure must be a name"),
    (groups(lr="1e-3"), TypeError, "lr must be a number, got '1e-3'; 0.001 would be one"),
    (groups(lr=-1), ValueError, "lr and weight_decay must not be negative, got -1 and 0.0"),
    (groups(weight_decay="0.1"), TypeError, "weight_decay must be a number, got '0.1'; 0.1 would be one"),
    (groups(optimizer="lion"), ValueError, "unknown optimizer 'lion'; one of adam, adamw, sign, sgd, muon"),
    (groups(decay="weights"), ValueError,
     "decay must be a collection of factor, weight, embedding, bias, norm, gain, vector, got 'weights'"),
    (groups(decay=("wieght",)), ValueError,
     "decay must be a collection of factor, weight, embedding, bias, norm, gain, vector, got 'wieght'"),
    (groups(rules={"head": ParameterRule(1.0, False)}), ValueError, "nothing matches 'head'"),
    (groups(rules={"0": 2.0}), TypeError, "rules['0'] must be a ParameterRule, got 2.0"),
    (groups(extra_multipliers={"0": -0.5}), ValueError,
     "a multiplier must be finite and at least 0, got -0.5 in extra_multipliers['0']"),
    (groups(optimizer="adam", independent_decay=True), ValueError,
     "independent_decay needs an optimizer that subtracts the decay from the parameter (adamw, sgd, sig"),
    (lambda: parameter_groups(ready().parameters(), lr=1e-3), TypeError,
     "parameter_groups takes a torch.nn.Module, got a generator: pass the model, not its parameters"),
    (lambda: layer()(torch.ones(5, 11)), ValueError,
     "the last axis of the input must have size in_features = 12, got shape (5, 11)"),
    (lambda: layer()(np.ones((5, 12))), TypeError,
     "the input must be a torch.Tensor, got a ndarray; convert it with torch.from_numpy"),
    (lambda: layer()([[1.0] * 12]), TypeError, "the input must be a torch.Tensor, got a list"),
    (low(layers=lambda name, layer: False), ValueError, "leaves no layer to replace; the linear layers are 0, 2, 4"),
    (lambda: layer()(X.double()), ValueError,
     "the input is torch.float64, the parameters are torch.float32 (factor W0): convert one of them, or"),
    (lambda: setattr(layer(), "weight", torch.ones(16, 12)), AttributeError,
     "the weight of a structured layer is computed from its factors and cannot be assigned: set its fac"),
    (lambda: layer(gain=True), ValueError, "gain=True needs rms_cap=True: only capped factors have gains"),
    (lambda: layer(rule="mup"), ValueError, "unknown rule 'mup'; one of paper, rank_corrected"),
    (lambda: layer(blocks=4), ValueError,
     "structure 'low_rank' has no option 'blocks'; its options are rank, rank_fraction"),
    (lambda: StructuredLinear(12, 16, structure="monarch", blocks=0), ValueError,
     "blocks must be a positive integer, got 0"),
    (lambda: StructuredLinear(0, 16, structure="dense"), ValueError,
     "a shape is (d_out, d_in) with two positive integers, got (16, 0)"),
    (lambda: StructuredPointwise(4, 4, stride=(1, 1), structure="dense")(torch.ones(4)), ValueError,
     "the input must have a batch, channels and 2 axes of positions, got shape (4,)"),
    (lambda: to_dense_linear(net()), ValueError, "the model has no structured layers"),
    (lambda: to_dense_linear(layer()), ValueError,
     "the model itself is a structured layer and cannot be replaced in place; put it in a container"),
    (lambda: save_structured(layer(), "never.safetensors"), ValueError,
     "the model itself is a structured layer; put it in a container"),
    (lambda: load_structured(net(), "missing.safetensors"), FileNotFoundError, "missing.safetensors is missing"),
    (lambda: read_structured("missing.safetensors"), FileNotFoundError, "missing.safetensors is missing"),
    (lambda: unpack_linear([layer()]), TypeError,
     "unpack_linear takes a torch.nn.Module, got a list: pass the model, not its parameters; the roles"),
    (lambda: MuAdamW(ready().parameters(), lr=1e-3), TypeError,
     "parameter_groups takes a torch.nn.Module, got a generator: pass the model, not its parameters"),
    (lambda: MuAdamW(ready(), lr="1e-3"), TypeError, "lr must be a number, got '1e-3'; 0.001 would be one"),
    (lambda: torch.jit.script(layer(rms_cap=True)), TypeError,
     "torch.jit.script cannot compile the layer 12 -> 16 (it caps its factors); use torch.export.export, which"),
    (lambda: torch.jit.script(layer(checkpoint=True)), TypeError,
     "torch.jit.script cannot compile the layer 12 -> 16 (it has checkpoint=True); use torch.export.export, which"),
    (lambda: torch.jit.script(StructuredMLP(layer(), StructuredLinear(16, 9, structure="dense"))), TypeError,
     "torch.jit.script cannot compile a StructuredMLP; use torch.export.export, or replace_linear without fuse=True"),
    (lambda: with_multipliers(torch.optim.lr_scheduler.OneCycleLR, None, max_lr=1e-3, total_steps=5), TypeError,
     "the second argument of with_multipliers must be an optimiser, got a NoneType"),
    (lambda: fuse_mlps([net()]), TypeError,
     "fuse_mlps takes a torch.nn.Module, got a list: pass the model, not its parameters; the roles"),
    (groups(base_model=net), TypeError, "parameter_groups, as base_model, takes a torch.nn.Module, got a function"),
    (lambda: pack_linear(None), TypeError, "pack_linear takes a torch.nn.Module, got a NoneType"),
)  # fmt: skip


@pytest.mark.parametrize(("mistake", "kind", "words"), MISTAKES, ids=range(len(MISTAKES)))
def test_messages_say_what_was_wrong_and_what_would_be_right(mistake, kind, words):
    with pytest.raises(kind) as found:
        mistake()
    assert type(found.value) is kind
    assert words in str(found.value)


def test_there_are_sixty():
    assert len(MISTAKES) >= 60
