"""Blocks of a network in torch: an MLP or the projections of one input as one pass (:mod:`.compiled.block`).

A :class:`TorchBlock` describes the computation. A call runs it as one compiled pass over the memory of plain tensors,
or returns None; the caller then runs layer after layer. The faster of the two is chosen like the way of a chain
(:mod:`.choice`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from structlin.execution import choice
from structlin.execution._gradients import SingleProducts
from structlin.execution._guard import addressable, apart, as_kept, guard_of, recording, shield, watched
from structlin.execution.compiled._activations import ACTIVATIONS
from structlin.execution.compiled._target import CompileError, host, tiled_host, warn_once
from structlin.execution.compiled.block import BlockProgram, BlockSpec, make_block
from structlin.execution.compiled.passes import NAMES, run
from structlin.execution.race import race
from structlin.execution.rates import clock
from structlin.execution.torch_ways import torch_chain
from structlin.structure import Structure

__all__ = ["TorchBlock", "torch_block"]

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
assert _FUNCTIONS.keys() == ACTIVATIONS.keys()


@dataclass(frozen=True, eq=False)
class TorchBlock(BlockSpec):
    """The computation of a block on tensors; see :func:`torch_block`."""

    _taken: dict[tuple[Any, ...], str | None] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def half(self) -> TorchBlock | None:
        """The block up to the hidden features of an MLP."""
        if self.second is None:
            return None
        return torch_block(self.first, None, self.activation, self.biases[:-1], self.norm, self.eps, self.affine)

    def program(self, dtype: torch.dtype, kind: str = "0") -> BlockProgram | None:
        """Return the compiled pass of a kind (one of :data:`KINDS`); None if it cannot be compiled for this dtype."""
        target = tiled_host() if TILES in kind else host()
        if target is None or dtype not in NAMES or not all(s.steps for s in self.structures):
            return None
        if kind.startswith(HALF):
            return None if self.half is None or self.half in _failed else self.half.program(dtype, first_kind(kind))
        if (TILES in kind and dtype is not torch.bfloat16) or (KEPT in kind and self.activation is None):
            return None
        block = kind.removesuffix(KEPT)
        return make_block(self, NAMES[dtype], target, int(block) if block.isdecimal() else None)

    def layers(self, x: Tensor, operands: Sequence[Tensor | None], run: Run) -> tuple[Tensor, ...]:
        """Return the outputs layer after layer, with ``run(structure, h, factors, bias)`` for each of them.

        ``operands`` are weight and bias of the norm, the bias of each structure or None, and the factors of all
        structures.
        """
        weight, shift, *rest = operands
        h = x
        if self.norm == "layer":
            h = F.layer_norm(x, x.shape[1:], weight, shift, self.eps)
        elif self.norm == "rms":
            h = F.rms_norm(x, x.shape[1:], weight, self.eps)
        found: list[Tensor] = []
        for number, (structure, bias, factors) in enumerate(self.by_structure(rest)):
            if number == len(self.first):
                h, found = self._features(found), []
            found.append(run(structure, h, factors, bias))
        if self.second is None and self.activation is not None:
            return (self._features(found),)
        return (found[0] + x,) if self.residual else tuple(found)

    def _features(self, outputs: Sequence[Tensor]) -> Tensor:
        """Return the hidden features, from the outputs of the first layers."""
        assert self.activation is not None
        h = _FUNCTIONS[self.activation](outputs[0])
        for other in outputs[1:]:
            h = h * other
        return h

    def by_structure(
        self, operands: Sequence[Tensor | None]
    ) -> Iterator[tuple[Structure, Tensor | None, list[Tensor]]]:  # fmt: skip
        """Yield each structure with its bias and its factors."""
        at = len(self.structures)
        for structure, bias in zip(self.structures, operands, strict=False):
            mine = operands[at : (at := at + len(structure.steps))]
            yield structure, bias, cast(list[Tensor], mine)

    def plain(self, x: Tensor, operands: Sequence[Tensor | None]) -> bool:
        """Whether all operands have the right shapes and dtypes, and memory that may be read by address."""
        weight, shift, *rest = operands
        if x.ndim != 2 or x.shape[1] != self.first[0].d_in or not len(x):
            return False
        for structure, bias, factors in self.by_structure(rest):
            if not guard_of(structure).plain(x, factors if bias is None else [*factors, bias]):
                return False
        return all(
            t is None or (addressable(t) and t.shape == x.shape[1:] and t.dtype is x.dtype) for t in (weight, shift)
        )

    def __call__(self, x: Tensor, operands: Sequence[Tensor | None]) -> tuple[Tensor, ...] | None:
        """Return the outputs, differentiable any number of times, or None if the layers must run one by one."""
        if watched() or not self.plain(x, operands):
            return None
        train = trains(x, operands)
        kind = self.kind(x.dtype, len(x), train)
        if kind is None:
            return None
        try:
            return self.by_pass(kind, x, operands, train)
        except CompileError as error:
            self.fail(error)
            return None

    def by_pass(self, kind: str, x: Tensor, operands: Sequence[Tensor | None], train: bool) -> tuple[Tensor, ...]:
        """Return the outputs by one pass, or by one for the first half of an MLP and another for its second layer."""
        if kind.startswith(HALF):
            return self._by_halves(kind, x, operands, train)
        if train:
            found = _Differentiable.apply(self, kind, x, *operands)
            return found if isinstance(found, tuple) else (found,)
        return self.run(x, operands, kind)

    def _by_halves(
        self, kind: str, x: Tensor, operands: Sequence[Tensor | None], train: bool
    ) -> tuple[Tensor, ...]:  # fmt: skip
        half, (weight, shift, *rest) = self.half, operands
        assert half is not None
        *of, (second, bias, factors) = self.by_structure(rest)
        first = [weight, shift, *(b for _, b, _ in of), *(f for _, _, fs in of for f in fs)]
        (h,) = half.by_pass(first_kind(kind), x, first, train)
        y = torch_chain(second)(h, factors, bias)
        return (y + x,) if self.residual else (y,)

    @property
    def failed(self) -> bool:
        """Whether the layers run one after the other, because the compiler has failed."""
        return self in _failed

    def fail(self, error: CompileError | None = None) -> None:
        """Run layer after layer from now on, because the compiler has failed."""
        _failed.add(self)
        choice.forget()
        if error is not None:
            warn_once(error, "A block of a network by torch")

    def kind(self, dtype: torch.dtype, tokens: int, train: bool) -> str | None:
        """Return the pass to run, one of :data:`KINDS`; None: layer after layer is faster."""
        tokens, threads = choice.bucket(tokens), torch.get_num_threads()
        key = dtype, tokens, threads, train, choice.own_policy(), choice.generation()
        if key not in self._taken:
            problem = BlockProblem(self, str(dtype).removeprefix("torch."), tokens, threads, train)
            taken = SEPARATE if self in _failed or not problem.kinds() else choice.settle(problem)
            kind = taken.split("-")[-1]
            # A pinned pass may be one that this processor does not have.
            self._taken[(*key[:-1], choice.generation())] = kind if kind in problem.kinds() else None
            return self.kind(dtype, tokens, train)
        return self._taken[key]

    def stored_rows(self, dtype: torch.dtype, kind: str) -> list[int]:
        """Return the numbers of a row of each activation that a pass of this kind stores."""
        program = self.program(dtype, kind) if KEPT in kind else None
        return [] if program is None else program.stored_rows()

    def run(
        self, x: Tensor, operands: Sequence[Tensor | None], kind: str = "0", kept: list[Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        """Return the outputs by the compiled pass, without gradients. All operands are plain.

        Unless ``kept`` is None, the activations that a pass of this kind stores for :meth:`backward` are added to it.
        """
        keeps = kept is not None and KEPT in kind
        found, number = self._run([x], operands, kind, False, keeps), len(self.outputs)
        if kept is not None:
            kept += found[number:]
        return tuple(found[:number])

    def backward(
        self, gradients: Sequence[Tensor], x: Tensor, operands: Sequence[Tensor | None], kind: str = "0",
        kept: Sequence[Tensor] = (),
    ) -> list[Tensor | None]:  # fmt: skip
        """Return the gradients of x and all operands, from those of the outputs. All tensors are plain.

        ``kept``: the activations that :meth:`run` has stored; without them they are computed again.
        """
        gx, *found = self._run([x, *gradients], operands, kind, True, bool(kept), kept)
        rest = iter(found)
        ends = [next(rest).to(x.dtype) if there else None for there in (*self.affine, *self.biases)]
        return [gx, *ends, *rest]

    def _run(
        self, ends: Sequence[Tensor], operands: Sequence[Tensor | None], kind: str, back: bool, keeps: bool,
        kept: Sequence[Tensor] = (),
    ) -> list[Tensor]:  # fmt: skip
        """Run the forward pass on the input, or the backward pass on the input and the gradients of the outputs."""
        tokens, dtype, threads = len(ends[0]), ends[0].dtype, torch.get_num_threads()
        program = self.program(dtype, kind)
        assert program is not None
        weight, shift, *rest = operands
        parts, wide = list(zip(self.by_structure(rest), program.programs, strict=True)), program.programs[0].dtype
        added = [(weight, self.d_in), (shift, self.d_in)]
        added += [(bias, p.schedule.widths[-1]) for (_, bias, _), p in parts[: len(self.first) if back else None]]
        given = [(F.pad(t, (0, size - len(t))) if size > len(t) else t).to(wide) for t, size in added if t is not None]
        factors = [factor for (_, _, own), _ in parts for factor in own]
        make = program.backward_plan if back else program.forward_plan
        plan = program.plans.get((tokens, threads, back, keeps), lambda: make(tokens, threads, keeps))
        return run(plan, [t.contiguous() for t in (*ends, *given, *factors, *kept)])


Run = Callable[[Structure, Tensor, Sequence[Tensor], "Tensor | None"], Tensor]
KEPT = choice.KEPT  # at the end of a kind: hidden features are stored for the backward pass
SEPARATE = "separate"
TILES = "tiles"  # by tiles, in bfloat16 on processors with AMX
AUTO = "0"
# Of passes to be timed: by tokens of a block (0: as many as the caches suggest), or by tiles.
HALF = "half"  # of an MLP: a pass up to the hidden features, which may store the derivatives; then the second layer
WIDE = "48"  # the widest blocks, which read the factors least often
_PLAIN = (AUTO, "16", WIDE, TILES, HALF, HALF + TILES)
KINDS = (*_PLAIN, *(kind + KEPT for kind in _PLAIN))
BUDGET = 0.6  # seconds (:func:`.race.race`)
# Ways that run both passes of a layer as compiled ones.
_WHOLE = re.compile(r"compiled(-tiles)?(-\d+|-near)?")
_failed: set[TorchBlock] = set()


def first_kind(kind: str) -> str:
    """Return the kind of the pass over the first half, for a kind of the whole."""
    found = kind.removeprefix(HALF)
    return found if TILES in found else AUTO + found


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, block: TorchBlock, kind: str, x: Tensor, *operands: Tensor | None) -> Any:
        shield(_Differentiable)
        ctx.block, ctx.kind = block, kind
        ctx.set_materialize_grads(True)
        kept: list[Tensor] = []
        found = block.run(x, operands, kind, kept)
        ctx.kept = [(tensor.dtype, tensor.shape) for tensor in kept]
        ctx.save_for_backward(x, *operands, *kept)
        return found if len(found) > 1 else found[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        block: TorchBlock = ctx.block
        x, *saved = ctx.saved_tensors
        count = len(saved) - len(ctx.kept)
        operands, kept = saved[:count], saved[count:]
        needs = ctx.needs_input_grad[2:]
        if not torch.is_grad_enabled() and not (recording() or watched()) and block.plain(x, operands):
            plain = all(addressable(g) and g.dtype is x.dtype for g in gradients)
            if plain:
                try:
                    if not as_kept(kept, ctx.kept):
                        kept = []
                    found = block.backward(gradients, x, operands, ctx.kind, kept)
                    return None, None, *(g if need else None for g, need in zip(found, needs, strict=True))
                except CompileError as error:
                    block.fail(error)
        return None, None, *by_autograd(block, gradients, x, operands, needs)


def trains(x: Tensor, operands: Sequence[Tensor | None]) -> bool:
    """Whether gradients of x or of an operand will be needed."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *operands))


