"""Activation checkpointing: the same losses and gradients, dropout and batch norm included, from fewer kept tensors."""

import copy

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Instances
from torch import nn

from mask2former_plugin.modeling.layers import linear
from mask2former_plugin.modeling.pixel_decoders import build_pixel_decoder
from mask2former_plugin.modeling.recomputation import RecomputedSequential, recompute_activations

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
    kept = {}
    torch.manual_seed(2)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.numel()}) or t, lambda t: t):
        losses = model(batch)
    sum(losses.values()).backward()
    after = torch.rand(3)  # the random stream goes on where it would have
    return losses, {name: p.grad for name, p in model.named_parameters()}, sum(kept.values()), after


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("kind", [[], MASKFORMER], ids=["mask2former", "maskformer"])
def test_same_losses_and_gradients(small_config, key, kind):
    plain = model_of(small_config(*RESNET, *COMMON, *kind))
    recomputed = model_of(small_config(*RESNET, *COMMON, *kind, key, True))
    assert list(plain.state_dict()) == list(recomputed.state_dict())
    losses, gradients, kept, after = step(plain)
    own_losses, own_gradients, own_kept, own_after = step(recomputed)
    assert own_kept < kept
    assert torch.equal(after, own_after)
    for name, loss in losses.items():
        assert torch.equal(loss, own_losses[name]), name
    for name, gradient in gradients.items():
        if gradient is None:
            assert own_gradients[name] is None, name
        else:  # the same operations; only the order of sums over several uses may differ
            torch.testing.assert_close(own_gradients[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max())


def test_copies_recompute_their_own_layers(small_config):
    model = model_of(small_config(*RESNET, *COMMON, *(word for key in KEYS for word in (key, True))))
    assert isinstance(model.backbone.res3, RecomputedSequential)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.mul_(0.5)
    _, gradients, _, _ = step(model)
    assert all(p.grad is None for p in clone.parameters())
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values())


def test_batch_norm_counts_a_batch_once():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
    plain = nn.Sequential(block, nn.Conv2d(3, 2, 1))
    recomputed = copy.deepcopy(plain)
    recomputed.__class__ = RecomputedSequential
    x = torch.randn(4, 2, 7, 9)
    for network in (plain, recomputed):
        for _ in range(2):
            network(x).square().mean().backward()
    for (name, expected), actual in zip(plain.state_dict().items(), recomputed.state_dict().values()):
        assert torch.equal(expected, actual), name
    assert recomputed[0][1].momentum == 0.1
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
    features = {
        name: torch.randn(2, s.channels, 96 // s.stride, 64 // s.stride, dtype=torch.float64)
        for name, s in input_shape.items()
    }
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
