"""The three lists of torch's operations.

- ``product``: operations with a formula (:mod:`structlin_nn.torch.counting._formulas`).
- ``no product``: elementwise work, reductions, lookups and data movement. Most follow from what torch declares of an
  operation (tags, views, arguments); the others are named here.
- ``unknown``: everything else, including operations that later versions of torch add.

A *composite* operation consists of other operations. It is decomposed, and its parts are counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

PRODUCT, NO_PRODUCT, UNKNOWN, COMPOSITE = "product", "no product", "unknown", "composite"


class UnknownOperationError(ValueError):
    """An operation of unknown cost occurred in a strict count."""


@dataclass(frozen=True)
class Product:
    """The work of one call of an operation.

    Attributes
    ----------
    macs
        Multiply-accumulates.
    kind
        ``convolution``, ``attention``, ``linalg``, ``fft`` or ``product``. None means ``linear`` if an operand is a
        weight, and ``product`` otherwise.
    operands, sizes
        Operands of a matrix product, of which a weight determines the features; its rows (with the batch), inner size
        and columns.
    d_in, d_out, rows
        Features of a layer, if ``operands`` does not determine them, and the number of vectors to which it is applied.
    moved
        Numbers read and written. None means those of all arguments and results.
    other_flops
        FLOPs that are not multiply-accumulates, such as those of an FFT.
    recomputed
        The part of ``macs`` that the forward pass has already computed.
    """

    macs: int = 0
    kind: str | None = None
    operands: tuple[Tensor, ...] = ()
    sizes: tuple[int, int, int] | None = None
    d_in: int | None = None
    d_out: int | None = None
    rows: int = 0
    moved: int | None = None
    other_flops: int = 0
    recomputed: int = 0


Formula = Callable[[Mapping[str, Any], Any], "Product | int | None"]
_FORMULAS: dict[str, Formula] = {}
WHOLE: dict[str, Formula] = {}
"""Formulas of composite operations, for arrays that they do not decompose."""
_REGISTERED_FREE: set[str] = set()

# Operations recognized by their names: pooling, resizing, padding, and torch's own tests.
_FAMILIES = re.compile(
    r"_?(mkldnn_|quantized_|adaptive_|mkldnn_adaptive_|fractional_)?(avg|max)_(un)?pool[123]d(_with_indices)?"
    r"|_?upsample_(nearest|linear|bilinear|bicubic|trilinear|lanczos)\w*"
    r"|(reflection|replication)_pad[123]d"
    r"|_test_\w+|_foobar"
)

# The same for quantised arrays, and packing of weights.
_QUANTIZED = re.compile(
    r"(add|mul|cat|sigmoid|softmax|threshold|elu|celu|clamp|dropout|hardswish|leaky_relu|prelu|relu6|max_pool[12]d"
    r"|(batch|layer|group|instance)_norm([123]d)?)(_scalar)?(_relu)?(_out)?"
    r"|embedding\w*|\w+_(prepack|unpack)\w*|make_quantized_cell_params\w*"
)

# Properties of arrays, communication, profiling and random numbers.
_FREE_NAMESPACES = {
    "prim", "c10d", "_c10d_functional", "_c10d_functional_autograd", "profiler", "rngprims", "debug_mode_ops",
}  # fmt: skip

# Elementwise operations, reductions, norms, losses, lookups, sorting, sampling, optimisers, quantisation and data
# movement that carry no tag. In-place forms, those on lists (_foreach), copies of views and backward passes follow
# from these.
_NAMED_TEXT = """
    __irshift__ _add_relu _aminmax _amp_foreach_non_finite_check_and_unscale _amp_update_scale _assert_async
    _assert_tensor_metadata _batch_norm_no_update _batch_norm_with_update _chunk_cat _coalesce _coalesced
    _convert_indices_from_coo_to_csr _convert_indices_from_csr_to_coo _convert_weight_to_int4pack
    _convert_weight_to_int4pack_for_cpu _copy_from _copy_from_and_resize _cslt_compress _ctc_loss _cudnn_ctc_loss
    _cudnn_rnn_flatten_weight _cummax_helper _cummin_helper _dimI _dimV _dirichlet_grad _dyn_quant_pack_4bit_weight
    _embedding_bag _embedding_bag_dense_backward _embedding_bag_forward_only _embedding_bag_per_sample_weights_backward
    _empty_per_channel_affine_quantized _fake_quantize_learnable_per_channel_affine
    _fake_quantize_learnable_per_tensor_affine _fake_quantize_per_tensor_affine_cachemask_tensor_qparams
    _fill_mem_eff_dropout_mask_ _foreach_powsum _functional_assert_async _functional_assert_scalar
    _functional_sym_constrain_range _functional_sym_constrain_range_for_size _fused_adagrad _fused_adam _fused_adamw
    _fused_dropout _fused_moving_avg_obs_fq_helper _fused_sdp_choice _fused_sgd _grid_sampler_2d_cpu_fallback
    _has_same_storage_numel _histogramdd_bin_edges _histogramdd_from_bin_cts _histogramdd_from_bin_tensors
    _index_put_impl _is_all_true _is_any_true _jagged_to_padded_dense_forward _lazy_clone _linalg_check_errors
    _local_scalar_dense _log_softmax _log_softmax_backward_data _logcumsumexp _make_per_channel_quantized_tensor
    _make_per_tensor_quantized_tensor _masked_scale _masked_softmax _mkldnn_reshape _mkldnn_transpose
    _native_batch_norm_legit _native_batch_norm_legit_no_training _nested_compute_contiguous_strides_offsets
    _nested_from_padded _nested_from_padded_and_nested_example _nested_from_padded_tensor _nested_get_jagged_dummy
    _nested_get_lengths _nested_get_max_seqlen _nested_get_min_seqlen _nested_get_offsets _nested_get_ragged_idx
    _nested_select_backward _nested_sum_backward _nested_tensor_from_mask _nested_tensor_from_mask_left_aligned
    _nested_tensor_from_tensor_list _nested_tensor_size _nested_tensor_softmax_with_shape
    _nested_tensor_storage_offsets _nested_tensor_strides _new_zeros_with_same_feature_meta _nnz _pack_padded_sequence
    _padded_dense_to_jagged_forward _pdist_backward _pdist_forward _philox_key_fold_in _philox_key_split
    _philox_normal _philox_uniform _pin_memory _prelu_kernel _reshape_copy _resize_output _safe_softmax
    _sample_dirichlet _segment_reduce_backward _softmax _softmax_backward_data
    _sparse_coo_tensor_with_dims_and_tensors _sparse_csr_prod _sparse_csr_sum _sparse_log_softmax
    _sparse_log_softmax_backward_data _sparse_mask_projection _sparse_semi_structured_apply
    _sparse_semi_structured_apply_dense _sparse_semi_structured_tile _sparse_softmax _sparse_softmax_backward_data
    _sparse_sum _spdiags _stack _standard_gamma _standard_gamma_grad _thnn_fused_gru_cell _thnn_fused_lstm_cell
    _thnn_fused_lstm_cell_backward_impl _to_copy _to_dense _to_sparse _to_sparse_bsc _to_sparse_bsr _to_sparse_csc
    _to_sparse_csr _to_sparse_semi_structured _transform_bias_rescale_qkv _unique _unique2 _unsafe_index
    _unsafe_index_put _unsafe_masked_index _unsafe_masked_index_put_accumulate _unsafe_view _use_cudnn_ctc_loss
    _use_miopen_ctc_loss _validate_compressed_sparse_indices _weight_norm_interface allclose as_strided_scatter
    batch_norm_backward_elemt batch_norm_backward_reduce batch_norm_elemt batch_norm_gather_stats
    batch_norm_gather_stats_with_counts batch_norm_stats batch_norm_update_stats bernoulli binary_cross_entropy
    binary_cross_entropy_with_logits bincount binomial block_diag bucketize cat cauchy channel_shuffle col2im complex
    constant_pad_nd copy copy_sparse_to_sparse cudnn_batch_norm cudnn_grid_sampler cummax cummin cumprod cumsum
    dense_dim dequantize diag_embed diagonal_scatter dist embedding embedding_dense_backward embedding_renorm
    empty_like empty_quantized exponential fake_quantize_per_channel_affine_cachemask
    fake_quantize_per_tensor_affine_cachemask fill flip floor_divide full_like gather geometric glu glu_backward_jvp
    glu_jvp grid_sampler_2d grid_sampler_3d hardswish hash_tensor histc histogram huber_loss im2col index index_add
    index_fill index_put index_reduce index_select int_repr is_coalesced is_pinned is_same_size is_set_to isin kthvalue
    lift linalg_cross linspace log_normal log_sigmoid_forward logcumsumexp logspace lu_unpack masked_scatter
    masked_select median miopen_batch_norm miopen_ctc_loss mkldnn_reorder_conv2d_weight mkldnn_reorder_conv3d_weight
    mode mse_loss multi_margin_loss multilabel_margin_loss_forward multinomial nanmedian native_batch_norm
    native_dropout native_group_norm native_layer_norm native_norm new_empty new_empty_strided new_full new_ones
    new_zeros nll_loss2d_forward nll_loss_forward nonzero nonzero_static normal ones_like pixel_shuffle pixel_unshuffle
    poisson polar put q_per_channel_axis q_per_channel_scales q_per_channel_zero_points q_scale q_zero_point qscheme
    quantize_per_channel quantize_per_tensor quantize_per_tensor_dynamic quantized_batch_norm rand_like randint_like
    randn_like random record_stream renorm repeat repeat_interleave resize resize_as resize_as_sparse roll rot90
    rrelu_with_noise scatter scatter_add scatter_reduce searchsorted segment_reduce select_scatter set slice_scatter
    smooth_l1_loss soft_margin_loss sort sparse_compressed_tensor sparse_coo_tensor sparse_dim sparse_mask
    sparse_resize sparse_resize_and_clear stack take to_mkldnn to_padded_tensor topk trace tril triu uniform
    unique_consecutive unique_dim unique_dim_consecutive unsafe_split unsafe_split_with_sizes zero zeros_like
