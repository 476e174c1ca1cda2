"""Every row of docs/huggingface.md: what Hugging Face's two models promise has the place here that the table names."""

import functools
import re
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances
from PIL import Image
from torch import nn

from mask2former_plugin import MaskFormer
from mask2former_plugin.checkpoint.huggingface import from_hf_config, save_pretrained, to_hf_config
from mask2former_plugin.config import differing_keys
from mask2former_plugin.modeling.criterion import average_number_of_masks
from mask2former_plugin.processing import ImageProcessor

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "huggingface.md"


def documented():
    """Section → name of the row → second column."""
    tables = {}
    for section in re.split(r"^## ", DOCUMENT.read_text(encoding="utf-8"), flags=re.M)[1:]:
        title, _, text = section.partition("\n")
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
        assert all(len(row) == 3 for row in rows), title
        tables[title] = {row[0].replace("`", ""): row[1] for row in rows[2:]}
    return tables


TABLES = documented()

# ---- configuration ----

SWIN = {"model_type": "swin", "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8], "window_size": 4}
RESNET = {"model_type": "resnet", "hidden_sizes": [32, 64, 128, 256], "embedding_size": 8}
BASES = {
    "Configuration of Mask2Former": {
        "model_type": "mask2former", "backbone_config": SWIN, "feature_size": 32, "mask_feature_size": 16,
        "hidden_dim": 32, "encoder_layers": 1, "decoder_layers": 4, "num_attention_heads": 4, "dim_feedforward": 40,
        "num_queries": 6, "train_num_points": 60,
    },
    "Configuration of MaskFormer": {
        "model_type": "maskformer", "backbone_config": SWIN, "fpn_feature_size": 32, "mask_feature_size": 16,
        "decoder_config": {
            "model_type": "detr", "d_model": 32, "decoder_layers": 3, "decoder_attention_heads": 4,
            "decoder_ffn_dim": 40, "num_queries": 6, "dropout": 0.0,
        },
    },
}  # fmt: skip
HEAD, MODEL = "MODEL.SEM_SEG_HEAD.", "MODEL.MASK_FORMER."
CLASSES = [HEAD + "NUM_CLASSES", "DATASETS.*"]


def no_error(values, keys, probe=None):
    return values, keys, probe, None


def error(values, text):
    return values, None, None, text


def decoder_layer(model):
    return model.sem_seg_head.predictor.transformer.decoder.layers[0]


def weights_of(model, loss, cost):
    """Weight of a loss, of an auxiliary one, and of the cost in the matching."""
    weights = model.criterion.weight_dict
    return weights[loss], weights[f"{loss}_1"], getattr(model.criterion.matcher, cost)


# name of the row → values in their config, keys that change in ours, what the built model shows of it; or the error
CONFIG_ROWS = {
    "Configuration of Mask2Former": {
        "backbone_config": no_error(
            {"backbone_config": {**SWIN, "embed_dim": 16}},
            ["MODEL.SWIN.EMBED_DIM"],
            lambda m: m.backbone.output_shape()["res2"].channels == 16,
        ),
        "backbone": error({"backbone": "microsoft/swin", "backbone_config": None}, "no backbone_config"),
        "use_pretrained_backbone": no_error({"use_pretrained_backbone": True}, []),
        "use_timm_backbone": no_error({"use_timm_backbone": True}, []),
        "backbone_kwargs": error({"backbone_config": {**SWIN, "out_features": ["stage4"]}}, "out_features"),
        "feature_size": no_error(
            {"feature_size": 64},
            [HEAD + "CONVS_DIM"],
            lambda m: m.sem_seg_head.pixel_decoder.mask_features.in_channels == 64,
        ),
        "mask_feature_size": no_error(
            {"mask_feature_size": 24},
            [HEAD + "MASK_DIM"],
            lambda m: m.sem_seg_head.pixel_decoder.mask_features.out_channels == 24,
        ),
        "hidden_dim": no_error(
            {"hidden_dim": 48},
            [MODEL + "HIDDEN_DIM"],
            lambda m: m.sem_seg_head.predictor.query_feat.weight.shape == (6, 48),
        ),
        "encoder_feedforward_dim": error({"encoder_feedforward_dim": 512}, "encoder_feedforward_dim is 512"),
        "activation_function": error({"activation_function": "gelu"}, "activation_function is 'gelu'"),
        "encoder_layers": no_error(
            {"encoder_layers": 2},
            [HEAD + "TRANSFORMER_ENC_LAYERS"],
            lambda m: len(m.sem_seg_head.pixel_decoder.transformer.encoder.layers) == 2,
        ),
        "decoder_layers": no_error(
            {"decoder_layers": 6},
            [MODEL + "DEC_LAYERS"],
            lambda m: len(m.sem_seg_head.predictor.transformer_ffn_layers) == 5,
        ),
        "num_attention_heads": no_error(
            {"num_attention_heads": 2},
            [MODEL + "NHEADS"],
            lambda m: m.sem_seg_head.predictor.transformer_self_attention_layers[0].self_attn.num_heads == 2
            and m.sem_seg_head.pixel_decoder.transformer.encoder.layers[0].self_attn.attention_weights.out_features
            == 2 * 3 * 4,
        ),
        "dropout": no_error(
            {"dropout": 0.25},
            [MODEL + "DROPOUT"],
            lambda m: m.sem_seg_head.pixel_decoder.transformer.encoder.layers[0].dropout.p == 0.25,
        ),
        "dim_feedforward": no_error(
            {"dim_feedforward": 56},
            [MODEL + "DIM_FEEDFORWARD"],
            lambda m: m.sem_seg_head.predictor.transformer_ffn_layers[0].linear1.out_features == 56,
        ),
        "pre_norm": no_error(
            {"pre_norm": True},
            [MODEL + "PRE_NORM"],
            lambda m: m.sem_seg_head.predictor.transformer_cross_attention_layers[0].pre_norm,
        ),
        "enforce_input_projection": no_error(
            {"enforce_input_projection": True},
            [MODEL + "ENFORCE_INPUT_PROJ"],
            lambda m: len(list(m.sem_seg_head.predictor.input_proj.parameters())) == 6,
        ),
        "common_stride": no_error(
            {"common_stride": 8}, [HEAD + "COMMON_STRIDE"], lambda m: m.sem_seg_head.pixel_decoder.fpn_features == []
        ),
        "ignore_value": no_error({"ignore_value": 7}, [HEAD + "IGNORE_VALUE"]),
        "num_queries": no_error(
            {"num_queries": 9},
            [MODEL + "NUM_OBJECT_QUERIES"],
            lambda m: m.num_queries == 9 == len(m.sem_seg_head.predictor.query_feat.weight),
        ),
        "no_object_weight": no_error(
            {"no_object_weight": 0.3},
            [MODEL + "NO_OBJECT_WEIGHT"],
            lambda m: m.criterion.empty_weight.tolist() == [1, 1, pytest.approx(0.3)],
        ),
        "class_weight": no_error(
            {"class_weight": 3.0},
            [MODEL + "CLASS_WEIGHT"],
            lambda m: weights_of(m, "loss_ce", "cost_class") == (3.0,) * 3,
        ),
        "mask_weight": no_error(
            {"mask_weight": 3.0},
            [MODEL + "MASK_WEIGHT"],
            lambda m: weights_of(m, "loss_mask", "cost_mask") == (3.0,) * 3,
        ),
        "dice_weight": no_error(
            {"dice_weight": 3.0},
            [MODEL + "DICE_WEIGHT"],
            lambda m: weights_of(m, "loss_dice", "cost_dice") == (3.0,) * 3,
        ),
        "train_num_points": no_error(
            {"train_num_points": 70},
            [MODEL + "TRAIN_NUM_POINTS"],
            lambda m: m.criterion.num_points == 70 == m.criterion.matcher.num_points,
        ),
        "oversample_ratio": no_error(
            {"oversample_ratio": 2.0}, [MODEL + "OVERSAMPLE_RATIO"], lambda m: m.criterion.oversample_ratio == 2.0
        ),
        "importance_sample_ratio": no_error(
            {"importance_sample_ratio": 0.5},
            [MODEL + "IMPORTANCE_SAMPLE_RATIO"],
            lambda m: m.criterion.importance_sample_ratio == 0.5,
        ),
        "init_std": no_error({"init_std": 0.5}, []),
        "init_xavier_std": no_error({"init_xavier_std": 0.5}, []),
        "use_auxiliary_loss": no_error(
            {"use_auxiliary_loss": False},
            [MODEL + "DEEP_SUPERVISION"],
            lambda m: m.criterion.weight_dict.keys() == {"loss_ce", "loss_mask", "loss_dice"},
        ),
        "feature_strides": error({"feature_strides": [4, 8, 16]}, "feature_strides is"),
        "output_auxiliary_logits": no_error({"output_auxiliary_logits": False}, []),
        "num_labels": no_error(
            {"num_labels": 5}, CLASSES, lambda m: m.sem_seg_head.predictor.class_embed.out_features == 6
        ),
        "id2label": no_error(
            {"id2label": {"0": "a", "1": "b", "2": "c"}},
            CLASSES,
            lambda m: m.metadata.get("stuff_classes") == ["a", "b", "c"] and m.sem_seg_head.num_classes == 3,
        ),
        "label2id": no_error({"label2id": {"a": 0, "b": 1}}, []),
        "output_hidden_states": no_error({"output_hidden_states": True}, []),
        "output_attentions": no_error({"output_attentions": True}, []),
        "return_dict": no_error({"return_dict": False}, []),
        "from_backbone_config": no_error({}, [], lambda m: m.backbone.output_shape()["res5"].channels == 64),
    },
    "Configuration of MaskFormer": {
        "backbone_config": no_error(
            {"backbone_config": RESNET},
            ["MODEL.BACKBONE.NAME", "MODEL.RESNETS.*", "MODEL.SWIN.*"],
            lambda m: m.backbone.output_shape()["res5"].channels == 256,
        ),
        "fpn_feature_size": no_error(
            {"fpn_feature_size": 64},
            [HEAD + "CONVS_DIM"],
            lambda m: m.sem_seg_head.pixel_decoder.mask_features.in_channels == 64,
        ),
        "mask_feature_size": no_error(
            {"mask_feature_size": 24},
            [HEAD + "MASK_DIM"],
            lambda m: m.sem_seg_head.pixel_decoder.mask_features.out_channels == 24,
        ),
        "no_object_weight": no_error(
            {"no_object_weight": 0.3},
            [MODEL + "NO_OBJECT_WEIGHT"],
            lambda m: m.criterion.empty_weight.tolist() == [1, 1, pytest.approx(0.3)],
        ),
        "use_auxiliary_loss": no_error(
            {"use_auxiliary_loss": True},
            [MODEL + "DEEP_SUPERVISION"],
            lambda m: "loss_ce_1" in m.criterion.weight_dict and len(m.criterion.weight_dict) == 9,
        ),
        "dice_weight": no_error(
            {"dice_weight": 3.0},
            [MODEL + "DICE_WEIGHT"],
            lambda m: m.criterion.weight_dict["loss_dice"] == 3.0 == m.criterion.matcher.cost_dice,
        ),
        "cross_entropy_weight": no_error(
            {"cross_entropy_weight": 3.0},
            [MODEL + "CLASS_WEIGHT"],
            lambda m: m.criterion.weight_dict["loss_ce"] == 3.0 == m.criterion.matcher.cost_class,
        ),
        "mask_weight": no_error(
            {"mask_weight": 3.0},
            [MODEL + "MASK_WEIGHT"],
            lambda m: m.criterion.weight_dict["loss_mask"] == 3.0 == m.criterion.matcher.cost_mask,
        ),
        "output_auxiliary_logits": no_error({"output_auxiliary_logits": True}, []),
        "init_std": no_error({"init_std": 0.5}, []),
        "init_xavier_std": no_error({"init_xavier_std": 0.5}, []),
        "decoder_config": error({"decoder_config.model_type": "bart"}, "decoder_config.model_type is 'bart'"),
        "decoder_config.d_model": no_error(
            {"decoder_config.d_model": 48},
            [MODEL + "HIDDEN_DIM"],
            lambda m: m.sem_seg_head.predictor.query_embed.weight.shape == (6, 48),
        ),
        "decoder_config.decoder_layers": no_error(
            {"decoder_config.decoder_layers": 2},
            [MODEL + "DEC_LAYERS"],
            lambda m: len(m.sem_seg_head.predictor.transformer.decoder.layers) == 2,
        ),
        "decoder_config.decoder_attention_heads": no_error(
            {"decoder_config.decoder_attention_heads": 2},
            [MODEL + "NHEADS"],
            lambda m: decoder_layer(m).multihead_attn.num_heads == 2,
        ),
        "decoder_config.decoder_ffn_dim": no_error(
            {"decoder_config.decoder_ffn_dim": 56},
            [MODEL + "DIM_FEEDFORWARD"],
            lambda m: decoder_layer(m).linear1.out_features == 56,
        ),
        "decoder_config.dropout": no_error(
            {"decoder_config.dropout": 0.25},
            [MODEL + "DROPOUT"],
            lambda m: decoder_layer(m).dropout.p == 0.25 == decoder_layer(m).self_attn.dropout,
        ),
        "decoder_config.attention_dropout": no_error({"decoder_config.attention_dropout": 0.25}, []),
        "decoder_config.activation_dropout": no_error({"decoder_config.activation_dropout": 0.25}, []),
        "decoder_config.num_queries": no_error(
            {"decoder_config.num_queries": 9},
            [MODEL + "NUM_OBJECT_QUERIES"],
            lambda m: m.num_queries == 9 == len(m.sem_seg_head.predictor.query_embed.weight),
        ),
        "decoder_config.activation_function": error({"decoder_config.activation_function": "gelu"}, "is 'gelu'"),
        "decoder_config.auxiliary_loss": error({"decoder_config.auxiliary_loss": True}, "auxiliary_loss is True"),
        "decoder_config.decoder_layerdrop": error({"decoder_config.decoder_layerdrop": 0.1}, "layerdrop is 0.1"),
        "from_backbone_and_decoder_configs": no_error({}, [], lambda m: decoder_layer(m).linear1.out_features == 40),
    },
}


def changed_config(base, values):
    result = dict(base)
    for key, value in values.items():
        node, _, inner = key.partition(".")
        result[node] = {**base[node], inner: value} if inner else value
    return result


@pytest.mark.parametrize(("section", "name"), [(s, n) for s, rows in CONFIG_ROWS.items() for n in rows])
def test_configuration(section, name):
    values, keys, probe, text = CONFIG_ROWS[section][name]
    place = TABLES[section][name]
    base = from_hf_config(BASES[section])
    named = re.findall(r"`((?:MODEL|DATASETS)\.[\w.*]+)`", place)
    for key in named:  # the keys of the table exist
        node = base
        for part in key.removesuffix(".*").split("."):
            node = node[part]
    if text is not None:
        with pytest.raises(ValueError, match=re.escape(text)):
            from_hf_config(changed_config(BASES[section], values))
        return
    cfg = from_hf_config(changed_config(BASES[section], values))
    changed = differing_keys(base, cfg)
    assert all(any(fnmatch(key, pattern) for pattern in keys) for key in changed)
    assert all(any(fnmatch(key, pattern) for key in changed) for pattern in keys)
    assert all(any(fnmatch(key, pattern) for pattern in named) for key in changed), "not in the table"
    assert (place == "None") <= (changed == [])
    if probe is not None:
        cfg.MODEL.DEVICE = "cpu"
        assert probe(build_model(cfg)), "the model does not show it"
        assert not changed or not probe(base_model(section)), "the model shows it anyway"


@functools.lru_cache(maxsize=None)
def base_model(section):
    cfg = from_hf_config(BASES[section])
    cfg.MODEL.DEVICE = "cpu"
    return build_model(cfg)


# ---- models ----

FAMILIES = {"mask2former": "Configuration of Mask2Former", "maskformer": "Configuration of MaskFormer"}
B, Q, K, D, F, M = 2, 6, 2, 32, 32, 16  # of the models below
HEIGHT, WIDTH = 97, 131
STRIDES = {stride: (-(-HEIGHT // stride), -(-WIDTH // stride)) for stride in (4, 8, 16, 32)}


def config_of(family, **values):
    cfg = from_hf_config({**BASES[FAMILIES[family]], "use_auxiliary_loss": True, **values})
    cfg.MODEL.DEVICE = "cpu"
    return cfg


@pytest.fixture(scope="module", params=FAMILIES)
def run(request):
    """A model, normalised images and, of one pass over them, features, predictions and what hooks saw."""
    torch.manual_seed(0)
    cfg = config_of(request.param)
    model = build_model(cfg).eval()
    images = torch.randn(B, 3, HEIGHT, WIDTH)
    result = {"family": request.param, "cfg": cfg, "model": model, "images": images}
    head = model.sem_seg_head
    decoder = head.predictor
    if request.param == "mask2former":
        norm, states, maps = decoder.decoder_norm, decoder.decoder_norm, []
        attentions = [layer.self_attn for layer in decoder.transformer_self_attention_layers]
    else:
        norm, states = decoder.transformer.decoder.norm, decoder.transformer.decoder.layers
        maps = [head.pixel_decoder.layer_3, head.pixel_decoder.layer_2, head.pixel_decoder.layer_1]
        attentions = [layer.self_attn for layer in states]
    seen = {"norm": [], "states": [], "maps": [], "attention": []}
    hooks = [norm.register_forward_hook(lambda m, inputs, output: seen["norm"].append((inputs[0], output)))]
    if states is not norm:
        hooks += [
            layer.register_forward_hook(lambda m, inputs, output: seen["states"].append(output)) for layer in states
        ]
    hooks += [layer.register_forward_hook(lambda m, inputs, output: seen["maps"].append(output)) for layer in maps]
    hooks += [
        layer.register_forward_pre_hook(lambda m, inputs: seen["attention"].append((m, inputs))) for layer in attentions
    ]
    with torch.no_grad():
        features = model.backbone(images)
        result["outputs"] = head(features)
        for hook in hooks:
            hook.remove()
        result["pixel"] = head.pixel_decoder.forward_features(features)
        result["attentions"] = [attention_weights(*one) for one in seen["attention"]]
    if states is norm:
        seen["states"] = [inputs for inputs, _ in seen["norm"]]
    return {**result, "features": features, "seen": seen}


def attention_weights(module, inputs):
    """What fused attention never computes, from its inputs and its parameters, ``[B, heads, Q, Q]``."""
    plain = nn.MultiheadAttention(module.embed_dim, module.num_heads, batch_first=True)
    plain.load_state_dict(module.state_dict())
    return plain(*inputs, need_weights=True, average_attn_weights=False)[1]


def field(run, name):
    """An output of Hugging Face's by the way that the table describes."""
    outputs, features, seen = run["outputs"], run["features"], run["seen"]
    masked = run["family"] == "mask2former"
    if name == "class_queries_logits":
        return outputs["pred_logits"]
    if name == "masks_queries_logits":
        return outputs["pred_masks"]
    if name == "auxiliary_logits":
        return [one[key] for one in outputs["aux_outputs"] for key in ("pred_logits", "pred_masks")]
    if name == "encoder_last_hidden_state":
        return features["res5"]
    if name == "encoder_hidden_states":
        return [features[level] for level in ("res2", "res3", "res4", "res5")]
    if name == "pixel_decoder_last_hidden_state":
        return run["pixel"][0]
    if name == "pixel_decoder_hidden_states":
        return run["pixel"][2] if masked else seen["maps"]
    if name == "transformer_decoder_last_hidden_state":
        return seen["norm"][-1][0 if masked else 1]
    if name == "transformer_decoder_hidden_states":
        return seen["states"]
    if name == "transformer_decoder_intermediate_states":
        return [output for _, output in seen["norm"]]
    return run["attentions"]


AUXILIARY = [(B, Q, K + 1), (B, Q, *STRIDES[4])]
OUTPUTS = {
    "class_queries_logits": lambda masked: (B, Q, K + 1),
    "masks_queries_logits": lambda masked: (B, Q, *STRIDES[4]),
    "auxiliary_logits": lambda masked: AUXILIARY * (3 if masked else 2),
    "encoder_last_hidden_state": lambda masked: (B, 64, *STRIDES[32]),
    "encoder_hidden_states": lambda masked: [(B, c, *STRIDES[s]) for c, s in zip((8, 16, 32, 64), STRIDES)],
    "pixel_decoder_last_hidden_state": lambda masked: (B, M, *STRIDES[4]),
    "pixel_decoder_hidden_states": lambda masked: [
        (B, F, *STRIDES[stride]) for stride in ((32, 16, 8) if masked else (16, 8, 4))
    ],
    "transformer_decoder_last_hidden_state": lambda masked: (B, Q, D),
    "transformer_decoder_hidden_states": lambda masked: [(B, Q, D)] * (4 if masked else 3),
    "transformer_decoder_intermediate_states": lambda masked: [(B, Q, D)] * (4 if masked else 3),
    "attentions": lambda masked: [(B, 4, Q, Q)] * 3,
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_output(run, name):
    value, expected = field(run, name), OUTPUTS[name](run["family"] == "mask2former")
    found = [tuple(one.shape) for one in value] if isinstance(value, list) else tuple(value.shape)
    assert found == expected


def test_outputs_belong_together(run):
    predictor = run["model"].sem_seg_head.predictor
    with torch.no_grad():
        intermediate = field(run, "transformer_decoder_intermediate_states")
        torch.testing.assert_close(predictor.class_embed(intermediate[-1]), field(run, "class_queries_logits"))
        torch.testing.assert_close(predictor.class_embed(intermediate[0]), field(run, "auxiliary_logits")[0])
        norm = predictor.decoder_norm if run["family"] == "mask2former" else predictor.transformer.decoder.norm
        states = field(run, "transformer_decoder_hidden_states")
        torch.testing.assert_close([norm(state) for state in states], intermediate)
        masks = torch.einsum(
            "bqc,bchw->bqhw", predictor.mask_embed(intermediate[-1]), field(run, "pixel_decoder_last_hidden_state")
        )
    torch.testing.assert_close(masks, field(run, "masks_queries_logits"))
    for weights, (module, inputs) in zip(field(run, "attentions"), run["seen"]["attention"]):
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
        value = nn.functional.linear(inputs[2], *(p.chunk(3)[2] for p in (module.in_proj_weight, module.in_proj_bias)))
        attended = weights @ value.unflatten(2, (module.num_heads, -1)).transpose(1, 2)
        torch.testing.assert_close(module.out_proj(attended.transpose(1, 2).flatten(2)), module(*inputs))


def test_outputs_are_those_of_transformers(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers", reason="compares with Hugging Face: pip install transformers")
    save_pretrained(run["model"], run["cfg"], tmp_path)
    masked = run["family"] == "mask2former"
    name = "Mask2FormerForUniversalSegmentation" if masked else "MaskFormerForInstanceSegmentation"
    theirs = getattr(transformers, name).from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        outputs = theirs(run["images"], output_hidden_states=True, output_attentions=True)
        bare = theirs.model(run["images"], output_hidden_states=True)
    compared = 0
    for name in OUTPUTS:
        expected = getattr(outputs, name, None)
        expected = getattr(bare, name, None) if expected is None else expected
        value = field(run, name)
        if name == "auxiliary_logits" or expected is None or (name == "attentions" and not expected):
            continue  # parity tests compare the first one
        if name.startswith("transformer_decoder") and isinstance(expected, tuple):
            # sequence first in Mask2Former; the initial zeros come first in MaskFormer
            expected = [state.transpose(0, 1) for state in expected] if masked else expected[1:]
        if isinstance(value, list):
            assert len(value) == len(expected), name
        for one, other in zip(*((value, expected) if isinstance(value, list) else ([value], [expected]))):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=lambda text: f"{name}: {text}")
            compared += 1
    assert compared > 12


def batch(*sizes):
    """Images with one square object of class 1 each, as Detectron2's dicts."""
    inputs = []
    for height, width in sizes:
        masks = torch.zeros(1, height, width, dtype=torch.bool)
        masks[0, 8:24, 8:24] = True
        instances = Instances((height, width), gt_classes=torch.tensor([1]), gt_masks=BitMasks(masks))
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        inputs.append({"image": image, "instances": instances})
    return inputs


def test_loss_from_the_tensors_of_the_processor(run):
    """``pixel_values``, ``mask_labels`` and ``class_labels`` give the losses of ``model(batched_inputs)``."""
    inputs, model = batch((64, 96), (96, 64)), run["model"]
    model.size_divisibility, previous = 0, model.size_divisibility
    maps = [x["instances"].gt_masks.tensor[0].int() for x in inputs]  # 1 = class 1
    encoded = ImageProcessor(do_resize=False, ignore_index=0, image_std=[0.229, 0.224, 0.225])(
        [x["image"] for x in inputs], maps
    )
    targets = [
        {"labels": classes, "masks": masks.bool()}
        for classes, masks in zip(encoded["class_labels"], encoded["mask_labels"])
    ]
    try:
        model.train()
        for module in model.modules():
            if module.__class__.__name__ == "DropPath":
                module.eval()
        torch.manual_seed(3)
        with torch.no_grad():
            expected = model(inputs)
            torch.manual_seed(3)
            outputs = model.sem_seg_head(model.backbone(encoded["pixel_values"]))
            losses = model.criterion(outputs, targets, tuple(encoded["pixel_values"].shape[-2:]))
    finally:
        model.eval()
        model.size_divisibility = previous
    assert len(expected) == (12 if run["family"] == "mask2former" else 9)
    weights = model.criterion.weight_dict
    weighted = {name: loss * weights[name] for name, loss in losses.items()}
    torch.testing.assert_close(weighted, expected, rtol=1e-4, atol=1e-4)
    assert sum(expected.values()).shape == () and sum(expected.values()) > 0


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("mask2former", {"use_auxiliary_loss": False}),  # TypeError there
        ("maskformer", {"use_auxiliary_loss": True}),  # TypeError there
        ("mask2former", {"dropout": 0.5}),  # skips layers and crashes there
        ("mask2former", {"backbone_config": RESNET}),  # a warning there
    ],
)
def test_what_crashes_there_trains_here(family, values):
    model = build_model(config_of(family, **values)).train()
    losses = model(batch((64, 64)))
    predictions = 4 if family == "mask2former" else 3
    assert len(losses) == 3 * (predictions if values.get("use_auxiliary_loss", True) else 1)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_whole_way_of_the_document(tmp_path, run):
    save_pretrained(run["model"], run["cfg"], tmp_path)
    code = re.search(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.S).group(1)
    images = [np.zeros((60, 90, 3), np.uint8), np.zeros((90, 60, 3), np.uint8)]
    sizes = [(60, 90), (90, 60)]
    cpu = "cfg.MODEL.DEVICE = 'cpu'\nmodel = build_model"
    small = "inputs = processor(images, size=64)"
    names = {"folder": tmp_path, "images": images, "sizes": sizes}
    exec(code.replace("model = build_model", cpu).replace("inputs = processor(images)", small), names)
    assert [tuple(r["segmentation"].shape) for r in names["results"]] == sizes
    for ours, theirs in zip(names["model"].state_dict().values(), run["model"].state_dict().values()):
        assert torch.equal(ours, theirs)


CLASS_ROWS = {
    "Mask2FormerConfig, MaskFormerConfig": lambda m: to_hf_config(config_of("mask2former"))["num_queries"] == 6,
    "Mask2FormerForUniversalSegmentation, MaskFormerForInstanceSegmentation": lambda m: isinstance(m, MaskFormer),
    "Mask2FormerModel, MaskFormerModel": lambda m: all(
        isinstance(part, nn.Module) for part in (m.backbone, m.sem_seg_head.pixel_decoder, m.sem_seg_head.predictor)
    ),
    "Mask2FormerImageProcessor, MaskFormerImageProcessor": lambda m: all(
        ImageProcessor.from_dict({"image_processor_type": name, "size_divisor": 4}).size_divisor == 4
        for name in ("Mask2FormerImageProcessor", "MaskFormerImageProcessor")
    ),
    "MaskFormerFeatureExtractor": lambda m: ImageProcessor.from_dict(
        {"feature_extractor_type": "MaskFormerFeatureExtractor", "size": 64, "max_size": 90}
    )(np.zeros((9, 9, 3), np.uint8))["pixel_values"].shape == (1, 3, 64, 64),
}  # fmt: skip


@pytest.mark.parametrize("name", CLASS_ROWS)
def test_class(run, name):
    assert CLASS_ROWS[name](run["model"])


# ---- processor ----

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
LABELS = np.random.default_rng(1).integers(0, 3, (40, 50)).astype(np.uint8)
PLAIN = {"do_resize": False, "do_rescale": False, "do_normalize": False}


def values(**options):
    return ImageProcessor(**{**PLAIN, **options})(IMAGE)["pixel_values"]


def shape(**options):
    return tuple(values(**options).shape[-2:])


def classes(**options):
    return ImageProcessor(**{**PLAIN, **options})(IMAGE, LABELS)["class_labels"][0].tolist()


def pixels(filter_):
    return np.asarray(Image.fromarray(IMAGE).resize((32, 32), filter_)).transpose(2, 0, 1)[None].astype(np.float32)


RAW = IMAGE.transpose(2, 0, 1)[None].astype(np.float32)
# name of the option → results, then as many expected values
OPTIONS = {
    "do_resize": lambda: (shape(do_resize=False), shape(do_resize=True, size=64), (40, 50), (64, 96)),
    "size": lambda: (
        shape(do_resize=True, size=32), shape(do_resize=True, size=(64, 32)),
        shape(do_resize=True, size={"max_height": 32, "max_width": 99}, size_divisor=1),
        shape(do_resize=True, size={"height": 40, "width": 50}), (32, 64), (64, 32), (32, 40), (64, 64),
    ),
    "max_size": lambda: (shape(do_resize=True, size=32, max_size=35, size_divisor=1), (28, 35)),
    "size_divisor": lambda: (shape(do_resize=True, size=33, size_divisor=20), (40, 60)),
    "resample": lambda: (
        *(values(do_resize=True, size=(32, 32), resample=f).numpy() for f in (0, 2)), *(pixels(f) for f in (0, 2)),
    ),
    "do_rescale": lambda: (values(do_rescale=True).numpy(), RAW * np.float32(1 / 255)),
    "rescale_factor": lambda: (values(do_rescale=True, rescale_factor=0.5).numpy(), RAW / 2),
    "do_normalize": lambda: (
        values(do_normalize=True).numpy(),
        (RAW - np.float32([0.485, 0.456, 0.406])[:, None, None]) / np.float32([0.229, 0.224, 0.225])[:, None, None],
    ),
    "image_mean": lambda: (
        values(do_normalize=True, image_mean=(1, 2, 3), image_std=(1, 1, 1)).numpy(),
        RAW - np.float32([1, 2, 3])[:, None, None],
    ),
    "image_std": lambda: (
        values(do_normalize=True, image_mean=(0, 0, 0), image_std=(1, 2, 4)).numpy(),
        RAW / np.float32([1, 2, 4])[:, None, None],
    ),
    "ignore_index": lambda: (classes(), classes(ignore_index=1), [0, 1, 2], [0, 2]),
    "do_reduce_labels": lambda: (classes(do_reduce_labels=True, ignore_index=255), [0, 1]),
    "reduce_labels": lambda: (classes(reduce_labels=True, ignore_index=255), [0, 1]),
    "size_divisibility": lambda: (shape(do_resize=True, size=33, size_divisibility=20), (40, 60)),
    "num_labels": lambda: (classes(num_labels=3), raised(lambda: classes(num_labels=2)), [0, 1, 2], "num_labels"),
    "do_pad": lambda: (raised(lambda: ImageProcessor(**PLAIN, do_pad=False)([IMAGE, IMAGE[1:]])), "do_pad"),
    "pad_size": lambda: (shape(pad_size={"height": 60, "width": 70}), (60, 70)),
    "do_convert_rgb": lambda: (
        ImageProcessor(**PLAIN)(IMAGE[..., 0])["pixel_values"].shape,
        ImageProcessor(**PLAIN, do_convert_rgb=False)(IMAGE[..., 0])["pixel_values"].shape,
        (1, 3, 40, 50), (1, 1, 40, 50),
    ),
    "input_data_format": lambda: (
        ImageProcessor(**PLAIN)(RAW[0, :2], input_data_format="channels_first")["pixel_values"].numpy(), RAW[:, :2],
    ),
    "data_format": lambda: (
        ImageProcessor(**PLAIN)(IMAGE, data_format="channels_last")["pixel_values"].numpy(), IMAGE[None].astype("f")
    ),
    "device": lambda: (ImageProcessor(**PLAIN)(IMAGE, device="meta")["pixel_mask"].device.type, "meta"),
    "return_tensors": lambda: (
        type(ImageProcessor(**PLAIN)(IMAGE, return_tensors="np")["pixel_values"]), type(values()),
        np.ndarray, torch.Tensor,
    ),
    "disable_grouping": lambda: (raised(lambda: values(disable_grouping=True), TypeError), "disable_grouping"),
}  # fmt: skip


def raised(call, kind=ValueError):
    """The word of the text of an error that is expected to stand there."""
    with pytest.raises(kind) as info:
        call()
    return next(word for word in ("num_labels", "do_pad", "disable_grouping") if word in str(info.value))


@pytest.mark.parametrize("name", OPTIONS)
def test_option(name):
    results = OPTIONS[name]()
    half = len(results) // 2
    for found, expected in zip(results[:half], results[half:]):
        if isinstance(expected, np.ndarray):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
        else:
            assert found == expected or tuple(found) == expected


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": {"shortest_edge": 48, "longest_edge": 90}, "ignore_index": 255, "do_reduce_labels": True},
        {"size": {"height": 64, "width": 32}, "resample": 3, "ignore_index": 1, "do_normalize": False},
        {"size": {"max_height": 70, "max_width": 50}, "size_divisor": 7, "do_rescale": False},
        {"do_resize": False, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "rescale_factor": 0.01},
    ],
)
def test_processor_gives_what_transformers_gives(options, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers", reason="compares with Hugging Face: pip install transformers")
    image, labels = IMAGE[:35, :49], LABELS[:35, :49]  # odd: no pixel centre falls between two pixels
    theirs = transformers.Mask2FormerImageProcessor(**options)([image], [labels], return_tensors="pt")
    ours = ImageProcessor(**options)([image], [labels])
    assert set(ours) == set(theirs)
    for name in ("pixel_values", "pixel_mask"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5)
    for name in ("mask_labels", "class_labels"):
        assert ours[name][0].dtype == theirs[name][0].dtype and torch.equal(ours[name][0], theirs[name][0])


ONE_MAP = [np.array([[1, 2, 2, 700]])]
ONE_IMAGE = [np.zeros((3, 1, 4), np.float32)]
PREPARATION = {
    "preprocess": lambda p: p.preprocess(np.zeros((1, 4, 3)), ONE_MAP)["class_labels"][0].tolist() == [1, 2, 700],
    "images": lambda p: p.preprocess(images=Image.new("RGB", (4, 1)))["pixel_values"].shape == (1, 3, 1, 4),
    "segmentation_maps": lambda p: p(np.zeros((1, 4, 3)), segmentation_maps=ONE_MAP)["mask_labels"][0].tolist()
    == [[[1, 0, 0, 0]], [[0, 1, 1, 0]], [[0, 0, 0, 1]]],
    "instance_id_to_semantic_id": lambda p: p(
        np.zeros((1, 4, 3)), ONE_MAP, instance_id_to_semantic_id={1: 5, 2: 5, 700: 0}
    )["class_labels"][0].tolist() == [5, 5, 0],
    "encode_inputs": lambda p: p.encode_inputs(ONE_IMAGE, ONE_MAP, ignore_index=2)["class_labels"][0].tolist()
    == [1, 700],
    "pixel_values_list": lambda p: p.encode_inputs(pixel_values_list=ONE_IMAGE)["pixel_mask"].tolist() == [[[1] * 4]],
    "BatchFeature": lambda p: list(p(np.zeros((1, 4, 3)), ONE_MAP))
    == ["pixel_values", "pixel_mask", "mask_labels", "class_labels"],
}  # fmt: skip


@pytest.mark.parametrize("name", PREPARATION)
def test_preparation(name):
    assert PREPARATION[name](ImageProcessor(**PLAIN))


# class 0 with score 0.7 on the left half, with 0.6 on the right half, class 1 with 0.65 on the top left row
MASKS = torch.full((1, 3, 4, 8), -30.0)
MASKS[0, 0, :, :4] = MASKS[0, 1, :, 4:] = 2.0  # probability 0.88
MASKS[0, 2, 0, :4] = 30.0
PREDICTIONS = {
    "pred_logits": torch.tensor([[[0.7, 0.1, 0.2], [0.6, 0.1, 0.3], [0.1, 0.65, 0.25]]]).log(),
    "pred_masks": MASKS,
}


def results(task, **options):
    (one,) = getattr(ImageProcessor(), f"post_process_{task}_segmentation")(PREDICTIONS, **options)
    return one


def labels_of(task, **options):
    return [segment["label_id"] for segment in results(task, **options)["segments_info"]]


def info(task, key, **options):
    return [segment[key] for segment in results(task, **options)["segments_info"]]


ALL = {"overlap_mask_area_threshold": 0.75}  # of the left half three quarters stay visible
RESULTS = {
    "post_process_semantic_segmentation": lambda: results("semantic")[:, ::4].tolist() == [[1, 0]] + [[0, 0]] * 3,
    "post_process_instance_segmentation": lambda: results("instance", **ALL)["segmentation"][:, ::4].tolist()
    == [[0, 2]] + [[1, 2]] * 3,
    "post_process_panoptic_segmentation": lambda: results("panoptic", **ALL)["segmentation"][:, ::4].tolist()
    == [[3, 2]] + [[1, 2]] * 3,
    "target_sizes": lambda: [
        tuple((r if torch.is_tensor(r) else r["segmentation"]).shape)
        for r in (results(t, target_sizes=[(5, 7)]) for t in ("semantic", "instance", "panoptic"))
    ] == [(5, 7)] * 3,
    "return_segmentation_scores": lambda: results("semantic", return_segmentation_scores=True)[
        "segmentation_scores"
    ].shape == (2, 4, 8),
    "threshold": lambda: info("instance", "label_id", threshold=0.62) == [1]
    and info("panoptic", "label_id", threshold=0.66) == [0],
    "mask_threshold": lambda: info("instance", "label_id", mask_threshold=0.9) == [1]
    and info("panoptic", "label_id", mask_threshold=0.9) == [1],
    "overlap_mask_area_threshold": lambda: [
        info(t, "label_id", overlap_mask_area_threshold=o) for t in ("instance", "panoptic") for o in (0.75, 0.76, 1.01)
    ] == [[1, 0, 0], [1, 0], [], [0, 0, 1], [0, 1], []],
    "label_ids_to_fuse": lambda: info("panoptic", "label_id", label_ids_to_fuse={0}, **ALL) == [0, 1]
    and results("panoptic", label_ids_to_fuse={0}, **ALL)["segmentation"][1:].eq(1).all(),
    "return_coco_annotation": lambda: [
        one["size"] for one in results("instance", return_coco_annotation=True)["segmentation"]
    ] == [[4, 8]] * 3,
    "return_binary_maps": lambda: results("instance", return_binary_maps=True)["segmentation"].sum((1, 2)).tolist()
    == [4, 16, 16],
    "segmentation": lambda: results("instance", threshold=1.0)["segmentation"].eq(-1).all()
    and results("panoptic", threshold=1.0)["segmentation"].eq(0).all(),
    "segments_info": lambda: [set(s) for t in ("instance", "panoptic") for s in results(t)["segments_info"]]
    == [{"id", "label_id", "was_fused", "score"}] * 4,
    "segments_info.id": lambda: [info(t, "id", **ALL) for t in ("instance", "panoptic")] == [[0, 1, 2], [1, 2, 3]],
    "segments_info.label_id": lambda: [info(t, "label_id", **ALL) for t in ("instance", "panoptic")]
    == [[1, 0, 0], [0, 0, 1]],
    "segments_info.was_fused": lambda: info("panoptic", "was_fused", label_ids_to_fuse={0}) == [True, False]
    and info("panoptic", "was_fused") == [False, False],
    "segments_info.score": lambda: info("instance", "score", **ALL)
    == pytest.approx([0.65, 0.7 * 0.880797, 0.6 * 0.880797], abs=2e-6)
    and info("panoptic", "score", label_ids_to_fuse={0}, **ALL) == pytest.approx([0.7, 0.65], abs=1e-6),
}  # fmt: skip


@pytest.mark.parametrize("name", RESULTS)
def test_result(name):
    assert RESULTS[name]()


def rgb_annotation():
    red, green = np.array([[3, 3, 7]]), np.array([[1, 2, 1]])
    ids = red * 256 + green
    encoded = ImageProcessor(**PLAIN)(np.zeros((1, 3, 3)), ids, {i: i // 256 for i in np.unique(ids).tolist()})
    return encoded["class_labels"][0].tolist() == [3, 3, 7]


OTHER = {
    "Auxiliary losses": lambda: "loss_mask_1" in build_model(config_of("maskformer")).criterion.weight_dict,
    "Number of masks over nodes": lambda: average_number_of_masks([{"labels": [0, 1]}, {"labels": []}], "cpu") == 2
    and (ROOT / "tests/distributed/test_number_of_masks.py").is_file(),
    "Backbones": lambda: [
        from_hf_config({**base, "backbone_config": {"model_type": kind}}).MODEL.BACKBONE.NAME
        for base in BASES.values() for kind in ("swin", "resnet")
    ] == ["D2SwinTransformer", "build_resnet_backbone"] * 2,
    "Notebooks and scripts": lambda: (ROOT / "tools/train_net.py").is_file() and (ROOT / "tools/demo.py").is_file(),
    "Data as RGB annotations": rgb_annotation,
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER)
def test_other_promise(name):
    assert OTHER[name]()


# ---- the document ----

TESTED = {
    **CONFIG_ROWS,
    "Classes": CLASS_ROWS,
    "Inputs of the models": ["pixel_values", "pixel_mask", "mask_labels", "class_labels"],  # test_loss_from_…
    "Outputs": ["loss", *OUTPUTS, "hidden_states"],
    "Options of the image processor": OPTIONS,
    "Preparing images and targets": PREPARATION,
    "Results": RESULTS,
    "Other promises": OTHER,
}


@pytest.mark.parametrize("section", TESTED)
def test_document_has_every_row(section):
    assert list(TABLES[section]) == list(TESTED[section])


def test_document_has_no_other_tables():
    assert list(TABLES) == list(TESTED)
