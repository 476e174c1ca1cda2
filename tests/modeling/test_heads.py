"""Heads: what goes where, the per-pixel losses, and checkpoints of every known layout."""

import logging

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_sem_seg_head
from torch import nn

from mask2former_plugin.modeling.heads import MaskFormerHead, per_pixel_loss

STANDARD = ("MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME", "StandardTransformerDecoder")


def mask_former(cfg):
    return (
        "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME",
        "BasePixelDecoder",
        *STANDARD,
        "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE",
        cfg,
    )


@pytest.mark.parametrize(
    "options, expected_channels",
    [
        ((), 32),
        ((*STANDARD, "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "transformer_encoder"), 32),
        (
            (
                *STANDARD,
                "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE",
                "pixel_embedding",
                "MODEL.SEM_SEG_HEAD.MASK_DIM",
                20,
            ),
            20,
        ),
        (mask_former("res5"), 40),
        (mask_former("res3"), 16),
    ],
)
def test_the_decoder_reads_what_the_config_names(small_config, input_shape, features, options, expected_channels):
    head = build_sem_seg_head(
        small_config("MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ", True, *options), input_shape
    ).double()
    projections = head.predictor.input_proj if head.predictor.multi_scale_input else [head.predictor.input_proj]
    assert {p.weight.shape[1] for p in projections} == {expected_channels}
    maps = features()
    mask_features, encoder_features, multi_scale = head.pixel_decoder.forward_features(maps)
    source = {
        "multi_scale_pixel_decoder": multi_scale,
        "transformer_encoder": encoder_features,
        "pixel_embedding": mask_features,
        **maps,
    }[head.transformer_in_feature]
    expected = head.predictor(source, mask_features)
    prediction = head(maps)
    assert prediction["pred_logits"].shape == (2, 10, 6)
    assert prediction["pred_masks"].shape == (2, 10, 19, 26)
    assert torch.equal(prediction["pred_logits"], expected["pred_logits"])
    assert torch.equal(prediction["pred_masks"], expected["pred_masks"])
    assert head.num_classes == 5


def test_every_parameter_gets_a_gradient(small_config, input_shape, features):
    for options in ((), mask_former("res5")):
        head = build_sem_seg_head(small_config(*options), input_shape)
        prediction = head(features(dtype=torch.float32))
        everything = [prediction, *prediction["aux_outputs"]]
        sum(p["pred_logits"].square().sum() + p["pred_masks"].square().sum() for p in everything).backward()
        assert [name for name, p in head.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    "options, message",
    [
        (("MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "res7"), r"is 'res7'.*\['res2', 'res3', 'res4', 'res5'\]"),
        (STANDARD, "StandardTransformerDecoder needs .* a single feature map, got 'multi_scale_pixel_decoder'"),
        (("MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "res5"), "Masked.* needs .* 'multi_scale.*', got 'res5'"),
        (("MODEL.SEM_SEG_HEAD.NAME", "PerPixelBaselinePlusHead", "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "res5"),
         r"one query per class.*\(10\).*\(5\)"),
    ],
)  # fmt: skip
def test_errors_of_the_configuration(small_config, input_shape, options, message):
    with pytest.raises(ValueError, match=message):
        build_sem_seg_head(small_config(*options), input_shape)


def test_encoder_features_without_an_encoder(small_config, input_shape, features):
    head = build_sem_seg_head(small_config(*mask_former("transformer_encoder")), input_shape).double()
    with pytest.raises(ValueError, match="BasePixelDecoder has no transformer encoder"):
        head(features())


def per_pixel_head(small_config, input_shape, name, *options):
    return build_sem_seg_head(
        small_config(
            *mask_former("res5"), "MODEL.SEM_SEG_HEAD.NAME", name, "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 5,
            "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT", 0.5, *options,
        ),
        input_shape,
    ).double()  # fmt: skip


def mean_cross_entropy(logits, targets, ignore=255):
    """Over the labelled pixels, one by one."""
    terms = []
    for b, y, x in (targets != ignore).nonzero().tolist():
        scores = logits[b, :, y, x]
        terms.append(scores.logsumexp(0) - scores[targets[b, y, x]])
    return torch.stack(terms).mean()


def test_per_pixel_baseline(small_config, input_shape, features):
    head = per_pixel_head(small_config, input_shape, "PerPixelBaselineHead")
    maps = features((32, 64))
    mask_features, _, _ = head.pixel_decoder.forward_features(maps)
    logits = F.conv2d(mask_features, head.predictor.weight, head.predictor.bias)
    logits = F.interpolate(logits, size=(32, 64), mode="bilinear", align_corners=False)
    targets = torch.randint(0, 5, (2, 32, 64))
    targets[:, :3] = 255
    nothing, losses = head(maps, targets)
    assert nothing is None and set(losses) == {"loss_sem_seg"}
    torch.testing.assert_close(losses["loss_sem_seg"], 0.5 * mean_cross_entropy(logits, targets), rtol=0, atol=1e-10)
    output, losses = head.eval()(maps)
    assert losses == {}
    torch.testing.assert_close(output, logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("deep_supervision", [True, False])
def test_per_pixel_baseline_plus(small_config, input_shape, features, deep_supervision):
    head = per_pixel_head(
        small_config, input_shape, "PerPixelBaselinePlusHead",
        "MODEL.MASK_FORMER.DEEP_SUPERVISION", deep_supervision, "MODEL.MASK_FORMER.DEC_LAYERS", 3,
    )  # fmt: skip
    maps = features((32, 64))
    mask_features, _, _ = head.pixel_decoder.forward_features(maps)
    prediction = head.predictor(maps["res5"], mask_features)
    targets = torch.randint(0, 5, (2, 32, 64))
    _, losses = head(maps, targets)
    expected = {"loss_sem_seg": prediction}
    if deep_supervision:
        expected |= {f"loss_sem_seg_{i}": auxiliary for i, auxiliary in enumerate(prediction["aux_outputs"])}
        assert len(expected) == 3
    assert losses.keys() == expected.keys()
    for name, output in expected.items():
        logits = F.interpolate(output["pred_masks"], scale_factor=4, mode="bilinear", align_corners=False)
        torch.testing.assert_close(losses[name], 0.5 * mean_cross_entropy(logits, targets), rtol=0, atol=1e-10)
    scores, _ = head.eval()(maps)
    assert scores.shape == (2, 5, 32, 64)


def test_per_pixel_loss_of_odd_sizes_and_of_nothing():
    logits = torch.randn(1, 4, 8, 12, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 4, (1, 7, 10))
    torch.testing.assert_close(per_pixel_loss(logits, targets, 255), mean_cross_entropy(logits[..., :7, :10], targets))
    loss = per_pixel_loss(logits, torch.full((1, 7, 10), 255), 255)
    loss.backward()
    assert loss == 0 and not logits.grad.any()
    assert per_pixel_loss(logits.bfloat16(), targets, 255).dtype == torch.float32


def layouts(state, prefix):
    """The same weights as the published files hold them."""

    def rename(change):
        return {f"{prefix}{change(key)}": value for key, value in state.items()}

    yield "current", rename(lambda key: key)
    yield "without pixel_decoder", rename(lambda key: key.removeprefix("pixel_decoder."))
    yield "old query name", rename(lambda key: key.replace("query_feat", "static_query"))
    yield "both", rename(lambda key: key.removeprefix("pixel_decoder.").replace("query_feat", "static_query"))


@pytest.mark.parametrize("prefix", ["", "sem_seg_head."])
@pytest.mark.parametrize("name", ["MaskFormerHead", "PerPixelBaselineHead", "PerPixelBaselinePlusHead"])
def test_checkpoint_layouts(small_config, input_shape, caplog, name, prefix):
    options = () if name == "MaskFormerHead" else (*mask_former("res5"), "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 5)
    cfg = small_config("MODEL.SEM_SEG_HEAD.NAME", name, *options)
    source = build_sem_seg_head(cfg, input_shape)
    for layout, state in layouts(source.state_dict(), prefix):
        caplog.clear()
        head = build_sem_seg_head(cfg, input_shape)
        model = nn.ModuleDict({"sem_seg_head": head}) if prefix else head
        with caplog.at_level(logging.WARNING):
            model.load_state_dict(state, strict=True)
        for key, value in source.state_dict().items():
            assert torch.equal(head.state_dict()[key], value), (layout, key)
        renamed = layout in ("without pixel_decoder", "both")
        assert ("old checkpoint" in caplog.text) == renamed
    assert source.state_dict()._metadata[""]["version"] == 2


def test_saved_checkpoints_round_trip(small_config, input_shape, tmp_path):
    cfg = small_config()
    source, target = (build_sem_seg_head(cfg, input_shape) for _ in range(2))
    torch.save(source.state_dict(), tmp_path / "head.pth")
    target.load_state_dict(torch.load(tmp_path / "head.pth", weights_only=True), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values()))


def test_wrong_checkpoints_are_still_refused(small_config, input_shape):
    head = build_sem_seg_head(small_config(), input_shape)
    state = dict(head.state_dict())
    state["something_else.weight"] = torch.zeros(1)
    del state["predictor.class_embed.bias"]
    with pytest.raises(RuntimeError, match="(?s)predictor.class_embed.bias.*something_else.weight"):
        head.load_state_dict(state, strict=True)


MASK2FORMER = (
    "MODEL.SEM_SEG_HEAD.NAME", "MaskFormerHead", "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "MSDeformAttnPixelDecoder",
    "MODEL.SEM_SEG_HEAD.IN_FEATURES", ["res2", "res3", "res4", "res5"], "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 133,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM", 256, "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 6,
    "MODEL.SEM_SEG_HEAD.NORM", "GN",
    "MODEL.MASK_FORMER.DEC_LAYERS", 10, "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "multi_scale_pixel_decoder",
)  # fmt: skip
MASKFORMER = (
    *MASK2FORMER, "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "BasePixelDecoder",
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 0,
    "MODEL.MASK_FORMER.DEC_LAYERS", 6, "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "res5", *STANDARD,
)  # fmt: skip
ADE = ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 150)
ENCODER = (
    "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "TransformerEncoderPixelDecoder",
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 6,
    "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "transformer_encoder",
)  # fmt: skip
RESNET = (
    "MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.BACKBONE.FREEZE_AT", 0,
    "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"],
    "MODEL.RESNETS.STEM_TYPE", "basic", "MODEL.RESNETS.RES5_MULTI_GRID", [1, 1, 1],
)  # fmt: skip
R101 = (*RESNET, "MODEL.RESNETS.DEPTH", 101)


def swin(embed, depths, heads, window):
    return ("MODEL.BACKBONE.NAME", "D2SwinTransformer", "MODEL.SWIN.EMBED_DIM", embed, "MODEL.SWIN.DEPTHS", depths,
            "MODEL.SWIN.NUM_HEADS", heads, "MODEL.SWIN.WINDOW_SIZE", window)  # fmt: skip


TINY = swin(96, [2, 2, 6, 2], [3, 6, 12, 24], 7)
SMALL = swin(96, [2, 2, 18, 2], [3, 6, 12, 24], 7)
BASE = swin(128, [2, 2, 18, 2], [4, 8, 16, 32], 12)
LARGE = swin(192, [2, 2, 18, 2], [6, 12, 24, 48], 12)
QUERIES_200 = ("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 200)
PER_PIXEL = (*MASKFORMER, *ADE, "MODEL.SEM_SEG_HEAD.NAME", "PerPixelBaselineHead")
PLUS = (*PER_PIXEL, "MODEL.SEM_SEG_HEAD.NAME", "PerPixelBaselinePlusHead", "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 150)


@pytest.mark.parametrize(
    "parameters, keys, options",
    [
        (43_983_878, 558, (*MASK2FORMER, *RESNET)),
        (62_923_782, 813, (*MASK2FORMER, *R101)),
        (47_435_264, 482, (*MASK2FORMER, *TINY)),
        (68_753_168, 650, (*MASK2FORMER, *SMALL)),
        (106_917_822, 650, (*MASK2FORMER, *BASE)),
        (215_535_610, 650, (*MASK2FORMER, *LARGE, *QUERIES_200)),
        (
            44_007_700,
            611,
            (*MASK2FORMER, *RESNET, "MODEL.RESNETS.NORM", "SyncBN", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 19),
        ),
        (41_254_743, 410, (*MASKFORMER, *ADE, *RESNET)),
        (41_757_009, 334, (*MASKFORMER, *ADE, *TINY)),
        (211_575_627, 502, (*MASKFORMER, *ADE, *LARGE)),
        (45_012_038, 482, (*MASKFORMER, *ENCODER, *RESNET)),
        (63_951_942, 737, (*MASKFORMER, *ENCODER, *R101)),
        (41_752_640, 334, (*MASKFORMER, *TINY)),
        (31_033_942, 290, (*PER_PIXEL, *RESNET)),
        (41_228_736, 407, (*PLUS, *RESNET)),
    ],
)
def test_published_totals(full_config, parameters, keys, options):
    """Parameters and checkpoint keys of the published models; the criterion adds one key and no parameter."""
    cfg = full_config(*options)
    with torch.device("meta"):
        backbone = build_backbone(cfg, ShapeSpec(channels=3))
        head = build_sem_seg_head(cfg, backbone.output_shape())
    assert sum(p.numel() for module in (backbone, head) for p in module.parameters()) == parameters
    state_keys = len(backbone.state_dict()) + len(head.state_dict())
    assert state_keys + isinstance(head, MaskFormerHead) == keys


def test_published_names(full_config):
    """One key of each kind, with its shape, from the published checkpoint of Mask2Former R50 for COCO panoptic."""
    with torch.device("meta"):
        channels = {"res2": (256, 4), "res3": (512, 8), "res4": (1024, 16), "res5": (2048, 32)}
        shapes = {name: ShapeSpec(channels=c, stride=s) for name, (c, s) in channels.items()}
        state = build_sem_seg_head(full_config(*MASK2FORMER), shapes).state_dict()
    encoder, predictor = "pixel_decoder.transformer.encoder.layers.5.", "predictor."
    expected = {
        "pixel_decoder.input_proj.0.0.weight": (256, 2048, 1, 1),
        "pixel_decoder.input_proj.2.0.weight": (256, 512, 1, 1),
        "pixel_decoder.input_proj.2.1.bias": (256,),
        "pixel_decoder.transformer.level_embed": (3, 256),
        encoder + "self_attn.sampling_offsets.weight": (192, 256),
        encoder + "self_attn.attention_weights.bias": (96,),
        encoder + "self_attn.value_proj.weight": (256, 256),
        encoder + "self_attn.output_proj.bias": (256,),
        encoder + "linear1.weight": (1024, 256),
        encoder + "linear2.weight": (256, 1024),
        encoder + "norm2.weight": (256,),
        "pixel_decoder.mask_features.weight": (256, 256, 1, 1),
        "pixel_decoder.adapter_1.weight": (256, 256, 1, 1),
        "pixel_decoder.adapter_1.norm.weight": (256,),
        "pixel_decoder.layer_1.weight": (256, 256, 3, 3),
        "pixel_decoder.layer_1.norm.bias": (256,),
        predictor + "transformer_self_attention_layers.8.self_attn.in_proj_weight": (768, 256),
        predictor + "transformer_self_attention_layers.8.norm.weight": (256,),
        predictor + "transformer_cross_attention_layers.8.multihead_attn.in_proj_bias": (768,),
        predictor + "transformer_cross_attention_layers.8.multihead_attn.out_proj.weight": (256, 256),
        predictor + "transformer_ffn_layers.8.linear1.weight": (2048, 256),
        predictor + "transformer_ffn_layers.8.norm.bias": (256,),
        predictor + "decoder_norm.weight": (256,),
        predictor + "query_feat.weight": (100, 256),
        predictor + "query_embed.weight": (100, 256),
        predictor + "level_embed.weight": (3, 256),
        predictor + "class_embed.weight": (134, 256),
        predictor + "mask_embed.layers.2.bias": (256,),
    }
    assert {name: tuple(state[name].shape) for name in expected} == expected
    assert "pixel_decoder.adapter_1.bias" not in state and "pixel_decoder.layer_1.bias" not in state
