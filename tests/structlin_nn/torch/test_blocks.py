"""MLPs and projections as one pass: the same numbers, gradients, state dicts and graphs as layer after layer."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.refusals import refused
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from structlin import execution
from structlin.execution import blocks as _execution_blocks
from structlin.execution import choice
from structlin.execution._guard import recording
from structlin_nn.torch import StructuredLinear, StructuredMLP, count, fuse_mlps, mlp, projections, replace_linear
from structlin_nn.torch import blocks as _blocks
from structlin_nn.torch._block_operator import block_text


def linear(d_in: int, d_out: int, **options: Any) -> StructuredLinear:
    torch.manual_seed(d_in + 7 * d_out)
    layer = StructuredLinear(d_in, d_out, structure="block_tensor_train", rank=2, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3)
    return layer


@pytest.fixture(autouse=True)
def one_pass() -> Iterator[None]:
    """Blocks run as one pass wherever they can."""
    with execution.using("compiled"):
        yield


def taken(call: Callable[[], object]) -> list[str]:
    """How each block of a call ran."""
    with choice.recording() as met:
        call()
    return [choice.settle(problem) for problem in met if hasattr(problem, "block")]


def reference(x: Tensor, up: nn.Module, down: nn.Module, gate: nn.Module | None, norm: nn.Module | None) -> Tensor:
    h = x if norm is None else norm(x)
    h = F.silu(gate(h)) * up(h) if gate is not None else F.silu(up(h))
    y: Tensor = x + down(h)
    return y


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("norm", [None, nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("cap", [False, True])
def test_mlp_is_that_of_the_layers(gated: bool, norm: Any, cap: bool) -> None:
    up, down = linear(24, 40, rms_cap=cap).double(), linear(40, 24, rms_cap=cap).double()
    gate = linear(24, 40, bias=False).double() if gated else None
    normed = None if norm is None else norm(24).double()
    modules = nn.ModuleList([m for m in (up, down, gate, normed) if m is not None])
    x = torch.randn(3, 5, 24, dtype=torch.float64, requires_grad=True)
    wanted = [x, *modules.parameters()]

    def run() -> Tensor:
        return mlp(x, up, down, "silu", gate=gate, norm=normed, residual=True)

    assert taken(run) == ["block-0kept"]
    found, expected = run(), reference(x, up, down, gate, normed)
    torch.testing.assert_close(found, expected)
    gradient = torch.randn(found.shape, dtype=torch.float64)
    pairs = zip(
        torch.autograd.grad(found, wanted, gradient), torch.autograd.grad(expected, wanted, gradient), strict=True
    )
    for got, want in pairs:
        torch.testing.assert_close(got, want)


def test_projections_are_those_of_the_layers() -> None:
    layers, norm = [linear(24, size) for size in (24, 12, 40)], nn.LayerNorm(24)
    x = torch.randn(2, 9, 24)
    assert taken(lambda: projections(x, layers, norm)) == ["block-0"]
    for got, layer in zip(projections(x, layers, norm), layers, strict=True):
        torch.testing.assert_close(got, layer(norm(x)))


def seen_by_hooks(up: StructuredLinear, down: StructuredLinear) -> None:
    seen: list[str] = []
    handles = [layer.register_forward_hook(lambda *_: seen.append("called")) for layer in (up, down)]
    mlp(torch.randn(3, 24), up, down)
    assert len(seen) == 2
    for handle in handles:
        handle.remove()


def test_what_watches_the_layers_sees_them() -> None:
    """Hooks, dispatch modes and transformations get layer after layer."""
    up, down = linear(24, 40), linear(40, 24)
    x = torch.randn(3, 24)
    seen_by_hooks(up, down)
    model = StructuredMLP(up, down)
    separate = nn.Sequential(up, nn.GELU(), down)
    assert count(model, x).macs() == count(separate, x).macs() > 0
    expected = torch.func.jacrev(lambda x: down(F.gelu(up(x))))(x[0])
    torch.testing.assert_close(torch.func.jacrev(model)(x[0]), expected)
    torch.testing.assert_close(torch.func.vmap(model)(x), model(x))
    assert taken(lambda: mlp(x, linear(24, 40, checkpoint=True), down)) == []
    assert taken(lambda: mlp(x, nn.Linear(24, 40), down)) == []


@pytest.mark.parametrize("compiles", [False, True])
def test_replaced_forwards_and_global_hooks_are_called(compiles: bool) -> None:
    """As libraries replace ``forward`` of an instance to offload or to quantise it."""
    up, down, norm = linear(24, 40), linear(40, 24), nn.LayerNorm(24)
    x = torch.randn(5, 24)

    def call(x: Tensor) -> Tensor:
        return mlp(x, up, down, norm=norm)

    def run(x: Tensor) -> Tensor:
        torch._dynamo.reset()
        y: Tensor = torch.compile(call, backend="eager")(x) if compiles else call(x)
        return y

    for module in (up, down, norm):
        was = module.forward
        module.forward = lambda h, was=was: 2 * was(h)
        torch.testing.assert_close(run(x), down(F.gelu(up(norm(x)))))
        del module.forward
    seen: list[nn.Module] = []
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        call(x)
    finally:
        handle.remove()
    assert [module for module in seen if isinstance(module, StructuredLinear)] == [up, down]
    assert taken(lambda: call(x)) == ["block-0kept"]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_autocast(normed: bool, residual: bool) -> None:
    """One pass in bfloat16; the norm and the sum have the dtypes that they have layer after layer."""
    up, down, norm = linear(24, 40), linear(40, 24), nn.LayerNorm(24) if normed else None
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1), requires_grad=True)
    parameters = [x, *up.parameters(), *down.parameters()]

    def separate() -> torch.Tensor:
        y = down(F.gelu(up(x if norm is None else norm(x))))
        return x + y if residual else y

    found: list[list[torch.Tensor]] = []
    with torch.autocast("cpu", torch.bfloat16):
        assert taken(lambda: mlp(x, up, down, norm=norm, residual=residual)) == ["block-0kept"]
        assert taken(lambda: projections(x, [up, up], norm)) == ["block-0"]
        with execution.using("compiled"):
            for call in (lambda: mlp(x, up, down, norm=norm, residual=residual), separate):
                y = call()
                found.append([y, *torch.autograd.grad(y.float().square().sum(), parameters)])
    for got, expected in zip(*found, strict=True):
        assert got.dtype is expected.dtype
        assert (got - expected).norm() < 0.02 * expected.norm()


def test_no_layers_have_no_projections() -> None:
    assert projections(torch.ones(2, 24), []) == ()


def test_wrong_sizes_are_named() -> None:
    up, down = linear(24, 40), linear(40, 24)
    refused(ValueError, "in_features = 24", mlp, torch.randn(3, 23), up, down)
    with pytest.raises(ValueError, match=r"of the shape of the input, \(3, 24\), got \(3, 12\)"):
        mlp(torch.randn(3, 24), up, linear(40, 12), residual=True)
    with pytest.raises(ValueError, match="unknown activation 'swish'; one of gelu, gelu_tanh, relu, silu"):
        mlp(torch.randn(3, 24), up, down, "swish")
    refused(ValueError, "do not match", StructuredMLP, up, linear(24, 40))
    refused(ValueError, "one entry for each of the 2 layers", StructuredMLP, up, down, names=("a", "b", "c"))


@pytest.mark.slow
def test_compile_and_export() -> None:
    model = StructuredMLP(linear(24, 40), linear(40, 24), "silu", gate=linear(24, 40))
    x = torch.randn(3, 24)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


# -- compiled graphs ---------------------------------------------------------------------------------------------------


class Graphs:
    """A compiler that runs graphs as they are, and lists their operators."""

    def __init__(self) -> None:
        self.forward: list[set[str]] = []
        self.backward: list[set[str]] = []
        self.backend = aot_autograd(fw_compiler=self._into(self.forward), bw_compiler=self._into(self.backward))

    def _into(self, found: list[set[str]]) -> Callable[..., Any]:
        def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
            found.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
            return make_boxed_func(graph.forward)

        return compiler


def compiled_block(**options: Any) -> tuple[Callable[[Tensor], Tensor], list[Tensor], Graphs, Callable[..., Any]]:
    """Return an MLP, its parameters, the graphs of its compiled form, and that."""
    up, down, norm = (m.double() for m in (linear(24, 40), linear(40, 24, bias=False), nn.LayerNorm(24)))
    parameters = [*up.parameters(), *down.parameters(), *norm.parameters()]

    def call(x: Tensor) -> Tensor:
        return mlp(x, up, down, norm=norm, residual=True)

    torch._dynamo.reset()
    graphs = Graphs()
    return call, parameters, graphs, torch.compile(call, backend=graphs.backend, fullgraph=True, **options)


def agree(call: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor], x: Tensor, others: list[Tensor]) -> None:
    x = x.requires_grad_()
    found, expected = (torch.autograd.grad(f(x).sin().sum(), [x, *others]) for f in (other, call))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_graph_runs_the_pass(dynamic: bool) -> None:
    call, parameters, graphs, compiled = compiled_block(dynamic=dynamic)
    for tokens in (5, 70, 3) if dynamic else (5,):
        agree(call, compiled, torch.randn(tokens, 24, dtype=torch.float64), parameters)
        assert len(graphs.forward) == 1
    agree(call, compiled, torch.randn(0, 24, dtype=torch.float64), parameters)
    assert "structlin.block_pass.default" in graphs.forward[0]
    assert "structlin.block_backward.default" in graphs.backward[0]
    assert not any("mm" in name or "gelu" in name or "norm" in name for name in graphs.forward[0] | graphs.backward[0])
    x = torch.randn(2, 3, 24, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), call(x))
    assert "structlin.block_pass.default" in graphs.forward[-1]


def test_a_compiled_graph_of_projections() -> None:
    layers = nn.ModuleList([linear(24, size, bias=size > 20) for size in (24, 12, 40)]).double()
    torch._dynamo.reset()
    graphs = Graphs()

    def call(x: Tensor) -> Tensor:
        return torch.cat(projections(x, list(layers)), -1)

    compiled = torch.compile(call, backend=graphs.backend, fullgraph=True)
    agree(call, compiled, torch.randn(2, 9, 24, dtype=torch.float64), list(layers.parameters()))
    assert "structlin.block_pass.default" in graphs.forward[0]


@pytest.mark.parametrize(("way", "node"), [("block-halfkept", True), ("separate", False)])
def test_a_compiled_graph_follows_the_choice(way: str, node: bool) -> None:
    call, parameters, graphs, compiled = compiled_block()
    x = torch.randn(64, 24, requires_grad=True, dtype=torch.float64)
    with choice.recording() as met:
        call(x)
    choice.pin({problem.key: way for problem in met if hasattr(problem, "block")})
    try:
        agree(call, compiled, x, parameters)
    finally:
        choice._pinned.clear()
        choice.forget()
    assert ("structlin.block_pass.default" in graphs.forward[0]) == node
    assert any("mm" in name for name in graphs.forward[0])  # of the second layer, or of both


def test_a_compiled_graph_without_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the pass cannot be compiled any more, its nodes run products of torch."""
    call, parameters, graphs, compiled = compiled_block()
    x = torch.randn(6, 24, requires_grad=True, dtype=torch.float64)
    y = compiled(x)
    expected = torch.autograd.grad(call(x).sum(), [x, *parameters])
    monkeypatch.setattr(_execution_blocks, "_failed", Everything())
    torch.testing.assert_close(torch.autograd.grad(y.sum(), [x, *parameters]), expected)
    agree(call, compiled, x, parameters)
    assert len(graphs.forward) == 1
    choice.forget()  # which was to run layer after layer


