"""Activation checkpointing: the same losses and gradients, dropout and batch norm included, from fewer kept tensors."""

import copy
from collections import Counter

import pytest
import torch
from detectron2.modeling import build_model, build_sem_seg_head
from detectron2.structures import Instances
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from mask2former_plugin.modeling.layers import linear
from mask2former_plugin.modeling.pixel_decoders import build_pixel_decoder
from mask2former_plugin.modeling.recomputation import (
    RecomputedSequential,
    RunsLayers,
    recompute_activations,
    train_leanly,
)

KEYS = ("MODEL.BACKBONE.USE_CHECKPOINT", "MODEL.SEM_SEG_HEAD.USE_CHECKPOINT", "MODEL.MASK_FORMER.USE_CHECKPOINT")
RESNET = [
    "MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.BACKBONE.FREEZE_AT", 1,
    "MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 8, "MODEL.RESNETS.STEM_OUT_CHANNELS", 8,
    "MODEL.RESNETS.WIDTH_PER_GROUP", 4, "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"],
]  # fmt: skip
MASKFORMER = [
    "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "TransformerEncoderPixelDecoder",
    "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME", "StandardTransformerDecoder",
    "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "transformer_encoder", "MODEL.MASK_FORMER.MASK_LOSS", "dense",
]  # fmt: skip
COMMON = [
    "MODEL.META_ARCHITECTURE", "MaskFormer", "MODEL.MASK_FORMER.DROPOUT", 0.3, "MODEL.MASK_FORMER.TRAIN_NUM_POINTS", 40,
]  # fmt: skip


def model_of(cfg):
    torch.manual_seed(0)
    return build_model(cfg).train()


def run_counting(module, inputs):
    """What a module gives, and the number of values that the graph keeps."""
    kept = {}
    with saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.numel()}) or t, lambda t: t):
        result = module(inputs)
    return result, sum(kept.values())


def step(model):
    """Losses, gradients and the number of values that the graph keeps, for one batch and one seed."""
    generator = torch.Generator().manual_seed(1)
    batch = []
    for count in (3, 0):
        instances = Instances((64, 96))
        instances.gt_classes = torch.randint(0, 5, (count,), generator=generator)
        instances.gt_masks = torch.rand(count, 64, 96, generator=generator) > 0.5
        image = torch.randint(0, 256, (3, 64, 96), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances})
    torch.manual_seed(2)
    losses, kept = run_counting(model, batch)
    sum(losses.values()).backward()
    after = torch.rand(3)  # the random stream goes on where it would have
    return losses, {name: p.grad for name, p in model.named_parameters()}, kept, after


