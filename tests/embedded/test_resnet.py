"""ResNets: published parameter counts and names, a forward pass written out, freezing, dilation, config errors."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, ResNet, build_backbone
from detectron2.modeling.backbone import BasicStem, BottleneckBlock, build_resnet_backbone
from detectron2.projects.deeplab import add_deeplab_config, build_resnet_deeplab_backbone

STAGES = ["res2", "res3", "res4", "res5"]


def config(depth=50, norm="BN", freeze_at=0, deeplab=False, **resnets):
    cfg = get_cfg()
    add_deeplab_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_deeplab_backbone" if deeplab else "build_resnet_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    options = cfg.MODEL.RESNETS
    options.DEPTH, options.NORM, options.OUT_FEATURES, options.STRIDE_IN_1X1 = depth, norm, STAGES, False
    if depth < 50:
        options.RES2_OUT_CHANNELS = 64
    for key, value in resnets.items():
        options[key] = value
    return cfg


def build(*args, device="meta", **kwargs):
    with torch.device(device):
        return build_backbone(config(*args, **kwargs))


def randomise(module):
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name.endswith(("running_var", "norm.weight")):
                value.uniform_(0.5, 1.5)
            elif value.is_floating_point():
                value.normal_(std=1 / math.sqrt(value[0].numel() if value.dim() > 1 else 100))
    return module


@pytest.mark.parametrize(
    "depth, count", [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032), (101, 44_549_160), (152, 60_192_808)]
)
def test_published_parameter_counts(depth, count):
    with torch.device("meta"):
        network = ResNet(BasicStem(), ResNet.make_default_stages(depth), num_classes=1000)
    assert sum(parameter.numel() for parameter in network.parameters()) == count


def test_resnext_parameter_count():
    network = build(NUM_GROUPS=32, WIDTH_PER_GROUP=4)
    classifier = 2048 * 1000 + 1000
    assert sum(parameter.numel() for parameter in network.parameters()) + classifier == 25_028_904


def test_parameter_names_of_resnet50():
    network = build(norm="FrozenBN")
    expected = {f"stem.conv1.norm.{name}" for name in ("weight", "bias", "running_mean", "running_var")} | {
        "stem.conv1.weight"
    }
    for stage, count in zip(STAGES, (3, 4, 6, 3)):
        for block in range(count):
            for conv in ("conv1", "conv2", "conv3") + (("shortcut",) if block == 0 else ()):
                prefix = f"{stage}.{block}.{conv}"
                expected |= {f"{prefix}.norm.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
                expected.add(f"{prefix}.weight")
    state = network.state_dict()
    assert set(state) == expected
    assert sum(parameter.numel() for parameter in network.parameters()) == 23_454_912
    assert state["res4.0.conv1.weight"].shape == (256, 512, 1, 1)
    assert state["res4.5.conv2.weight"].shape == (256, 256, 3, 3)
    assert state["res5.0.shortcut.weight"].shape == (2048, 1024, 1, 1)
    synchronised = set(build(norm="SyncBN").state_dict())
    counters = {name for name in synchronised if name.endswith("num_batches_tracked")}
    assert synchronised - counters == expected and len(counters) == 53


def conv_bn(state, name, x, **kwargs):
    x = F.conv2d(x, state[f"{name}.weight"], **kwargs)
    weight, bias, mean, var = (
        state[f"{name}.norm.{part}"].view(1, -1, 1, 1) for part in ("weight", "bias", "running_mean", "running_var")
    )
    return (x - mean) / torch.sqrt(var + 1e-5) * weight + bias


def slow_resnet(state, depth, x, stride_in_1x1=False, dilations=((1,), (1,), (1,), (1,)), first_strides=(1, 2, 2, 2)):
    counts = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}[depth]
    if "stem.conv3.weight" in state:
        x = conv_bn(state, "stem.conv1", x, stride=2, padding=1).relu()
        x = conv_bn(state, "stem.conv2", x, padding=1).relu()
        x = conv_bn(state, "stem.conv3", x, padding=1).relu()
    else:
        x = conv_bn(state, "stem.conv1", x, stride=2, padding=3).relu()
    x = F.max_pool2d(x, 3, 2, 1)
    features = {}
    for stage, count, dilation, first in zip(STAGES, counts, dilations, first_strides):
        for block in range(count):
            name, stride, grid = f"{stage}.{block}", first if block == 0 else 1, dilation[block % len(dilation)]
            skip = conv_bn(state, f"{name}.shortcut", x, stride=stride) if f"{name}.shortcut.weight" in state else x
            if depth == 18:
                y = conv_bn(state, f"{name}.conv1", x, stride=stride, padding=1).relu()
                y = conv_bn(state, f"{name}.conv2", y, padding=1)
            else:
                y = conv_bn(state, f"{name}.conv1", x, stride=stride if stride_in_1x1 else 1).relu()
                y = conv_bn(
                    state, f"{name}.conv2", y, stride=1 if stride_in_1x1 else stride, padding=grid, dilation=grid
                ).relu()
                y = conv_bn(state, f"{name}.conv3", y)
            x = (y + skip).relu()
        features[stage] = x
    return features


@pytest.mark.parametrize(
    "arguments, reference, strides",
    [
        (dict(depth=18), dict(depth=18), (4, 8, 16, 32)),
        (dict(depth=50, norm="FrozenBN"), dict(depth=50), (4, 8, 16, 32)),
        (dict(depth=50, STRIDE_IN_1X1=True), dict(depth=50, stride_in_1x1=True), (4, 8, 16, 32)),
        (
            dict(depth=50, RES5_DILATION=2),
            dict(depth=50, dilations=((1,), (1,), (1,), (2,)), first_strides=(1, 2, 2, 1)),
            (4, 8, 16, 16),
        ),
        (
            dict(depth=50, deeplab=True, STEM_OUT_CHANNELS=128),
            dict(depth=50, dilations=((1,), (1,), (1,), (1, 2, 4))),
            (4, 8, 16, 32),
        ),
        (
            dict(depth=50, deeplab=True, RES4_DILATION=2, RES5_DILATION=4, RES5_MULTI_GRID=[1, 2, 1]),
            dict(depth=50, dilations=((1,), (1,), (2,), (4, 8, 4)), first_strides=(1, 2, 1, 1)),
            (4, 8, 8, 8),
        ),
    ],
    ids=["R18", "R50", "R50 caffe", "R50 dilated", "R50c multi-grid", "R50c dilated"],
)
def test_forward_written_out(arguments, reference, strides):
    network = randomise(build(device="cpu", **arguments)).eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        features, expected = network(x), slow_resnet(network.state_dict(), x=x, **reference)
    assert list(features) == STAGES
    shapes = network.output_shape()
    for name, stride in zip(STAGES, strides):
        torch.testing.assert_close(features[name], expected[name], rtol=1e-3, atol=1e-4)
        assert shapes[name].stride == stride and shapes[name].channels == features[name].shape[1]
        assert features[name].shape[-2:] == (64 // stride, 96 // stride)


def test_deeplab_stem_shapes():
    state = build(101, "FrozenBN", deeplab=True, STEM_OUT_CHANNELS=128).state_dict()
    assert state["stem.conv1.weight"].shape == (64, 3, 3, 3)
    assert state["stem.conv2.weight"].shape == (64, 64, 3, 3)
    assert state["stem.conv3.weight"].shape == (128, 64, 3, 3)
    assert state["res2.0.conv1.weight"].shape == (64, 128, 1, 1)
    assert "res4.22.conv3.weight" in state and "res4.23.conv3.weight" not in state
    assert type(build(50, deeplab=True, STEM_TYPE="basic").stem) is BasicStem


@pytest.mark.parametrize("freeze_at", range(6))
def test_freeze(freeze_at):
    network = build(18, freeze_at=freeze_at)
    parts = ["stem", *STAGES]
    for index, part in enumerate(parts, start=1):
        frozen = index <= freeze_at
        module = getattr(network, part)
        assert all(parameter.requires_grad != frozen for parameter in module.parameters())
        assert any(isinstance(child, FrozenBatchNorm2d) for child in module.modules()) == frozen
        assert any(isinstance(child, nn.BatchNorm2d) for child in module.modules()) != frozen


def test_only_what_is_asked_for_is_built_and_returned():
    network = build(18, OUT_FEATURES=["stem", "res3"], device="cpu")
    assert not hasattr(network, "res4")
    features = network(torch.randn(1, 3, 32, 32))
    assert {name: tuple(value.shape) for name, value in features.items()} == {
        "stem": (1, 64, 8, 8),
        "res3": (1, 128, 4, 4),
    }
    assert network.output_shape() == {
        "stem": ShapeSpec(channels=64, stride=4),
        "res3": ShapeSpec(channels=128, stride=8),
    }


def test_classifier():
    network = ResNet(BasicStem(), ResNet.make_default_stages(18), num_classes=7).eval()
    x = torch.randn(2, 3, 32, 32)
    out = network(x)
    assert list(out) == ["linear"]
    pooled = network.res5(network.res4(network.res3(network.res2(network.stem(x))))).mean((2, 3))
    torch.testing.assert_close(out["linear"], pooled @ network.linear.weight.T + network.linear.bias)


def test_convolutions_start_as_he_et_al():
    network = build(18, device="cpu")
    weight = network.res4[1].conv1.weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (256 * 9)), rel=0.02)
    assert (network.res4[1].conv1.norm.weight == 1).all()


def test_make_stage():
    stage = ResNet.make_stage(
        BottleneckBlock,
        3,
        in_channels=16,
        out_channels=64,
        bottleneck_channels=8,
        stride_per_block=[2, 1, 1],
        dilation_per_block=[1, 2, 4],
    )
    assert [block.stride for block in stage] == [2, 1, 1]
    assert [block.conv2.dilation[0] for block in stage] == [1, 2, 4]
    assert [block.in_channels for block in stage] == [16, 64, 64]
    with pytest.raises(AssertionError):
        ResNet.make_stage(
            BottleneckBlock, 3, in_channels=16, out_channels=64, bottleneck_channels=8, stride_per_block=[2, 1]
        )
    with pytest.raises(AssertionError):
        ResNet.make_stage(
            BottleneckBlock, 1, in_channels=16, out_channels=64, bottleneck_channels=8, stride=1, stride_per_block=[2]
        )


def test_image_channels_follow_pixel_mean():
    cfg = config(18)
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [0.5] * 5, [1.0] * 5
    assert build_backbone(cfg).stem.conv1.in_channels == 5
    assert build_resnet_backbone(cfg, ShapeSpec(channels=4)).stem.conv1.in_channels == 4


def test_interface():
    class Toy(Backbone):
        def forward(self, x):
            return {"a": x}

    toy = Toy()
    assert toy.size_divisibility == 0 and toy.padding_constraints == {}
    toy._out_features, toy._out_feature_channels, toy._out_feature_strides = ["a"], {"a": 3}, {"a": 1}
    assert toy.output_shape() == {"a": ShapeSpec(channels=3, stride=1)}
    with pytest.raises(TypeError):
        Backbone()
    assert BACKBONE_REGISTRY.get("build_resnet_deeplab_backbone") is build_resnet_deeplab_backbone


def test_bad_configs():
    with pytest.raises(AssertionError, match="RES2_OUT_CHANNELS"):
        build(18, RES2_OUT_CHANNELS=256)
    with pytest.raises(AssertionError):
        build(18, RES5_DILATION=2)
    with pytest.raises(AssertionError):
        build(50, RES5_DILATION=3)
    with pytest.raises(KeyError, match="20"):
        build(20, RES2_OUT_CHANNELS=64)
    with pytest.raises(AssertionError):
        build(50, OUT_FEATURES=["res2", "res6"])
    with pytest.raises(ValueError, match="plain"):
        build(50, deeplab=True, STEM_TYPE="plain")
    with pytest.raises(AssertionError):
        build(50, deeplab=True, RES4_DILATION=2)
    with pytest.raises(AssertionError):
        build(50, device="cpu")(torch.zeros(3, 32, 32))


@pytest.mark.embedded_only
def test_errors_name_key_and_neighbours():
    cfg = config()
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbon"
    with pytest.raises(
        KeyError, match="MODEL.BACKBONE.NAME is 'build_resnet_backbon'.*did you mean build_resnet_backbone"
    ):
        build_backbone(cfg)
    with pytest.raises(AssertionError, match=r"\['res6'\]; there are \['stem', 'res2'"):
        build(50, OUT_FEATURES=["res2", "res6"])
    with pytest.raises(NotImplementedError, match="DEFORM_ON_PER_STAGE.*install upstream"):
        build(50, DEFORM_ON_PER_STAGE=[False, True, False, False])
    with pytest.raises(AssertionError, match="no dilated blocks"):
        build(18, deeplab=True)