class Everything(set):  # type: ignore[type-arg]
    def __contains__(self, _: object) -> bool:
        return True


def test_a_compiled_graph_of_operands_that_are_not_plain() -> None:
    """A pass reads a copy of a tensor with other strides; for other kinds of operands the layers run."""
    call, parameters, graphs, compiled = compiled_block()
    agree(call, compiled, torch.randn(24, 6, dtype=torch.float64).T, parameters)
    assert "structlin.block_pass.default" in graphs.forward[0]
    assert not any("mm" in name for name in graphs.forward[0])
    up, down = linear(24, 40), linear(40, 24)
    for layer in (up, down):
        for k, factor in enumerate(layer.factors):
            layer.factors[k] = nn.Parameter(TwoTensor(factor.detach(), factor.detach()))
    torch._dynamo.reset()
    graphs = Graphs()
    compiled = torch.compile(lambda x: mlp(x, up, down), backend=graphs.backend, fullgraph=True)
    assert type(compiled(torch.randn(5, 24))) is TwoTensor
    assert "structlin.block_pass.default" not in graphs.forward[0]


def test_second_derivatives_of_a_compiled_graph() -> None:
    call, parameters, _, _ = compiled_block()
    x = torch.randn(6, 24, requires_grad=True, dtype=torch.float64)

    def second(f: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(f(x).sin().sum(), [x, *parameters], create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in first), [x, *parameters])

    found, expected = second(torch.compile(call, backend="eager", fullgraph=True)), second(call)
    torch.testing.assert_close(found, expected)


