"""Hugging Face's names and tensors against a list of pairs written down from their documented layout."""

import pytest
import torch
from detectron2.modeling import build_model

from mask2former_plugin.checkpoint import Checkpointer
from mask2former_plugin.checkpoint.huggingface_names import (
    family_of,
    from_detectron2,
    is_huggingface,
    rules,
    to_detectron2,
)

WB = ("weight", "bias")
NORM = ("weight", "bias", "running_mean", "running_var")
CASES = [(family, backbone) for family in ("mask2former", "maskformer") for backbone in ("swin", "resnet")]

# ---- the expectation: (their name or their three names, our name), for the models of conftest.py ----


def both(theirs, ours, kinds=WB):
    return [(f"{theirs}.{kind}", f"{ours}.{kind}") for kind in kinds]


def qkv(theirs, ours, parts=("q_proj", "k_proj", "v_proj")):
    return [(tuple(f"{theirs}.{part}.{kind}" for part in parts), f"{ours}{kind}") for kind in WB]


def swin_pairs(family):
    encoder = "model.pixel_level_module.encoder."
    inner = encoder + ("model." if family == "maskformer" else "")
    pairs = both(f"{inner}embeddings.patch_embeddings.projection", "backbone.patch_embed.proj")
    pairs += both(f"{inner}embeddings.norm", "backbone.patch_embed.norm")
    for layer, depth in enumerate((1, 2, 1, 1)):
        for number in range(depth):
            t, o = f"{inner}encoder.layers.{layer}.blocks.{number}", f"backbone.layers.{layer}.blocks.{number}"
            pairs += both(f"{t}.layernorm_before", f"{o}.norm1") + both(f"{t}.layernorm_after", f"{o}.norm2")
            pairs += qkv(f"{t}.attention.self", f"{o}.attn.qkv.", ("query", "key", "value"))
            table = "relative_position_bias_table"
            pairs.append((f"{t}.attention.self.{table}", f"{o}.attn.{table}"))
            pairs += both(f"{t}.attention.output.dense", f"{o}.attn.proj")
            pairs += both(f"{t}.intermediate.dense", f"{o}.mlp.fc1") + both(f"{t}.output.dense", f"{o}.mlp.fc2")
        if layer < 3:
            t, o = f"{inner}encoder.layers.{layer}.downsample", f"backbone.layers.{layer}.downsample"
            pairs += both(f"{t}.norm", f"{o}.norm") + [(f"{t}.reduction.weight", f"{o}.reduction.weight")]
        name = str(layer) if family == "maskformer" else f"stage{layer + 1}"
        pairs += both(f"{encoder}hidden_states_norms.{name}", f"backbone.norm{layer}")
    return pairs


def resnet_pairs():
    encoder = "model.pixel_level_module.encoder."
    pairs = [(f"{encoder}embedder.embedder.convolution.weight", "backbone.stem.conv1.weight")]
    pairs += both(f"{encoder}embedder.embedder.normalization", "backbone.stem.conv1.norm", NORM)
    for stage, depth in enumerate((3, 4, 6, 3)):
        for block in range(depth):
            t, o = f"{encoder}encoder.stages.{stage}.layers.{block}", f"backbone.res{stage + 2}.{block}"
            convs = [(f"{t}.layer.{k}", f"{o}.conv{k + 1}") for k in range(3)]
            for theirs, ours in convs + ([(f"{t}.shortcut", f"{o}.shortcut")] if block == 0 else []):
                pairs.append((f"{theirs}.convolution.weight", f"{ours}.weight"))
                pairs += both(f"{theirs}.normalization", f"{ours}.norm", NORM)
    return pairs


