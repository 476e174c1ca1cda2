"""Layers against closed forms and, for shared statistics, against one process with the whole batch."""

import importlib
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import mask2former_plugin  # noqa: F401  (workers import this module without conftest)
from detectron2 import layers
from detectron2.layers import (
    ASPP,
    CNNBlockBase,
    Conv2d,
    DeformConv,
    DepthwiseSeparableConv2d,
    FrozenBatchNorm2d,
    NaiveSyncBatchNorm,
    ShapeSpec,
    cat,
    cross_entropy,
    get_norm,
    nonzero_tuple,
    shapes_to_tensor,
)
from detectron2.utils import comm
from workers import run_in_processes


def randomise(module):
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif value.is_floating_point():
                value.normal_()
    return module


# ------------------------------------------------------------------------------------------ frozen batch normalisation


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_frozen_batch_norm_closed_form(dtype, requires_grad):
    norm = randomise(FrozenBatchNorm2d(5, eps=0.01))
    x = torch.randn(2, 5, 3, 4).to(dtype).requires_grad_(requires_grad)
    out = norm(x)
    column = lambda value: value.view(1, 5, 1, 1)  # noqa: E731
    scale = column(norm.weight) / torch.sqrt(column(norm.running_var) + 0.01)
    expected = (x.detach().float() - column(norm.running_mean)) * scale + column(norm.bias)
    assert out.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance)
    if requires_grad and dtype == torch.float32:
        out.sum().backward()
        torch.testing.assert_close(x.grad, scale.expand_as(x))


def test_frozen_batch_norm_has_buffers_only_and_starts_as_identity():
    norm = FrozenBatchNorm2d(4)
    assert not list(norm.parameters())
    assert list(norm.state_dict()) == ["weight", "bias", "running_mean", "running_var"]
    assert norm.state_dict()._metadata[""]["version"] == 3
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(norm(x), x)


def test_frozen_batch_norm_reads_affine_only_weights():
    norm = randomise(FrozenBatchNorm2d(3))
    norm.load_state_dict({"weight": torch.full((3,), 2.0), "bias": torch.full((3,), 1.0)})
    assert norm.running_mean.tolist() == [0, 0, 0] and norm.running_var.tolist() == [1, 1, 1]
    current = FrozenBatchNorm2d(3).state_dict()
    del current["running_mean"]
    with pytest.raises(RuntimeError, match="running_mean"):
        norm.load_state_dict(current)


def test_convert_frozen_batch_norm():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4), nn.Sequential(nn.BatchNorm2d(4, eps=0.1)), nn.GroupNorm(2, 4)
    )
    randomise(network).eval()
    with torch.no_grad():
        network[1].running_var.fill_(2.0)
    x = torch.randn(2, 3, 5, 5)
    expected = network(x)
    frozen = FrozenBatchNorm2d.convert_frozen_batchnorm(network)
    assert frozen is network
    assert isinstance(network[1], FrozenBatchNorm2d) and isinstance(network[2][0], FrozenBatchNorm2d)
    assert isinstance(network[3], nn.GroupNorm)
    torch.testing.assert_close(network(x), expected)
    assert isinstance(FrozenBatchNorm2d.convert_frozen_batchnorm(nn.BatchNorm2d(2)), FrozenBatchNorm2d)


def test_block_freeze():
    block = CNNBlockBase(3, 4, 2)
    block.conv = Conv2d(3, 4, 3, norm=nn.BatchNorm2d(4))
    assert block.freeze() is block
    assert isinstance(block.conv.norm, FrozenBatchNorm2d) and not block.conv.weight.requires_grad
    assert (block.in_channels, block.out_channels, block.stride) == (3, 4, 2)


# ---------------------------------------------------------------------------------------------- get_norm


@pytest.mark.parametrize(
    "name, kind",
    [
        ("BN", nn.BatchNorm2d),
        ("SyncBN", nn.SyncBatchNorm),
        ("nnSyncBN", nn.SyncBatchNorm),
        ("naiveSyncBN", NaiveSyncBatchNorm),
        ("naiveSyncBN_N", NaiveSyncBatchNorm),
        ("FrozenBN", FrozenBatchNorm2d),
        ("GN", nn.GroupNorm),
        (nn.InstanceNorm2d, nn.InstanceNorm2d),
    ],
)
def test_get_norm(name, kind):
    norm = get_norm(name, 64)
    assert isinstance(norm, kind)
    assert norm.num_channels == 64 and norm.num_groups == 32 if kind is nn.GroupNorm else norm.num_features == 64


