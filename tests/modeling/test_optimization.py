"""Models optimised for inference against the models that they were made from."""

import copy
import io

import pytest
import torch
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import build_backbone, build_model
from torch import nn

from mask2former_plugin.modeling import optimization
from mask2former_plugin.modeling.layers import MultiheadAttention
from mask2former_plugin.modeling.optimization import FusedBlock, FusedStem, fold_norms, optimize_for_inference

needs_fused_convolutions = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_convolution_pointwise"), reason="this torch has no fused convolutions"
)
RGB = ShapeSpec(channels=3)


@pytest.fixture
def resnet_config(full_config):
    """A ResNet of a depth, all its outputs, with a norm: ``resnet_config(18, "FrozenBN")``."""

    def make(depth, norm, *overrides):
        options = ["MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.NORM", norm, "MODEL.RESNETS.STEM_OUT_CHANNELS", 64]
        options += ["MODEL.RESNETS.OUT_FEATURES", ["stem", "res2", "res3", "res4", "res5"]]
        if depth < 50:
            options += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
        return full_config("MODEL.BACKBONE.NAME", "build_resnet_backbone", *options, *overrides)

    return make


@pytest.fixture
def model(small_config):
    """A Mask2Former with ResNet-18, every norm and weight with noise."""

    def make(*overrides):
        cfg = small_config(
            "MODEL.META_ARCHITECTURE", "MaskFormer",
            "MODEL.BACKBONE.NAME", "build_resnet_backbone",
            "MODEL.RESNETS.DEPTH", 18,
            "MODEL.RESNETS.RES2_OUT_CHANNELS", 64,
            "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"],
            *overrides,
        )  # fmt: skip
        torch.manual_seed(0)
        return with_noise(build_model(cfg).eval())

    return make


@torch.no_grad()
def with_noise(module):
    """Statistics and affine parts of the norms away from 0 and 1; sampling that depends on the features."""
    for name, tensor in [*module.named_buffers(), *module.named_parameters()]:
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2.0)
        elif tensor.is_floating_point() and any(part in name for part in ("norm", "sampling", "attention_weights")):
            tensor.add_(torch.randn_like(tensor) * 0.1)
    return module


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "SyncBN"])
def test_folded_norms(resnet_config, depth, norm):
    backbone = with_noise(build_backbone(resnet_config(depth, norm), RGB)).double().eval()
    folded = copy.deepcopy(backbone)
    fold_norms(folded)
    assert not any(hasattr(module, "running_var") for module in folded.modules())
    image = torch.randn(2, 3, 65, 90, dtype=torch.float64)
    with torch.no_grad():
        expected, actual = backbone(image), folded(image)
    assert actual.keys() == expected.keys()
    for name in expected:
        assert relative_error(actual[name], expected[name]) < 1e-12  # float64


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_folded_norms_of_all_kinds(bias, options):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6, **options)
    conv = Conv2d(4, 6, kernel_size=3, bias=bias, norm=norm).double().eval()
    for tensor in [*norm.buffers(), *norm.parameters()]:
        tensor.data.copy_(torch.rand(tensor.shape) + 0.5)
    folded = copy.deepcopy(conv)
    fold_norms(folded)
    assert (folded.norm is None) == ("track_running_stats" not in options)
    x = torch.randn(2, 4, 7, 9, dtype=torch.float64)
    torch.testing.assert_close(folded(x), conv(x), rtol=0, atol=1e-12)


def test_other_norms_stay(resnet_config):
    backbone = build_backbone(resnet_config(18, "GN"), RGB)
    state = copy.deepcopy(backbone.state_dict())
    fold_norms(backbone)
    optimization.fuse_residual_blocks(backbone)
    assert backbone.state_dict().keys() == state.keys()
    assert not any(isinstance(m, FusedBlock) for m in backbone.modules())


@needs_fused_convolutions
@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("channels_last", [True, False])
def test_fused_blocks(resnet_config, depth, channels_last):
    torch.manual_seed(0)
    backbone = with_noise(build_backbone(resnet_config(depth, "FrozenBN"), RGB)).eval()
    fused = copy.deepcopy(backbone)
    fold_norms(fused)
    optimization.fuse_residual_blocks(fused)
    blocks = sum(isinstance(m, FusedBlock) for m in fused.modules())
    assert blocks == {18: 8, 50: 16}[depth] and isinstance(fused.stem, FusedStem)
    image = torch.randn(2, 3, 65, 90)
    if channels_last:
        image = image.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected, actual, again = backbone(image), fused(image), fused(image)
        exact = backbone.double()(image.double())
    for name in expected:  # the stem's output must not be overwritten by the first block
        assert torch.equal(actual[name], again[name])
        # float32 through up to 53 convolutions: about as exact as the model itself
        assert relative_error(actual[name], exact[name]) < 4 * relative_error(expected[name], exact[name]) + 1e-6