def mask2former_pairs():
    t, o = "model.pixel_level_module.decoder.", "sem_seg_head.pixel_decoder."
    pairs = [(f"{t}level_embed", f"{o}transformer.level_embed")] + both(f"{t}mask_projection", f"{o}mask_features")
    for level in range(3):
        for part in range(2):  # convolution, norm
            pairs += both(f"{t}input_projections.{level}.{part}", f"{o}input_proj.{level}.{part}")
    for layer in range(2):
        theirs, ours = f"{t}encoder.layers.{layer}.", f"{o}transformer.encoder.layers.{layer}."
        for name in ("sampling_offsets", "attention_weights", "value_proj", "output_proj"):
            pairs += both(f"{theirs}self_attn.{name}", f"{ours}self_attn.{name}")
        pairs += both(f"{theirs}self_attn_layer_norm", f"{ours}norm1")
        pairs += both(f"{theirs}fc1", f"{ours}linear1") + both(f"{theirs}fc2", f"{ours}linear2")
        pairs += both(f"{theirs}final_layer_norm", f"{ours}norm2")
    for name in ("adapter_1", "layer_1"):
        pairs += [(f"{t}{name}.0.weight", f"{o}{name}.weight")] + both(f"{t}{name}.1", f"{o}{name}.norm")

    t, o = "model.transformer_module.", "sem_seg_head.predictor."
    for theirs, ours in (("queries_features", "query_feat"), ("queries_embedder", "query_embed"), ("level_embed",) * 2):
        pairs.append((f"{t}{theirs}.weight", f"{o}{ours}.weight"))
    for level in range(3):
        pairs += both(f"{t}input_projections.{level}", f"{o}input_proj.{level}")
    for layer in range(3):
        theirs = f"{t}decoder.layers.{layer}."
        cross = f"{o}transformer_cross_attention_layers.{layer}."
        own, ffn = f"{o}transformer_self_attention_layers.{layer}.", f"{o}transformer_ffn_layers.{layer}."
        for kind in WB:
            pairs.append((f"{theirs}cross_attn.in_proj_{kind}", f"{cross}multihead_attn.in_proj_{kind}"))
        pairs += both(f"{theirs}cross_attn.out_proj", f"{cross}multihead_attn.out_proj")
        pairs += both(f"{theirs}cross_attn_layer_norm", f"{cross}norm")
        pairs += qkv(f"{theirs}self_attn", f"{own}self_attn.in_proj_")
        pairs += both(f"{theirs}self_attn.out_proj", f"{own}self_attn.out_proj")
        pairs += both(f"{theirs}self_attn_layer_norm", f"{own}norm")
        pairs += both(f"{theirs}fc1", f"{ffn}linear1") + both(f"{theirs}fc2", f"{ffn}linear2")
        pairs += both(f"{theirs}final_layer_norm", f"{ffn}norm")
    pairs += both(f"{t}decoder.layernorm", f"{o}decoder_norm")
    for layer in range(3):
        pairs += both(f"{t}decoder.mask_predictor.mask_embedder.{layer}.0", f"{o}mask_embed.layers.{layer}")
    return pairs


def maskformer_pairs():
    t, o = "model.pixel_level_module.decoder.", "sem_seg_head.pixel_decoder."
    pairs = both(f"{t}mask_projection", f"{o}mask_features")
    pairs += [(f"{t}fpn.stem.0.weight", f"{o}layer_4.weight")] + both(f"{t}fpn.stem.1", f"{o}layer_4.norm")
    for index, number in ((0, 3), (1, 2), (2, 1)):  # theirs counts from the coarse end
        for theirs, ours in (("proj", "adapter"), ("block", "layer")):
            pairs.append((f"{t}fpn.layers.{index}.{theirs}.0.weight", f"{o}{ours}_{number}.weight"))
            pairs += both(f"{t}fpn.layers.{index}.{theirs}.1", f"{o}{ours}_{number}.norm")
    t, o = "model.transformer_module.", "sem_seg_head.predictor."
    pairs.append((f"{t}queries_embedder.weight", f"{o}query_embed.weight"))
    pairs += both(f"{t}input_projection", f"{o}input_proj")
    for layer in range(2):
        theirs, ours = f"{t}decoder.layers.{layer}.", f"{o}transformer.decoder.layers.{layer}."
        for name, our_name in (("self_attn", "self_attn"), ("encoder_attn", "multihead_attn")):
            pairs += qkv(f"{theirs}{name}", f"{ours}{our_name}.in_proj_")
            pairs += both(f"{theirs}{name}.out_proj", f"{ours}{our_name}.out_proj")
        pairs += both(f"{theirs}fc1", f"{ours}linear1") + both(f"{theirs}fc2", f"{ours}linear2")
        for name, our_name in (("self_attn", "norm1"), ("encoder_attn", "norm2"), ("final", "norm3")):
            pairs += both(f"{theirs}{name}_layer_norm", f"{ours}{our_name}")
    pairs += both(f"{t}decoder.layernorm", f"{o}transformer.decoder.norm")
    for layer in range(3):
        pairs += both(f"mask_embedder.{layer}.0", f"{o}mask_embed.layers.{layer}")
    return pairs


