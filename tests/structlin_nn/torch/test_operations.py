"""Every operation of torch is in one of three lists; formulas against counts written out here and against loops."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.layers import Call
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from structlin_nn._flops import FLOPS
from structlin_nn.torch import ModelCount, UnknownOperationError, count
from structlin_nn.torch.counting import (
    Product,
    classify,
    classify_name,
    operation_names,
    register_no_product,
    register_product,
)
from structlin_nn.torch.counting import _lists as lists

# Operations that compute products and have no formula.
UNKNOWN = frozenset({
    "_cslt_sparse_mm_search", "_lstm_mps", "_spsolve", "_triton_multi_head_attention", "_triton_scaled_dot_attention",
    "lstm_mps_backward", "quantized_gru", "quantized_lstm",
})  # fmt: skip


def counted(function: Callable[..., Any], *inputs: Tensor, **options: Any) -> ModelCount:
    return count(Call(lambda _, *inputs: function(*inputs)), *inputs, strict=True, **options)


class TestLists:
    def test_every_operation_of_aten_is_in_a_list(self) -> None:
        """Of a new torch, an operation that no rule knows fails here: give it a formula, or name it."""
        names = [name for name in operation_names() if name.startswith("aten::")]
        assert len(names) > 1000
        unknown = {name for name in names if classify_name(name) == lists.UNKNOWN}
        assert unknown == {f"aten::{name}" for name in UNKNOWN if f"aten::{name}" in names}

    def test_overloads_agree_with_their_names(self) -> None:
        for name in operation_names():
            if not name.startswith("aten::"):
                continue
            listed = classify_name(name)
            for overload in lists._overloads("aten", name[6:]):
                found = classify(overload)
                assert found == listed or {found, listed} <= {lists.COMPOSITE, lists.NO_PRODUCT}, str(overload)

    def test_names_exist(self) -> None:
        """What is listed is there, so that the lists do not outlive torch's operations unseen."""
        names = {name.partition("::")[2] for name in operation_names() if name.startswith("aten::")}
        listed = {name.partition("::")[2] for name in lists._FORMULAS if name.startswith("aten::")}
        missing = (lists._NAMED | UNKNOWN | listed) - names
        assert len(missing) < 10, missing

    def test_what_multiplies_has_a_formula(self) -> None:
        """torch's own counter knows no product that is not listed as one."""
        from torch.utils.flop_counter import flop_registry

        for packet in flop_registry:
            if isinstance(packet, torch._ops.OpOverloadPacket):
                assert classify_name(packet._qualified_op_name) == lists.PRODUCT, packet

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("aten::mm", "product"), ("aten::addmm_", "product"), ("aten::_grouped_mm", "product"),
            ("aten::convolution_backward", "product"), ("aten::linalg_eig", "product"), ("aten::_fft_r2c", "product"),
            ("aten::relu", "no product"), ("aten::_foreach_add_", "no product"), ("aten::sum", "no product"),
            ("aten::index_put_", "no product"), ("aten::max_pool2d_with_indices_backward", "no product"),
            ("aten::view_copy", "no product"), ("aten::randperm", "no product"), ("aten::transpose", "no product"),
            ("aten::matmul", "composite"), ("aten::quantized_lstm", "unknown"), ("nothing::here", "unknown"),
            ("quantized::linear", "product"), ("c10d::allreduce_", "no product"),
        ],
    )  # fmt: skip
    def test_examples(self, name: str, expected: str) -> None:
        assert classify_name(name) == expected


