"""Attention, encodings and transformer layers against PyTorch's own modules and written-out formulas."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mask2former_plugin.modeling.layers import (
    MLP,
    MSDeformAttn,
    MultiheadAttention,
    attention,
    reference_points,
    sine_position_encoding,
)
from mask2former_plugin.modeling.layers.linear import fuses
from mask2former_plugin.modeling.layers.transformer import (
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

DOUBLE = {"dtype": torch.float64}
TOLERANCE = {"rtol": 0, "atol": 1e-12}  # float64, a few hundred additions


def gradients(output, module, *inputs):
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(5), dtype=output.dtype)
    named = dict(module.named_parameters())
    found = torch.autograd.grad((output * noise).sum(), [*named.values(), *inputs])
    return dict(zip([*named, *range(len(inputs))], found))


def twin(module, reference):
    reference.double().load_state_dict(module.state_dict(), strict=True)
    return reference


@pytest.mark.parametrize("self_attention", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_equals_torch(randomize, self_attention, masked):
    ours = randomize(MultiheadAttention(24, 4))
    theirs = twin(ours, nn.MultiheadAttention(24, 4, batch_first=True))
    query = torch.randn(2, 7, 24, **DOUBLE, requires_grad=True)
    key = query if self_attention else torch.randn(2, 9, 24, **DOUBLE, requires_grad=True)
    value = torch.randn(2, key.shape[1], 24, **DOUBLE, requires_grad=True)
    allowed = blocked = None
    if masked:
        allowed = torch.rand(2, 1, 7, key.shape[1]) < 0.5
        allowed[..., 0] = True
        blocked = ~allowed.expand(-1, 4, -1, -1).flatten(0, 1)
    output = ours(query, key, value, allowed)
    expected = theirs(query, key, value, attn_mask=blocked)[0]
    torch.testing.assert_close(output, expected, **TOLERANCE)
    inputs = (query, value) if self_attention else (query, key, value)
    actual, wanted = gradients(output, ours, *inputs), gradients(expected, theirs, *inputs)
    assert actual.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(actual[name], wanted[name], **TOLERANCE)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_attention_without_gradients(randomize, monkeypatch, dtype, tolerance, masked):
    ours = randomize(MultiheadAttention(24, 4)).to(dtype)
    theirs = twin(ours, nn.MultiheadAttention(24, 4, batch_first=True))
    query, key, value = (torch.randn(3, n, 24).to(dtype) for n in (7, 50, 50))
    if not fuses(key, ours.in_proj_weight):
        pytest.skip("no fused linear layers here")
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    allowed = blocked = None
    if masked:
        allowed = torch.rand(3, 1, 7, 50) < 0.3
        allowed[..., 0] = True
        allowed[1, :, 2, 1:] = False  # a query that sees a single place
        blocked = ~allowed.expand(-1, 4, -1, -1).flatten(0, 1)
    expected = theirs(query.double(), key.double(), value.double(), attn_mask=blocked)[0]
    whole = ours(query, key, value, allowed)
    monkeypatch.setattr(attention, "_SCORES", 120)  # two queries at once
    for output in (whole, ours(query, key, value, allowed), ours(query.float(), key, value, allowed)):
        assert output.dtype == dtype
        assert (output - expected).norm() < tolerance * expected.norm()


def test_attention_dropout_only_in_training():
    layer = MultiheadAttention(8, 2, dropout=0.5)
    x, memory = torch.randn(1, 6, 8), torch.randn(1, 30, 8)
    assert not torch.equal(layer(x, x, x), layer(x, x, x))
    with torch.no_grad():
        assert not torch.equal(layer(x, memory, memory), layer(x, memory, memory))
    layer.eval()
    assert torch.equal(layer(x, x, x), layer(x, x, x))


@pytest.mark.parametrize("build", [lambda: MultiheadAttention(10, 4), lambda: MSDeformAttn(10, 1, 4, 1)])
def test_heads_must_divide_the_width(build):
    with pytest.raises(ValueError, match="width 10 must be a multiple of the number of heads 4"):
        build()


def test_mlp(randomize):
    mlp = randomize(MLP(4, 6, 3, 3))
    x = torch.randn(5, 4, **DOUBLE)
    state = mlp.state_dict()
    expected = x
    for number in range(3):
        expected = expected @ state[f"layers.{number}.weight"].T + state[f"layers.{number}.bias"]
        expected = expected.clamp(min=0) if number < 2 else expected
    torch.testing.assert_close(mlp(x), expected, **TOLERANCE)


@pytest.mark.parametrize("size", [(3, 5), (1, 1), (6, 2)])
def test_sine_encoding_equals_the_formula(size):
    height, width = size
    channels = 12
    expected = torch.zeros(height, width, channels, **DOUBLE)
    for row in range(height):
        for column in range(width):
            for k in range(channels):
                position, extent = (row, height) if k < channels // 2 else (column, width)
                feature = k % (channels // 2)
                angle = (position + 1) / (extent + 1e-6) * 2 * math.pi
                angle /= 10000 ** (2 * (feature // 2) / (channels // 2))
                expected[row, column, k] = math.cos(angle) if feature % 2 else math.sin(angle)
    encoding = sine_position_encoding(size, channels, device=torch.device("cpu"), dtype=torch.float64)
    torch.testing.assert_close(encoding, expected, **TOLERANCE)
    # half precision is rounded at the end only
    half = sine_position_encoding(size, channels, device=torch.device("cpu"), dtype=torch.bfloat16)
    torch.testing.assert_close(half.double(), expected, rtol=0, atol=2**-8)


def test_sine_encoding_needs_a_multiple_of_four():
    with pytest.raises(ValueError, match="multiple of 4 channels, got 6"):
        sine_position_encoding((2, 2), 6, device=torch.device("cpu"), dtype=torch.float32)


def test_reference_points_are_pixel_centres():
    points = reference_points([(2, 3), (1, 2)], device=torch.device("cpu"), dtype=torch.float64)
    rows = [((c + 0.5) / w, (r + 0.5) / h) for h, w in [(2, 3), (1, 2)] for r in range(h) for c in range(w)]
    torch.testing.assert_close(points, torch.tensor(rows, **DOUBLE), **TOLERANCE)


def test_deformable_attention_starts_by_looking_around():
    attention = MSDeformAttn(32, num_levels=2, num_heads=8, num_points=3)
    offsets = attention.sampling_offsets.bias.detach().reshape(8, 2, 3, 2)
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for head, direction in enumerate(directions):
        for point in range(3):
            wanted = torch.tensor(direction, dtype=torch.float32) * (point + 1)
            torch.testing.assert_close(offsets[head, :, point], wanted.expand(2, 2), rtol=0, atol=1e-5)
    for layer in (attention.sampling_offsets, attention.attention_weights):
        assert not layer.weight.any()
    assert not attention.attention_weights.bias.any()


def deformable_attention(attention, query, value, shapes, points):
    """The formula with ``grid_sample`` for one query and head at a time."""
    heads, levels, samples = attention.num_heads, attention.num_levels, attention.num_points
    batch, length, width = query.shape
    values = attention.value_proj(value).reshape(batch, -1, heads, width // heads)
    offsets = attention.sampling_offsets(query).reshape(batch, length, heads, levels, samples, 2)
    weights = attention.attention_weights(query).reshape(batch, length, heads, levels * samples).softmax(3)
    rows = []
    for b in range(batch):
        for t in range(length):
            for h in range(heads):
                total, start = 0, 0
                for level, (height, columns) in enumerate(shapes):
                    tokens = values[b, start : start + height * columns, h].T.reshape(1, -1, height, columns)
                    start += height * columns
                    places = points[t] + offsets[b, t, h, level] / torch.tensor([columns, height], **DOUBLE)
                    sampled = F.grid_sample(tokens, (2 * places - 1)[None, None], align_corners=False)[0, :, 0]
                    total = total + sampled @ weights[b, t, h, level * samples : (level + 1) * samples]
                rows.append(total)
    return attention.output_proj(torch.stack(rows).reshape(batch, length, width))


def test_deformable_attention(randomize):
    shapes = [(2, 3), (4, 5)]
    attention = randomize(MSDeformAttn(8, num_levels=2, num_heads=2, num_points=3))
    query, value = (torch.randn(2, 26, 8, **DOUBLE, requires_grad=True) for _ in range(2))
    points = reference_points(shapes, device=torch.device("cpu"), dtype=torch.float64)
    output = attention(query, value, shapes, points)
    expected = deformable_attention(attention, query, value, shapes, points)
    torch.testing.assert_close(output, expected, **TOLERANCE)
    actual, wanted = gradients(output, attention, query, value), gradients(expected, attention, query, value)
    for name in wanted:
        torch.testing.assert_close(actual[name], wanted[name], rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["sampling_offsets", "attention_weights", "value_proj", "output_proj"])
def test_changed_layers_of_deformable_attention(randomize, name):
    """What stands in the place of a linear layer, or hangs on it, counts and is trained."""

    class Adapted(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.further = layer, nn.Linear(layer.in_features, layer.out_features)
            self.weight, self.bias, self.out_features = layer.weight, layer.bias, layer.out_features

        def forward(self, x):
            return self.layer(x) + self.further(x)

    shapes = [(2, 3), (4, 5)]
    attention = randomize(MSDeformAttn(8, num_levels=2, num_heads=2, num_points=3))
    adapted, hooked = copy.deepcopy(attention), copy.deepcopy(attention)
    setattr(adapted, name, Adapted(getattr(adapted, name)).double())
    further = getattr(adapted, name).further
    getattr(hooked, name).register_forward_hook(lambda _, inputs, output: output + further(*inputs))
    with torch.no_grad():
        merged = getattr(attention, name)
        merged.weight += further.weight
        merged.bias += further.bias
    query, value = (torch.randn(2, 26, 8, **DOUBLE) for _ in range(2))
    points = reference_points(shapes, device=torch.device("cpu"), dtype=torch.float64)
    expected = attention(query, value, shapes, points)
    (wanted,) = torch.autograd.grad(expected.square().sum(), merged.weight)
    for module in (adapted, hooked):
        output = module(query, value, shapes, points)
        torch.testing.assert_close(output, expected, **TOLERANCE)
        (found,) = torch.autograd.grad(output.square().sum(), further.weight)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("pre_norm", [True, False])
def test_encoder_layer_without_positions_is_torch_s(randomize, pre_norm):
    ours = randomize(TransformerEncoderLayer(16, 4, 20, dropout=0.0, pre_norm=pre_norm))
    theirs = twin(ours, nn.TransformerEncoderLayer(16, 4, 20, dropout=0.0, batch_first=True, norm_first=pre_norm))
    x = torch.randn(2, 5, 16, **DOUBLE)
    torch.testing.assert_close(ours(x, torch.zeros(5, 16, **DOUBLE)), theirs(x), **TOLERANCE)


@pytest.mark.parametrize("pre_norm", [True, False])
def test_decoder_layer_without_positions_is_torch_s(randomize, pre_norm):
    ours = randomize(TransformerDecoderLayer(16, 4, 20, dropout=0.0, pre_norm=pre_norm))
    theirs = twin(ours, nn.TransformerDecoderLayer(16, 4, 20, dropout=0.0, batch_first=True, norm_first=pre_norm))
    x, memory = torch.randn(2, 5, 16, **DOUBLE), torch.randn(2, 7, 16, **DOUBLE)
    output = ours(x, torch.zeros(5, 16, **DOUBLE), memory, memory)
    torch.testing.assert_close(output, theirs(x, memory), **TOLERANCE)


def test_positions_enter_queries_and_keys_only(randomize):
    """Post-norm layers with positions, from torch's attention."""
    encoder = randomize(TransformerEncoderLayer(16, 4, 20, dropout=0.0, pre_norm=False))
    decoder = randomize(TransformerDecoderLayer(16, 4, 20, dropout=0.0, pre_norm=False))

    def torch_attention(module, q, k, v):
        return twin(module, nn.MultiheadAttention(16, 4, batch_first=True))(q, k, v)[0]

    def feed(layer, x):
        return layer.linear2(layer.linear1(x).relu())

    source, pos = torch.randn(2, 7, 16, **DOUBLE), torch.randn(7, 16, **DOUBLE)
    x = encoder.norm1(source + torch_attention(encoder.self_attn, source + pos, source + pos, source))
    memory = encoder.norm2(x + feed(encoder, x))
    torch.testing.assert_close(encoder(source, pos), memory, **TOLERANCE)

    queries, query_pos = torch.randn(2, 5, 16, **DOUBLE), torch.randn(5, 16, **DOUBLE)
    x = decoder.norm1(queries + torch_attention(decoder.self_attn, queries + query_pos, queries + query_pos, queries))
    x = decoder.norm2(x + torch_attention(decoder.multihead_attn, x + query_pos, memory + pos, memory))
    x = decoder.norm3(x + feed(decoder, x))
    torch.testing.assert_close(decoder(queries, query_pos, memory + pos, memory), x, **TOLERANCE)


@pytest.mark.parametrize("pre_norm", [True, False])
def test_stacks_and_their_norms(randomize, pre_norm):
    encoder = randomize(TransformerEncoder(2, 16, 4, 20, 0.0, pre_norm))
    decoder = randomize(TransformerDecoder(2, 16, 4, 20, 0.0, pre_norm))
    assert (encoder.norm is not None) == pre_norm
    x, pos = torch.randn(1, 4, 16, **DOUBLE), torch.randn(4, 16, **DOUBLE)
    encoded = encoder.layers[1](encoder.layers[0](x, pos), pos)
    torch.testing.assert_close(encoder(x, pos), encoder.norm(encoded) if pre_norm else encoded, **TOLERANCE)
    first = decoder.layers[0](x, pos, encoded + pos, encoded)
    second = decoder.layers[1](first, pos, encoded + pos, encoded)
    outputs = decoder(x, pos, encoded + pos, encoded)
    assert len(outputs) == 2
    torch.testing.assert_close(outputs[0], decoder.norm(first), **TOLERANCE)
    torch.testing.assert_close(outputs[1], decoder.norm(second), **TOLERANCE)