def by_autograd(
    block: TorchBlock, gradients: Sequence[Tensor], x: Tensor, operands: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor | None]:  # fmt: skip
    """Return the gradients through torch's products, which can be differentiated again."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        tensors = [x, *operands]
        if not again:
            tensors = [
                None if t is None else t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)
            ]
        wanted = [t for t, need in zip(tensors, needs, strict=True) if need and t is not None]
        outputs = block.layers(
            cast(Tensor, tensors[0]),
            tensors[1:],
            lambda s, h, factors, bias: SingleProducts(s, True).forward(h, factors, bias),
        )
        found = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=again, allow_unused=True))
    return [next(found) if need and t is not None else None for t, need in zip(tensors, needs, strict=True)]


@dataclass(frozen=True)
class BlockProblem:
    """The choice between layer after layer (:data:`SEPARATE`) and one pass, in blocks of some number of tokens."""

    block: TorchBlock
    dtype: str
    tokens: int
    threads: int
    train: bool

    @cached_property
    def key(self) -> str:
        """The problem as text: the name of its records."""
        b = self.block
        chains = " | ".join(
            f"{'; '.join(map(str, s.steps))} {','.join(f'{a}={n}' for a, n in s.sizes)} {s.d_out}x{s.d_in}"
            for s in b.structures
        )
        what = f"{b.activation} {len(b.first)} {b.norm} {b.affine} {b.residual} {b.biases}"
        kind = "train" if self.train else "forward"
        return f"block {chains} {what} {self.dtype} tokens={self.tokens} threads={self.threads} {kind}"

    @property
    def structure(self) -> Structure:
        """The first structure, under which decisions are listed."""
        return self.block.first[0]

    @property
    def without(self) -> str:
        """The alternative if passes over several layers are excluded."""
        return SEPARATE

    def kinds(self) -> list[str]:
        """Return those of :data:`KINDS` that can run; only a training step stores activations.

        The second layer of a half stores its input for a training step, so that is one with ``kept``.
        """
        dtype = getattr(torch, self.dtype)
        keeps = self.train and KEPT not in choice.policy_of(choice.policy_text()).without
        able = [k for k in KINDS if (keeps or KEPT not in k) and not (self.train and HALF in k and KEPT not in k)]
        return [k for k in able if self.block.program(dtype, k) is not None]

    def able(self) -> set[str]:
        """Return the passes of :meth:`kinds`, and layer after layer.

        Separate layers of an MLP store the hidden features, so the policy ``-kept`` excludes them if a pass can run. An
        estimate can still be separate layers.
        """
        passes, without = {f"block-{kind}" for kind in self.kinds()}, choice.policy_of(choice.policy_text()).without
        stores = self.train and self.block.activation is not None
        return passes if passes and stores and KEPT in without else {SEPARATE, *passes}

    def _problems(self) -> list[choice.Problem]:
        """Return the problem of each layer."""
        return [
            choice.Problem(structure, True, "torch", "cpu", self.dtype, self.tokens, self.threads, self.train)
            for structure in self.block.structures
        ]

    def estimate(self) -> str:
        """Return one pass if each layer would run as a compiled pass, because the operations between then cost less.

        If all but the second layer of an MLP would, one for its first half.
        """
        kinds: list[str] = []
        for problem in self._problems():
            way = choice.way_of(problem)
            if _WHOLE.fullmatch(way.name) is None:  # backward by the BLAS, say
                whole = len(kinds) == len(self.block.first) and len(set(kinds)) == 1
                return self._half(kinds[0]) if whole else SEPARATE
            kinds.append(TILES if way.name.startswith("compiled-tiles") else AUTO)
        # The best number of tokens of a layer does not apply, because a block has more activations in cache.
        kind = max(set(kinds), key=kinds.count)
        if self.train and kind + KEPT in self.kinds():
            kind += KEPT
        return f"block-{kind}" if kind in self.kinds() else SEPARATE

    def close(self) -> list[str]:
        """Return one pass and layer after layer, if the estimate is one pass and a call is not too short to time.

        A pass that stores activations is compared with the one that computes them again and that of a half, too, and a
        pass without tiles with one in wider blocks.
        """
        name = self.estimate()
        seconds = sum(choice.way_of(problem).seconds(problem) for problem in self._problems())
        if name == SEPARATE or seconds < choice.WORTH:
            return []
        wide, half = name.replace(f"-{AUTO}", f"-{WIDE}"), self._half(TILES if TILES in name else AUTO)
        ways = dict.fromkeys((name, name.removesuffix(KEPT), wide, half, SEPARATE))
        return [one for one in ways if one in self.able()]

    def _half(self, first: str) -> str:
        """Return the pass for the first half of an MLP by this kind, with stored derivatives if these are allowed."""
        half = HALF + first.removeprefix(AUTO)
        return next((f"block-{k}" for k in (half + KEPT, half) if k in self.kinds()), SEPARATE)

    def measure(self, names: list[str] | None = None, budget: float = BUDGET) -> dict[str, float]:
        """Return the seconds of alternatives, by default of all."""
        with apart(self.train):
            return self._measure(names, budget)

    def _measure(self, names: list[str] | None, budget: float) -> dict[str, float]:
        block, kind = self.block, getattr(torch, self.dtype)
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator, device="cpu") * scale).to(kind).requires_grad_(self.train)

        x = normal(self.tokens, block.first[0].d_in)
        operands: list[Tensor | None] = [normal(block.first[0].d_in) if there else None for there in block.affine]
        operands += [
            normal(s.d_out) if there else None for s, there in zip(block.structures, block.biases, strict=True)
        ]
        operands += [normal(*f.shape, scale=1 / math.sqrt(f.fan_in)) for s in block.structures for f in s.factors]

        def separate() -> tuple[Tensor, ...]:
            return block.layers(x, operands, lambda s, h, factors, bias: torch_chain(s)(h, factors, bias))

        def fused(which: str) -> tuple[Tensor, ...]:
            return block.by_pass(which, x, operands, self.train)

        wanted = [t for t in (x, *operands) if t is not None]

        def whole(call: Callable[[], tuple[Tensor, ...]]) -> None:
            outputs = call()
            if self.train:
                torch.autograd.grad(outputs, wanted, [torch.ones_like(y) for y in outputs])

        calls = {SEPARATE: separate} | {f"block-{which}": partial(fused, which) for which in self.kinds()}
        if names is not None:
            calls = {name: calls[name] for name in names}
        able = {}
        for name, call in calls.items():
            with suppress(MemoryError, RuntimeError):  # as for ways: it is not chosen
                whole(call)
                able[name] = partial(whole, call)
        return race(able, clock(self.threads), budget)


@lru_cache(maxsize=128)
def torch_block(
    first: tuple[Structure, ...], second: Structure | None, activation: str | None, biases: tuple[bool, ...],
    norm: str | None = None, eps: float = 0.0, affine: tuple[bool, bool] = (False, False), residual: bool = False,
) -> TorchBlock:  # fmt: skip
    """Return the block with these parts, made once."""
    return TorchBlock(first, second, activation, biases, norm, eps, affine, residual)