class TestRegistration:
    @pytest.fixture
    def operation(self) -> Any:
        name = "structlin_test::scaled"
        if not hasattr(torch.ops.structlin_test, "scaled"):

            @torch.library.custom_op(name, mutates_args=())
            def scaled(x: Tensor, weight: Tensor, scale: float = 2.0) -> Tensor:
                return scale * (x @ weight)

        yield name
        lists._FORMULAS.pop(name, None)
        lists._REGISTERED_FREE.discard(name)
        lists._forget()

    def test_unknown_is_shown_first_and_refused(self, operation: str) -> None:
        model = Call(lambda self, x: torch.ops.structlin_test.scaled(self.first(x), self.w), w=torch.ones(5, 4),
                     first=nn.Linear(3, 5).requires_grad_(False))  # fmt: skip
        found = count(model, torch.zeros(2, 3))
        assert found.unknown_ops == {"structlin_test.scaled": 1}
        text = str(found).splitlines()
        assert text[0] == "UNKNOWN operations: structlin_test.scaled x1"
        assert any(line.startswith("forward MACs") and "without UNKNOWN" in line for line in text)
        assert any(line.startswith("training MACs") and "without UNKNOWN" in line for line in text)
        with pytest.raises(UnknownOperationError, match=r"structlin_test.scaled x1; register them with"):
            count(model, torch.zeros(2, 3), strict=True)

    def test_formula(self, operation: str) -> None:
        weight = nn.Parameter(torch.ones(5, 4), requires_grad=False)
        model = Call(lambda self, x: torch.ops.structlin_test.scaled(x, self.weight), weight=weight)

        @register_product(operation)
        def _(arguments: Any, output: Tensor) -> int:
            assert arguments["scale"] == 2.0, "defaults are filled in"
            return arguments["x"].numel() * output.shape[-1]

        found = count(model, torch.zeros(2, 5), strict=True)
        assert (found.macs("linear"), found.calls[0].moved) == (40, 10 + 20 + 8)

        @register_product(operation)
        def _(arguments: Any, output: Tensor) -> Product:
            return Product(7, "convolution", d_in=1, d_out=2, other_flops=3)

        found = count(model, torch.zeros(2, 5), strict=True)
        assert (found.macs("convolution"), found.other_flops, found.calls[0].out_features) == (7, 3, 2)
        register_no_product(operation)
        assert count(model, torch.zeros(2, 5), strict=True).uncounted_ops == {"structlin_test.scaled": 1}
        with pytest.raises(ValueError, match="must be namespace::operation, such as aten::mm, got 'scaled'"):
            register_product("scaled")

    def test_registered_formulas_of_torch(self, operation: str) -> None:
        from torch.utils.flop_counter import flop_registry, register_flop_formula

        x, weight = torch.zeros(2, 5), torch.zeros(5, 4)
        call = lambda x: torch.ops.structlin_test.scaled(x, weight)  # noqa: E731
        with pytest.raises(UnknownOperationError):
            counted(call, x)

        @register_flop_formula(torch.ops.structlin_test.scaled)
        def _(x: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
            return 2 * x[0] * x[1] * weight[1]

        try:
            assert counted(call, x).macs() == 40
        finally:
            del flop_registry[torch.ops.structlin_test.scaled]


class TestProducts:
    @pytest.mark.parametrize(
        ("call", "macs"),
        [
            (lambda: torch.addbmm(torch.ones(4, 5), torch.ones(3, 4, 6), torch.ones(3, 6, 5)), 3 * 4 * 6 * 5),
            (lambda: torch.ones(4, 5).addbmm_(torch.ones(3, 4, 6), torch.ones(3, 6, 5)), 3 * 4 * 6 * 5),
            (lambda: torch.baddbmm(torch.ones(3, 4, 5), torch.ones(3, 4, 6), torch.ones(3, 6, 5)), 3 * 4 * 6 * 5),
            (lambda: torch.addr(torch.ones(4, 5), torch.ones(4), torch.ones(5)), 4 * 5),
            (lambda: torch.vdot(torch.ones(7), torch.ones(7)), 7),
            (lambda: torch.addmv(torch.ones(4), torch.ones(4, 6), torch.ones(6)), 24),
            (lambda: torch.einsum("bij,bkj->bik", torch.ones(2, 3, 4), torch.ones(2, 5, 4)), 2 * 3 * 5 * 4),
            (lambda: torch._int_mm(torch.ones(17, 8).char(), torch.ones(8, 16).char()), 17 * 8 * 16),
            (lambda: torch.linalg.multi_dot([torch.ones(2, 9), torch.ones(9, 3), torch.ones(3, 4)]), 54 + 24),
            (lambda: F.affine_grid(torch.ones(2, 2, 3), [2, 1, 4, 5], align_corners=False), 2 * 4 * 5 * 2 * 3),
            (lambda: torch.conv_tbc(torch.ones(7, 2, 3), torch.ones(4, 3, 5), torch.ones(5)), 4 * 2 * 5 * 4 * 3),
        ],
    )  # fmt: skip
    def test_against_formulas(self, call: Callable[[], Tensor], macs: int) -> None:
        assert counted(call).macs() == macs

    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_bilinear(self, device: str) -> None:
        """For each result and each pair of sizes one product, and then one with the second input."""
        layer = nn.Bilinear(6, 7, 5, device=device)
        found = count(layer, torch.ones(4, 6, device=device), torch.ones(4, 7, device=device), strict=True)
        assert found.macs("linear") == 4 * 5 * 7 * 6 + 4 * 5 * 7
        assert found.training_macs > 2 * found.macs() - 4 * 5 * 7

    def test_distances(self) -> None:
        """By a product from 26 rows on, of rows with their squared norm and a one; else elementwise."""
        x, few, many = torch.ones(4, 6), torch.ones(5, 6), torch.ones(26, 6)
        assert counted(torch.cdist, x, few).macs() == 0
        assert counted(torch.cdist, x, many).macs() == 4 * 26 * 8
        assert counted(lambda a, b: torch.cdist(a, b, p=1), x, many).macs() == 0
        force = lambda a, b: torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist")  # noqa: E731
        assert counted(force, x, few).macs() == 4 * 5 * 8

    def test_grouped_product(self) -> None:
        """Rows of groups, and on a CPU those alone that belong to one."""
        weight = torch.ones(3, 16, 8, dtype=torch.bfloat16)
        x = torch.ones(40, 16, dtype=torch.bfloat16)
        ends = torch.tensor([8, 24, 32], dtype=torch.int32)
        product = lambda x: torch._grouped_mm(x, weight.to(x.device), offs=ends.to(x.device))  # noqa: E731
        assert counted(product, x).macs() == 32 * 16 * 8
        assert counted(product, x.to("meta")).macs() == 40 * 16 * 8, "no values there: the groups fill the rows"
        model = Call(lambda self, x: torch._grouped_mm(x, self.weight, offs=ends), weight=nn.Parameter(weight))
        found = count(model, x, strict=True)
        assert (found.macs("linear"), found.training_macs) == (4096, 2 * 4096)
        assert (found.calls[0].in_features, found.calls[0].out_features, found.calls[0].rows) == (16, 8, 32)

    def test_other_groups(self) -> None:
        from structlin_nn.torch.counting._formulas import grouped

        ends = torch.tensor([2, 6], dtype=torch.int32)
        assert grouped(torch.ones(2, 3, 5), torch.ones(5, 7), ends).macs == 3 * 5 * 6, "columns"
        assert grouped(torch.ones(3, 8), torch.ones(8, 7), ends).macs == 3 * 6 * 7, "the inner axis"
        assert grouped(torch.ones(2, 3, 5), torch.ones(2, 5, 7), None).macs == 2 * 3 * 5 * 7

    def test_scaled_product(self) -> None:
        a, b = torch.ones(16, 32, device="meta"), torch.ones(48, 32, device="meta").t()
        float8, one = torch.float8_e4m3fn, torch.ones((), device="meta")
        product = lambda a, b: torch._scaled_mm(a.to(float8), b.to(float8), one, one, out_dtype=torch.bfloat16)  # noqa: E731
        assert counted(product, a, b).macs() == 16 * 32 * 48

    @pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
    @pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}])
    def test_recurrent_layers(self, kind: type[nn.Module], options: dict[str, Any]) -> None:
        """Every vector meets the matrices of the input and of the state, on any device."""
        gates = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind]
        layers, ways = options.get("num_layers", 1), 1 + options.get("bidirectional", False)
        expected = sum(ways * gates * 8 * ((6 if n == 0 else 8 * ways) + 8) for n in range(layers)) * 7 * 3
        for device in ("cpu", "meta"):
            layer = kind(6, 8, **options).to(device)
            found = count(layer, torch.ones(7, 3, 6, device=device), strict=True)
            assert found.macs("linear") == found.macs() == expected
            assert found.training_macs > 2.4 * expected
            assert found.calls[0].params == sum(p.numel() for p in layer.parameters())

    def test_recurrent_layers_of_cuda(self) -> None:
        """Formulas of operations that a CPU does not have: by the matrices among the weights."""
        weights = [torch.ones(32, 6), torch.ones(32, 8), torch.ones(32), torch.ones(32)]
        arguments = {"input": torch.ones(7, 3, 6), "weight": weights, "batch_sizes": []}
        forward, backward = (lists.formula_of(f"aten::_cudnn_rnn{end}") for end in ("", "_backward"))
        assert forward is not None
        assert backward is not None
        one = 21 * 32 * 14
        assert forward(arguments, None).macs == one
        assert forward({**arguments, "input": torch.ones(9, 6), "batch_sizes": [4, 3, 2]}, None).macs == 9 * 32 * 14
        for mask, times in (((True, True, True, True), 2), ((True, True, True, False), 1)):
            assert backward({**arguments, "output_mask": mask}, None).macs == times * one

    def test_transformer_in_one_operation(self) -> None:
        """The fused encoder layer of inference comes to what its parts do."""
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval().requires_grad_(False)
        x = torch.ones(3, 5, 16)
        parts = count(layer, x).macs()
        assert parts == 15 * (4 * 256 + 2 * 512) + 3 * 2 * 25 * 16
        fused = lists.formula_of("aten::_transformer_encoder_layer_fwd")
        assert fused is not None
        weights = {"ffn_weight_1": layer.linear1.weight, "ffn_weight_2": layer.linear2.weight}
        assert fused({"src": x, "embed_dim": 16, **weights}, None).macs == parts
        nested = torch.nested.nested_tensor([torch.ones(3, 16), torch.ones(5, 16)])
        assert fused({"src": nested, "embed_dim": 16, **weights}, None).macs == 8 * 2048 + 2 * (9 + 25) * 16

    @pytest.mark.filterwarnings("ignore")
    def test_quantised_layers(self) -> None:
        model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))
        small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        found = count(small, torch.ones(4, 6), strict=True)
        assert [c.macs for c in found.calls] == [4 * 48, 4 * 40]
        packed = lists.formula_of("aten::_weight_int8pack_mm")
        assert packed is not None
        assert packed({"self": torch.ones(3, 8), "mat2": torch.ones(5, 8).char()}, torch.ones(3, 5)).macs == 3 * 8 * 5

    def test_sparse_operands(self) -> None:
        """Stored numbers meet the rows of the other operand."""
        dense = torch.tensor([[1.0, 0, 2, 0], [0, 0, 3, 0], [4, 5, 0, 0]])
        weight = nn.Parameter(torch.ones(4, 7))
        for sparse in (dense.to_sparse(), dense.to_sparse_csr()):
            found = count(Call(lambda self, x: x @ self.w, w=weight), sparse, strict=True)
            assert found.macs("linear") == 5 * 7
            assert found.training_macs == 2 * 5 * 7
        both = counted(lambda a, b: a @ b, dense.to_sparse(), dense.T.to_sparse())
        expected = sum(int((dense[:, k] != 0).sum()) ** 2 for k in range(4))
        assert both.macs() == expected == 4 + 1 + 4
        half = lists.formula_of("aten::_sparse_semi_structured_mm")
        assert half is not None
        assert half({"mat1": torch.ones(8, 16), "mat2": torch.ones(32, 5)}, None).macs == 8 * 32 * 5 // 2

    def test_convolution_in_groups(self) -> None:
        """The gradients cost what the product does, in groups too, where torch's counter takes every channel."""
        layer = nn.Conv2d(6, 8, 3, groups=2, bias=False)
        found = count(layer, torch.ones(2, 6, 7, 5, requires_grad=True), strict=True)
        assert found.macs("convolution") == 2 * 8 * 5 * 3 * 3 * 9
        assert found.training_macs == 3 * found.macs()
        back = nn.ConvTranspose2d(6, 8, 3, groups=2)
        found = count(back, torch.ones(2, 6, 7, 5, requires_grad=True), strict=True)
        assert found.macs() == 2 * 6 * 35 * 4 * 9
        assert found.training_macs == 3 * found.macs()


