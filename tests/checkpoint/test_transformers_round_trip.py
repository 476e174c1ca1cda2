"""With transformers itself: their random model to ours, equal outputs, and back into theirs, bit by bit."""

import os

import pytest
import torch
from detectron2.modeling import build_model

from mask2former_plugin.checkpoint import Checkpointer
from mask2former_plugin.checkpoint.huggingface import save_pretrained, to_detectron2
from mask2former_plugin.config import load_config

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="pip install transformers")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

STAGES = ["stage1", "stage2", "stage3", "stage4"]


def backbone(kind):
    if kind == "swin":
        sizes = {"embed_dim": 12, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 3, 4], "window_size": 4}
        return transformers.SwinConfig(**sizes, out_features=STAGES)
    return transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32, 64, 128], out_features=STAGES)


def theirs(family, kind):
    """A random model of few channels; every weight has noise, so that initial zeros and ones hide nothing."""
    if family == "mask2former":
        config = transformers.Mask2FormerConfig(
            backbone_config=backbone(kind), num_labels=3, feature_size=32, mask_feature_size=64, hidden_dim=48,
            num_attention_heads=4, encoder_layers=2, decoder_layers=5, dim_feedforward=40, num_queries=7,
        )  # fmt: skip
        model = transformers.Mask2FormerForUniversalSegmentation(config)
    else:
        decoder = transformers.DetrConfig(
            d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, num_queries=7, encoder_layers=1
        )
        config = transformers.MaskFormerConfig(
            backbone_config=backbone(kind),
            decoder_config=decoder,
            num_labels=3,
            fpn_feature_size=64,
            mask_feature_size=96,
        )
        model = transformers.MaskFormerForInstanceSegmentation(config)
    # the one norm that no output depends on, and that ours has not
    unused = {f"model.pixel_level_module.encoder.{part}layernorm" for part in ("", "swin.", "model.")}
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.rpartition(".")[0] not in unused:
                value.add_(torch.randn_like(value) * 0.02)
        for name, value in model.named_buffers():
            if name.endswith("running_mean"):
                value.normal_(0, 0.1)
            elif name.endswith(("running_var", "empty_weight")):
                value.uniform_(0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("kind", ["swin", "resnet"])
@pytest.mark.parametrize("family", ["mask2former", "maskformer"])
def test_there_and_back(family, kind, tmp_path):
    model = theirs(family, kind)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="300KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1

    cfg = load_config(tmp_path / "theirs", ["MODEL.DEVICE", "cpu"])
    ours = build_model(cfg).eval()
    checkpointer = Checkpointer(ours)
    checkpointer.load(cfg.MODEL.WEIGHTS)
    assert not checkpointer.report
    checkpointer.require_weights(classifier=True)
    live = to_detectron2(model.state_dict())
    assert all(torch.equal(live[name], value) for name, value in ours.state_dict().items())

    save_pretrained(ours, cfg, tmp_path / "ours")
    again, loading = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state, wanted = again.state_dict(), model.state_dict()
    assert list(state) == list(wanted)
    assert [name for name in wanted if state[name].dtype != wanted[name].dtype] == []
    assert [name for name in wanted if not torch.equal(state[name], wanted[name])] == []
    ignored = ("_name_or_path", "backbone_config", "decoder_config", "num_attention_heads", "num_hidden_layers")
    before, after = model.config.to_dict(), again.config.to_dict()
    assert {key for key in before if key not in ignored and before[key] != after.get(key)} == set()
    assert again.config.num_attention_heads == (
        4 if family == "mask2former" else again.config.decoder_config.num_attention_heads
    )
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "ours")
    assert tuple(processor.image_mean) == (0.485, 0.456, 0.406) and processor.size["shortest_edge"] == 800

    model.double(), ours.double()
    images = torch.randn(2, 3, 75, 101, dtype=torch.float64)
    with torch.no_grad():
        expected = model(pixel_values=images)
        found = ours.sem_seg_head(ours.backbone(images))
    assert expected.masks_queries_logits.std() > 1e-3
    torch.testing.assert_close(found["pred_logits"], expected.class_queries_logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(found["pred_masks"], expected.masks_queries_logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["swin", "resnet"])
def test_their_imagenet_backbones(kind, tmp_path):
    classes = {"swin": transformers.SwinForImageClassification, "resnet": transformers.ResNetForImageClassification}
    model = classes[kind](backbone(kind)).eval()
    model.save_pretrained(tmp_path)
    theirs_config = theirs("mask2former", kind).config
    theirs_config.save_pretrained(tmp_path / "config")
    ours = build_model(load_config(tmp_path / "config", ["MODEL.DEVICE", "cpu"])).eval().backbone
    checkpointer = Checkpointer(ours)
    checkpointer.load(str(tmp_path))
    assert not checkpointer.report.unexpected
    assert all(name.startswith("norm") for name in checkpointer.report.missing)
    images = torch.randn(1, 3, 160, 192)  # no stage smaller than a window, which theirs would shrink
    with torch.no_grad():
        expected = model(pixel_values=images, output_hidden_states=True)
        if kind == "resnet":
            found = ours(images)["res5"]
            torch.testing.assert_close(found, expected.hidden_states[-1], rtol=0, atol=1e-4)
        else:
            tokens = ours.patch_embed(images)
            for stage in ours.layers:
                for block in stage.blocks:
                    tokens = block(tokens)
                tokens = tokens if stage.downsample is None else stage.downsample(tokens)
            torch.testing.assert_close(tokens.flatten(1, 2), expected.hidden_states[-1], rtol=0, atol=1e-4)
