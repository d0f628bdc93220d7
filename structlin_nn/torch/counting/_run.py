"""Counts of a model with inputs, and of a ``with`` statement."""

from __future__ import annotations

import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from structlin._arrays import dtype_name
from structlin_nn._text import check_integer, occurrences
from structlin_nn.torch.counting._lists import UnknownOperationError
from structlin_nn.torch.counting._recorder import OUTSIDE, Recorder
from structlin_nn.torch.counting._result import ModelCount


def count(
    model: nn.Module,
    *inputs: Any,
    loss: Callable[[Any], Tensor] | None = None,
    backward: bool = True,
    strict: bool = False,
    causal_discount: bool = False,
    flash_backward: bool = False,
    **kwargs: Any,
) -> ModelCount:
    """Count the products of ``model(*inputs, **kwargs)`` and of its backward pass by module.

    The model runs once, forward and backward, on its device and in its mode. Parts under ``no_grad`` or
    ``inference_mode`` have no backward pass, and checkpointing computes again. The totals are those of the whole batch.
    Afterwards buffers (such as the statistics of BatchNorm), gradients and states of random number generators are
    restored. On the meta device nothing is allocated or computed.

    Parameters
    ----------
    model
        Module to count. Call a model with lazy modules once before.
    inputs, kwargs
        Arguments of the model. Gradients are computed for inputs that require them, but not for their origins.
    loss
        Function of the model's result from which the backward pass starts. Default: all floating results with a
        gradient. This costs more than a training step if the loss does not use all of them.
    backward
        If False, count only the forward pass.
    strict
        Raise an error if an operation is unknown.
    causal_discount
        For attention with ``is_causal=True``, count only the pairs of queries and keys within the mask.
    flash_backward
        Add the scores that fused attention computes again in its backward pass, which then costs 2.5 instead of 2 times
        the forward pass.

    Raises
    ------
    TypeError
        If ``model`` is not a module.
    ValueError
        For lazy modules without sizes, and if ``loss`` does not return a tensor with a gradient.
    UnknownOperationError
        If ``strict`` is true and an operation is unknown.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 6))
    >>> c = count(model, torch.zeros(3, 8))
    >>> [(call.name, call.macs) for call in c.calls], c.macs(), c.training_macs, c.uncounted_ops
    ([('0', 120), ('2', 90)], 210, 510, {'aten.relu': 1})
    """
    _check(model)

    def run(saving: bool) -> ModelCount:
        recorder = Recorder({"": model}, causal=causal_discount, flash=flash_backward)
        trainable = [p for p in model.parameters() if p.requires_grad]
        started, unreached = "nothing", 0
        with torch.inference_mode(False), torch.enable_grad(), _untouched(model):
            own, named = tree_map(_leaf, (inputs, kwargs))
            with recorder.recording():
                with recorder.saving() if saving else nullcontext():
                    output = model(*own, **named)
                if loss is not None:
                    output = loss(output)
                    if not isinstance(output, Tensor) or (backward and not output.requires_grad):
                        raise ValueError(f"loss must return a tensor with a gradient, got {_described(output)}")
                if backward:
                    started = _run_backward(output, None if loss is None else "the loss")
            if started != "nothing":
                unreached = _numbers(p for p in trainable if p.grad is None)
        found = _collected(recorder, {"": model})
        found.backward_from, found.unreached_params, found.saved_known = started, unreached, saving
        return found

    try:
        found = run(saving=True)
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):  # gradients of torch.func do not support these hooks
            raise
        found = run(saving=False)
    if strict:
        _refuse_unknown(found)
    return found


def _described(x: Any) -> str:
    return f"a tensor of shape {tuple(x.shape)} without a gradient" if isinstance(x, Tensor) else repr(type(x))


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, got {model!r}")
    lazy = [name for name, x in (*model.named_parameters(), *model.named_buffers()) if is_lazy(x)]
    if lazy:
        raise ValueError(f"{', '.join(lazy)}: lazy modules have no sizes before they are called; call the model once")