@pytest.mark.parametrize("lean", [False, True], ids=["all", "lean"])
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("kind", [[], MASKFORMER], ids=["mask2former", "maskformer"])
def test_same_losses_and_gradients(small_config, key, kind, lean):
    options = [*RESNET, *COMMON, *kind, "MODEL.LEAN_TRAINING", lean]
    plain = model_of(small_config(*options))
    recomputed = model_of(small_config(*options, key, True))
    assert list(plain.state_dict()) == list(recomputed.state_dict())
    losses, gradients, kept, after = step(plain)
    own_losses, own_gradients, own_kept, own_after = step(recomputed)
    # of a lean pixel decoder on a CPU nothing is left to be recomputed
    assert own_kept < kept or (lean and key == "MODEL.SEM_SEG_HEAD.USE_CHECKPOINT" and own_kept == kept)
    assert torch.equal(after, own_after)
    for name, loss in losses.items():
        assert torch.equal(loss, own_losses[name]), name
    for name, gradient in gradients.items():
        if gradient is None:
            assert own_gradients[name] is None, name
        else:  # the same operations; only the order of sums over several uses may differ
            torch.testing.assert_close(own_gradients[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", [[], MASKFORMER], ids=["mask2former", "maskformer"])
def test_lean_training_changes_rounding_only(small_config, kind, dropout):
    options = [*RESNET, *COMMON, *kind, "MODEL.MASK_FORMER.DROPOUT", dropout]
    plain, lean = (model_of(small_config(*options, "MODEL.LEAN_TRAINING", lean)).double() for lean in (False, True))
    assert list(plain.state_dict()) == list(lean.state_dict())
    losses, gradients, kept, after = step(plain)
    own_losses, own_gradients, own_kept, own_after = step(lean)
    assert own_kept < 0.95 * kept  # of both, most are the weights of this small model
    assert torch.equal(after, own_after)
    for name, loss in losses.items():
        torch.testing.assert_close(own_losses[name], loss, rtol=1e-8, atol=1e-12)
    for name, gradient in gradients.items():
        if gradient is None:
            assert own_gradients[name] is None, name
        else:  # norms of maps of a few pixels magnify the rounding of folded weights a million times
            assert (own_gradients[name] - gradient).norm() <= 1e-7 * gradient.norm() + 1e-12, name


def random_features(input_shape):
    return {
        name: torch.randn(2, s.channels, 96 // s.stride, 64 // s.stride, dtype=torch.float64)
        for name, s in input_shape.items()
    }


@pytest.mark.parametrize("norm", ["GN", "BN"])
@pytest.mark.parametrize("key", [None, *KEYS[1:]])
def test_lean_heads_equal_plain_ones(small_config, input_shape, norm, key):
    torch.manual_seed(0)
    features = random_features(input_shape)
    found = []
    for lean in (False, True):
        cfg = small_config("MODEL.SEM_SEG_HEAD.NORM", norm, *([key, True] if key else []))
        torch.manual_seed(1)
        head = build_sem_seg_head(cfg, input_shape).double().train()
        if lean:
            train_leanly(nn.Identity(), head)
        inputs = {name: f.clone().requires_grad_() for name, f in features.items()}
        outputs, kept = run_counting(head, inputs)
        loss = outputs["pred_logits"].square().sum() + outputs["mask_logits"].dense().square().mean()
        loss.backward()
        gradients = [p.grad for p in head.parameters() if p.grad is not None]
        found.append(([loss, *gradients, *(f.grad for f in inputs.values()), *head.buffers()], kept))
    assert found[1][1] < found[0][1]
    for ours, plain in zip(found[1][0], found[0][0]):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-13)


class Convolves(RunsLayers):
    """A 3×3 convolution between cheap steps; what it gives may be overwritten."""

    recompute_cheap_steps = True

    def __init__(self, overwrites):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 2, 3)
        self.overwrites = overwrites

    def convolve(self, x):
        x = self.second(self.first(x).sigmoid())
        return (x.add_(1.0) if self.overwrites else x + 1.0).sigmoid().square()

    def forward(self, x):
        return self.run_lean(self.convolve, x)


@pytest.mark.parametrize("whole", [False, True])
def test_second_backward_pass(whole):
    torch.manual_seed(0)
    module = Convolves(overwrites=False).double()
    module.recompute_cheap_steps, module.recompute_layers = not whole, whole
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    loss = module(x).sum()
    expected = torch.autograd.grad(module.convolve(x).sum(), [x, *module.parameters()])
    for retain in (True, False):
        found = torch.autograd.grad(loss, [x, *module.parameters()], retain_graph=retain)
        for one, other in zip(found, expected):
            torch.testing.assert_close(one, other)


def test_overwritten_results_are_an_error():
    loss = Convolves(overwrites=True)(torch.randn(1, 2, 5, 6)).sum()
    with pytest.raises(RuntimeError, match="MODEL.LEAN_TRAINING keeps"):
        loss.backward()


def test_costly_operators_run_once():
    calls = []

    class Counts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.convolution.default:
                calls.append(tuple(args[1].shape[2:]))
            return func(*args, **(kwargs or {}))

    with Counts():
        Convolves(overwrites=False)(torch.randn(1, 2, 5, 6)).sum().backward()
    assert calls == [(1, 1), (3, 3), (1, 1)]


def test_attention_of_a_lean_head_runs_once(small_config, input_shape):
    features = random_features(input_shape)
    found = []
    for lean in (False, True):
        torch.manual_seed(1)
        head = build_sem_seg_head(small_config(), input_shape).double().train()
        if lean:
            train_leanly(nn.Identity(), head)
        calls = Counter()

        class Counts(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None, calls=calls):
                calls[func.name()] += 1
                return func(*args, **(kwargs or {}))

        with Counts():
            outputs = head({name: f.clone().requires_grad_() for name, f in features.items()})
            (outputs["pred_logits"].square().sum() + outputs["mask_logits"].dense().square().mean()).backward()
        found.append({name: number for name, number in calls.items() if "attn" in name or "attention" in name})
    assert found[0] and found[0] == found[1]


def test_copies_recompute_their_own_layers(small_config):
    keys = [word for key in KEYS for word in (key, True)]
    model = model_of(small_config(*RESNET, *COMMON, *keys, "MODEL.LEAN_TRAINING", False))
    assert isinstance(model.backbone.res3, RecomputedSequential)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.mul_(0.5)
    _, gradients, _, _ = step(model)
    assert all(p.grad is None for p in clone.parameters())
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values())


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_counts_a_batch_once(momentum):
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, momentum=momentum), nn.ReLU())
    plain = nn.Sequential(block, nn.Conv2d(3, 2, 1))
    recomputed = copy.deepcopy(plain)
    recomputed.__class__ = RecomputedSequential
    x = torch.randn(4, 2, 7, 9)
    for network in (plain, recomputed):
        for _ in range(2):
            network(x).square().mean().backward()
    for (name, expected), actual in zip(plain.state_dict().items(), recomputed.state_dict().values()):
        assert torch.equal(expected, actual), name
    for expected, actual in zip(plain.parameters(), recomputed.parameters()):
        torch.testing.assert_close(actual.grad, expected.grad)