@pytest.mark.parametrize("size", [(64, 96), (75, 101)])
def test_same_results(model, size):
    original = model()
    optimized = optimize_for_inference(original)
    inputs = [{"image": torch.rand(3, *size) * 255, "height": 50, "width": 70}, {"image": torch.rand(3, 40, 80) * 255}]
    with torch.no_grad():
        expected, actual = original(inputs), optimized(inputs)
    for one, other in zip(actual, expected):
        assert one["sem_seg"].dtype == torch.float32
        # float32: a mask logit next to 0 may let a query attend to one more pixel, which moves the scores a little
        torch.testing.assert_close(one["sem_seg"], other["sem_seg"], rtol=0, atol=2e-4)


@pytest.mark.parametrize("norm", ["", "BN"])
@torch.no_grad()
def test_norms_of_the_pixel_decoder(model, norm):
    """Folded or missing; the ReLU behind them stays."""
    original = model("MODEL.SEM_SEG_HEAD.NORM", norm)
    images = original.preprocess([{"image": torch.rand(3, 75, 101) * 255}]).tensor
    features = original.backbone(images)
    for module, tolerance in ((original, 1e-5), (copy.deepcopy(original).double(), 1e-12)):
        optimized = optimize_for_inference(module)
        dtype = next(module.parameters()).dtype
        maps = {name: feature.to(dtype) for name, feature in features.items()}
        expected, actual = (x.sem_seg_head.pixel_decoder.forward_features(maps)[0] for x in (module, optimized))
        assert actual.dtype == dtype and relative_error(actual, expected) < tolerance


@needs_fused_convolutions
def test_what_cannot_be_fused(resnet_config):
    """Other borders than zeros, another activation, float64."""
    image = torch.randn(1, 3, 40, 56)
    for change in ("padding", "activation", "float64"):
        backbone = with_noise(build_backbone(resnet_config(18, "FrozenBN"), RGB)).eval()
        conv = backbone.res2[1].conv1
        if change == "padding":
            conv.padding_mode, conv._reversed_padding_repeated_twice = "reflect", [1, 1, 1, 1]
        elif change == "activation":
            conv.activation = torch.tanh
        else:
            backbone.double()
        optimized = optimize_for_inference(backbone)
        x = image.to(conv.weight.dtype)
        with torch.no_grad():
            expected, actual = backbone(x), optimized(x)
        for name in expected:
            assert relative_error(actual[name], expected[name]) < 1e-5  # float32, 17 convolutions
        blocks = sum(isinstance(module, FusedBlock) for module in optimized.modules())
        assert blocks == (0 if change == "float64" else 7)


@pytest.mark.parametrize("precision, tolerance", [("bfloat16", 0.15), ("float16", 0.05)])
def test_half_precision_is_that_of_autocast(model, precision, tolerance):
    original = model()
    optimized = optimize_for_inference(original, precision=precision)
    dtype = getattr(torch, precision)
    for module in optimized.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            assert module.weight.dtype == dtype
        elif isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.Embedding)):
            assert module.weight.dtype == torch.float32
        elif isinstance(module, MultiheadAttention):
            assert module.in_proj_weight.dtype == module.in_proj_bias.dtype == dtype
    images = original.preprocess([{"image": torch.rand(3, 75, 101) * 255} for _ in range(4)]).tensor
    with torch.no_grad():
        exact = original.sem_seg_head(original.backbone(images))
        actual = optimized.sem_seg_head(optimized.backbone(images))
        with torch.autocast("cpu", dtype):
            plain = original.sem_seg_head(original.backbone(images))
        result = optimized([{"image": torch.rand(3, 75, 101) * 255}])[0]["sem_seg"]

    def error(prediction, expected, name):
        return ((prediction[name].float() - expected[name]).norm() / expected[name].norm()).item()

    # a few roundings of 2^-9 (2^-12) per layer, no more of them than under plain autocast; before the decoder's first
    # layer they are all there is, later some of them move a mask's border and with it the attention
    first = [x["aux_outputs"][0] for x in (actual, plain, exact)]
    assert error(first[0], first[2], "pred_masks") < 1.1 * error(first[1], first[2], "pred_masks") < tolerance
    assert all(error(actual, exact, name) < tolerance for name in ("pred_logits", "pred_masks"))
    assert result.dtype == torch.float32


