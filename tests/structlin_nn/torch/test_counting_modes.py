"""Modes, states and kinds of models that a count follows, and the forms of its result."""

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from helpers.layers import Call
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from structlin_nn.counting import DEVICES, roofline, training_bytes
from structlin_nn.torch import Counting, StructuredLinear, UnknownOperationError, count, time_modules

A, B = 4 * 6 * 8, 4 * 8 * 5  # MACs of the layers of two() for four vectors


def two() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))


def x(**options: Any) -> Tensor:
    return torch.randn(4, 6, **options)


class TestModes:
    def test_plain(self) -> None:
        found = count(two(), x())
        assert (found.macs(), found.training_macs, found.recomputed_macs) == (A + B, 2 * A + 3 * B, 0)
        assert found.backward_from == "1 of 1 results"

    def test_no_grad(self) -> None:
        """A part without gradients has no backward pass, and its weights get none."""
        model = Call(lambda self, x: self.b(torch.no_grad()(self.a)(x)), a=nn.Linear(6, 8), b=nn.Linear(8, 5))
        found = count(model, x())
        assert [(c.name, c.macs, c.backward_macs) for c in found.calls] == [("a", A, 0), ("b", B, B)]
        assert found.unreached_params == 6 * 8 + 8
        assert "56 parameters without a gradient" in str(found)

    def test_inference_mode(self) -> None:
        found = count(Call(torch.inference_mode()(lambda self, x: self.m(x)), m=two()), x())
        assert (found.macs(), found.training_macs, found.backward_from) == (A + B, A + B, "nothing")
        model = two()
        with torch.inference_mode():
            data = x()
            assert count(model, data).training_macs == 2 * A + 3 * B, "what is around the count does not matter"
        with torch.no_grad():
            assert count(model, data).training_macs == 2 * A + 3 * B

    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_reentrant_checkpoint(self, device: str) -> None:
        """Forward, once more, and two products for each in the backward pass."""
        model = Call(lambda self, x: torch.utils.checkpoint.checkpoint(self.m, x, use_reentrant=True), m=two())
        found = count(model.to(device), x(device=device, requires_grad=True))
        assert (found.macs(), found.training_macs, found.recomputed_macs) == (A + B, 4 * (A + B), A + B)
        assert [(c.name, c.recomputed_macs) for c in found.calls] == [("m.0", A), ("m.2", B)]
        assert found.saved == 24, "the input alone is kept"

    def test_checkpoint_without_reentrance(self) -> None:
        """It stops where the last array that is needed is there, before the last product."""
        model = Call(lambda self, x: torch.utils.checkpoint.checkpoint(self.m, x, use_reentrant=False), m=two())
        found = count(model, x(requires_grad=True))
        assert (found.macs(), found.training_macs, found.recomputed_macs) == (A + B, 3 * (A + B) + A, A)
        assert [(c.name, c.kind, c.backward_macs) for c in found.calls] == [
            ("m.0", "linear", 3 * A), ("m.2", "linear", 2 * B)
        ]  # fmt: skip

    def test_checkpoint_of_a_structured_layer_and_attention(self) -> None:
        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = StructuredLinear(6, 6, structure="low_rank", rank=2)
                self.last = nn.Linear(6, 6)

            def inner(self, x: Tensor) -> Tensor:
                h = self.layer(x)
                return self.last(F.scaled_dot_product_attention(h, h, h)).tanh()

            def forward(self, x: Tensor, reentrant: bool) -> Tensor:
                return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=reentrant)

        data = torch.randn(2, 4, 6, requires_grad=True)
        forward = 8 * (2 * 12 + 36) + 2 * 2 * 16 * 6
        for reentrant in (True, False):
            found = count(Block(), data, reentrant)
            assert found.macs() == forward
            assert found.training_macs == 4 * forward, "the tanh at the end needs all of it"
            assert found.recomputed_macs == forward
            assert {c.name for c in found.calls} == {"layer", "last", ""}

    def test_results_that_the_loss_leaves_out(self) -> None:
        model = Call(lambda self, x: {"a": self.a(x), "b": [self.b(x)]}, a=nn.Linear(6, 8), b=nn.Linear(6, 3))
        whole = count(model, x())
        assert whole.training_macs == 2 * (A + 4 * 18)
        assert whole.backward_from == "2 of 2 results"
        part = count(model, x(), loss=lambda result: result["a"].sum())
        assert part.training_macs == 2 * A + 4 * 18
        assert (part.unreached_params, part.backward_from) == (21, "the loss")
        assert "backward from the loss, 21 parameters without a gradient" in str(part)
        with pytest.raises(ValueError, match=r"with a gradient, got a tensor of shape \(4, 8\) without"):
            count(model, x(), loss=lambda result: result["a"].detach())

    def test_forward_alone(self) -> None:
        found = count(two(), x(), backward=False)
        assert (found.macs(), found.training_macs) == (A + B, A + B)

    def test_backward_that_fails(self) -> None:
        class Fails(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x.clone()

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> Tensor:
                raise ArithmeticError("no")

        with pytest.raises(ArithmeticError) as caught:
            count(Call(lambda self, x: Fails.apply(self.m(x)), m=two()), x())
        assert "backward=False" in caught.value.__notes__[0]

    def test_gradients_inside_of_a_model(self) -> None:
        """Forces as gradients of an energy: products of the first backward pass, and of the second."""

        def forces(self: Any, x: Tensor) -> Tensor:
            x = x.clone().requires_grad_()
            return torch.autograd.grad(self.m(x).sum(), x, create_graph=True)[0]

        found = count(Call(forces, m=two()), x())
        assert found.macs() == A + B
        assert found.training_macs > 3 * (A + B)
        assert found.recomputed_macs == 0
        functional = Call(lambda self, x: torch.func.grad(lambda x: self.m(x).sum())(x), m=two())
        again = count(functional, x())
        assert again.training_macs == found.training_macs - A, "the data are no leaf of the outer graph here"
        assert not again.saved_known
        with pytest.raises(ValueError, match="activations were not counted"):
            training_bytes(again)


class TestKinds:
    def layers(self, model: nn.Module, *inputs: Tensor) -> list[tuple[Any, ...]]:
        found = count(model, *inputs)
        return [(c.name, c.kind, c.params, c.in_features, c.out_features, c.backward_macs) for c in found.calls]

    def test_autocast(self) -> None:
        class Mixed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.m = two()

            def forward(self, x: Tensor) -> Tensor:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    return self.m(x)

        assert self.layers(Mixed(), x()) == [
            ("m.0", "linear", 56, 6, 8, A), ("m.2", "linear", 45, 8, 5, 2 * B)
        ]  # fmt: skip

    @pytest.mark.filterwarnings("ignore::FutureWarning")
    def test_weights_that_are_computed(self) -> None:
        for norm in (parametrizations.weight_norm, torch.nn.utils.weight_norm):
            assert self.layers(norm(nn.Linear(6, 8)), x()) == [("", "linear", 48 + 8 + 8, 6, 8, A)]
        assert self.layers(parametrizations.spectral_norm(nn.Linear(6, 8)), x())[-1] == ("", "linear", 56, 6, 8, A)
        found = count(parametrizations.orthogonal(nn.Linear(6, 8)), x())
        assert {c.kind for c in found.calls if c.name == ""} == {"linear"}

    def test_products_of_activations(self) -> None:
        """Queries that are learned are activations once a layer was applied to them."""

        class Pool(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.latents, self.query = nn.Parameter(torch.randn(3, 6)), nn.Linear(6, 6)

            def forward(self, x: Tensor) -> Tensor:
                return self.query(self.latents) @ x.T

        assert [(c.name, c.kind) for c in count(Pool(), x()).calls] == [("query", "linear"), ("", "product")]


class TestStates:
    def test_statistics_and_random_numbers_are_put_back(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        model[0].weight.grad = torch.ones(8, 6)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        data = x()
        drawn, states = torch.get_rng_state(), (random.getstate(), np.random.get_state()[1].copy())  # noqa: NPY002
        count(Call(lambda self, x: self.m(x) * random.random() * np.random.rand(), m=model), data)  # noqa: NPY002
        assert torch.equal(drawn, torch.get_rng_state())
        assert states[0] == random.getstate()
        assert (states[1] == np.random.get_state()[1]).all()  # noqa: NPY002
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert torch.equal(model[0].weight.grad, torch.ones(8, 6))
        assert model[0].bias.grad is None

    def test_buffers_that_are_replaced(self) -> None:
        class Counts(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("calls", torch.zeros(()))

            def forward(self, x: Tensor) -> Tensor:
                self.calls = self.calls + 1
                return x

        model = Counts()
        count(model, x())
        assert model.calls == 0

    def test_optimisers_in_the_backward_pass_do_not_step(self) -> None:
        model = two()
        steps: list[Any] = []
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(steps.append)
        count(model, x())
        assert steps == []
        model(x()).sum().backward()
        assert len(steps) == 4

    def test_inputs_keep_their_graph(self) -> None:
        before = nn.Linear(6, 6)
        data = before(x())
        found = count(two(), data)
        assert found.training_macs == 3 * (A + B), "the data need a gradient"
        assert before.weight.grad is None
        data.sum().backward()

    def test_hooks_are_gone_after_an_error(self) -> None:
        model = nn.Sequential(nn.Linear(6, 8), nn.Linear(5, 2))
        with pytest.raises(RuntimeError):
            count(model, x())
        assert not torch.nn.modules.module._has_any_global_hook()  # as for torch.compile, which warns of them


class TestModels:
    def test_no_features(self) -> None:
        with pytest.warns(UserWarning, match="zero-element"):
            layer = nn.Linear(0, 5)
        assert count(layer, torch.zeros(3, 0)).macs() == 0
        assert count(nn.Linear(6, 5), torch.zeros(0, 6)).macs() == 0

    def test_lazy(self) -> None:
        model = nn.Sequential(nn.LazyLinear(5))
        with pytest.raises(ValueError, match=r"0.weight, 0.bias: lazy modules have no sizes before they are called"):
            count(model, x())
        model(x())
        assert count(model, x()).macs() == 4 * 30

    def test_scripted(self) -> None:
        with pytest.warns(DeprecationWarning, match="script"):
            model = torch.jit.script(two())
        assert count(model, x()).training_macs == 2 * A + 3 * B

    def test_jagged(self) -> None:
        rows = [torch.randn(3, 6), torch.randn(5, 6)]
        found = count(two(), torch.nested.nested_tensor(rows, layout=torch.jagged))
        assert (found.macs(), found.training_macs) == (2 * (A + B), 2 * (2 * A + 3 * B))
        assert found.saved == 8 * (6 + 8)
        assert count(two()[0], torch.nested.nested_tensor(rows)).macs() == 2 * A

    def test_fake(self) -> None:
        """Arrays without values, whose properties are operations too."""
        with torch._subclasses.FakeTensorMode():
            found = count(two(), x(), strict=True)
        assert (found.macs(), found.training_macs, found.uncounted_ops) == (A + B, 2 * A + 3 * B, {"aten.tanh": 1})

    def test_compiled(self) -> None:
        assert count(torch.compile(two(), backend="eager"), x()).macs() == A + B

    def test_modules_that_are_not_registered(self) -> None:
        hidden = [nn.Linear(6, 8)]
        found = count(Call(lambda self, x: self.m(hidden[0](x)), m=nn.Linear(8, 5)), x())
        assert [(c.name, c.macs) for c in found.calls] == [("(Linear)", A), ("m", B)]


class TestCosts:
    def test_bytes_in_the_dtype_of_the_model(self) -> None:
        single, half = (training_bytes(count(two().to(dtype), x(dtype=dtype))) for dtype in
                        (torch.float32, torch.bfloat16))  # fmt: skip
        assert {key: 2 * value for key, value in half.items()} == single
        assert single["weights"] == 4 * 101
        mixed = two()
        mixed[0].bfloat16()
        found = count(Call(lambda self, x: self.m[2](self.m[:2](x).float()), m=mixed), x(dtype=torch.bfloat16))
        assert found.dtype is None
        assert training_bytes(found)["weights"] == 2 * 56 + 4 * 45
        with pytest.raises(ValueError, match="the parameters have several dtypes; pass dtype"):
            roofline(found, DEVICES["h100"])

    def test_shares(self) -> None:
        """ZeRO shares states, then gradients, then weights; FSDP is stage 3."""
        counted = count(two(), x())
        whole = training_bytes(counted)
        parts = [training_bytes(counted, zero_stage=stage, devices=8) for stage in range(4)]
        assert parts[0] == whole
        for stage, key in ((1, "optimizer_states"), (2, "gradients"), (3, "weights")):
            assert [p[key] for p in parts] == [whole[key] if s < stage else -(-whole[key] // 8) for s in range(4)]
        assert len({p["activations"] for p in parts}) == 1
        with pytest.raises(ValueError, match="zero_stage must be 0, 1, 2 or 3, got 4"):
            training_bytes(counted, zero_stage=4)
        with pytest.raises(ValueError, match="devices must be a positive integer, got 0"):
            training_bytes(counted, zero_stage=1, devices=0)

    def test_transforms_train_too(self) -> None:
        """FFTs of a Toeplitz layer: those of the forward pass for each gradient, in FLOPs and in the roofline."""
        layer = StructuredLinear(64, 64, structure="toeplitz")
        with torch.no_grad():
            data = torch.randn(3, 64)
        one, both = count(layer, data), count(layer, data.requires_grad_())
        assert one.macs() == 0 < one.other_flops
        assert one.training_other_flops == one.training_flops == 2 * one.other_flops
        assert both.training_other_flops == 3 * one.other_flops
        found = roofline(both, DEVICES["a100"])
        assert found.backward == pytest.approx(2 * found.forward)
        assert found.compute == pytest.approx(both.training_flops / 19.5e12)

    def test_rates_of_bytes(self) -> None:
        layer = nn.Linear(4096, 4096, bias=False, device="meta")
        counted = count(layer, torch.zeros(65536, 4096, device="meta"))
        times = [roofline(counted, DEVICES["h100"], dtype).forward for dtype in ("bfloat16", "float8_e4m3fn", "int8")]
        assert times[1] == times[2] == pytest.approx(times[0] / 2, rel=1e-3)


class TestContext:
    def test_training_step(self) -> None:
        """Two models, a product outside, and an optimiser, as they run."""
        one, other = two(), nn.Linear(5, 3)
        optimizer = torch.optim.AdamW([*one.parameters(), *other.parameters()])
        with Counting(one, other=other) as counting:
            y = other(one(x()))
            (y @ torch.ones(3, 2)).sum().backward()
            optimizer.step()
        found = {(c.name, c.kind): (c.macs, c.backward_macs) for c in counting.result.calls}
        assert found == {
            ("0", "linear"): (A, A), ("2", "linear"): (B, 2 * B), ("other", "linear"): (60, 120),
            ("(outside)", "product"): (24, 24),
        }  # fmt: skip
        assert counting.result.params == 101 + 18
        assert counting.result.backward_from == "what was run"

    def test_models_that_are_not_named(self) -> None:
        first, second = nn.Linear(6, 8), nn.Linear(8, 5)
        with Counting() as counting:
            for _ in range(2):
                second(first(x()))
        assert [(c.name, c.macs, c.calls) for c in counting.result.calls] == [
            ("Linear", 2 * A, 2), ("Linear#2", 2 * B, 2)
        ]  # fmt: skip

    def test_errors(self) -> None:
        with pytest.raises(TypeError, match="model must be a torch module, got 3"):
            Counting(3)  # type: ignore[arg-type]
        name = "structlin_test::mystery"
        mystery = torch.library.custom_op(name, lambda x: x.clone(), mutates_args=(), schema="(Tensor x) -> Tensor")
        with pytest.raises(UnknownOperationError, match=r"structlin_test.mystery x1"), Counting(strict=True):
            mystery(x())
        with pytest.raises(ZeroDivisionError), Counting(strict=True):
            self.fail(mystery)

    def fail(self, call: Callable[[Tensor], Tensor]) -> None:
        call(x())
        raise ZeroDivisionError

    def test_other_threads_do_not_count(self) -> None:
        import threading

        model = two()
        with Counting(model) as counting:
            worker = threading.Thread(target=lambda: model(x()))
            worker.start()
            worker.join()
        assert counting.result.calls == []


class TestForms:
    def model(self) -> nn.Sequential:
        return nn.Sequential(two(), nn.Sequential(nn.Linear(5, 2), nn.ReLU()))

    def test_tree(self) -> None:
        found = count(self.model(), x())
        nodes = {m.name: m for _, m in found.tree().walk()}
        assert list(nodes) == ["", "0", "0.0", "0.1", "0.2", "1", "1.0", "1.1"]
        assert nodes[""].macs == A + B + 40 == found.macs()
        assert nodes["0"].macs == A + B
        assert nodes["0"].share == pytest.approx((A + B) / (A + B + 40))
        assert nodes["1.0"].backward_macs == 80
        assert (nodes["0.1"].macs, nodes["0.1"].module) == (0, "Tanh")
        assert [(d, m.name, m.params) for d, m in found.tree(1).walk()] == [(0, "", 113), (1, "0", 101), (1, "1", 12)]
        assert [m.macs for _, m in found.tree(0).walk()] == [A + B + 40]
        text = found.format_tree()
        assert "(model)" in text
        assert f"{100 * (A + B) / (A + B + 40):.1f} %" in text
        with pytest.raises(ValueError, match="depth must be an integer of at least 0, got -1"):
            found.tree(-1)

    def test_programs(self) -> None:
        found = count(self.model(), x())
        record = json.loads(found.to_json(indent=1))
        assert record == found.to_dict()
        assert record["training_flops"] == 2 * record["training_macs"] == 2 * found.training_macs
        assert record["calls"][0]["name"] == "0.0"
        pandas = pytest.importorskip("pandas")
        frame = found.to_dataframe()
        assert isinstance(frame, pandas.DataFrame)
        assert frame["training_macs"].sum() == found.training_macs
        assert list(frame["name"]) == ["0.0", "0.2", "1.0"]

    def test_times(self) -> None:
        model = nn.Sequential(two(), nn.BatchNorm1d(5))
        found = time_modules(model, x(), repeats=3)
        assert found.seconds.keys() == {"", "0", "0.0", "0.1", "0.2", "1"}
        assert 0 < found.seconds["0.0"] < found.seconds["0"] < found.seconds[""]
        assert model[1].num_batches_tracked == 0
        nodes = {m.name: m for _, m in found.tree().walk()}
        assert nodes["0"].flops_per_second == pytest.approx(2 * (A + B) / found.seconds["0"])
        assert nodes["1"].flops_per_second == 0
        assert "GFLOP/s" in found.format_tree(1)
        with pytest.raises(ValueError, match="a model on the meta device computes nothing"):
            time_modules(two().to("meta"), x(device="meta"))
        with pytest.raises(ValueError, match="repeats must be a positive integer, got 0"):
            time_modules(two(), x(), repeats=0)