def expected_pairs(family, backbone):
    pairs = swin_pairs(family) if backbone == "swin" else resnet_pairs()
    pairs += mask2former_pairs() if family == "mask2former" else maskformer_pairs()
    pairs += both("class_predictor", "sem_seg_head.predictor.class_embed")
    return [*pairs, ("criterion.empty_weight", "criterion.empty_weight")]


def theirs_of(state, pairs):
    """Our weights under their names, by the list."""
    result = {}
    for theirs, ours in pairs:
        if isinstance(theirs, str):
            result[theirs] = state[ours]
        else:
            third = state[ours].shape[0] // 3
            for number, name in enumerate(theirs):
                result[name] = state[ours][number * third : (number + 1) * third]
    return result


def extras(theirs, family, backbone):
    """What their files hold beyond the list."""
    if backbone == "resnet":
        return {name.replace("running_mean", "num_batches_tracked") for name in theirs if name.endswith("running_mean")}
    inner = "model.pixel_level_module.encoder." + ("swin." if family == "mask2former" else "model.")
    return {f"{inner}layernorm.weight", f"{inner}layernorm.bias"}


# ---- tests ----


@pytest.fixture(params=CASES, ids="-".join)
def case(request, small_config, random_model):
    """Family, backbone, a random model, and its weights as Hugging Face has them."""
    family, backbone = request.param
    model = random_model(small_config(family, backbone))
    return family, backbone, model, theirs_of(model.state_dict(), expected_pairs(family, backbone))


def test_the_list_covers_the_model(case):
    family, backbone, model, _ = case
    listed = [ours for _, ours in expected_pairs(family, backbone)]
    assert len(listed) == len(set(listed))
    computed = {name for name in model.state_dict() if name.endswith("relative_position_index")}
    assert set(listed) == model.state_dict().keys() - computed


def test_theirs_to_ours_is_bit_equal(case, tmp_path):
    family, backbone, model, theirs = case
    assert is_huggingface(theirs) and family_of(theirs) == family
    converted = to_detectron2(theirs)
    wanted = model.state_dict()
    assert converted.keys() == wanted.keys()
    assert all(torch.equal(converted[name], wanted[name]) for name in wanted)
    assert {value.dtype for value in converted.values()} <= {torch.float32, torch.int64}
    # files of transformers 4 hold the index of the windows, too
    computed = {name: value for name, value in wanted.items() if name.endswith("relative_position_index")}
    inner = "model.pixel_level_module.encoder." + ("model." if family == "maskformer" else "")
    for name, value in computed.items():
        theirs[name.replace("backbone.", f"{inner}encoder.").replace(".attn.", ".attention.self.")] = value
    converted = to_detectron2(theirs)
    assert converted.keys() == wanted.keys()
    assert all(torch.equal(converted[name], value) for name, value in computed.items())


def test_ours_to_theirs_is_bit_equal(case):
    family, backbone, model, theirs = case
    written = from_detectron2(model.state_dict())
    beyond = extras(theirs, family, backbone)
    index = {name for name in written if name.endswith("relative_position_index")}
    assert bool(index) == ((family, backbone) == ("maskformer", "swin"))
    assert written.keys() == theirs.keys() | beyond | index
    assert all(torch.equal(written[name], theirs[name]) for name in theirs)
    for name in beyond:
        kind = name.rpartition(".")[2]
        assert (written[name] == (1 if kind == "weight" else 0)).all()
        assert kind != "num_batches_tracked" or (written[name].dtype, written[name].shape) == (torch.int64, ())