"""
_NAMED = frozenset(_NAMED_TEXT.split())


def register_product(name: str) -> Callable[[Formula], Formula]:
    """Register the formula of an operation; use as a decorator.

    The formula is called as ``formula(arguments, output)``. ``arguments`` maps the names of the operation's schema to
    values, including defaults. The formula returns MACs, a :class:`Product`, or None if the call computes no product.
    It applies to all overloads and to the in-place form. A backward operation needs its own formula.

    Parameters
    ----------
    name
        ``namespace::operation``, or ``higher_order::operation`` for a higher-order operation.

    Raises
    ------
    ValueError
        If the name has no namespace.

    Examples
    --------
    >>> @torch.library.custom_op("structlin_example::twice", mutates_args=())
    ... def twice(x: Tensor, weight: Tensor) -> Tensor:
    ...     return 2 * (x @ weight)
    >>> @register_product("structlin_example::twice")
    ... def _(arguments, output):
    ...     return arguments["x"].numel() * output.shape[-1]
    >>> classify(torch.ops.structlin_example.twice.default)
    'product'
    """
    _check_name(name)

    def add(formula: Formula) -> Formula:
        _FORMULAS[name] = formula
        _REGISTERED_FREE.discard(name)
        _forget()
        return formula

    return add


def register_table(table: Mapping[str, Formula]) -> None:
    """Register formulas by the names of their operations, of ``aten`` unless they state another namespace."""
    for names, formula in table.items():
        for name in names.split():
            register_product(name if "::" in name else f"aten::{name}")(formula)


def register_no_product(name: str) -> None:
    """Register an operation without products, such as ``register_no_product("torchvision::nms")``.

    ValueError if the name has no namespace.
    """
    _check_name(name)
    _FORMULAS.pop(name, None)
    _REGISTERED_FREE.add(name)
    _forget()


def _check_name(name: str) -> None:
    if not re.fullmatch(r"\w+::\w+", name):
        raise ValueError(f"the name of an operation must be namespace::operation, such as aten::mm, got {name!r}")


def _forget() -> None:
    for cached in (_classify, classify_name):
        cached.cache_clear()


def operation_names() -> list[str]:
    """Return ``namespace::operation`` of every operation in torch's registry, sorted."""
    return sorted({name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()})


