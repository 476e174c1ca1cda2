"""Linear layers through the convolution or fused against ``F.linear``, and token-wise functions in pieces against one
call."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mask2former_plugin.modeling.layers import linear as module
from mask2former_plugin.modeling.layers.linear import (
    Linear,
    fused_linear,
    fuses,
    linear,
    linear_add,
    linear_relu,
    recomputes_pieces,
    token_wise,
)

# float32, sums of up to 96 products of size 1: about ten times the rounding of one sum
TOLERANCE = {"rtol": 0, "atol": 2e-5}

needs_fast_path = pytest.mark.skipif(
    not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()),
    reason="this torch has no MKL or no oneDNN, F.linear is used everywhere",
)


needs_fusion = pytest.mark.skipif(not module._HAS_FUSED, reason="this torch has no fused linear layers")
needs_bfloat16 = pytest.mark.skipif(
    not (module._HAS_FUSED and module.calculates_in_bfloat16()), reason="this CPU does not calculate in bfloat16"
)


@pytest.fixture
def convolutions(monkeypatch):
    """Counts the convolutions that are called."""
    calls = []
    original = F.conv2d
    monkeypatch.setattr(module.F, "conv2d", lambda *args: calls.append(1) or original(*args))
    return calls


@needs_fast_path
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape", [(300, 96), (2, 257, 33), (2, 3, 101, 8), (1, 256, 1)], ids=lambda shape: "x".join(map(str, shape))
)
def test_values_and_gradients(convolutions, shape, bias):
    torch.manual_seed(0)
    x, weight, b = torch.randn(shape), torch.randn(17, shape[-1]), torch.randn(17) if bias else None
    inputs = [t.requires_grad_() for t in (x, weight, b) if t is not None]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    output = linear(x, weight, b)
    assert convolutions and output.is_contiguous() and output.dtype == torch.float32
    expected = F.linear(*exact)
    torch.testing.assert_close(output, expected.float(), **TOLERANCE)
    noise = torch.randn(output.shape)
    actual = torch.autograd.grad((output * noise).sum(), inputs)
    wanted = torch.autograd.grad((expected * noise).sum(), exact)
    for one, other in zip(actual, wanted):
        # gradients of the weights are sums over up to 606 rows
        torch.testing.assert_close(one, other.float(), rtol=0, atol=2e-4)


@needs_fast_path
def test_any_memory_layout(convolutions):
    torch.manual_seed(1)
    weight = torch.randn(5, 12)
    for x in (
        torch.randn(2, 12, 400).transpose(1, 2),
        torch.randn(2, 500, 24)[:, ::2, ::2],
        torch.randn(2, 12, 20, 21).permute(0, 2, 3, 1),
        torch.randn(1, 1, 12).expand(2, 300, 12),
    ):
        convolutions.clear()
        torch.testing.assert_close(linear(x, weight), F.linear(x, weight), **TOLERANCE)
        assert convolutions


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize(
    "x, context",
    [
        (torch.randn(600, 8, dtype=torch.float64), torch.no_grad()),
        (torch.randn(600, 8, dtype=torch.float16), torch.no_grad()),
        (torch.randn(255, 8), contextlib.nullcontext()),
        (torch.randn(0, 8), torch.no_grad()),
        (torch.randn(600, 8), torch.autocast("cpu", torch.bfloat16)),
        (torch.randn(600, 8), torch.backends.mkldnn.flags(enabled=False)),
    ],
    ids=["float64", "float16", "few rows", "no rows", "autocast", "oneDNN off"],
)
def test_everything_else_is_the_plain_operator(convolutions, x, context):
    layer = Linear(8, 3).to(x.dtype)
    with context:
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert not convolutions


FUSED_DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)]


@needs_fusion
@pytest.mark.parametrize("dtype", FUSED_DTYPES)
@pytest.mark.parametrize("shape", [(300, 96), (2, 7, 33), (1, 8)], ids=lambda shape: "x".join(map(str, shape)))
@torch.no_grad()
def test_fused_without_gradients(convolutions, dtype, shape):
    torch.manual_seed(0)
    layer, x = nn.Linear(shape[-1], 17).to(dtype), torch.randn(shape).to(dtype)
    addend, dropout = torch.randn(*shape[:-1], 17).to(dtype), nn.Dropout(0.5).eval()
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    assert fuses(x, layer.weight)
    for bias in (layer.bias, None):
        expected = exact if bias is not None else exact - layer.bias.double()
        check_rounding(linear(x, layer.weight, bias), expected, dtype)
    check_rounding(linear_relu(x, layer), exact.relu(), dtype)
    check_rounding(linear_add(x, layer, dropout, addend), exact + addend.double(), dtype, roundings=2)
    assert not convolutions


def check_rounding(actual, expected, dtype, roundings=1):
    """Sums of products in float32, then ``roundings`` to half a place of the dtype, of numbers below 8."""
    assert actual.dtype == dtype and actual.is_contiguous() and expected.abs().max() < 8
    atol = TOLERANCE["atol"] + (roundings * 2**-6 if dtype == torch.bfloat16 else 0)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=atol)


@needs_fusion
@torch.no_grad()
def test_layers_that_are_more_than_their_weights_are_called():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    x, calls = torch.randn(5, 8), []
    other = Doubled(8, 3)
    torch.testing.assert_close(linear_relu(x, other), 2 * F.linear(x, other.weight, other.bias).relu())
    watched = nn.Linear(8, 3)
    watched.register_forward_hook(lambda *_: calls.append(1))
    linear_relu(x, watched)
    assert calls == [1]


@torch.no_grad()
def test_what_hooks_see_and_others_give_is_not_overwritten():
    x, addend, seen = torch.randn(5, 8), torch.randn(5, 8), []
    hooked = nn.Linear(8, 8)
    hooked.register_forward_hook(lambda module, inputs, output: seen.append(output))
    expected = F.linear(x, hooked.weight, hooked.bias)
    kept = x.clone()
    assert torch.allclose(linear_relu(x, hooked), expected.relu(), atol=1e-5)
    assert torch.allclose(linear_add(x, hooked, nn.Dropout(0.0), addend), addend + expected, atol=1e-5)
    assert len(seen) == 2 and all(torch.allclose(s, expected, atol=1e-5) for s in seen)
    assert torch.equal(linear_relu(x, nn.Identity()), x.relu()) and torch.equal(x, kept)
    assert torch.equal(linear_add(x, nn.Identity(), nn.Dropout(0.0), addend), addend + x) and torch.equal(x, kept)


@needs_fusion
@torch.no_grad()
def test_fused_product_of_any_memory_layout():
    torch.manual_seed(1)
    x, weight = torch.randn(40, 64)[:, ::2], torch.randn(32, 50)
    for w in (weight.t(), weight.t().contiguous(), torch.randn(70, 64)[::2, 32:], torch.randn(1, 32).expand(5, 32)):
        assert fuses(x, w)
        expected = F.linear(x.double(), w.double())
        torch.testing.assert_close(fused_linear(x, w).double(), expected, **TOLERANCE)


@needs_fusion
def test_sum_with_a_linear_layer_under_gradients_and_dropout():
    torch.manual_seed(2)
    layer, x, addend = nn.Linear(6, 4), torch.randn(50, 6, requires_grad=True), torch.randn(50, 4, requires_grad=True)
    kept = addend.detach().clone()
    for dropout in (nn.Dropout(0.0), nn.Dropout(0.5).eval()):
        found = torch.autograd.grad(linear_add(x, layer, dropout, addend).square().sum(), (x, addend, layer.weight))
        wanted = torch.autograd.grad((addend + layer(x)).square().sum(), (x, addend, layer.weight))
        torch.testing.assert_close(found, wanted)
    with torch.no_grad():
        dropped = (linear_add(x, layer, nn.Dropout(0.5), addend) - addend).div(2)
        product = layer(x)
    zero = dropped.abs() < 1e-6
    assert 40 < zero.sum() < 160  # of 200, half on average
    torch.testing.assert_close(dropped[~zero], product[~zero], rtol=1e-5, atol=1e-6)
    assert torch.equal(addend, kept)
    with torch.no_grad():  # a sum of two dtypes has the wider one
        assert linear_add(x.bfloat16(), layer.bfloat16(), dropout, addend).dtype == torch.float32


def test_compilers_and_tracers_see_the_plain_operator(convolutions):
    layer, x = Linear(8, 3), torch.randn(600, 8)
    expected = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), expected)
    assert not convolutions
    assert "aten::linear" in str(torch.jit.trace(layer, x).graph)


def test_parameters_have_the_names_of_a_linear_layer():
    plain, ours = nn.Linear(3, 4), Linear(3, 4)
    ours.load_state_dict(plain.state_dict(), strict=True)
    assert isinstance(ours, nn.Linear)


@pytest.mark.parametrize("shape", [(2, 7, 5, 6), (71, 6), (0, 6)])
def test_pieces_give_what_the_whole_gives(monkeypatch, shape):
    monkeypatch.setattr(module, "_LEAST_ROWS", 8)
    monkeypatch.setattr(module, "_CACHED_VALUES", 160)
    lengths = []
    layer = nn.Linear(6, 4).double()

    def function(x):
        lengths.append(x.numel() // 6)
        return layer(x).relu()

    x = torch.randn(shape, dtype=torch.float64)
    expected = layer(x).relu()
    with torch.no_grad():
        output = token_wise(function, x, hidden=16)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-14)
    assert max(lengths) <= 10 and sum(lengths) == x.numel() // 6
    lengths.clear()
    torch.testing.assert_close(token_wise(function, x, hidden=16), expected, rtol=0, atol=1e-14)
    assert lengths == [x.numel() // 6]  # with gradients in one piece


@pytest.mark.parametrize("tokens", [7, 24, 71])
def test_pieces_are_recomputed_in_training(monkeypatch, tokens):
    monkeypatch.setattr(module, "_LEAST_ROWS", 8)
    monkeypatch.setattr(module, "_CACHED_VALUES", 160)
    layers = {"a": nn.Linear(6, 16), "b": nn.Linear(16, 6), "norm": nn.LayerNorm(6), "unused": nn.Linear(1, 1)}
    block = nn.ModuleDict(layers)
    block.double()["b"].bias.requires_grad_(False)
    lengths = []

    def function(x, y):
        lengths.append(len(x.flatten(0, -2)))
        return block["norm"](x + block["b"](block["a"](y).relu()))

    x = torch.randn(2, tokens, 6, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, tokens, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, tokens, 6, dtype=torch.float64)
    parameters = [p for name, p in block.named_parameters() if p.requires_grad and "unused" not in name]
    kept, found = {}, []
    for pieces in (False, True):
        lengths.clear()
        count = 0

        def keep(tensor):
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            output = token_wise(function, x, y, hidden=16, module=block if pieces else None)
        kept[pieces] = count
        found.append((output, torch.autograd.grad((output * weights).sum(), (x, y, *parameters))))
        if pieces:
            assert max(lengths) <= 10 or tokens == 7
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    assert kept[True] < kept[False] or 2 * tokens <= 10
    assert block["unused"].weight.grad is None


def test_backward_pass_of_pieces_inside_of_autocast(monkeypatch):
    monkeypatch.setattr(module, "_LEAST_ROWS", 8)
    monkeypatch.setattr(module, "_CACHED_VALUES", 160)
    layer, x = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 6)), torch.randn(50, 6, requires_grad=True)
    loss = token_wise(layer, x, hidden=16, module=layer).square().sum()
    leaves = (x, *layer.parameters())
    expected = torch.autograd.grad(loss, leaves, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.autograd.grad(loss, leaves)
    for one, other in zip(actual, expected):
        assert torch.equal(one, other)


def test_inputs_without_gradient_and_active_dropout(monkeypatch):
    monkeypatch.setattr(module, "_LEAST_ROWS", 8)
    monkeypatch.setattr(module, "_CACHED_VALUES", 160)
    layer, x = nn.Linear(6, 4).double(), torch.randn(50, 6, dtype=torch.float64)
    assert recomputes_pieces(layer, x, 16)
    (ours,) = torch.autograd.grad(token_wise(layer, x, hidden=16, module=layer).square().sum(), layer.weight)
    (plain,) = torch.autograd.grad(layer(x).square().sum(), layer.weight)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    dropping = nn.Sequential(layer, nn.Dropout(0.5))
    assert not recomputes_pieces(dropping, x, 16)
    assert recomputes_pieces(dropping.eval(), x, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert not recomputes_pieces(layer, x, 16)


def test_hooks_on_parts_see_all_tokens_at_once():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Linear(8, 16)

        def feed(self, x):
            return self.layer(x)

    block, x, seen = Block(), torch.randn(2, 3000, 8), []
    with torch.no_grad():
        expected = token_wise(block.feed, x, hidden=2**20)
        block.layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
        found = token_wise(block.feed, x, hidden=2**20)  # so wide that there are many pieces
    assert seen == [x.shape]
    torch.testing.assert_close(found, expected)