def test_their_unused_weights_and_their_bare_model(case):
    family, backbone, model, theirs = case
    noisy = dict(theirs)
    for name in extras(theirs, family, backbone):
        noisy[name] = torch.rand(3)
    bare = {name.removeprefix("model."): value for name, value in noisy.items() if name.startswith("model.")}
    assert is_huggingface(bare)
    wanted = model.state_dict()
    for state in (noisy, bare):
        converted = to_detectron2(state)
        counters = {name for name in converted if name.endswith("num_batches_tracked")}
        assert bool(counters) == (backbone == "resnet")
        assert all(torch.equal(converted[name], wanted[name]) for name in converted.keys() - counters)
    left = wanted.keys() - converted.keys()
    heads = ("class_embed", "mask_embed") if family == "maskformer" else ("class_embed",)
    assert all(name == "criterion.empty_weight" or any(head in name for head in heads) for name in left)


def test_checkpointer_recognises_them(case, small_config, load_fresh, tmp_path):
    family, backbone, model, theirs = case
    theirs = {**theirs, **{name: torch.tensor(9) for name in extras(theirs, family, backbone) if "tracked" in name}}
    torch.save(theirs, tmp_path / "pytorch_model.bin")
    loaded, checkpointer = load_fresh(small_config(family, backbone), tmp_path, Checkpointer)
    assert not checkpointer.report
    checkpointer.require_weights(classifier=True)
    wanted = model.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in loaded.state_dict().items())


def test_names_of_modules_in_memory(small_config, random_model):
    """As transformers 5 has them; its files have the names above."""
    for family in ("mask2former", "maskformer"):
        model = random_model(small_config(family))
        theirs = theirs_of(model.state_dict(), expected_pairs(family, "swin"))
        live = {}
        for name, value in theirs.items():
            if family == "mask2former":
                name = name.replace("module.encoder.embeddings.", "module.encoder.swin.embeddings.")
                name = name.replace("module.encoder.encoder.", "module.encoder.swin.encoder.")
                if ".blocks." in name:
                    name = name.replace(".intermediate.dense.", ".mlp.fc1.")
                    name = name.replace("attention.output.dense", "attention.o_proj").replace("output.dense", "mlp.fc2")
                    for long, short in (("query", "q"), ("key", "k"), ("value", "v")):
                        name = name.replace(f"attention.self.{long}.", f"attention.{short}_proj.")
                    name = name.replace("attention.self.", "attention.relative_position_bias.")
            elif ".decoder.layers." in name:
                name = name.replace("out_proj", "o_proj").replace(".fc1.", ".mlp.fc1.").replace(".fc2.", ".mlp.fc2.")
            live[name] = value
        assert live.keys() != theirs.keys()
        converted = to_detectron2(live)
        assert all(torch.equal(converted[name], value) for name, value in model.state_dict().items())


def test_imagenet_backbones_of_hugging_face(small_config, random_model, load_fresh, tmp_path):
    for backbone, prefix, rest in (
        ("resnet", "resnet.", {"classifier.1.weight": torch.rand(10, 64)}),
        ("swin", "swin.", {"classifier.weight": torch.rand(10, 64), "swin.layernorm.weight": torch.rand(64)}),
    ):
        cfg = small_config("mask2former", backbone)
        model = random_model(cfg)
        theirs = theirs_of(model.state_dict(), expected_pairs("mask2former", backbone))
        encoder = "model.pixel_level_module.encoder."
        kept = {n: v for n, v in theirs.items() if n.startswith(encoder) and "hidden_states_norms" not in n}
        alone = {name.replace(encoder, prefix): value for name, value in kept.items()}
        torch.save({**alone, **rest}, tmp_path / f"{backbone}.bin")
        loaded, checkpointer = load_fresh(cfg, tmp_path / f"{backbone}.bin", Checkpointer)
        assert not checkpointer.report.unexpected and not checkpointer.report.wrong_shape
        for name, value in loaded.backbone.state_dict().items():
            untouched = name.startswith("norm")
            assert (value == 7).all() if untouched else torch.equal(value, model.backbone.state_dict()[name])