def test_swin_uses_its_own_switch(small_config):
    swin = ["MODEL.BACKBONE.NAME", "D2SwinTransformer", "MODEL.SWIN.EMBED_DIM", 12, "MODEL.SWIN.DEPTHS", [1, 1, 1, 1]]
    cfg = small_config(*swin, *COMMON, "MODEL.BACKBONE.USE_CHECKPOINT", True)
    assert build_model(cfg).backbone.use_checkpoint


def test_nothing_to_recompute_is_an_error(small_config, input_shape):
    with pytest.raises(ValueError, match="MODEL.SEM_SEG_HEAD.USE_CHECKPOINT: BasePixelDecoder has no layers"):
        build_pixel_decoder(
            small_config(
                "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "BasePixelDecoder", "MODEL.SEM_SEG_HEAD.USE_CHECKPOINT", True
            ),
            input_shape,
        )
    with pytest.raises(ValueError, match="MODEL.BACKBONE.USE_CHECKPOINT: Linear"):
        recompute_activations(nn.Linear(1, 1), "MODEL.BACKBONE.USE_CHECKPOINT")


def test_encoder_in_pieces_changes_nothing(small_config, input_shape, monkeypatch):
    torch.manual_seed(0)
    features = random_features(input_shape)
    found = []
    for key in (False, True):
        cfg = small_config("MODEL.SEM_SEG_HEAD.USE_CHECKPOINT", key)
        torch.manual_seed(1)
        decoder = build_pixel_decoder(cfg, input_shape).double().train()
        for values in (2**21, 48 * 32):
            monkeypatch.setattr(linear, "_LEAST_ROWS", 32)
            monkeypatch.setattr(linear, "_CACHED_VALUES", values)
            decoder.zero_grad()
            mask_features, _, maps = decoder.forward_features(features)
            (mask_features.square().mean() + sum(m.square().mean() for m in maps)).backward()
            found.append([mask_features] + [p.grad.clone() for p in decoder.parameters()])
    for other in found[1:]:
        # sums in another order; biases before a norm have no gradient but rounding, hence the absolute part
        for ours, plain in zip(other, found[0]):
            torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-13)


def test_pieces_within_recomputed_layers(small_config, input_shape, monkeypatch):
    monkeypatch.setattr(linear, "_LEAST_ROWS", 4)
    monkeypatch.setattr(linear, "_CACHED_VALUES", 4 * 48)  # six places of res5: two pieces for two images
    features = random_features(input_shape)
    found = []
    for key in (False, True):
        torch.manual_seed(1)
        kind = ["MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "TransformerEncoderPixelDecoder"]
        options = ["MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 2, "MODEL.SEM_SEG_HEAD.USE_CHECKPOINT", key]
        decoder = build_pixel_decoder(small_config(*kind, *options), input_shape).double().train()
        decoder.forward_features(features)[0].square().mean().backward()
        found.append([p.grad for p in decoder.parameters()])
    assert all(g is not None for g in found[0])
    for ours, plain in zip(*found):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-13)