class TestAttention:
    def attend(self, **options: Any) -> Callable[..., Tensor]:
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)

    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_broadcast(self, device: str) -> None:
        """The batch of any of the three counts, not that of the queries alone."""
        q, k, v = (torch.ones(*shape, device=device) for shape in ((1, 1, 6, 8), (2, 3, 5, 8), (2, 1, 5, 4)))
        assert counted(self.attend(), q, k, v).macs("attention") == 2 * 3 * 6 * 5 * (8 + 4)
        q, k = torch.ones(2, 6, 7, 8, device=device), torch.ones(2, 3, 5, 8, device=device)
        assert counted(self.attend(enable_gqa=True), q, k, k).macs() == 2 * 6 * 7 * 5 * 16

    def test_vmap(self) -> None:
        q, k = torch.ones(2, 3, 6, 8), torch.ones(2, 3, 5, 8)
        plain = counted(self.attend(), q, k, k).macs()
        assert plain == 2 * 3 * 6 * 5 * 16
        assert counted(torch.vmap(self.attend()), q, k, k).macs("attention") == plain
        nested = torch.vmap(torch.vmap(self.attend(), in_dims=(0, None, None)), in_dims=(None, 0, 0))
        assert counted(nested, q[0], k[:, 0], k[:, 0]).macs("attention") == plain

    def test_causal_discount(self) -> None:
        q, k = torch.ones(2, 6, 8), torch.ones(2, 9, 8)
        attend = self.attend(is_causal=True)
        assert counted(attend, q, k, k).macs() == 2 * 6 * 9 * 16
        assert counted(attend, q, k, k, causal_discount=True).macs() == 2 * 21 * 16, "query i sees keys 0 ... i"
        assert counted(attend, k, q, q, causal_discount=True).macs() == 2 * (21 + 3 * 6) * 16
        assert counted(self.attend(), q, k, k, causal_discount=True).macs() == 2 * 6 * 9 * 16

    def test_backward_and_flash(self) -> None:
        """Two products forward, four backward; where it is fused the scores once more, 2.5 times the forward pass."""
        q, k, v = (torch.ones(2, 3, 6, 8, requires_grad=True) for _ in range(3))
        found = counted(self.attend(), q, k, v)
        assert found.training_macs == 3 * found.macs()
        assert found.recomputed_macs == 0
        fused = counted(self.attend(), q, k, v, flash_backward=True)
        assert fused.training_macs == 3.5 * fused.macs()
        assert fused.recomputed_macs == fused.macs() / 2

    def test_fused_operations(self) -> None:
        """Called below the function, the fused operations count alike."""
        q, k, v = (torch.ones(2, 3, 6, 8, requires_grad=True) for _ in range(3))
        call = lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]  # noqa: E731
        for flash, times in ((False, 3), (True, 3.5)):
            found = counted(call, q, k, v, flash_backward=flash)
            assert found.macs("attention") == 2 * 3 * 36 * 16
            assert found.training_macs == times * found.macs()
        packed = lists.formula_of("aten::_flash_attention_forward")
        assert packed is not None
        ends = torch.tensor([0, 3, 8])
        arguments = {"query": torch.ones(8, 2, 4), "key": torch.ones(8, 2, 4), "value": torch.ones(8, 2, 4)}
        product = packed({**arguments, "cum_seq_q": ends, "cum_seq_k": ends}, None)
        assert product.macs == 2 * (9 + 25) * 8

    @pytest.mark.filterwarnings("ignore")
    def test_flexible(self) -> None:
        """flex_attention is an operation of a higher order; its mask is not discounted."""
        from torch.nn.attention import flex_attention as module

        q, k = torch.ones(1, 4, 128, 16), torch.ones(1, 2, 64, 16)
        found = counted(lambda q, k: module.flex_attention(q, k, k, enable_gqa=True), q, k)
        assert found.macs("attention") == 4 * 128 * 64 * 32
        assert not module._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG

    def test_sequences_of_their_own_length(self) -> None:
        rows = [torch.ones(3, 2, 8), torch.ones(5, 2, 8)]
        jagged = torch.nested.nested_tensor(rows, layout=torch.jagged)

        def attend(x: Tensor) -> Tensor:
            x = x.transpose(1, 2)
            return F.scaled_dot_product_attention(x, x, x).transpose(1, 2)

        assert counted(attend, jagged).macs() == 2 * (9 + 25) * 8 * 2