def test_batched_gradients_of_a_compiled_graph() -> None:
    call, _, _, _ = compiled_block()
    x, gradients = torch.randn(6, 24, dtype=torch.float64, requires_grad=True), torch.randn(3, 6, 24).double()
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    found, expected = (torch.autograd.grad(f(x), x, gradients, is_grads_batched=True)[0] for f in (compiled, call))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", ["mlp", "layer", "checkpoint"])
def test_a_compiled_step_with_an_activation_checkpoint(kind: str, backend: str) -> None:
    """Dynamo compiled our backward functions, and unpacked what the checkpoint allows to unpack once."""
    model = StructuredMLP(linear(24, 40), linear(40, 24)) if kind == "mlp" else linear(24, 24)
    if isinstance(model, StructuredLinear):
        model.checkpoint = kind == "checkpoint"
    x = torch.randn(33, 24)

    def step() -> None:
        for _ in range(1):
            checkpoint(model, x, use_reentrant=False).square().sum().backward()

    found = []
    for call in (step, torch.compile(step, backend=backend)):
        torch._dynamo.reset()
        model.zero_grad()
        call()
        found.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*found)


def test_operators_of_blocks_check_their_text_and_operands() -> None:
    with pytest.raises(ValueError, match="does not describe a block"):
        torch.ops.structlin.block_pass(torch.ones(2, 3), [], "{}", "0", [])
    up, down = linear(24, 40), linear(40, 24)
    text = block_text(_execution_blocks.torch_block((up.structure,), down.structure, "gelu", (True, True)))
    operands = [up.bias, down.bias, *up.factors, *down.factors]
    with pytest.raises(ValueError, match=r"\(tokens, 24\), got \(2, 3\)"):
        torch.ops.structlin.block_pass(torch.ones(2, 3), operands, text, "0", [])
    with pytest.raises(ValueError, match="expected"):
        torch.ops.structlin.block_pass(torch.ones(2, 24), operands[::-1], text, "0", [])
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        torch.ops.structlin.block_pass(torch.ones(2, 24), operands, text, "0", [])