def test_get_norm_none_and_unknown():
    assert get_norm("", 4) is None and get_norm(None, 4) is None
    with pytest.raises(KeyError):
        get_norm("Batch", 4)


@pytest.mark.embedded_only
def test_unknown_norm_names_the_nearest():
    with pytest.raises(KeyError, match="'SyncBn', did you mean 'SyncBN'.*FrozenBN"):
        get_norm("SyncBn", 4)


def test_layer_norm_is_over_channels():
    norm = randomise(get_norm("LN", 6))
    x = torch.randn(2, 6, 3, 4)
    centred = x - x.mean(1, keepdim=True)
    expected = centred / torch.sqrt(centred.square().mean(1, keepdim=True) + 1e-6)
    expected = expected * norm.weight.view(1, 6, 1, 1) + norm.bias.view(1, 6, 1, 1)
    torch.testing.assert_close(norm(x), expected)
    assert sorted(norm.state_dict()) == ["bias", "weight"]


# ---------------------------------------------------------------------------------------------- shared statistics


def _full_batch():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 3, 5, 6, generator=generator) * torch.tensor([0.1, 1.0, 7.0]).view(1, 3, 1, 1) + 50.0
    return x, torch.randn(4, 3, 5, 6, generator=generator)


def _run_norm(norm, x, weight):
    x = x.clone().requires_grad_()
    out = norm(x)
    (out * weight).sum().backward()
    state = {name: value.clone() for name, value in norm.state_dict().items()}
    return {"out": out.detach(), "x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad, "state": state}


def _make_norm(name):
    norm = get_norm(name, 3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
        norm.bias.copy_(torch.tensor([1.0, 0.0, -1.0]))
    return norm


def _worker(names):
    x, weight = _full_batch()
    part = slice(0, 1) if comm.get_rank() == 0 else slice(1, 4)  # unequal shares
    return {name: _run_norm(_make_norm(name), x[part], weight[part]) for name in names}


@pytest.mark.embedded_only
def test_shared_statistics_equal_those_of_the_whole_batch(tmp_path):
    names = ["naiveSyncBN", "naiveSyncBN_N", "SyncBN"]
    workers = run_in_processes(_worker, 2, tmp_path, names)
    expected = _run_norm(_make_norm("BN"), *_full_batch())
    for name in names:
        first, second = workers[0][name], workers[1][name]
        for key in ("out", "x"):
            torch.testing.assert_close(torch.cat([first[key], second[key]]), expected[key], rtol=1e-3, atol=1e-4)
        for key in ("weight", "bias"):
            torch.testing.assert_close(first[key] + second[key], expected[key], rtol=1e-3, atol=1e-3)
        assert first["state"].keys() == expected["state"].keys()
        for key, value in expected["state"].items():
            torch.testing.assert_close(first["state"][key], value, rtol=1e-5, atol=1e-6)
            assert torch.equal(first["state"][key], second["state"][key])


@pytest.mark.parametrize("in_group", [False, pytest.param(True, marks=pytest.mark.embedded_only)])
@pytest.mark.parametrize("name", ["SyncBN", "naiveSyncBN"])
def test_one_process_needs_no_sharing(name, in_group, tmp_path, request):
    if in_group:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
        request.addfinalizer(dist.destroy_process_group)
    x, weight = _full_batch()
    got, expected = _run_norm(_make_norm(name), x, weight), _run_norm(_make_norm("BN"), x, weight)
    torch.testing.assert_close(got["out"], expected["out"])
    torch.testing.assert_close(got["x"], expected["x"])


# ---------------------------------------------------------------------------------------------- convolutions


def test_conv_applies_norm_before_activation():
    conv = randomise(Conv2d(2, 3, 3, padding=1, bias=False, norm=nn.BatchNorm2d(3), activation=F.relu)).eval()
    x = torch.randn(2, 2, 5, 5)
    norm = conv.norm
    raw = F.conv2d(x, conv.weight, padding=1)
    column = lambda value: value.view(1, 3, 1, 1)  # noqa: E731
    expected = (raw - column(norm.running_mean)) / torch.sqrt(column(norm.running_var) + norm.eps)
    expected = (expected * column(norm.weight) + column(norm.bias)).clamp(min=0)
    torch.testing.assert_close(conv(x), expected)
    assert "norm.running_mean" in conv.state_dict()


def test_depthwise_separable_convolution():
    block = DepthwiseSeparableConv2d(4, 6, padding=2, dilation=2, norm2="BN", activation2=nn.ReLU()).eval()
    assert block.depthwise.bias is not None and block.pointwise.bias is None
    x = torch.randn(1, 4, 7, 8)
    middle = F.conv2d(x, block.depthwise.weight, block.depthwise.bias, padding=2, dilation=2, groups=4)
    expected = F.conv2d(middle, block.pointwise.weight) / math.sqrt(1 + 1e-5)
    torch.testing.assert_close(block(x), expected.clamp(min=0))


@pytest.mark.parametrize("pool", [None, (4, 5)])
def test_aspp(pool):
    module = ASPP(3, 4, [1, 2, 3], norm="", activation=nn.ReLU(), pool_kernel_size=pool)
    x = torch.randn(2, 3, 8, 10)
    weights = module.state_dict()
    branches = [F.conv2d(x, weights["convs.0.weight"], weights["convs.0.bias"]).clamp(min=0)]
    for index, dilation in enumerate([1, 2, 3], start=1):
        weight, bias = weights[f"convs.{index}.weight"], weights[f"convs.{index}.bias"]
        branches.append(F.conv2d(x, weight, bias, padding=dilation, dilation=dilation).clamp(min=0))
    pooled = x.mean((2, 3), keepdim=True) if pool is None else F.avg_pool2d(x, pool, stride=1)
    pooled = F.conv2d(pooled, weights["convs.4.1.weight"], weights["convs.4.1.bias"]).clamp(min=0)
    branches.append(F.interpolate(pooled, size=(8, 10), mode="bilinear", align_corners=False))
    expected = F.conv2d(torch.cat(branches, 1), weights["project.weight"], weights["project.bias"]).clamp(min=0)
    torch.testing.assert_close(module(x), expected)


def test_aspp_refuses_bad_sizes():
    module = ASPP(3, 4, [1, 2, 3], norm="BN", activation=nn.ReLU(), pool_kernel_size=(4, 5)).eval()
    with pytest.raises(ValueError):
        module(torch.randn(1, 3, 9, 10))
    with pytest.raises(AssertionError):
        ASPP(3, 4, [1, 2], norm="BN", activation=nn.ReLU())


# ---------------------------------------------------------------------------------------------- small functions


def test_cross_entropy_without_targets_is_zero():
    logits = torch.zeros(0, 3, requires_grad=True)
    loss = cross_entropy(logits, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0 and logits.grad.shape == (0, 3)
    logits, target = torch.randn(5, 3), torch.randint(0, 3, (5,))
    expected = np.mean([-row.log_softmax(0)[t].item() for row, t in zip(logits, target)])
    assert cross_entropy(logits, target).item() == pytest.approx(expected, rel=1e-5)


def test_small_functions():
    x = torch.rand(2, 3)
    assert cat([x]) is x and cat([x, x], 1).shape == (2, 6)
    assert [index.tolist() for index in nonzero_tuple(torch.tensor([[0, 1], [1, 0]]))] == [[0, 1], [1, 0]]
    assert [index.tolist() for index in nonzero_tuple(torch.tensor(1))] == [[0]]
    assert shapes_to_tensor([3, 4]).tolist() == [3, 4]
    assert ShapeSpec(channels=3, stride=4) == ShapeSpec(3, None, None, 4)


@pytest.mark.embedded_only
def test_left_out_layers_say_how_to_get_them():
    with pytest.raises(NotImplementedError, match="DeformConv.*install upstream"):
        DeformConv(3, 4, 3)
    with pytest.raises(NotImplementedError, match="detectron2.layers.ROIAlign.*install upstream"):
        layers.ROIAlign
    with pytest.raises(ImportError, match="detectron2.layers.batched_nms.*install upstream"):  # optional imports work
        from detectron2.layers import batched_nms  # noqa: F401
    for module, name in (
        ("modeling", "FPN"),
        ("modeling.backbone", "ViT"),
        ("modeling.meta_arch", "RetinaNet"),
        ("modeling.postprocessing", "detector_postprocess"),
        ("projects.deeplab", "DeepLabV3Head"),
        ("projects.point_rend", "PointRendSemSegHead"),
    ):
        module = importlib.import_module(f"detectron2.{module}")
        with pytest.raises(ImportError, match=f"{module.__name__}.{name} .*install upstream"):
            getattr(module, name)
        with pytest.raises(AttributeError, match="no attribute 'Typo'"):
            module.Typo
    with pytest.raises(AttributeError, match="no attribute 'Typo'"):
        layers.Typo
