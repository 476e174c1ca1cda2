"""Pixel decoders against their formulas, written out with functional operations on the parameters."""

import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import nn

from mask2former_plugin.modeling import build_pixel_decoder
from mask2former_plugin.modeling.layers import reference_points, sine_position_encoding
from mask2former_plugin.modeling.pixel_decoders.deformable import DeformableEncoderLayer
from mask2former_plugin.modeling.pixel_decoders.fpn import plus_upsampled

# float64; sums of a few thousand terms, through several norms
TOLERANCE = {"rtol": 0, "atol": 1e-10}
CPU_DOUBLE = {"device": torch.device("cpu"), "dtype": torch.float64}


def convolution(state, name, x):
    weight = state[f"{name}.weight"]
    x = F.conv2d(x, weight, state.get(f"{name}.bias"), padding=weight.shape[2] // 2)
    if f"{name}.norm.weight" in state:
        x = F.group_norm(x, 32, state[f"{name}.norm.weight"], state[f"{name}.norm.bias"])
    return x


def nearest(x, size):
    rows = [int(r * x.shape[2] / size[0]) for r in range(size[0])]
    columns = [int(c * x.shape[3] / size[1]) for c in range(size[1])]
    return x[:, :, rows][:, :, :, columns]


def fpn(state, features, top):
    """(mask features, maps from coarse to fine) of the plain FPN, given what enters the coarsest convolution."""
    maps = [convolution(state, "layer_4", top).relu()]
    for number, name in ((3, "res4"), (2, "res3"), (1, "res2")):
        lateral = convolution(state, f"adapter_{number}", features[name])
        maps.append(convolution(state, f"layer_{number}", lateral + nearest(maps[-1], lateral.shape[2:])).relu())
    return convolution(state, "mask_features", maps[-1]), maps[:3]


def assert_outputs_and_gradients(decoder, features, expected):
    mask_features, encoder_features, maps = decoder.forward_features(features)
    wanted_mask_features, wanted_encoder_features, wanted_maps = expected
    outputs, wanted = [mask_features, *maps], [wanted_mask_features, *wanted_maps]
    if wanted_encoder_features is None:
        assert encoder_features is None
    else:
        outputs.append(encoder_features)
        wanted.append(wanted_encoder_features)
    assert len(outputs) == len(wanted)
    for output, w in zip(outputs, wanted):
        torch.testing.assert_close(output, w, **TOLERANCE)
    names, parameters = zip(*decoder.named_parameters())
    noise = [torch.randn_like(w) / w.numel() for w in wanted]
    actual = torch.autograd.grad(sum((o * n).sum() for o, n in zip(outputs, noise)), parameters)
    reference = torch.autograd.grad(sum((w * n).sum() for w, n in zip(wanted, noise)), parameters)
    for name, a, r in zip(names, actual, reference):
        torch.testing.assert_close(a, r, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def build(small_config, input_shape, randomize):
    def make(name, *options):
        return randomize(
            build_pixel_decoder(small_config("MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", name, *options), input_shape)
        )

    return make


@pytest.mark.parametrize("norm", ["GN", ""])
def test_fpn(build, features, norm):
    decoder = build("BasePixelDecoder", "MODEL.SEM_SEG_HEAD.NORM", norm)
    state = dict(decoder.named_parameters())
    assert ("adapter_1.bias" in state) == ("layer_4.bias" in state) == (norm == "")
    maps = features()
    mask_features, levels = fpn(state, maps, maps["res5"])
    assert mask_features.shape == (2, 32, 19, 26)
    assert [m.shape[2:] for m in levels] == [(3, 4), (5, 7), (10, 13)]
    assert_outputs_and_gradients(decoder, maps, (mask_features, None, levels))


@pytest.mark.parametrize("pre_norm", [False, True])
def test_transformer_encoder_fpn(build, features, pre_norm):
    decoder = build("TransformerEncoderPixelDecoder", "MODEL.MASK_FORMER.PRE_NORM", pre_norm)
    assert ("transformer.encoder.norm.weight" in decoder.state_dict()) == pre_norm
    state = dict(decoder.named_parameters())
    maps = features()
    x = convolution(state, "input_proj", maps["res5"])
    tokens = x.flatten(2).transpose(1, 2)
    pos = sine_position_encoding((3, 4), 32, **CPU_DOUBLE).flatten(0, 1)
    encoded = decoder.transformer.encoder(tokens, pos).transpose(1, 2).reshape(x.shape)
    mask_features, levels = fpn(state, maps, encoded)
    assert_outputs_and_gradients(decoder, maps, (mask_features, encoded, levels))


def deformable(decoder, state, maps, names, fpn_names):
    """The published decoder, level by level and layer by layer."""
    projected = []
    for number, name in enumerate(names):
        x = convolution(state, f"input_proj.{number}.0", maps[name])
        projected.append(
            F.group_norm(x, 32, state[f"input_proj.{number}.1.weight"], state[f"input_proj.{number}.1.bias"])
        )
    sizes = [tuple(p.shape[2:]) for p in projected]
    tokens = torch.cat([p.flatten(2).transpose(1, 2) for p in projected], dim=1)
    pos = torch.cat(
        [
            sine_position_encoding(size, 32, **CPU_DOUBLE).reshape(-1, 32) + state["transformer.level_embed"][number]
            for number, size in enumerate(sizes)
        ]
    )
    points = reference_points(sizes, **CPU_DOUBLE)
    for layer in decoder.transformer.encoder.layers:
        tokens = layer.norm1(tokens + layer.self_attn(tokens + pos, tokens, sizes, points))
        tokens = layer.norm2(tokens + layer.linear2(layer.linear1(tokens).relu()))
    levels, start = [], 0
    for height, width in sizes:
        level = tokens[:, start : start + height * width]
        levels.append(level.transpose(1, 2).reshape(2, 32, height, width))
        start += height * width
    for number, name in fpn_names:
        lateral = convolution(state, f"adapter_{number}", maps[name])
        upsampled = F.interpolate(levels[-1], lateral.shape[2:], mode="bilinear", align_corners=False)
        levels.append(convolution(state, f"layer_{number}", lateral + upsampled).relu())
    return convolution(state, "mask_features", levels[-1]), levels[0], levels[:3]


@pytest.mark.parametrize(
    "names, fpn_names",
    [
        (["res5", "res4", "res3"], [(1, "res2")]),
        (["res5", "res4"], [(2, "res3"), (1, "res2")]),
        (["res5", "res4", "res3", "res2"], []),
    ],
)
def test_deformable(build, features, names, fpn_names):
    key = "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES"
    decoder = build("MSDeformAttnPixelDecoder", key, sorted(names))
    maps = features((45, 61))
    state = dict(decoder.named_parameters())
    assert_outputs_and_gradients(decoder, maps, deformable(decoder, state, maps, names, fpn_names))


def test_deformable_stays_in_the_precision_it_is_given(build, features):
    decoder = build("MSDeformAttnPixelDecoder").float()
    maps = features(dtype=torch.float32)
    exact, _, _ = decoder.forward_features(maps)
    places = []
    for layer in decoder.transformer.encoder.layers:
        layer.register_forward_pre_hook(lambda module, inputs: places.append(inputs[3]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, _, _ = decoder.forward_features(maps)
    assert mixed.dtype == torch.bfloat16
    half, _, _ = decoder.bfloat16().forward_features({name: m.bfloat16() for name, m in maps.items()})
    assert half.dtype == torch.bfloat16
    assert len(places) == 4 and all(points.dtype == torch.float32 for points in places)  # see test_precision.py
    for output in (mixed, half):
        correlation = torch.corrcoef(torch.stack((output.float().flatten(), exact.flatten())))[0, 1]
        assert correlation > 0.999


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("norm", ["GN", ""])
def test_lean_training_with_two_finer_levels(build, features, norm, changed):
    """The same results and gradients, also with an adapter in the place of a convolution and a hook on another."""

    class Adapted(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.scale = layer, nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

        def forward(self, x):
            return self.layer(x) * self.scale

    key = "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES"
    decoder = build("MSDeformAttnPixelDecoder", key, ["res4", "res5"], "MODEL.SEM_SEG_HEAD.NORM", norm)
    if changed:
        decoder.layer_1 = Adapted(decoder.layer_1)
        decoder.layer_2.register_forward_hook(lambda module, inputs, output: 2 * output)
    inputs, noise = features((33, 47)), torch.randn(2, 32, 9, 12, dtype=torch.float64)
    found = []
    for lean in (False, True):
        decoder.train().recompute_cheap_steps = lean
        output = decoder.forward_features(inputs)[0]
        found.append((output, torch.autograd.grad((output * noise).sum(), tuple(decoder.parameters()))))
    torch.testing.assert_close(*found, rtol=0, atol=1e-10)


@pytest.mark.parametrize("training", [False, True])
def test_who_hangs_on_a_part_of_an_encoder_layer_is_called_once(training):
    """With all tokens, more than a CPU treats at once; results and gradients stay the same."""
    size, recorded = (40, 60), {}
    layer = DeformableEncoderLayer(32, 1, 4, 4, feedforward=1024, dropout=0.0).double().train(training)
    layer.recompute_cheap_steps = True
    x, pos = torch.randn(2, math.prod(size), 32, dtype=torch.float64), torch.randn(math.prod(size), 32).double()
    noise, points = torch.randn_like(x), reference_points([size], **CPU_DOUBLE)

    def run():
        with torch.set_grad_enabled(training):
            output = layer(x, pos, [size], points)
        return output, torch.autograd.grad((output * noise).sum(), tuple(layer.parameters())) if training else ()

    expected = run()
    for name in ("self_attn", "linear1"):
        hook = layer.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: recorded.setdefault(name, []).append(output.shape)
        )
        torch.testing.assert_close(run(), expected, rtol=0, atol=1e-10)
        hook.remove()
    assert recorded == {"self_attn": [x.shape], "linear1": [(2, math.prod(size), 1024)]}


def test_an_encoder_layer_takes_another_attention():
    class Other(nn.Module):
        def forward(self, query, value, spatial_shapes, points):
            return value.mean(1, keepdim=True) + 0 * query

    layer = DeformableEncoderLayer(32, 1, 4, 4, feedforward=64, dropout=0.0).double().eval()
    layer.self_attn = Other()
    x, pos = torch.randn(2, 12, 32, dtype=torch.float64), torch.zeros(12, 32, dtype=torch.float64)
    hidden = layer.norm1(x + x.mean(1, keepdim=True))
    expected = layer.norm2(hidden + layer.linear2(layer.linear1(hidden).relu()))
    found = layer(x, pos, [(3, 4)], reference_points([(3, 4)], **CPU_DOUBLE))
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_sums_of_two_precisions_have_the_wider_one():
    fine, coarse = torch.randn(1, 2, 5, 6), torch.randn(1, 2, 3, 3)
    for mode in ("nearest", "bilinear"):
        expected = fine + F.interpolate(coarse, size=(5, 6), mode=mode)
        torch.testing.assert_close(plus_upsampled(fine, coarse, mode), expected)
        same = torch.randn(1, 2, 5, 6)
        torch.testing.assert_close(plus_upsampled(fine, same, mode), fine + same)  # neither is overwritten
        for one, other in ((fine.bfloat16(), coarse), (fine, coarse.bfloat16())):
            assert plus_upsampled(one, other, mode).dtype == torch.float32


def test_drops_only_in_training(small_config, input_shape, features):
    maps = features(dtype=torch.float32)
    for name in ("TransformerEncoderPixelDecoder", "MSDeformAttnPixelDecoder"):
        cfg = small_config("MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", name, "MODEL.MASK_FORMER.DROPOUT", 0.5)
        decoder = build_pixel_decoder(cfg, input_shape)
        assert not torch.equal(decoder(maps)[0], decoder(maps)[0])
        decoder.eval()
        assert torch.equal(decoder(maps)[0], decoder(maps)[0])


def test_initial_values(small_config, input_shape):
    decoder = build_pixel_decoder(small_config(), input_shape)
    state = decoder.state_dict()
    for name in ("input_proj.0.0", "mask_features", "layer_1", "transformer.encoder.layers.0.self_attn.value_proj"):
        weight = state[f"{name}.weight"]
        fan_in, fan_out = (math.prod(weight.shape[1:]), weight.shape[0])
        # Caffe2's xavier looks at the inputs only
        bound = math.sqrt(3 / fan_in) if name in ("mask_features", "layer_1") else math.sqrt(6 / (fan_in + fan_out))
        assert 0.9 * bound < weight.abs().max() <= bound, name
        assert not state.get(f"{name}.bias", torch.zeros(1)).any()
    assert state["transformer.level_embed"].std() > 0.7


def test_levels_are_chosen_by_the_config(small_config, input_shape):
    shapes = {**input_shape, "stem": ShapeSpec(channels=4, stride=2)}
    decoder = build_pixel_decoder(small_config("MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "BasePixelDecoder"), shapes)
    assert decoder.in_features == ["res2", "res3", "res4", "res5"]
    assert decoder.mask_dim == 32


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("IN_FEATURES", ["res2", "res6"], r"IN_FEATURES asks for \['res2', 'res6'\], but there is only"),
        ("IN_FEATURES", [], r"IN_FEATURES asks for \[\]"),
        ("DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES", ["p3"], r"ENCODER_IN_FEATURES asks for \['p3'\]"),
        ("COMMON_STRIDE", 0.125, "COMMON_STRIDE 0.125 needs 6 levels"),
    ],
)
def test_errors_name_the_key(small_config, input_shape, key, value, message):
    cfg = small_config()
    setattr(cfg.MODEL.SEM_SEG_HEAD, key, value)
    with pytest.raises(ValueError, match=message):
        build_pixel_decoder(cfg, input_shape)


def test_not_a_pixel_decoder(small_config, input_shape):
    class Nothing(nn.Module):
        def __init__(self, cfg, input_shape):
            super().__init__()

    if "NoPixelDecoderForTest" not in SEM_SEG_HEADS_REGISTRY:
        Nothing.__name__ = "NoPixelDecoderForTest"
        SEM_SEG_HEADS_REGISTRY.register(Nothing)
    with pytest.raises(ValueError, match="NoPixelDecoderForTest is no pixel decoder"):
        build_pixel_decoder(small_config("MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "NoPixelDecoderForTest"), input_shape)