def _run_backward(output: Any, name: str | None) -> str:
    """Run the backward pass of all results, and return what it started from."""
    results = {id(x): x for x in _tensors(output)}
    reached = [x for x in results.values() if x.requires_grad and (x.is_floating_point() or x.is_complex())]
    if not reached:
        return "nothing"
    # These are made outside the dispatch modes, so that only the backward pass is counted.
    with torch.utils._python_dispatch._disable_current_modes():
        ones = [torch.ones_like(x).detach() for x in reached]
    try:
        torch.autograd.backward(reached, ones)
    except Exception as error:
        error.add_note("the backward pass failed; count(..., backward=False) counts the forward pass alone")
        raise
    return name or f"{len(reached)} of {len(results)} results"


def _tensors(x: Any) -> Iterator[Tensor]:
    """Yield the tensors in lists, dicts, dataclasses and registered trees."""
    for leaf in tree_leaves(x):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):
            yield from _tensors(list(leaf.values()))
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _tensors([getattr(leaf, field.name) for field in fields(leaf)])


def _leaf(x: Any) -> Any:
    """Return an input that is detached from the operations that computed it."""
    if not isinstance(x, Tensor):
        return x
    if x.is_inference():
        return x.clone()
    return x.detach().requires_grad_(x.requires_grad) if x.requires_grad else x


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Restore buffers, gradients and the states of random number generators at the end."""
    buffers = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    values = {id(b): (b, b.detach().clone()) for _, known in buffers for b in known.values() if b is not None}
    parameters = [(p, p.grad) for p in model.parameters()]
    # An optimiser may step in a hook.
    held = (getattr(p, "_post_accumulate_grad_hooks", None) for p, _ in parameters)
    hooks = [(known, dict(known)) for known in held if known]
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  # the state that others use
    devices = {x.device for x in (*model.parameters(), *model.buffers()) if x.device.type == "cuda"}
    with torch.random.fork_rng([d.index for d in devices]):
        for p, _ in parameters:
            p.grad = None
        for known, _ in hooks:
            known.clear()
        try:
            yield
        finally:
            for p, grad in parameters:
                p.grad = grad
            for known, entries in hooks:
                known.update(entries)
            for module, names in buffers:
                module._buffers.clear()
                module._buffers.update(names)
            for buffer, value in values.values():
                with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                    buffer.copy_(value)
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


class Counting:
    """Count everything that runs within a ``with`` statement, forward and backward.

    Operations outside of modules count as ``(outside)``. Modules that are not part of ``models`` are named after their
    type. The backward pass must run in the thread of the forward pass, which is the default within the statement.
    Buffers and gradients are not restored.

    Parameters
    ----------
    model, models
        Models whose modules are named as in the model; a keyword is a prefix of the names.
    strict, causal_discount, flash_backward
        As in :func:`count`. The error of ``strict`` is raised at the end of the statement.

    Examples
    --------
    >>> model = nn.Linear(8, 5)
    >>> with Counting(model) as counting:
    ...     y = model(torch.zeros(3, 8))
    ...     (y @ torch.ones(5, 2)).sum().backward()
    >>> [(call.name, call.kind, call.macs, call.backward_macs) for call in counting.result.calls]
    [('', 'linear', 120, 120), ('(outside)', 'product', 30, 30)]
    """

    def __init__(
        self, model: nn.Module | None = None, *, strict: bool = False, causal_discount: bool = False,
        flash_backward: bool = False, **models: nn.Module,
    ) -> None:  # fmt: skip
        named = ({} if model is None else {"": model}) | models
        for one in named.values():
            _check(one)
        self._recorder = Recorder(named, causal=causal_discount, flash=flash_backward)
        self._strict = strict
        self._stack = ExitStack()

    def __enter__(self) -> Counting:
        self._stack.enter_context(self._recorder.recording())
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._stack.close()
        if self._strict and error is None:
            _refuse_unknown(self.result)

    @property
    def result(self) -> ModelCount:
        """The count so far, without saved activations."""
        found = _collected(self._recorder, self._recorder.roots)
        found.backward_from, found.saved_known = "what was run", False
        return found


def _refuse_unknown(found: ModelCount) -> None:
    if found.unknown_ops:
        raise UnknownOperationError(
            f"the cost of these operations is unknown: {occurrences(found.unknown_ops)}; register them with "
            "register_product or register_no_product"
        )


def _collected(recorder: Recorder, models: Mapping[str, nn.Module]) -> ModelCount:
    modules = {id(m): m for model in models.values() for m in model.modules()}.values()
    parameters = list({id(p): p for model in models.values() for p in model.parameters() if not is_lazy(p)}.values())
    buffers = {id(b): b for model in models.values() for b in model.buffers() if not is_lazy(b)}.values()
    embeddings = {p for m in modules if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    trainable = [p for p in parameters if p.requires_grad]
    dtypes = {dtype_name(p.dtype) for p in parameters}
    saved, floating, rest = recorder.saved_sizes()
    calls = list(recorder.calls.values())
    outside = {OUTSIDE: ""} if any(call.name == OUTSIDE for call in calls) else {}
    return ModelCount(
        calls=calls,
        params=_numbers(parameters),
        trainable_params=_numbers(trainable),
        embedding_params=_numbers(p for p in embeddings if p.requires_grad),
        buffer_bytes=_bytes(buffers),
        uncounted_ops=dict(sorted(recorder.free.items())),
        uncounted_moved=recorder.moved,
        saved=saved,
        saved_bytes=rest,
        unknown_ops=dict(sorted(recorder.unknown.items())),
        param_bytes=_bytes(parameters),
        trainable_bytes=_bytes(trainable),
        saved_float_bytes=floating,
        dtype=dtypes.pop() if len(dtypes) == 1 else None,
        modules={**recorder.types, **outside},
    )


def _numbers(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() for x in tensors)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def time_modules(model: nn.Module, *inputs: Any, repeats: int = 5, grad: bool = False, **kwargs: Any) -> ModelCount:
    """Count a model, and time the forward pass of each module (``seconds``) as the median of several calls.

    Hooks time the modules; on a CUDA device they synchronize. This overhead is visible for modules that take a few
    microseconds. Buffers and states of random number generators are restored.

    Parameters
    ----------
    model, inputs, kwargs
        As in :func:`count`.
    repeats
        Number of timed calls, after one that is not.
    grad
        Enable gradients in the timed calls.

    Raises
    ------
    TypeError
        If ``model`` is not a module.
    ValueError
        If ``repeats`` is below 1, or the model is on the meta device.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    >>> timed = time_modules(model, torch.zeros(8, 64))
    >>> sorted(timed.seconds), timed.tree().flops_per_second > 0
    (['', '0', '1'], True)
    """
    check_integer("repeats", repeats)
    found = count(model, *inputs, backward=False, **kwargs)
    if any(p.device.type == "meta" for p in model.parameters()):
        raise ValueError("a model on the meta device computes nothing, so it cannot be timed; move it to a device")
    names = {module: name for name, module in model.named_modules()}
    cuda = any(p.is_cuda for p in model.parameters())
    runs: list[dict[str, float]] = []  # seconds of the modules in each call of the model
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
                    runs[-1][names[module]] += end - start
                return

    with ExitStack() as stack, _untouched(model), torch.set_grad_enabled(grad):
        model(*inputs, **kwargs)
        stack.callback(register_module_forward_pre_hook(enter).remove)
        stack.callback(register_module_forward_hook(leave).remove)
        for _ in range(repeats):
            runs.append(defaultdict(float))
            model(*inputs, **kwargs)
    called = dict.fromkeys(name for spent in runs for name in spent)
    found.seconds = {name: statistics.median(spent[name] for spent in runs if name in spent) for name in called}
    return found
