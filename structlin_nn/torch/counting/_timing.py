"""Measured seconds of the forward pass by module, with the counts."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from structlin_nn.torch.counting._result import ModelCount
from structlin_nn.torch.counting._run import _untouched, count


def time_modules(
    model: nn.Module, *inputs: Any, repeats: int = 5, warm: int = 1, grad: bool = False, **kwargs: Any
) -> ModelCount:
    """Count a model, and time the forward pass of each module (``seconds``) as the median of several calls.

    Hooks time the modules; on a CUDA device they synchronize. This overhead is visible for modules that take a few
    microseconds. Buffers and states of random number generators are restored.

    Parameters
    ----------
    model, inputs, kwargs
        As in :func:`count`.
    repeats
        Number of timed calls.
    warm
        Number of calls before them.
    grad
        Enable gradients in the timed calls.

    Raises
    ------
    TypeError
        If ``model`` is not a module.
    ValueError
        If ``repeats`` is below 1, ``warm`` is negative, or the model is on the meta device.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    >>> timed = time_modules(model, torch.zeros(8, 64))
    >>> sorted(timed.seconds), timed.tree().flops_per_second > 0
    (['', '0', '1'], True)
    """
    if repeats < 1 or warm < 0:
        raise ValueError(f"repeats must be at least 1 and warm at least 0, got {repeats} and {warm}")
    found = count(model, *inputs, backward=False, **kwargs)
    if any(p.device.type == "meta" for p in model.parameters()):
        raise ValueError("a model on the meta device computes nothing, so it cannot be timed; move it to a device")
    names = {module: name for name, module in model.named_modules()}
    cuda = any(p.is_cuda for p in model.parameters())
    seconds: dict[str, list[float]] = defaultdict(list)
    spent: dict[str, float] = defaultdict(float)
    started: list[tuple[nn.Module, float]] = []

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def enter(module: nn.Module, args: tuple) -> None:
        started.append((module, now()))

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        end = now()
        while started:
            inside, start = started.pop()
            if inside is module:
                if module in names:
                    spent[names[module]] += end - start
                return

    with ExitStack() as stack:
        stack.enter_context(_untouched(model))
        stack.enter_context(torch.set_grad_enabled(grad))
        for _ in range(warm):
            model(*inputs, **kwargs)
        stack.callback(register_module_forward_pre_hook(enter).remove)
        stack.callback(register_module_forward_hook(leave).remove)
        for _ in range(repeats):
            spent.clear()
            model(*inputs, **kwargs)
            for name, value in spent.items():
                seconds[name].append(value)
    found.seconds = {name: statistics.median(values) for name, values in seconds.items()}
    return found
