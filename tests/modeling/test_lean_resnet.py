"""Lean ResNets: values and gradients of Detectron2's own modules, from fewer kept tensors."""

import copy

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, ResNet
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import parametrize

from mask2former_plugin.modeling import lean_resnet
from mask2former_plugin.modeling.layers.fused_convolution import all_finite
from mask2former_plugin.modeling.lean_resnet import LeanStage, LeanStem, train_resnet_leanly
from mask2former_plugin.modeling.optimization import optimize_for_inference

FEATURES = ["res2", "res3", "res4"]


def stage(block_class, length, in_channels, out_channels, stride, norm, **more):
    strides = [stride] + [1] * (length - 1)
    channels = {"in_channels": in_channels, "out_channels": out_channels}
    return ResNet.make_stage(block_class, length, stride_per_block=strides, norm=norm, **channels, **more)


def resnet(kind, norm="FrozenBN", freeze_at=0):
    """Three stages of odd kinds: groups, dilation, the stride in either place, with and without shortcut."""
    torch.manual_seed(0)
    if kind == "basic":
        stages = [stage(BasicBlock, *of, norm) for of in ((3, 8, 8, 1), (2, 8, 16, 2), (1, 16, 32, 2))]
    else:
        stages = [
            stage(BottleneckBlock, 3, 8, 16, 1, norm, bottleneck_channels=4),
            stage(BottleneckBlock, 2, 16, 32, 2, norm, bottleneck_channels=8, num_groups=2, stride_in_1x1=True),
            stage(BottleneckBlock, 2, 32, 64, 2, norm, bottleneck_channels=16, dilation=2),
        ]
    network = ResNet(BasicStem(3, 8, norm), stages, out_features=FEATURES, freeze_at=freeze_at).train()
    for module in network.modules():
        if hasattr(module, "running_var"):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            with torch.no_grad():
                module.weight.normal_()
                module.bias.normal_()
    return network


def pair(*args, **kwargs):
    """The network as Detectron2 has it, and a lean copy."""
    network = resnet(*args, **kwargs)
    lean = copy.deepcopy(network)
    assert train_resnet_leanly(lean)
    assert type(lean.stem) is LeanStem and all(type(s) is LeanStage for s in lean.stages)
    return network, lean


def run(network, x):
    """Feature maps and gradients by name, and the number of values that the graph keeps."""
    kept = {}
    with saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.numel()}) or t, lambda t: t):
        features = network(x)
    differentiate(features)
    result = {**features, **{name: p.grad for name, p in network.named_parameters()}, "image": x.grad}
    return result, sum(kept.values())


def differentiate(features):
    generator = torch.Generator().manual_seed(1)
    directions = (torch.randn(f.shape, generator=generator, dtype=torch.float64) for f in features.values())
    sum((f * direction).sum() for f, direction in zip(features.values(), directions)).backward()