def test_published_sizes():
    """Tensors of ResNet-50 models at their published depth (fact: 265 + 292, 265 + 144, and the loss's weights)."""
    from mask2former_plugin.config import load_config

    options = ["MODEL.DEVICE", "cpu", "MODEL.SEM_SEG_HEAD.IN_FEATURES", ["res2", "res3", "res4", "res5"]]
    options += [
        "MODEL.META_ARCHITECTURE",
        "MaskFormer",
        "MODEL.SEM_SEG_HEAD.NAME",
        "MaskFormerHead",
        "MODEL.RESNETS.OUT_FEATURES",
    ]
    options += [
        ["res2", "res3", "res4", "res5"],
        "MODEL.RESNETS.WIDTH_PER_GROUP",
        8,
        "MODEL.RESNETS.RES2_OUT_CHANNELS",
        32,
    ]
    options += ["MODEL.SEM_SEG_HEAD.NORM", "GN", "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32, "MODEL.MASK_FORMER.HIDDEN_DIM", 32]
    options += ["MODEL.BACKBONE.NAME", "build_resnet_backbone"]
    deformable = [
        "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME",
        "MSDeformAttnPixelDecoder",
        "MODEL.MASK_FORMER.DEC_LAYERS",
        10,
    ]
    deformable += ["MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 6]
    deformable += ["MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "multi_scale_pixel_decoder"]
    standard = [
        "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME",
        "StandardTransformerDecoder",
        "MODEL.MASK_FORMER.DEC_LAYERS",
        6,
    ]
    for extra, count in ((deformable, 292), (standard, 144)):
        state = build_model(load_config(opts=[*options, *extra])).state_dict()
        assert len(state) == 265 + count + 1
        converted = to_detectron2(from_detectron2(state))
        converted = {name: value for name, value in converted.items() if not name.endswith("num_batches_tracked")}
        assert converted.keys() == state.keys()
        assert all(torch.equal(converted[name], state[name]) for name in state)


def test_every_name_fits_one_rule_only(case):
    family, _, model, theirs = case
    for name in theirs:
        assert sum(bool(rule.their_pattern.fullmatch(name)) for rule in rules(family)) == 1, name
    for name in model.state_dict():
        assert sum(bool(rule.our_pattern.fullmatch(name)) for rule in rules(family)) == 1, name


def test_half_an_attention_is_an_incomplete_file(small_config, random_model):
    for family, lost in (("mask2former", "self_attn.k_proj.weight"), ("maskformer", "encoder_attn.v_proj.bias")):
        model = random_model(small_config(family))
        theirs = theirs_of(model.state_dict(), expected_pairs(family, "swin"))
        del theirs[f"model.transformer_module.decoder.layers.1.{lost}"]
        with pytest.raises(ValueError, match=f"lacks {lost.split('.')[1]} of what is .*in_proj_.* here; .* incomplete"):
            to_detectron2(theirs)


def test_unknown_names_stay_and_are_reported(small_config, random_model, load_fresh, tmp_path):
    cfg = small_config()
    theirs = theirs_of(random_model(cfg).state_dict(), expected_pairs("mask2former", "swin"))
    torch.save({**theirs, "model.novelty.weight": torch.rand(2)}, tmp_path / "new.bin")
    _, checkpointer = load_fresh(cfg, tmp_path / "new.bin", Checkpointer)
    assert list(checkpointer.report.unexpected) == ["model.novelty.weight"]


def test_what_they_lack_cannot_be_saved(small_config):
    options = ["MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "TransformerEncoderPixelDecoder"]
    options += ["MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 1]
    options += ["MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "transformer_encoder"]
    model = build_model(small_config("maskformer", "resnet", *options))
    with pytest.raises(ValueError, match="maskformer has nothing like sem_seg_head.pixel_decoder"):
        from_detectron2(model.state_dict())