def formula_of(name: str) -> Formula | None:
    """Return the formula of an operation or of its out-of-place form, else torch's own, or None."""
    if name in _FORMULAS:
        return _FORMULAS[name]
    if name.endswith("_") and name[:-1] in _FORMULAS:
        return _FORMULAS[name[:-1]]
    namespace, _, plain = name.partition("::")
    flops = flop_registry.get(getattr(getattr(torch.ops, namespace), plain, None))
    if flops is None or name in _REGISTERED_FREE:
        return None
    return lambda arguments, output: flops(*arguments.values(), out_val=output) // 2


def classify(operation: Any) -> str:
    """Return the list of an operation: ``product``, ``no product``, ``unknown`` or ``composite``.

    An operation with a formula of ``torch.utils.flop_counter.register_flop_formula`` is a product.

    Parameters
    ----------
    operation
        A ``torch._ops.OpOverload`` or a higher-order operation.

    Examples
    --------
    >>> aten = torch.ops.aten
    >>> [classify(op) for op in (aten.mm.default, aten.relu.default, aten.matmul.default)]
    ['product', 'no product', 'composite']
    """
    found = _classify(operation)
    if found == UNKNOWN and isinstance(operation, torch._ops.OpOverload):  # torch may have a new formula
        return PRODUCT if formula_of(operation._schema.name) else UNKNOWN
    return found