def test_original_stays_as_it_is(model):
    original = model()
    state, flags = copy.deepcopy(original.state_dict()), [p.requires_grad for p in original.parameters()]
    names = [name for name, _ in original.named_modules()]
    optimize_for_inference(original.train(), precision="bfloat16")
    assert original.training and [name for name, _ in original.named_modules()] == names
    assert [p.requires_grad for p in original.parameters()] == flags
    for name, tensor in original.state_dict().items():
        assert torch.equal(tensor, state[name]) and tensor.dtype == state[name].dtype


def test_no_training(model):
    optimized = optimize_for_inference(model())
    assert isinstance(optimized, type(model())) and not optimized.training
    assert optimized.eval() is optimized and not any(p.requires_grad for p in optimized.parameters())
    for module in (optimized, optimized.backbone, optimized.sem_seg_head, copy.deepcopy(optimized)):
        with pytest.raises(RuntimeError, match="optimised for inference and cannot be trained; train the model that"):
            module.train()


@needs_fused_convolutions
def test_no_gradients(model):
    """oneDNN's fused steps would give wrong ones."""
    optimized, image = optimize_for_inference(model()), torch.randn(1, 3, 40, 56, requires_grad=True)
    with pytest.raises(RuntimeError, match="has no gradients; use the one it was made from"):
        optimized.backbone(image)
    with torch.no_grad():
        assert optimized.backbone(image)["res5"].shape[2:] == (2, 2)


def test_per_pixel_baseline_with_detectron2_s_meta_architecture(full_config):
    cfg = full_config(
        "MODEL.META_ARCHITECTURE", "SemanticSegmentor",
        "MODEL.BACKBONE.NAME", "build_resnet_backbone",
        "MODEL.RESNETS.DEPTH", 18,
        "MODEL.RESNETS.RES2_OUT_CHANNELS", 64,
        "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"],
        "MODEL.SEM_SEG_HEAD.NAME", "PerPixelBaselineHead",
        "MODEL.SEM_SEG_HEAD.IN_FEATURES", ["res2", "res3", "res4", "res5"],
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 4,
    )  # fmt: skip
    torch.manual_seed(0)
    original = with_noise(build_model(cfg).eval())
    inputs = [{"image": torch.rand(3, 64, 96) * 255, "height": 50, "width": 70}]
    with torch.no_grad():
        expected = original(inputs)[0]["sem_seg"]
        for precision, tolerance in (("float32", 1e-5), ("bfloat16", 0.05)):
            actual = optimize_for_inference(original, precision=precision)(inputs)[0]["sem_seg"]
            assert relative_error(actual, expected) < tolerance


def test_models_of_other_parts():
    original = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2), nn.BatchNorm1d(2)).eval()
    x = torch.randn(5, 3, 3, 3)
    with torch.no_grad():
        expected = original(x)
        assert torch.allclose(optimize_for_inference(original)(x), expected, atol=1e-5)
        assert relative_error(optimize_for_inference(original, precision="bfloat16")(x), expected) < 0.05
    nothing = nn.Identity()
    assert torch.equal(optimize_for_inference(nothing)(x), x)


def test_once_is_enough(model):
    optimized = optimize_for_inference(model())
    wrapper = nn.Sequential(optimized)
    assert optimize_for_inference(optimized) is optimized and optimize_for_inference(wrapper) is wrapper


class Standardized(Conv2d):
    """A convolution that is more than its weights."""

    def forward(self, x):
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std((1, 2, 3), keepdim=True)
        x = nn.functional.conv2d(x, weight, self.bias, self.stride, self.padding)
        return x if self.norm is None else self.norm(x)


class Tripled(nn.Module):
    def forward(self, x):
        return 3 * x


def tripled(module, inputs, output):
    return 3 * output