def test_a_measurement_is_apart_from_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise, the backward pass of a measurement would be recorded, which takes longer, and the choice be wrong."""
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    up, down = linear(24, 40), linear(40, 24)
    block = _execution_blocks.torch_block((up.structure,), down.structure, "gelu", (True, True))
    problem = _execution_blocks.BlockProblem(block, "float32", 64, 1, True)
    ran: list[int] = []
    backward = type(block).backward
    monkeypatch.setattr(type(block), "backward", lambda self, *given: ran.append(1) or backward(self, *given))
    assert recording()
    with FakeTensorMode(), torch.autocast("cpu"):
        assert problem.measure(["separate", "block-16"]).keys() == {"separate", "block-16"}
    assert ran
    assert recording()


# -- MLPs of other packages --------------------------------------------------------------------------------------------


class Timm(nn.Module):
    """As timm's Mlp."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(24, 96), nn.GELU(), nn.Dropout(drop)
        self.norm, self.fc2, self.drop2 = nn.Identity(), nn.Linear(96, 24), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))  # type: ignore[no-any-return]


class GPT2(nn.Module):
    """As transformers' GPT2MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj, self.act = nn.Linear(24, 96), nn.Linear(96, 24), nn.GELU("tanh")
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))  # type: ignore[no-any-return]


class Llama(nn.Module):
    """As transformers' LlamaMLP."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(24, 40, bias=False) for _ in range(2))
        self.down_proj, self.act_fn = nn.Linear(40, 24, bias=False), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Twice(Timm):
    """Has the names of timm's, but computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Packed(Timm):
    """As timm's GluMlp: the first layer has both halves, of which one multiplies the other."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(24, 192)

    def forward(self, x: Tensor) -> Tensor:
        gate, y = self.fc1(x).chunk(2, -1)
        z: Tensor = self.fc2(self.act(gate) * y)
        return z


