"""Swin Transformer against the published definition, window by window."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch.nn.attention import SDPBackend, sdpa_kernel

from mask2former_plugin.modeling import D2SwinTransformer
from mask2former_plugin.modeling.backbones.swin import DropPath

SMALL = {"embed_dim": 8, "depths": (2, 2, 2, 1), "num_heads": (1, 2, 2, 4), "window_size": 3, "drop_path_rate": 0.0}
TOLERANCE = {"rtol": 0, "atol": 1e-11}  # float64


def layer_norm(state, name, x):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def linear(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def padded(x, multiple):
    """``[B, H, W, C]`` with zeros added at the bottom and on the right."""
    batch, height, width, channels = x.shape
    full = x.new_zeros(batch, -(-height // multiple) * multiple, -(-width // multiple) * multiple, channels)
    full[:, :height, :width] = x
    return full


def region(place, extent, window, shift):
    """Number of the part of the map that a place of the shifted map belongs to."""
    return (place >= extent - window) + (place >= extent - shift)


def window_attention(state, name, x, window, shift, heads, scale):
    """Attention of every window on its own, every head on its own, with all places enumerated."""
    batch, height, width, channels = x.shape
    x = padded(x, window)
    rows, columns = x.shape[1:3]
    if shift:
        x = torch.roll(x, (-shift, -shift), (1, 2))
    output = torch.zeros_like(x)
    places = [(r, c) for r in range(window) for c in range(window)]
    table = state[f"{name}.relative_position_bias_table"]
    scale = scale or (channels // heads) ** -0.5
    for top in range(0, rows, window):
        for left in range(0, columns, window):
            tokens = x[:, top : top + window, left : left + window].reshape(batch, window * window, channels)
            q, k, v = linear(state, f"{name}.qkv", tokens).chunk(3, dim=2)
            mask = torch.zeros(len(places), len(places), dtype=x.dtype)
            index = torch.zeros(len(places), len(places), dtype=torch.long)
            for i, (r1, c1) in enumerate(places):
                for j, (r2, c2) in enumerate(places):
                    index[i, j] = (r1 - r2 + window - 1) * (2 * window - 1) + c1 - c2 + window - 1
                    if shift:
                        here = region(top + r1, rows, window, shift), region(left + c1, columns, window, shift)
                        there = region(top + r2, rows, window, shift), region(left + c2, columns, window, shift)
                        mask[i, j] = 0.0 if here == there else -100.0
            assert torch.equal(index, state[f"{name}.relative_position_index"])
            attended = []
            for head, (qh, kh, vh) in enumerate(zip(q.chunk(heads, 2), k.chunk(heads, 2), v.chunk(heads, 2))):
                logits = scale * qh @ kh.transpose(1, 2) + table[index, head] + mask
                attended.append(logits.softmax(2) @ vh)
            result = linear(state, f"{name}.proj", torch.cat(attended, 2))
            output[:, top : top + window, left : left + window] = result.reshape(batch, window, window, channels)
    if shift:
        output = torch.roll(output, (shift, shift), (1, 2))
    return output[:, :height, :width]


def swin(state, image, depths, num_heads, window_size, scale=None):
    """The whole backbone from its checkpoint."""
    image = padded(image.permute(0, 2, 3, 1), 4).permute(0, 3, 1, 2)
    x = F.conv2d(image, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=4).permute(0, 2, 3, 1)
    if "patch_embed.norm.weight" in state:
        x = layer_norm(state, "patch_embed.norm", x)
    if "absolute_pos_embed" in state:
        embed = F.interpolate(state["absolute_pos_embed"], x.shape[1:3], mode="bicubic", align_corners=False)
        x = x + embed.permute(0, 2, 3, 1)
    outputs = {}
    for stage, (depth, heads) in enumerate(zip(depths, num_heads)):
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}"
            shift = window_size // 2 if block % 2 else 0
            normed = layer_norm(state, f"{name}.norm1", x)
            x = x + window_attention(state, f"{name}.attn", normed, window_size, shift, heads, scale)
            hidden = F.gelu(linear(state, f"{name}.mlp.fc1", layer_norm(state, f"{name}.norm2", x)))
            x = x + linear(state, f"{name}.mlp.fc2", hidden)
        outputs[f"res{stage + 2}"] = layer_norm(state, f"norm{stage}", x).permute(0, 3, 1, 2)
        if stage + 1 < len(depths):
            x = padded(x, 2)
            neighbours = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
            merged = layer_norm(state, f"layers.{stage}.downsample.norm", torch.cat(neighbours, 3))
            x = linear(state, f"layers.{stage}.downsample.reduction", merged)
    return outputs


@pytest.mark.parametrize(
    "size, options",
    [
        ((29, 45), {}),  # no side a multiple of anything; several windows, padded
        ((24, 12), {"qkv_bias": False, "patch_norm": False}),  # exactly 2×1 windows at first
        ((9, 11), {"ape": True, "pretrain_img_size": 32, "qk_scale": 0.3, "mlp_ratio": 2.0}),  # smaller than a window
        ((33, 37), {"window_size": 4}),
    ],
)
def test_values_and_gradients(randomize, size, options):
    options = SMALL | options
    backbone = randomize(D2SwinTransformer(**options))
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    state = dict(backbone.state_dict()) | dict(backbone.named_parameters())
    expected = swin(
        state, image, options["depths"], options["num_heads"], options["window_size"], options.get("qk_scale")
    )
    outputs = backbone(image)
    assert outputs.keys() == expected.keys()
    for name, specification in backbone.output_shape().items():
        assert outputs[name].shape == (2, specification.channels, *(-(-s // specification.stride) for s in size))
        torch.testing.assert_close(outputs[name], expected[name], **TOLERANCE)
    names, parameters = zip(*backbone.named_parameters())
    noise = {name: torch.randn_like(output) for name, output in expected.items()}
    actual = torch.autograd.grad(sum((outputs[k] * noise[k]).sum() for k in noise), parameters)
    wanted = torch.autograd.grad(sum((expected[k] * noise[k]).sum() for k in noise), parameters)
    for name, a, w in zip(names, actual, wanted):
        scale = max(1.0, w.abs().max().item())
        torch.testing.assert_close(a / scale, w / scale, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


def test_published_names_and_shapes(full_config):
    with torch.device("meta"):
        backbone = BACKBONE_REGISTRY.get("D2SwinTransformer")(full_config(), ShapeSpec(channels=3))
    state = {name: tuple(tensor.shape) for name, tensor in backbone.state_dict().items()}
    assert sum(p.numel() for p in backbone.parameters()) == 27_520_698
    expected = {
        "patch_embed.proj.weight": (96, 3, 4, 4),
        "patch_embed.norm.bias": (96,),
        "layers.2.blocks.5.norm1.weight": (384,),
        "layers.2.blocks.5.attn.relative_position_bias_table": (169, 12),
        "layers.2.blocks.5.attn.relative_position_index": (49, 49),
        "layers.2.blocks.5.attn.qkv.weight": (1152, 384),
        "layers.2.blocks.5.attn.proj.bias": (384,),
        "layers.2.blocks.5.mlp.fc1.weight": (1536, 384),
        "layers.2.blocks.5.mlp.fc2.weight": (384, 1536),
        "layers.1.downsample.norm.weight": (768,),
        "layers.1.downsample.reduction.weight": (384, 768),
        "norm3.weight": (768,),
    }
    assert {name: state[name] for name in expected} == expected
    assert backbone.state_dict()["layers.0.blocks.0.attn.relative_position_index"].dtype == torch.int64
    assert "layers.3.downsample.norm.weight" not in state and not any("separation" in name for name in state)
    assert backbone.size_divisibility == 32
    assert [s.stride for s in backbone.output_shape().values()] == [4, 8, 16, 32]
    assert [b.drop_path.rate for stage in backbone.layers for b in stage.blocks] == pytest.approx(
        [i * 0.3 / 11 for i in range(12)]
    )


def test_modes_return_the_module():
    backbone = D2SwinTransformer(**SMALL)
    assert backbone.eval() is backbone and not backbone.training
    assert backbone.train() is backbone and backbone.training


@pytest.mark.parametrize("wanted", [["res2"], ["res3", "res4"], ["res5"], ["res2", "res5"]])
def test_subset_of_the_outputs(wanted):
    full, part = D2SwinTransformer(**SMALL), D2SwinTransformer(**SMALL, out_features=wanted)
    part.load_state_dict(full.state_dict(), strict=True)
    image = torch.randn(1, 3, 32, 40)
    outputs = part(image)
    assert list(outputs) == wanted == list(part.output_shape())
    for name, output in outputs.items():
        assert torch.equal(output, full(image)[name])
    sum(output.square().sum() for output in outputs.values()).backward()
    # distributed training hangs on a trainable parameter without gradient
    assert [name for name, p in part.named_parameters() if p.requires_grad != (p.grad is not None)] == []


def test_checkpointing_changes_nothing():
    plain, thrifty = D2SwinTransformer(**SMALL), D2SwinTransformer(**SMALL, use_checkpoint=True)
    thrifty.load_state_dict(plain.state_dict())
    image = torch.randn(1, 3, 33, 40)
    for backbone in (plain, thrifty):
        sum(output.square().sum() for output in backbone(image).values()).backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), thrifty.named_parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6, msg=name)


def test_drop_path_drops_samples_and_keeps_the_mean():
    drop = DropPath(0.25)
    x = torch.ones(4000, 2, 3)
    dropped = drop(x)
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert torch.equal(dropped, dropped[:, :1, :1].expand_as(dropped))
    assert abs(dropped.mean().item() - 1) < 0.05  # five standard deviations
    assert drop.eval()(x) is x and DropPath(0.0)(x) is x


def test_bfloat16():
    backbone = D2SwinTransformer(**SMALL).eval()
    image = torch.randn(1, 3, 32, 40)
    exact = backbone(image)["res5"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = backbone(image)["res5"]
    half = backbone.bfloat16()(image.bfloat16())["res5"]
    assert half.dtype == torch.bfloat16
    for output in (mixed, half):
        assert torch.corrcoef(torch.stack((output.float().flatten(), exact.flatten())))[0, 1] > 0.99


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"out_features": ["res1"]},
            r"OUT_FEATURES must name some of \['res2', 'res3', 'res4', 'res5'\], got \['res1'\]",
        ),
        ({"num_heads": (1, 2)}, "DEPTHS .* and MODEL.SWIN.NUM_HEADS .* differ in length"),
        ({"num_heads": (3, 3, 3, 3)}, "width 8 of a stage must be a multiple of its number of heads 3"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        D2SwinTransformer(**SMALL | options)


def test_attention_is_fused_on_cpus():
    backbone, image = D2SwinTransformer(**SMALL).eval(), torch.randn(1, 3, 40, 50)
    with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # any other kernel is an error
        outputs = backbone(image)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        for name, expected in backbone(image).items():
            torch.testing.assert_close(outputs[name], expected, rtol=0, atol=1e-4)  # float32