CHANGES = {
    "hook of a convolution": lambda block: block.conv1.register_forward_hook(tripled),
    "hook of a norm": lambda block: block.conv1.norm.register_forward_hook(tripled),
    "hook of a block": lambda block: block.register_forward_hook(tripled),
    "hook that makes the weight": lambda block: nn.utils.spectral_norm(block.conv1),
    "parametrization": lambda block: nn.utils.parametrize.register_parametrization(block.conv1, "weight", Tripled()),
    "subclass": lambda block: setattr(block.conv1, "__class__", Standardized),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_changed_convolutions(resnet_config, change):
    torch.manual_seed(0)
    backbone = with_noise(build_backbone(resnet_config(18, "FrozenBN"), RGB)).eval()
    image = torch.randn(1, 3, 40, 56)
    before = backbone(image)["res2"]
    CHANGES[change](backbone.eval().res2[1])
    expected = backbone(image)
    optimized = optimize_for_inference(backbone)
    actual = optimized(image)
    assert relative_error(before, expected["res2"]) > 0.01
    for name in expected:
        assert relative_error(actual[name], expected[name]) < 1e-5  # float32, 17 convolutions
    if optimization.fuses_convolutions(torch.float32):
        assert sum(isinstance(module, FusedBlock) for module in optimized.modules()) == 7


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("around", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_autocast_around_an_optimized_model(model, precision, around):
    original = model()
    inputs = [{"image": torch.rand(3, 75, 101) * 255}]
    optimized, expected = optimize_for_inference(original, precision=precision), original(inputs)[0]["sem_seg"]
    with torch.autocast("cpu", around):
        actual = optimized(inputs)[0]["sem_seg"]
    assert relative_error(actual, expected) < 0.1  # rounding to bfloat16 in all layers


@torch.no_grad()
def test_saved_and_copied_as_a_whole(model):
    inputs = [{"image": torch.rand(3, 40, 60) * 255}]
    for precision in ("float32", "bfloat16"):
        optimized = optimize_for_inference(model(), precision=precision)
        expected, file = optimized(inputs)[0]["sem_seg"], io.BytesIO()
        torch.save(optimized, file)
        file.seek(0)
        for other in (torch.load(file, weights_only=False), copy.deepcopy(optimized)):
            assert torch.equal(other(inputs)[0]["sem_seg"], expected)
            with pytest.raises(RuntimeError, match="cannot be trained"):
                other.backbone.train()


def test_other_weights(model):
    original = model()
    optimized = optimize_for_inference(original)
    state = copy.deepcopy(optimized.state_dict())
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="load into that one and optimise it again"):
            optimized.load_state_dict(original.state_dict(), strict=strict)
    assert all(torch.equal(tensor, state[name]) for name, tensor in optimized.state_dict().items())
    optimized.load_state_dict({name: tensor + 1 for name, tensor in state.items()})
    assert all(torch.equal(tensor, state[name] + 1) for name, tensor in optimized.state_dict().items())


def test_other_precision_or_device(model):
    optimized = optimize_for_inference(model())
    assert optimized.to("cpu").float() is optimized
    with pytest.raises(RuntimeError, match="optimised for torch.float32 on cpu, got torch.float64 on cpu; move or"):
        optimized.double()
    with pytest.raises(RuntimeError, match="got torch.float32 on meta"):
        nn.Sequential(optimized).to("meta")
    assert {parameter.dtype for parameter in optimized.parameters()} == {torch.float32}


@torch.no_grad()
def test_numbers_that_are_not_finite(model):
    """oneDNN's ReLU would make 0 of them."""
    original = model()
    optimized = optimize_for_inference(original)
    for stray in (float("nan"), float("inf"), -float("inf")):
        image = torch.rand(3, 40, 60) * 255
        image[1, 20, 30] = stray
        assert not original([{"image": image}])[0]["sem_seg"].isfinite().any()
        if isinstance(optimized.backbone.stem, FusedStem):
            with pytest.raises(ValueError, match="NaN or infinite"):
                optimized([{"image": image}])
        else:
            assert not optimized([{"image": image}])[0]["sem_seg"].isfinite().any()
    original.backbone.res3[0].conv2.norm.running_var[3] = -1.0
    with pytest.raises(ValueError, match=r"res3\.0\.conv2\.weight of ResNet is not finite"):
        optimize_for_inference(original)


def test_unknown_precision(model):
    with pytest.raises(ValueError, match="must be one of float32, bfloat16, float16, got 'int8'"):
        optimize_for_inference(model(), precision="int8")