class Mish(Timm):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Mish()


def test_mlps_of_other_packages_are_fused() -> None:
    kinds = OrderedDict(
        timm=Timm(),
        gpt2=GPT2(),
        llama=Llama(),
        twice=Twice(),
        drop=Timm(0.1),
        mish=Mish(),
        packed=Packed(),
        head=nn.Linear(24, 5),
    )
    model = nn.Sequential(kinds)
    separate = nn.Sequential(OrderedDict((name, type(m)() if name not in ("drop", "head") else m)
                                         for name, m in kinds.items()))  # fmt: skip
    report = replace_linear(model, "block_tensor_train", rank=2, fuse=True)
    notes = dict(note.removeprefix("MLP ").split(": ") for note in report.notes)
    assert {name for name, outcome in notes.items() if outcome == "fused"} == {"timm", "gpt2", "llama"}
    assert "its output differs" in notes["twice"]
    assert "dropout between" in notes["drop"]
    assert "activation function is not one of" in notes["mish"]
    assert "its layers have 192 outputs and 96 inputs" in notes["packed"]

    replace_linear(separate[:3], "block_tensor_train", rank=2, layers="all")
    for name in ("timm", "gpt2", "llama"):
        plain, fused = separate.get_submodule(name), model.get_submodule(name)
        plain.load_state_dict(fused.state_dict())
        x = torch.randn(7, 24)
        torch.testing.assert_close(fused.eval()(x), plain.eval()(x))
    assert model.get_submodule("gpt2").train()(torch.ones(50, 24)).eq(0).any()  # its dropout
    again = fuse_mlps(model)
    assert not {"timm", "gpt2", "llama"} & set(again)


def test_a_model_without_mlps_says_so() -> None:
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 5))
    assert replace_linear(model, "monarch", blocks=4, fuse=True).notes == ("no MLP of a known form was found to fuse",)


