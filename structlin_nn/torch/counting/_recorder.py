"""Count the operations that reach torch's dispatcher, forward and backward, by module.

Every node of the autograd graph has a sequence number. The recorder notes the numbers at which modules are entered and
left. So the node that runs an operation of the backward pass determines its module. Structured layers and
``scaled_dot_product_attention`` are counted as a whole, because their operations depend on device and dtype. These
operations are not counted, and the backward pass of the whole is added when it runs.
"""

from __future__ import annotations

import itertools
import math
import sys
import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from traceback import walk_stack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import (
    _global_forward_hooks_with_kwargs,
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import __file__ as CHECKPOINT_FILE

from structlin.counting import work_of
from structlin.structure import AbstractStructure, Structure
from structlin_nn.torch.counting._formulas import attention_pairs
from structlin_nn.torch.counting._lists import COMPOSITE, PRODUCT, UNKNOWN, WHOLE, Product, classify, formula_of
from structlin_nn.torch.counting._result import CallCount
from structlin_nn.torch.linear import StructuredLinear


@contextmanager
def _adapted_libraries() -> Iterator[None]:
    """Adapt the libraries that are imported, and restore them afterwards."""
    with ExitStack() as stack:
        # Without torch.compile, flex_attention compiles itself, which torch does not support under a dispatch mode.
        flex, name = sys.modules.get("torch.nn.attention.flex_attention"), "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"
        if hasattr(flex, name):
            stack.enter_context(patch.object(flex, name, True))
        # transformers reads the values of a padding mask, unless it is traced; a mask on the meta device has none.
        masking: Any = sys.modules.get("transformers.masking_utils")
        if hasattr(masking, "is_tracing"):
            traced = masking.is_tracing
            stack.enter_context(
                patch.object(masking, "is_tracing", lambda x=None: getattr(x, "is_meta", False) or traced(x))
            )
        yield


aten = torch.ops.aten
OUTSIDE = "(outside)"  # what runs in no module

# Operations other than views that only name, share or reinterpret memory.
_FREE = {aten.detach, aten._unsafe_view, aten.alias, aten.lift_fresh, aten.empty, aten.empty_like}
FORWARD, BACKWARD, AGAIN = "forward", "backward", "again"

_ROWS, _COLUMNS = ("crow_indices", "col_indices", "values"), ("ccol_indices", "row_indices", "values")
_PARTS = {
    torch.sparse_coo: ("_indices", "_values"), torch.sparse_csr: _ROWS, torch.sparse_bsr: _ROWS,
    torch.sparse_csc: _COLUMNS, torch.sparse_bsc: _COLUMNS,
}  # fmt: skip


def backward_macs(structure: AbstractStructure, needs_input: bool, needs_factors: Sequence[bool]) -> int:
    """Return the MACs of a layer's backward pass for one vector.

    The gradient of the input or of the factor of a step costs as much as the step. The gradient of a step's input is
    needed if that of the layer's input or of an earlier factor is. A structure that is not a chain counts as one step.

    Parameters
    ----------
    structure
        The structure of the layer.
    needs_input
        Whether the layer's input needs a gradient.
    needs_factors
        Whether each factor needs a gradient.

    Examples
    --------
    >>> chain = Structure.parse("i,ri->r; r,or->o", i=8, r=2, o=6)
    >>> chain.macs, backward_macs(chain, True, (True, True)), backward_macs(chain, False, (True, True))
    (28, 56, 40)
    """
    if not isinstance(structure, Structure):
        return structure.macs * (needs_input + any(needs_factors))
    total, flows = 0, needs_input
    for factor, needed in zip(structure.factors, needs_factors, strict=True):
        total += factor.numel * factor.carried * (flows + needed)
        flows = flows or needed
    return total


def inner_tensors(x: Tensor) -> list[Tensor]:
    """Return the dense arrays that represent a tensor, such as a subclass or a sparse tensor."""
    subclass: Any = x
    if is_traceable_wrapper_subclass(subclass):
        names, _ = subclass.__tensor_flatten__()
        return [part for name in names for part in inner_tensors(getattr(subclass, name))]
    return [getattr(x, part)() for part in _PARTS[x.layout]] if x.layout in _PARTS else [x]


def _storage(x: Tensor) -> StorageWeakRef | None:
    """Return an identity of the memory of an array; unlike data_ptr(), it works on meta and is never reused."""
    try:
        return StorageWeakRef(x.untyped_storage())
    except (NotImplementedError, RuntimeError):  # no memory of its own
        return None


def _memories(x: Tensor) -> list[StorageWeakRef]:
    """Return the identities of the memory of a tensor's arrays."""
    return [where for part in inner_tensors(x) if (where := _storage(part)) is not None]


def _tensors(*trees: Any) -> list[Tensor]:
    return [x for x in tree_leaves(trees) if isinstance(x, Tensor)]


def _numbers(x: Tensor) -> int:
    return sum(part.numel() for part in inner_tensors(x))


def _physical(x: Tensor) -> tuple[Tensor, dict[int, int]]:
    """Return the array inside functorch's wrappers, and the sizes of the axes of vmap by level."""
    functorch, hidden = torch._C._functorch, {}
    while functorch.is_functorch_wrapped_tensor(x):
        inside = functorch.get_unwrapped(x)
        if functorch.is_batchedtensor(x):
            hidden[functorch.maybe_get_level(x)] = inside.shape[functorch.maybe_get_bdim(x)]
        x = inside
    return x, hidden


@dataclass
class _Entry:
    """A call of a module that has not returned."""

    module: nn.Module
    name: str
    backward: bool  # entered in the backward pass, for recomputation
    opaque: bool


class Recorder(TorchDispatchMode):
    """The dispatch mode that counts, with its hooks on modules and attention.

    ``models`` maps prefixes of names to models. ``causal`` and ``flash`` are ``causal_discount`` and
    ``flash_backward`` of :func:`structlin_nn.torch.counting.count`.
    """

    supports_higher_order_operators = True

    def __init__(self, models: Mapping[str, nn.Module], *, causal: bool = False, flash: bool = False) -> None:
        super().__init__()
        self.causal, self.flash = causal, flash
        self.thread = threading.get_ident()
        self.names: dict[nn.Module, str] = {}
        self.modules: dict[str, nn.Module] = {}
        self.roots: dict[str, nn.Module] = {}
        self.weights: set[StorageWeakRef] = set()
        self.own: set[StorageWeakRef] = set()
        self.types: dict[str, str] = {}
        self.stack: list[_Entry] = []
        self.opaque = 0  # above 0 inside calls that are counted as a whole
        self.calls: dict[tuple[str, str], CallCount] = {}
        self.free: Counter[str] = Counter()
        self.unknown: Counter[str] = Counter()
        self.moved = 0
        self.nodes: dict[int, tuple[str, str]] = {}  # the call that a node of the graph belongs to
        self.marks: list[int] = [-1]  # sequence numbers from which on nodes belong to ...
        self.places: list[tuple[str, bool]] = [(OUTSIDE, False)]  # ... this module, and whether it counts as a whole
        self.attending = False
        self.values_only = False
        self.saved: dict[StorageWeakRef, Tensor] = {}
        self.saved_more = self.saved_more_bytes = 0
        for prefix, model in models.items():
            self.adopt(model, prefix)

    # -- modules ---------------------------------------------------------------------------------------------------

    def adopt(self, model: nn.Module, prefix: str) -> None:
        """Register the modules and weights of a model."""
        self.roots[prefix] = model
        for name, module in model.named_modules():
            self._named(module, f"{prefix}.{name}" if prefix and name else prefix or name)
        for parameter in model.parameters():
            self._becomes_weight(parameter)
        for tensor in (*model.parameters(), *model.buffers()):
            self.own.update(_memories(tensor))

    def _named(self, module: nn.Module, name: str) -> None:
        if module not in self.names:
            self.names[module] = name
            self.modules.setdefault(name, module)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Count everything that runs within the statement."""
        with ExitStack() as stack:
            # Nodes are numbered by thread, so the backward pass must run in the thread of the forward pass.
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            stack.enter_context(_adapted_libraries())
            stack.callback(register_module_forward_pre_hook(self._enter).remove)
            leave = register_module_forward_hook(self._leave, with_kwargs=True, always_call=True)
            # torch forgets to remove this entry, and warns later that there are global hooks.
            stack.callback(_global_forward_hooks_with_kwargs.pop, leave.id, None)
            stack.callback(leave.remove)
            stack.enter_context(self)
            stack.enter_context(_Functions(self))
            yield

    def _enter(self, module: nn.Module, args: tuple) -> None:
        if threading.get_ident() != self.thread:
            return
        if module not in self.names:
            if self.stack:
                self._named(module, f"{self.stack[-1].name}.({type(module).__name__})".lstrip("."))
            else:
                kind = type(module).__name__
                names = itertools.chain([kind], (f"{kind}#{number}" for number in itertools.count(2)))
                self.adopt(module, next(prefix for prefix in names if prefix not in self.roots))
        name, opaque = self.names[module], isinstance(module, StructuredLinear)
        self.types.setdefault(name, type(module).__name__)
        self.stack.append(_Entry(module, name, torch._C._current_autograd_node() is not None, opaque))
        self.opaque += opaque
        self._mark()

    def _leave(self, module: nn.Module, args: tuple, *rest: Any) -> None:
        # After an exception torch does not pass the keywords.
        kwargs, output = rest if len(rest) == 2 else ({}, None)
        if threading.get_ident() != self.thread or not any(entry.module is module for entry in self.stack):
            return
        while True:  # calls that an exception ended go too
            entry = self.stack.pop()
            self.opaque -= entry.opaque
            if entry.module is module:
                break
        if entry.opaque and isinstance(output, Tensor):
            given = {**dict(zip(("x", "sizes"), args, strict=False)), **kwargs}
            self._structured(entry, **given, output=output)
        if isinstance(module, nn.utils.parametrize.ParametrizationList) and isinstance(output, Tensor):
            self._becomes_weight(output)
        self._mark()

    def _mark(self) -> None:
        """Assign the following nodes to the module that is being called."""
        self.marks.append(torch._C._autograd._get_sequence_nr())
        self.places.append((self._name(), self.opaque > 0))

    def _name(self) -> str:
        """Return the module that is being called; where a function is computed again, that in which it was called."""
        node = torch._C._current_autograd_node()
        if node is not None and not (self.stack and self.stack[-1].backward):
            return self._place(node)[0]
        return self.stack[-1].name if self.stack else OUTSIDE

    # -- phases ----------------------------------------------------------------------------------------------------

    def _phase(self, node: Any) -> str:
        if node is None:
            return FORWARD
        if self.stack and self.stack[-1].backward:
            return AGAIN
        # Gradients of gradients run with gradients enabled too; only the frames tell them from a checkpoint.
        return AGAIN if torch.is_grad_enabled() and _in_checkpoint() else BACKWARD

    def _place(self, node: Any) -> tuple[str, bool]:
        return self.places[bisect_right(self.marks, node._sequence_nr()) - 1]

    # -- counting --------------------------------------------------------------------------------------------------

    def add(self, name: str, product: Product, kind: str, phase: str) -> None:
        """Add a product to the count of a module."""
        if (name, kind) not in self.calls:
            self.calls[name, kind] = self._new_call(name, kind)
        call = self.calls[name, kind]
        moved = product.moved or 0
        if phase == FORWARD:
            call.macs += product.macs
            call.other_flops += product.other_flops
            call.rows += product.rows
            call.moved += moved
            call.calls += 1
            if call.in_features is None:
                call.in_features, call.out_features = product.d_in, product.d_out
        else:
            call.backward_macs += product.macs
            call.backward_other_flops += product.other_flops
            call.backward_moved += moved
            call.recomputed_macs += product.macs if phase == AGAIN else product.recomputed

    def _new_call(self, name: str, kind: str) -> CallCount:
        module = self.modules.get(name)
        params = 0
        if module is not None and kind in ("linear", "convolution"):
            owned = set(module.parameters(recurse=isinstance(module, StructuredLinear)))
            for inside in (getattr(module, "parametrizations", None) or {}).values():
                owned |= set(inside.parameters())
            params = sum(p.numel() for p in owned if p.requires_grad)
        return CallCount(name, kind, "" if module is None else type(module).__name__, params, None, None)

    def _is_weight(self, x: Tensor) -> bool:
        return (where := _storage(x)) is not None and where in self.weights

    def _becomes_weight(self, x: Tensor) -> None:
        self.weights.update(_memories(x))

    def _settle(self, product: Product, inputs: list[Tensor], outputs: list[Tensor]) -> tuple[str, Product]:
        """Return the kind of a product, with sizes and numbers moved."""
        changes: dict[str, Any] = {}
        kind = product.kind
        if kind is None:
            operands = product.operands or tuple(inputs)
            weighted = [self._is_weight(x) for x in operands]
            kind = "linear" if any(weighted) else "product"
            if product.sizes is not None and any(weighted):
                rows, k, columns = product.sizes
                if weighted[-1]:
                    changes = {"d_in": k, "d_out": columns, "rows": rows}
                else:
                    features = operands[0].shape[-2] if operands[0].ndim > 1 else 1
                    changes = {"d_in": k, "d_out": features, "rows": columns * (rows // max(features, 1))}
        if product.moved is None:
            changes["moved"] = sum(map(_numbers, (*inputs, *outputs)))
        return kind, replace(product, **changes)

    def _structured(self, entry: _Entry, x: Tensor, sizes: Sequence[int] = (1,), *, output: Tensor) -> None:
        """Count a structured layer: the cost of its structure for each vector of its input.

        ``sizes``: numbers of vectors of the experts; factors of experts without vectors are not read.
        """
        module = entry.module
        assert isinstance(module, StructuredLinear)
        structure = module.structure
        x = x.values() if x.is_nested else x
        physical, hidden = _physical(x)
        rows = math.prod(x.shape[:-1]) * math.prod(hidden.values())
        parameters = iter(module.factors)
        needed = [f.trainable and next(parameters).requires_grad for f in structure.factors]
        used = sum(map(bool, sizes))
        moved = used * sum(f.numel for f in structure.factors) + rows * (work_of(structure).activations or 0)
        other = rows * sum(structure.other_flops.values()) + used * sum(structure.setup_flops.values())
        macs = rows * structure.macs
        gradients = physical.requires_grad + any(needed)
        back = rows * backward_macs(structure, physical.requires_grad, needed)
        moved_back = round(moved * back / macs) if macs else moved * gradients
        product = Product(macs, d_in=structure.d_in, d_out=structure.d_out, rows=rows, moved=moved, other_flops=other)
        backward = Product(back, moved=moved_back, other_flops=other * gradients)
        self.whole(entry.name, "linear", product, backward, output)

    def whole(self, name: str, kind: str, product: Product, backward: Product, output: Tensor) -> None:
        """Count a call as a whole now, and its backward pass when it runs."""
        if self.opaque:
            return
        self.add(name, product, kind, self._phase(torch._C._current_autograd_node()))
        node = _physical(output)[0].grad_fn
        if node is not None and (backward.macs or backward.other_flops):
            node.register_prehook(lambda gradients: self.add(name, backward, kind, BACKWARD))

    def attention(self, q: Tensor, k: Tensor, v: Tensor, output: Tensor, causal: bool, gqa: bool) -> None:
        """Count scores (queries times keys) and values (weights times values), of shape (..., tokens, size).

        The backward pass has two products for each of both; fused, it computes the scores once more.
        """
        (q0, one), (k0, two), (v0, three) = map(_physical, (q, k, v))
        keys: list[Sequence[int]] = [k.shape[:-2], v.shape[:-2]]
        if gqa:  # a head of keys serves several heads of queries
            keys = [(*shape[:-1], q.shape[-3]) for shape in keys]
        batch = math.prod(torch.broadcast_shapes(q.shape[:-2], *keys)) * math.prod((one | two | three).values())
        pairs = batch * attention_pairs(q.shape[-2], k.shape[-2], causal and self.causal)
        scores, values = pairs * q.shape[-1], pairs * v.shape[-1]
        flows = q0.requires_grad or k0.requires_grad
        back = scores * (q0.requires_grad + k0.requires_grad) + values * (flows + v0.requires_grad)
        again = scores if self.flash and back else 0
        moved = q0.numel() + k0.numel() + v0.numel() + batch * q.shape[-2] * v.shape[-1]
        macs = scores + values
        backward = Product(back + again, moved=round(moved * back / macs) if macs else 0, recomputed=again)
        self.whole(self._name(), "attention", Product(macs, moved=moved), backward, output)

    # -- operations ------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "__tensor_unflatten__") for kind in types):
            return NotImplemented  # the subclass takes it apart, and its parts come here
        kwargs = kwargs or {}
        found = classify(func)
        if found == COMPOSITE:
            if not any(x.is_nested for x in _tensors(args, kwargs)):
                with self:
                    output = func.decompose(*args, **kwargs)  # without autograd, composite operations arrive whole
                if output is not NotImplemented:
                    return output
            found = PRODUCT if func._schema.name in WHOLE else UNKNOWN
        # Arguments may be overwritten in place; what a formula needs are sizes, and values of offsets.
        output = _run(func, args, kwargs)
        if self.opaque:
            return output
        node = torch._C._current_autograd_node()
        phase = self._phase(node)
        if phase == BACKWARD:
            name, whole = self._place(node)
            if whole:
                return output
        else:
            name = self._name()
        if found == PRODUCT:
            self._product(func, args, kwargs, output, name, phase, node)
        elif found != UNKNOWN:
            self._no_product(func, args, kwargs, output, phase)
        else:
            self.unknown[_readable(func)] += 1
        return output

    def _product(self, func: Any, args: tuple, kwargs: dict, output: Any, name: str, phase: str, node: Any) -> None:
        if isinstance(func, torch._ops.OpOverload):
            operation = func._schema.name
            arguments, formula = _bound(func, args, kwargs), formula_of(operation) or WHOLE.get(operation)
        else:
            arguments = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            formula = formula_of(f"higher_order::{func.name()}")
        assert formula is not None
        if "is_causal" in arguments or "custom_mask_type" in arguments:
            arguments["causal_discount"] = self.causal
        if self.values_only:
            arguments["values_only"] = True
        product = formula(arguments, output)
        if product is None:
            self._no_product(func, args, kwargs, output, phase)
            return
        if not isinstance(product, Product):
            product = Product(int(product))
        if product.kind == "attention" and not self.flash:  # the scores that a fused backward pass computes again
            product = replace(product, macs=product.macs - product.recomputed, recomputed=0)
        inputs, outputs = _tensors(args, kwargs), _tensors(output)
        kind, product = self._settle(product, inputs, outputs)
        number = torch._C._autograd._get_sequence_nr() - 1
        if phase == BACKWARD:
            name, kind = self.nodes.get(node._sequence_nr(), (name, kind))
        else:
            self.nodes.setdefault(number, (name, kind))  # torch makes the node before it runs the operation
        self.add(name, product, kind, phase)

    def _no_product(self, func: Any, args: tuple, kwargs: dict, output: Any, phase: str) -> None:
        leaves, results = _tensors(args, kwargs), _tensors(output)
        if leaves and all(map(self._is_weight, leaves)):
            for x in results:  # a weight that is cast, scaled or normalised stays one
                self._becomes_weight(x)
        view = getattr(func, "is_view", False) or getattr(func, "overloadpacket", func) in _FREE
        if phase == FORWARD and not view and getattr(func, "namespace", "") != "prim":
            self.free[_readable(func)] += 1
            self.moved += sum(map(_numbers, (*leaves, *results)))

    # -- what autograd keeps ---------------------------------------------------------------------------------------

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Note what autograd keeps for the backward pass."""

        def pack(x: Tensor) -> Tensor:
            if not self.attending and torch._C._current_autograd_node() is None:
                self.save(x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            yield

    def save(self, x: Tensor) -> None:
        for part in inner_tensors(_physical(x)[0]):
            if (where := _storage(part)) is not None and where not in self.own:
                self.saved[where] = part.detach()

    def saved_sizes(self) -> tuple[int, int, int]:
        """Return the number of floating values that are kept, their bytes, and the bytes of other kept values."""
        numbers, floating, rest = self.saved_more, self.saved_more_bytes, 0
        for x in self.saved.values():
            size = x.untyped_storage().nbytes()  # a view keeps all of it
            if x.is_floating_point() or x.is_complex():
                numbers += size // x.element_size()
                floating += size
            else:
                rest += size
        return numbers, floating, rest


def _run(func: Any, args: tuple, kwargs: dict) -> Any:
    if func is not aten._grouped_mm.default or args[0].device.type != "meta":
        return func(*args, **kwargs)
    # On the meta device torch accepts bfloat16 alone, on others float32 too.
    a, b = (x.to(torch.bfloat16) for x in args[:2])
    return func(a, b, *args[2:], **kwargs).to(args[0].dtype)


def _bound(func: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Return the arguments by the names of the schema and in its order, with defaults."""
    schema = func._schema.arguments
    given = dict(zip((a.name for a in schema), args, strict=False)) | kwargs
    return {a.name: given.get(a.name, a.default_value) for a in schema if a.name in given or a.has_default_value()}


def _readable(func: Any) -> str:
    if isinstance(func, torch._ops.OpOverload):
        return str(func.overloadpacket)
    return f"higher_order.{func.name()}"


def _in_checkpoint() -> bool:
    """Whether torch.utils.checkpoint is further up in the stack of frames."""
    return any(frame.f_code.co_filename == CHECKPOINT_FILE for frame, _ in walk_stack(sys._getframe()))


# Without gradients these compute no vectors, but torch has them computed while a dispatch mode is active.
_VALUES_ONLY = {torch.linalg.eigvals, torch.linalg.eigvalsh, torch.linalg.svdvals}


class _Functions(TorchFunctionMode):
    """Counts scaled_dot_product_attention as a whole: what it is made of depends on device and dtype."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        recorder = self.recorder
        if func in _VALUES_ONLY:
            vectors = torch.is_grad_enabled() and any(x.requires_grad for x in _tensors(args, kwargs))
            with patch.object(recorder, "values_only", not vectors):
                return func(*args, **kwargs)
        if func is not torch.nn.functional.scaled_dot_product_attention or recorder.opaque:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        named = dict(zip(names, args, strict=False)) | kwargs
        q, k, v = (named[name] for name in names[:3])
        if any(x.is_nested for x in (q, k, v)):
            return func(*args, **kwargs)  # what they are made of is counted
        try:
            with patch.multiple(recorder, attending=True, opaque=recorder.opaque + 1):
                recorder._mark()
                output = func(*args, **kwargs)
        finally:
            recorder._mark()
        recorder.attention(q, k, v, output, bool(named.get("is_causal")), bool(named.get("enable_gqa")))
        if output.requires_grad and torch._C._current_autograd_node() is None:
            for x in (q, k, v, output):
                recorder.save(x)
            queries = math.prod(output.shape[:-1])
            recorder.saved_more += queries
            recorder.saved_more_bytes += queries * max(output.element_size(), 4)  # the log-sum-exp of each query
        return output