def compare(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        if wanted is None:
            assert actual[name] is None, name
        else:
            assert actual[name].dtype == wanted.dtype and actual[name].shape == wanted.shape, name
            assert (actual[name] - wanted).double().norm() <= tolerance * wanted.double().norm(), name


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("keeps_wide", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_values_and_gradients(kind, dtype, tolerance, keeps_wide, channels_last):
    plain, lean = (network.to(dtype) for network in pair(kind))
    for lean_stage in lean.stages:
        lean_stage.keeps_wide = keeps_wide
    assert list(plain.state_dict()) == list(lean.state_dict())
    x = torch.randn(2, 3, 67, 93, dtype=dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    expected, kept = run(plain, x.clone().requires_grad_())
    found, own_kept = run(lean, x.clone().requires_grad_())
    compare(found, expected, tolerance)  # the norms are part of the weights: other rounding
    assert own_kept < (0.9 if kind == "basic" and keeps_wide else 0.6) * kept


def test_gradcheck():
    _, lean = pair("bottleneck")
    x = torch.rand(1, 8, 4, 3, dtype=torch.float64, requires_grad=True)
    # small steps, which cross no kink of a ReLU with these numbers
    assert torch.autograd.gradcheck(lean.double().stages[0], x, eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("freeze_at", [1, 2, 5])
def test_frozen_parts_get_no_gradients(freeze_at):
    plain, lean = pair("bottleneck", freeze_at=freeze_at)
    x = torch.randn(1, 3, 64, 64)
    if freeze_at == 5:
        assert not any(f.requires_grad for f in lean(x).values())
        return
    expected, _ = run(plain, x)
    found, _ = run(lean, x)
    compare(found, expected, 1e-5)
    assert found["stem.conv1.weight"] is None and found["res4.0.conv1.weight"] is not None


def test_a_frozen_weight_inside():
    plain, lean = pair("bottleneck")
    for network in (plain, lean):
        network.res3[0].conv2.weight.requires_grad_(False)
        network.res2[0].shortcut.weight.requires_grad_(False)
    x = torch.randn(1, 3, 64, 64)
    compare(run(lean, x)[0], run(plain, x)[0], 1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_autocast_is_as_exact_as_the_modules(layout):
    plain, lean = pair("bottleneck")
    x = torch.randn(2, 3, 64, 96).contiguous(memory_format=layout)
    exact, _ = run(copy.deepcopy(plain).double(), x.double())
    found = []
    for network in (plain, lean):
        with torch.autocast("cpu", torch.bfloat16):
            features = network(x)
        assert all(f.dtype == torch.bfloat16 for f in features.values())
        differentiate(features)
        found.append({**features, **{name: p.grad for name, p in network.named_parameters()}})
    ratios = []
    for name, value in found[1].items():
        assert value.dtype == found[0][name].dtype
        error, usual = ((v.double() - exact[name]).norm() for v in (value, found[0][name]))
        ratios.append((error / usual if usual else error + 1).item())  # some ReLUs let nothing through
    assert torch.tensor(ratios).median() < 1.5  # rounded less often, but which ReLUs let pass what is chance


def test_stage_alone_under_autocast():
    plain, lean = pair("basic")
    x = torch.randn(2, 8, 12, 10).contiguous(memory_format=torch.channels_last)
    found = []
    for network in (plain, lean):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = network.res2(leaf)
        assert y.dtype == torch.bfloat16
        found.append({"y": y, "x": torch.autograd.grad(y.sum(), leaf)[0]})
    compare(found[1], found[0], 0.05)


def test_backward_pass_inside_autocast(monkeypatch):
    monkeypatch.setattr(lean_resnet, "_has_fused_steps", lambda x: False)  # autocast knows no fused steps
    _, lean = pair("bottleneck")
    x = torch.randn(1, 3, 64, 64, requires_grad=True)
    total = sum(f.square().sum() for f in lean(x).values())
    wanted = [x, *lean.parameters()]
    expected = torch.autograd.grad(total, wanted, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(total, wanted)
    assert all(map(torch.equal, found, expected))


def test_wide_convolutions_are_kept_or_run_again():
    _, lean = pair("bottleneck")
    kept = []
    for keeps_wide in (True, False):
        for lean_stage in lean.stages:
            lean_stage.keeps_wide = keeps_wide
        kept.append(run(lean, torch.randn(1, 3, 64, 64))[1])
    # results of the 3×3 convolutions: blocks, channels and pixels of each stage
    assert kept[0] - kept[1] == 3 * 4 * 16**2 + 2 * 8 * 8**2 + 2 * 16 * 4**2


def test_without_onednn(monkeypatch):
    plain, lean = pair("bottleneck")
    monkeypatch.setattr(lean_resnet, "_has_fused_steps", lambda x: False)
    x = torch.randn(1, 3, 64, 64)
    compare(run(lean, x)[0], run(plain, x)[0], 1e-5)


def test_no_images():
    plain, lean = pair("bottleneck")
    x = torch.randn(0, 3, 64, 64)
    for network in (plain, lean):
        features = network(x)
        assert [f.shape for f in features.values()] == [(0, 16, 16, 16), (0, 32, 8, 8), (0, 64, 4, 4)]
        sum(f.sum() for f in features.values()).backward()
        assert not any(p.grad.any() for p in network.parameters())


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
@pytest.mark.parametrize("place", ["image", "stem.conv1.weight", "res2.1.conv2.weight", "res4.0.shortcut.weight"])
def test_not_a_number_stays_one(kind, place):
    """The ReLU of oneDNN's fused steps would make 0 of it, and the losses would stay finite."""
    network, lean = pair(kind)
    image = torch.randn(2, 3, 33, 47)
    if place == "image":
        image[1, 2, 5, 30] = float("nan")
    else:
        for one in (network, lean):
            one.get_parameter(place).data[0, 0, 0, 0] = float("nan")
    expected, actual = network(image), lean(image)
    assert expected["res4"].isnan().any()
    for name, wanted in expected.items():
        assert torch.equal(actual[name].isnan(), wanted.isnan())


def test_large_maps_in_half_precision_count_as_finite():
    assert all_finite(torch.full((9, 1000), 50.0, dtype=torch.float16), torch.ones(3))
    for stray in (float("nan"), float("inf"), -float("inf")):
        assert not all_finite(torch.ones(3), torch.tensor([1.0, stray, -stray, 2.0]).half())


def test_hooks_are_called_and_exchanged_norms_count():
    plain, lean = pair("bottleneck")
    seen = []
    for network in (plain, lean):
        network.res2[1].conv2.register_forward_hook(lambda module, inputs, output: seen.append(output))
        network.res3[0].conv1.norm = nn.Sequential(nn.Identity())
        network.stem.conv1.norm = nn.Identity()
    x = torch.randn(1, 3, 64, 64)
    compare(run(lean, x)[0], run(plain, x)[0], 1e-5)
    assert len(seen) == 2 and torch.allclose(*seen, rtol=1e-5, atol=1e-5)


class ScaledConv(Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class ScaledNorm(FrozenBatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def double(module, inputs, output):
    return 2 * output


ALTERATIONS = {
    "subclass of a convolution": lambda conv, block: setattr(conv, "__class__", ScaledConv),
    "subclass of a norm": lambda conv, block: setattr(conv.norm, "__class__", ScaledNorm),
    "bias": lambda conv, block: setattr(conv, "bias", nn.Parameter(torch.ones(conv.out_channels))),
    "activation": lambda conv, block: setattr(conv, "activation", torch.tanh),
    "padding with what is there": lambda conv, block: conv.__init__(
        conv.in_channels, conv.out_channels, 3, conv.stride, 1, 1, conv.groups, False, "circular", norm=conv.norm
    ),
    "padding by name": lambda conv, block: setattr(conv, "padding", "valid") if conv.padding == (0, 0) else None,
    "hook of a convolution": lambda conv, block: conv.register_forward_hook(double),
    "hook of a norm": lambda conv, block: conv.norm.register_forward_hook(double),
    "hook of a block": lambda conv, block: block.register_forward_hook(double),
    "hook before a block": lambda conv, block: block.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],)),
    "hook behind a gradient": lambda conv, block: block.register_full_backward_hook(
        lambda module, grads, _: (2 * grads[0],)
    ),
    "parametrisation": lambda conv, block: parametrize.register_parametrization(conv, "weight", nn.Tanh()),
}


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("alter", ALTERATIONS.values(), ids=ALTERATIONS)
def test_what_is_no_plain_frozen_convolution_runs_as_it_is(alter, early):
    plain, lean = pair("bottleneck")
    if early:
        lean = copy.deepcopy(plain)
    for network in (plain, lean):
        torch.manual_seed(2)
        alter(network.res2[1].conv2, network.res2[1])
        alter(network.res3[0].conv3, network.res3[1])
    if early:
        train_resnet_leanly(lean)
    x = torch.randn(1, 3, 64, 64)
    compare(run(lean, x.clone().requires_grad_())[0], run(plain, x.clone().requires_grad_())[0], 1e-5)


def test_single_pixels_in_bfloat16():
    plain, lean = pair("bottleneck")
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = plain(torch.ones(1, 3, 16, 16)), lean(torch.ones(1, 3, 16, 16))
    assert found["res4"].shape == (1, 64, 1, 1)
    compare(found, expected, 0.05)
    differentiate(found)


@pytest.mark.parametrize("norm", ["BN", "GN", ""])
def test_other_norms_stay(norm):
    network = ResNet(BasicStem(3, 32, norm), [stage(BasicBlock, 1, 32, 32, 1, norm)])
    assert not train_resnet_leanly(network)
    assert not train_resnet_leanly(nn.Linear(1, 1))


def test_inference_of_a_lean_network():
    plain, lean = pair("bottleneck")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = plain.eval()(x)
        for found in (lean.eval()(x), optimize_for_inference(lean)(x)):
            compare(found, expected, 1e-5)
    optimised = optimize_for_inference(lean)
    assert not any(isinstance(m, (FrozenBatchNorm2d, LeanStem)) for m in optimised.modules())