def test_hooks_keep_an_mlp_from_being_replaced() -> None:
    model = nn.Sequential(Timm(), nn.Linear(24, 5))
    replace_linear(model, "monarch", blocks=4)
    model[0].register_forward_hook(lambda *_: None)
    assert fuse_mlps(model) == {"0": "it has hooks or a forward of its own, which would be lost"}
    model = nn.Sequential(Timm(), Timm(), Timm(), nn.Linear(24, 5))
    replace_linear(model, "monarch", blocks=4)
    model[0].act.register_forward_hook(lambda *_: None)
    model[1].drop2.forward = lambda x: 2 * x
    model[2].fc1.register_forward_hook(lambda *_: None)  # the block keeps its layers, and their hooks
    assert [outcome.partition(" or ")[0] for outcome in fuse_mlps(model).values()] == ["it has hooks"] * 2 + ["fused"]


class Dropped(nn.Module):
    """An MLP with dropout in the places that are named."""

    def __init__(self, places: str) -> None:
        super().__init__()
        self.places, self.drop = places, nn.Dropout(0.25)
        self.fc1, self.act, self.fc2 = nn.Linear(24, 96), nn.GELU(), nn.Linear(96, 24)

    def forward(self, x: Tensor) -> Tensor:
        def dropped(place: str, y: Tensor) -> Tensor:
            if place in self.places:
                y = self.drop(y)
            return F.dropout(y, 0.25, self.training) if place.upper() in self.places else y

        return dropped("c", self.fc2(dropped("b", self.act(self.fc1(dropped("a", x))))))


class DropPath(Dropped):
    """As timm's module of this name: it draws without a function of dropout."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * y.new_empty(y.shape[0], 1).bernoulli_(0.5) if self.training else y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("places", ["", "a", "b", "c", "bc", "A", "B", "C", "cC", "path"])
def test_dropout_is_fused_only_after_the_last_layer(places: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(DropPath("") if places == "path" else Dropped(places), nn.Linear(24, 5))
    replace_linear(model, "monarch", blocks=4)
    model.to(dtype).eval()
    plain = copy.deepcopy(model[0])
    outcome = fuse_mlps(model)["0"]
    assert not model[0].training
    assert not plain.drop.training
    if places not in ("", "c", "C"):
        assert "dropout between its layers, or draws other random numbers" in outcome
        return
    assert outcome == "fused"
    x = torch.randn(40, 24, dtype=dtype)
    outputs = []
    for one in (plain, model[0]):
        torch.manual_seed(3)
        outputs.append(one.train()(x))
    torch.testing.assert_close(*outputs, atol=2 * torch.finfo(dtype).eps, rtol=0.02)
    assert (outputs[1] == 0).float().mean() == pytest.approx(0.25 if places else 0.0, abs=0.05)


def test_dropout_on_the_meta_device() -> None:
    model = nn.Sequential(Dropped("b"), Dropped("c"), nn.Linear(24, 5))
    replace_linear(model, "monarch", blocks=4)
    assert [outcome == "fused" for outcome in fuse_mlps(model.to("meta")).values()] == [False, True]
    assert model[1].dropout == 0.25


@pytest.mark.parametrize("name", ["timm", "transformers"])
def test_real_models(name: str) -> None:
    if name == "timm":
        timm = pytest.importorskip("timm")
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5)
        x, expected = torch.randn(2, 3, 32, 32), 2
    else:
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **sizes))
        x, expected = torch.arange(12).view(2, 6), 2
    report = replace_linear(model, "monarch", blocks=4, exclude="*lm_head*" if name == "transformers" else ())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    y = model.eval()(x)
    assert list(fuse_mlps(model).values()) == ["fused"] * expected, report
    assert before.keys() == model.state_dict().keys()
    z = model.eval()(x)
    first, second = (getattr(out, "logits", out) for out in (y, z))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    assert len(taken(lambda: model(x))) >= 1
    assert _blocks.ACTIVATIONS.keys() == {"gelu", "gelu_tanh", "relu", "silu"}
