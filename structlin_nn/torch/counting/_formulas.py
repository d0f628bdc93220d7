"""Formulas of operations that are matrix products, convolutions, recurrent layers or attention, by ATen name.

A formula gets the arguments by the names of the schema, and the result. Sizes are those of the call: padding of a
convolution counts, as its zeros are multiplied too. The backward pass of a bilinear operation is one product of the
same size for each gradient that is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from structlin_nn.torch.counting._lists import WHOLE, Formula, Product, register_table

Arguments = Mapping[str, Any]


# -- matrix products -----------------------------------------------------------------------------------------------


def matrix_product(a: Tensor, b: Tensor) -> Product:
    """Count ``a @ b`` of shapes (..., n, k) and (..., k, m), or with a vector on a side; sparse operands by entries."""
    if a.is_nested or b.is_nested:
        return Product(_sum_of_products(*_parts(a, b)), operands=(a, b))
    if a.layout != torch.strided or b.layout != torch.strided:
        return _sparse_product(a, b)
    k = a.shape[-1]
    columns = b.shape[-1] if b.ndim > 1 else 1
    rows = math.prod(a.shape[:-1])
    macs = rows * k * columns
    moved = a.numel() + b.numel() + rows * columns
    return Product(macs, operands=(a, b), sizes=(rows, k, columns), moved=moved)


def _sum_of_products(firsts: Sequence[Tensor], seconds: Sequence[Tensor]) -> int:
    return sum(matrix_product(a, b).macs for a, b in zip(firsts, seconds, strict=True))


def _parts(*tensors: Tensor) -> list[list[Tensor]]:
    """Return the arrays of nested tensors, and others as often as there are of those."""
    number = max(x.size(0) for x in tensors if x.is_nested)
    return [list(x.unbind()) if x.is_nested else [x] * number for x in tensors]


def _sparse_product(a: Tensor, b: Tensor) -> Product:
    """Count one row (column) of the other operand for each stored entry of a sparse one."""
    if a.layout != torch.strided and b.layout != torch.strided:
        inner = a.to_sparse_coo().coalesce().indices()[-1], b.to_sparse_coo().coalesce().indices()[-2]
        columns, rows = (torch.bincount(place, minlength=a.shape[-1]) for place in inner)
        return Product(int((columns * rows).sum()))
    if a.layout != torch.strided:
        return Product(_entries(a) * (b.shape[-1] if b.ndim > 1 else 1))
    return Product(_entries(b) * (a.shape[-2] if a.ndim > 1 else 1))


def _entries(x: Tensor) -> int:
    """Return how many numbers a sparse array stores, including whole blocks."""
    values = x._values() if x.layout == torch.sparse_coo else x.values()
    return values.numel()


def _operands(first: str, second: str) -> Formula:
    return lambda arguments, output: matrix_product(arguments[first], arguments[second])


def _outer(arguments: Arguments, output: Any) -> Product:
    """Count one product and one addition for each number of the result."""
    a, b = arguments["vec1"], arguments["vec2"]
    return Product(a.numel() * b.numel(), operands=(a, b), sizes=(a.numel(), 1, b.numel()))


def grouped(a: Tensor, b: Tensor, offsets: Tensor | None) -> Product:
    """Count ``torch._grouped_mm``: products of groups of rows, of columns, or of parts of the inner axis.

    What lies behind the last offset is not multiplied. On the meta device the groups are taken to fill their axis.
    """
    if a.ndim == 3 and b.ndim == 3:
        return matrix_product(a, b)
    rows, columns = a.ndim == 2 and b.ndim == 3, a.ndim == 3
    length = a.shape[0] if rows else b.shape[-1] if columns else a.shape[-1]
    if offsets is not None and offsets.numel() and _has_values(offsets):
        length = int(offsets[-1])
    if rows:
        sizes = length, a.shape[1], b.shape[2]
    elif columns:
        sizes = a.shape[1], b.shape[0], length
    else:
        sizes = a.shape[0], length, b.shape[1]
    return Product(math.prod(sizes), operands=(a, b), sizes=sizes)


def _has_values(x: Tensor) -> bool:
    return x.device.type != "meta" and not isinstance(x, torch._subclasses.FakeTensor)


def _dense_layer(x: str) -> Formula:
    """Count a layer of packed, transposed or quantised weights, by the features of x and of the result."""

    def formula(arguments: Arguments, output: Tensor) -> Product:
        pairs = zip(*_parts(arguments[x], output), strict=True) if output.is_nested else [(arguments[x], output)]
        shapes = [(a.shape, b.shape) for a, b in pairs]
        features, width = shapes[0][0][-1], shapes[0][1][-1]
        rows = sum(math.prod(a[:-1]) for a, _ in shapes)
        return Product(rows * features * width, "linear", d_in=features, d_out=width, rows=rows)

    return formula


def _linear_backward(arguments: Arguments, output: Any) -> Product:
    """Count the gradients of the input and of the weight that are computed."""
    weight, gradient = arguments["weight"], arguments["grad_output"]
    rows = gradient.numel() // max(weight.shape[0], 1)
    needed = sum(arguments["output_mask"][:2])
    return Product(rows * weight.numel() * needed, "linear", d_in=weight.shape[1], d_out=weight.shape[0], rows=rows)


# -- sparse --------------------------------------------------------------------------------------------------------


def _semi_structured(sparse: str, dense: str, dense_rows: bool = False) -> Formula:
    """2:4 sparsity: only the stored half of the weight is multiplied."""

    def formula(arguments: Arguments, output: Tensor) -> Product:
        other = arguments[dense]
        vectors = math.prod(other.shape[:-1]) if dense_rows else other.shape[-1]
        return Product(arguments[sparse].numel() * vectors, "linear")

    return formula


def _compressed(arguments: Arguments, output: Any) -> Product:
    """2:4 sparsity, by the sizes of the dense operand and the result, as the packed one has none."""
    other = arguments["dense_B"]
    rows = output.shape[-1] if arguments["transpose_result"] else output.shape[0]
    return Product(rows * (other.shape[0] // 2) * other.shape[1], "linear")


# -- products of three, distances, grids ---------------------------------------------------------------------------


def _trilinear(arguments: Arguments, output: Any) -> Product:
    """``sum(i1 * i2 * i3)``, as torch does it: first i1 with i2, summing what i3 has not, then the result with i3."""
    expanded = []
    for number in (1, 2, 3):
        shape = list(arguments[f"i{number}"].shape)
        for axis in sorted(arguments[f"expand{number}"]):
            shape.insert(axis, 1)
        expanded.append(shape)
    sizes = [max(lengths) if min(lengths) else 0 for lengths in zip(*expanded, strict=True)]
    missing = set(arguments["expand3"])
    early = {axis % len(sizes) for axis in arguments["sumdim"]} & missing
    first = math.prod(n for axis, n in enumerate(sizes) if axis not in arguments["expand1"] or axis not in
                      arguments["expand2"])  # fmt: skip
    second = math.prod(n for axis, n in enumerate(sizes) if axis not in early)
    return Product(first + second, operands=tuple(arguments[f"i{number}"] for number in (1, 2, 3)))


def _euclidean(arguments: Arguments, output: Tensor) -> Product:
    """Count distances by one product, whose rows have two more entries: the squared norm and a one."""
    return Product(output.numel() * (arguments["x1"].shape[-1] + 2), "product")


def _distances(arguments: Arguments, output: Tensor) -> Product | None:
    """Count one product for Euclidean distances of more than 25 rows, or on request; none for differences."""
    x1, x2, mode = arguments["x1"], arguments["x2"], arguments["compute_mode"]
    by_product = mode == 1 or (not mode and (x1.shape[-2] > 25 or x2.shape[-2] > 25))
    return _euclidean(arguments, output) if arguments["p"] == 2 and by_product else None


# -- convolutions --------------------------------------------------------------------------------------------------


def _convolved(x: Tensor, weight: Tensor, output: Tensor, transposed: bool = False, times: int = 1) -> Product:
    """Count one kernel, over the channels of a group, for each number of the result (transposed: of the input)."""
    macs = times * (x if transposed else output).numel() * math.prod(weight.shape[1:])
    axis = 1 if x.ndim > 1 else 0
    moved = times * (x.numel() + weight.numel() + output.numel())
    return Product(macs, "convolution", d_in=x.shape[axis], d_out=output.shape[axis], moved=moved)


def _convolution(transposed: bool = False) -> Formula:
    """Return the formula of a convolution, or of its backward pass, which has a gradient in place of the result."""

    def formula(arguments: Arguments, output: Any) -> Product:
        x = arguments["input"] if "input" in arguments else arguments["self"]
        swapped, times = transposed or arguments.get("transposed", False), 1
        if "grad_output" in arguments:
            output, times = arguments["grad_output"], sum(arguments.get("output_mask", (True, True))[:2])
        return _convolved(x, arguments["weight"], output, swapped, times)

    return formula


def _time_convolution(arguments: Arguments, output: Tensor) -> Product:
    """Count a convolution of (time, batch, channels) by a kernel (length, channels in, channels out)."""
    length, d_in, d_out = arguments["weight"].shape
    return Product(output.numel() * length * d_in, "convolution", d_in=d_in, d_out=d_out)


def _packed_convolution(arguments: Arguments, output: Tensor) -> Product:
    """Count a convolution whose weights are packed with their scales; torch unpacks them."""
    packed = next(arguments[key] for key in ("packed_weight", "packed_params", "weight") if key in arguments)
    weight = packed.unpack()[0] if hasattr(packed, "unpack") else torch.ops.quantized.conv_unpack(packed)[0]
    return _convolved(arguments["qx"], weight, output)


# -- recurrent layers ----------------------------------------------------------------------------------------------


def _recurrent(*weights: str, times: Callable[[Arguments], int] = lambda g: 1) -> Formula:
    """Count each matrix of a layer for each vector: the gates of the input, and those of the previous state."""

    def formula(g: Arguments, output: Any) -> Product:
        held: list[Tensor] = []
        for name in weights:
            held += [g[name]] if isinstance(g[name], Tensor) else [w for w in g[name] if w.ndim == 2]
        x, batch_sizes = g["input"], g["batch_sizes"]
        vectors = sum(batch_sizes) if batch_sizes else math.prod(x.shape[:-1])
        macs = times(g) * vectors * sum(w.numel() for w in held)
        return Product(macs, "linear", operands=tuple(held), d_in=x.shape[-1], rows=vectors)

    return formula


# -- attention -----------------------------------------------------------------------------------------------------


def attention_pairs(queries: int, keys: int, causal: bool) -> int:
    """Return the number of pairs of a query and a key; with a causal mask, query i attends to the keys 0 ... i."""
    if not causal:
        return queries * keys
    square = min(queries, keys)
    return square * (square + 1) // 2 + (queries - square) * keys


def _attention(layout: str, backward: bool = False) -> Formula:
    """Return the formula of fused attention, which has two products forward and five backward.

    The backward pass computes the scores again, and the gradients of values, weights, queries and keys (Dao et al.
    2022, FlashAttention, algorithm 4).
    """

    def formula(arguments: Arguments, output: Any) -> Product:
        q, k, v = (arguments[name] for name in ("query", "key", "value"))
        causal = arguments.get("is_causal", False) or arguments.get("custom_mask_type", 0) == 1
        causal = causal and arguments.get("causal_discount", False)
        ends = _cumulated(arguments) if layout == "blhe" else None
        if ends is not None:
            lengths = [[b - a for a, b in pairwise(own)] for own in ends]
            pairs = q.shape[-2] * sum(attention_pairs(a, b, causal) for a, b in zip(*lengths, strict=True))
        else:
            axis = -2 if layout == "bhle" else -3
            heads = q.numel() // max(q.shape[axis] * q.shape[-1], 1)
            pairs = heads * attention_pairs(q.shape[axis], k.shape[axis], causal)
        scores, values = pairs * q.shape[-1], pairs * v.shape[-1]
        moved = q.numel() + k.numel() + v.numel() + math.prod(q.shape[:-1]) * v.shape[-1]
        if backward:
            return Product(3 * scores + 2 * values, "attention", moved=2 * moved, recomputed=scores)
        return Product(scores + values, "attention", moved=moved)

    return formula


def _cumulated(arguments: Arguments) -> list[list[int]] | None:
    """Return the ends of packed sequences, of queries and of keys."""
    for first, second in (("cum_seq_q", "cum_seq_k"), ("cu_seqlens_q", "cu_seqlens_k")):
        ends = arguments.get(first), arguments.get(second)
        if all(isinstance(e, Tensor) and e.numel() > 1 and _has_values(e) for e in ends):
            return [e.tolist() for e in ends if e is not None]
    return None


def _sequences(x: Tensor) -> tuple[int, int]:
    """Return the tokens of a batch (padded or nested), and the pairs of tokens of the same sequence."""
    if x.is_nested:
        lengths = [int(row[0]) for row in x._nested_tensor_size()]
        return sum(lengths), sum(n * n for n in lengths)
    return x.shape[0] * x.shape[1], x.shape[0] * x.shape[1] ** 2


def _fused_layer(x: str, kind: str, *further: str) -> Formula:
    """Return the formula of four projections and attention, and of further layers by their weights."""

    def formula(arguments: Arguments, output: Any) -> Product:
        width, (tokens, pairs) = arguments["embed_dim"], _sequences(arguments[x])
        weights = 4 * width**2 + sum(arguments[name].numel() for name in further)
        return Product(tokens * weights + 2 * pairs * width, kind)

    return formula


# -- the formula of each operation ---------------------------------------------------------------------------------

register_table({
    "mm _int_mm _scaled_mm _scaled_mm_v2 bmm": _operands("self", "mat2"),
    "mv": _operands("self", "vec"),
    "addmv": _operands("mat", "vec"),
    "addmm _addmm_activation _sparse_addmm sspaddmm hspmm": _operands("mat1", "mat2"),
    "baddbmm addbmm": _operands("batch1", "batch2"),
    "_sparse_sparse_matmul vdot": _operands("self", "other"),
    "dot": _operands("self", "tensor"),
    "quantized::matmul": _operands("qa", "qb"),
    "addr": _outer,
    "_foreach_mm": lambda g, output: Product(_sum_of_products(g["self"], g["mat2"])),
    "_grouped_mm _scaled_grouped_mm _scaled_grouped_mm_v2": (
        lambda g, output: grouped(g["self"], g["mat2"], g.get("offs"))
    ),
    "_mixed_dtypes_linear": _dense_layer("input"),
    """
    mkldnn_linear _weight_int4pack_mm _weight_int4pack_mm_for_cpu _weight_int4pack_mm_with_scales_and_zeros
    _weight_int8pack_mm
    """: _dense_layer("self"),
    "_dyn_quant_matmul_4bit": _dense_layer("inp"),
    """
    quantized::linear quantized::linear_relu quantized::linear_leaky_relu quantized::linear_tanh
    quantized::linear_dynamic quantized::linear_relu_dynamic quantized::linear_dynamic_fp16
    quantized::linear_relu_dynamic_fp16 quantized::linear_with_input_q_dq_qweight_dq_output_fp32
    quantized::linear_with_input_q_dq_qweight_dq_relu_output_fp32 quantized::linear_dynamic_fp16_unpacked_weight
    _quantized::linear _quantized::linear_dynamic onednn::linear_dynamic_fp16 onednn::linear_relu_dynamic_fp16
    mkldnn::_linear_pointwise sparse::qlinear sparse::qlinear_relu sparse::qlinear_dynamic sparse::qlinear_relu_dynamic
    """: _dense_layer("X"),
    "onednn::qlinear_pointwise": _dense_layer("qx"),
    "linear_backward mkldnn_linear_backward": _linear_backward,
    "mkldnn_linear_backward_input mkldnn_linear_backward_weights": (
        lambda g, output: Product(g["grad_output"].numel() * g["weight"].shape[1], "linear")
    ),
    "matmul_backward": lambda g, output: Product(
        g["grad"].numel() * g["self"].shape[-1] * sum(g["mask"]), operands=(g["self"], g["other"])
    ),
    "_sparse_semi_structured_addmm _sparse_semi_structured_mm": _semi_structured("mat1", "mat2"),
    "_sparse_semi_structured_linear": _semi_structured("weight", "input", dense_rows=True),
    "_cslt_sparse_mm": _compressed,
    "_sparse_mm_reduce_impl": lambda g, output: Product(_entries(g["self"]) * g["other"].shape[-1]),
    "_sparse_mm_reduce_impl_backward": (
        lambda g, output: Product(_entries(g["self"]) * g["weight"].shape[-1] * sum(g["output_mask"]))
    ),
    "sparse_sampled_addmm": lambda g, output: Product(_entries(g["self"]) * g["mat1"].shape[-1]),
    "_trilinear": _trilinear,
    "_euclidean_dist": _euclidean,
    "_cdist_forward": _distances,
    "_cdist_backward": lambda g, output: None,  # elementwise
    "_compute_linear_combination": (
        lambda g, output: Product(g["coefficients"].shape[0] * g["input"].numel(), "product")
    ),
    # An affine map of each point of a grid: (x, y, 1) or (x, y, z, 1).
    "affine_grid_generator cudnn_affine_grid_generator": (
        lambda g, output: Product(output.numel() * (output.shape[-1] + 1), "product")
    ),
    "cudnn_affine_grid_generator_backward": lambda g, output: Product(g["grad"].numel() * 3, "product"),
    """
    convolution _convolution convolution_overrideable cudnn_convolution cudnn_convolution_add_relu
    cudnn_convolution_relu miopen_convolution miopen_convolution_add_relu miopen_convolution_relu
    miopen_depthwise_convolution mkldnn_convolution _mps_convolution _nnpack_spatial_convolution _slow_conv2d_forward
    slow_conv3d_forward slow_conv_dilated2d slow_conv_dilated3d _conv_depthwise2d conv_depthwise3d
    convolution_backward convolution_backward_overrideable mps_convolution_backward _slow_conv2d_backward
    """: _convolution(),
    """
    cudnn_convolution_transpose miopen_convolution_transpose _mps_convolution_transpose slow_conv_transpose2d
    slow_conv_transpose3d mps_convolution_transpose_backward
    """: _convolution(transposed=True),
    "conv_tbc": _time_convolution,
    """
    quantized::conv1d quantized::conv1d_relu quantized::conv2d quantized::conv2d_relu quantized::conv3d
    quantized::conv3d_relu
    """: _packed_convolution,
    "mkldnn_rnn_layer": _recurrent("weight0", "weight1"),
    "mkldnn_rnn_layer_backward": _recurrent("weight1", "weight2", times=lambda g: 2),
    "_cudnn_rnn miopen_rnn": _recurrent("weight"),
    # The gradient of the data always, that of the weights on request.
    "_cudnn_rnn_backward miopen_rnn_backward": _recurrent("weight", times=lambda g: 1 + bool(g["output_mask"][3])),
    """
    _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu
    _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
    _scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math_for_mps
    _cudnn_attention_forward higher_order::flex_attention
    """: _attention("bhle"),
    """
    _scaled_dot_product_flash_attention_backward _scaled_dot_product_flash_attention_for_cpu_backward
    _scaled_dot_product_efficient_attention_backward _scaled_dot_product_cudnn_attention_backward
    _scaled_dot_product_fused_attention_overrideable_backward _cudnn_attention_backward
    higher_order::flex_attention_backward
    """: _attention("bhle", backward=True),
    "_flash_attention_forward _flash_attention_forward_no_dropout_inplace _efficient_attention_forward": (
        _attention("blhe")
    ),
    "_flash_attention_backward _efficient_attention_backward": _attention("blhe", backward=True),
    "_native_multi_head_attention": _fused_layer("query", "attention"),
    "_transformer_encoder_layer_fwd": _fused_layer("src", "linear", "ffn_weight_1", "ffn_weight_2"),
})  # fmt: skip
# Composites that nested arrays have kernels of.
WHOLE.update({"aten::linear": _dense_layer("input"), "aten::matmul": _operands("self", "other")})