@cache
def _classify(operation: Any) -> str:
    if not isinstance(operation, torch._ops.OpOverload):
        name = f"higher_order::{operation.name()}"
        return PRODUCT if formula_of(name) else NO_PRODUCT if name in _REGISTERED_FREE else UNKNOWN
    name = operation._schema.name
    if formula_of(name):
        return PRODUCT
    if name in _REGISTERED_FREE:
        return NO_PRODUCT
    if _is_composite(operation):
        return COMPOSITE
    return classify_name(name)


@cache
def classify_name(name: str) -> str:
    """Return the list of ``namespace::operation`` with all its overloads, as :func:`classify` does.

    Examples
    --------
    >>> classify_name("aten::_grouped_mm"), classify_name("aten::index_put_"), classify_name("aten::quantized_lstm")
    ('product', 'no product', 'unknown')
    """
    if formula_of(name):
        return PRODUCT
    namespace, _, plain = name.partition("::")
    if name in _REGISTERED_FREE or namespace in _FREE_NAMESPACES:
        return NO_PRODUCT
    overloads = _overloads(namespace, plain)
    if namespace == "aten" and (plain in _NAMED or _FAMILIES.fullmatch(plain)):
        return NO_PRODUCT
    if namespace in ("quantized", "_quantized") and _QUANTIZED.fullmatch(plain):
        return NO_PRODUCT
    if not overloads:
        return UNKNOWN
    tagged = {tag for overload in overloads for tag in overload.tags}
    if torch.Tag.pointwise in tagged or torch.Tag.reduction in tagged:
        return NO_PRODUCT
    read = [a for overload in overloads for a in overload._schema.arguments if not a.is_out]
    if all(overload.is_view for overload in overloads) or not any("Tensor" in str(a.type) for a in read):
        return NO_PRODUCT
    if all(map(_is_composite, overloads)):
        return COMPOSITE
    related = {classify_name(f"{namespace}::{base}") for base in _bases(plain)} if namespace == "aten" else set()
    return NO_PRODUCT if related & {NO_PRODUCT, COMPOSITE} else UNKNOWN


def _bases(name: str) -> list[str]:
    """Return the operations of which this is the in-place, list, copy, functional or backward form."""
    found = [name[:-1]] if name.endswith("_") and not name.endswith("__") else []
    found += [name.removeprefix("_foreach_")] if name.startswith("_foreach_") else []
    return found + [name.removesuffix(end) for end in ("_copy", "_functional", "_backward") if name.endswith(end)]


def _overloads(namespace: str, name: str) -> list[Any]:
    packet = getattr(getattr(torch.ops, namespace), name, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return []
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    overloads = [o for o in overloads if torch._C._dispatch_has_kernel(o.name())]  # without overloads of TorchScript
    return [o for o in overloads if not o._overloadname.endswith("out")] or overloads


def _is_composite(overload: Any) -> bool:
    if not torch._C._dispatch_has_kernel(overload.name()):
        return False
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return key in overload.py_kernels or torch._C._dispatch_has_kernel_for_dispatch_key(overload.name(), key)