def eliminate(n: int) -> int:
    """Multiplications and additions of Gaussian elimination without pivoting, loop by loop."""
    return sum(1 + 2 * (n - k - 1) for k in range(n) for _ in range(k + 1, n))


def cholesky_loops(n: int) -> int:
    return sum(1 + sum(2 * (j + 1) for j in range(k)) for k in range(n)) + sum(2 * k for k in range(n))


def householder_loops(m: int, n: int) -> int:
    """Each reflector on the columns behind it: a product with a vector and an update of rank one."""
    return sum(4 * (m - k) * (n - k) for k in range(n))


class TestLinearAlgebra:
    @pytest.mark.parametrize(
        ("flops", "loops"),
        [
            (FLOPS["lu"](150, 150), eliminate(150)),
            (FLOPS["cholesky"](150), cholesky_loops(150)),
            (FLOPS["qr"](120, 90), householder_loops(120, 90)),
            (FLOPS["triangular_solve"](90, 4), 4 * sum(2 * k + 1 for k in range(90))),
        ],
    )
    def test_formulas_against_loops(self, flops: Any, loops: int) -> None:
        """To leading order: the rest falls with the size."""
        assert float(flops) == pytest.approx(loops, rel=0.03)

    @pytest.mark.parametrize(
        ("call", "flops"),
        [
            (lambda a, b: torch.linalg.solve(a, b), 3 * (2 / 3 * 6**3 + 2 * 36 * 4)),
            (lambda a, b: torch.linalg.solve(a, b.mT, left=False), 3 * (2 / 3 * 6**3 + 2 * 36 * 4)),
            (lambda a, b: torch.linalg.inv(a), 3 * 2 * 6**3),
            (lambda a, b: torch.linalg.cholesky(a), 3 * 6**3 / 3),
            (lambda a, b: torch.cholesky_solve(b, a), 3 * 2 * 36 * 4),
            (lambda a, b: torch.linalg.solve_triangular(a, b, upper=True), 3 * 36 * 4),
            (lambda a, b: torch.linalg.lu_factor(a)[0], 3 * 2 / 3 * 6**3),
            (lambda a, b: torch.linalg.det(a), 3 * 2 / 3 * 6**3),
            (lambda a, b: torch.linalg.slogdet(a)[1], 3 * 2 / 3 * 6**3),
            (lambda a, b: torch.linalg.eigvalsh(a), 3 * 4 / 3 * 6**3),
            (lambda a, b: torch.linalg.eigh(a)[1], 3 * 9 * 6**3),
            (lambda a, b: torch.linalg.eigvals(a), 3 * 10 * 6**3),
            (lambda a, b: torch.linalg.eig(a)[1], 3 * 25 * 6**3),
            (lambda a, b: torch.linalg.svdvals(b), 3 * (4 * 6 * 16 - 4 / 3 * 64)),
            (lambda a, b: torch.linalg.svd(b, full_matrices=False)[0], 3 * (14 * 6 * 16 + 8 * 64)),
            (lambda a, b: torch.linalg.svd(b)[0], 3 * (4 * 36 * 4 + 8 * 6 * 16 + 9 * 64)),
            (lambda a, b: torch.linalg.qr(b, mode="r")[1], 3 * 2 * 16 * (6 - 4 / 3)),
            (lambda a, b: torch.linalg.qr(b)[0], 3 * (2 * 16 * (6 - 4 / 3) + 4 * 6 * 16 - 2 * 10 * 16 + 4 / 3 * 64)),
        ],
    )  # fmt: skip
    def test_calls(self, call: Callable[[Tensor, Tensor], Tensor], flops: float) -> None:
        """Three matrices of 6 x 6 (positive definite), and right-hand sides 6 x 4."""
        a = 7 * torch.eye(6).expand(3, 6, 6) + torch.ones(3, 6, 6)
        b = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
        found = counted(call, a, b)
        assert found.macs("linalg") == pytest.approx(flops / 2, abs=1)
        assert found.unknown_ops == {}

    def test_least_squares(self) -> None:
        """QR of A, Q on the right-hand sides, and a triangle."""
        a, b = torch.randn(9, 5), torch.randn(9, 2)
        flops = 2 * 25 * (9 - 5 / 3) + 2 * 2 * 5 * (18 - 5) + 25 * 2
        assert counted(lambda a, b: torch.linalg.lstsq(a, b).solution, a, b).macs() == pytest.approx(flops / 2, abs=1)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("norm", [0.0, 1e-9, 1e-5, 1e-3, 0.1, 0.5, 1.2, 2.0, 3.2, 100.0])
    def test_matrix_exponential(self, dtype: torch.dtype, norm: float) -> None:
        """As many products as torch's profiler sees."""
        a = torch.randn(4, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))
        a *= norm / a.abs().sum(0).max()
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            torch.linalg.matrix_exp(a)
        products = sum(event.name in ("aten::bmm", "aten::mm") for event in seen.events())
        assert counted(torch.linalg.matrix_exp, a).macs() == products * 64
        assert counted(torch.linalg.matrix_exp, a.to("meta")).macs() == 5 * 64


class TestFourier:
    @pytest.mark.parametrize(
        ("call", "flops"),
        [
            (lambda x: torch.fft.fft(x + 0j), 3 * math.ceil(5 * 10 * math.log2(10))),
            (lambda x: torch.fft.rfft(x), 3 * math.ceil(2.5 * 10 * math.log2(10))),
            (lambda x: torch.fft.irfft(x + 0j, n=12), 3 * math.ceil(2.5 * 12 * math.log2(12))),
            (lambda x: torch.fft.fft2(x + 0j), math.ceil(5 * 30 * math.log2(30))),
        ],
    )
    def test_against_formulas(self, call: Callable[[Tensor], Tensor], flops: int) -> None:
        x = torch.ones(3, 10, requires_grad=True)
        found = counted(call, x)
        assert (found.macs(), found.other_flops, found.flops) == (0, flops, flops)
        assert found.training_other_flops == found.training_flops >= 2 * flops
        assert found.calls[0].kind == "fft"
