"""Transformer decoders against the published formulas on dense masks, with torch's own attention."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mask2former_plugin.modeling import build_transformer_decoder
from mask2former_plugin.modeling.layers import sine_position_encoding
from mask2former_plugin.modeling.mask_logits import MaskLogits
from mask2former_plugin.modeling.transformer_decoders import TRANSFORMER_DECODER_REGISTRY
from mask2former_plugin.modeling.transformer_decoders.masked import allowed_places

# float64; resizing before or after the product and fused attention differ in rounding only
TOLERANCE = {"rtol": 0, "atol": 1e-10}


def positions(x):
    return sine_position_encoding(x.shape[2:], x.shape[1], device=x.device, dtype=x.dtype).flatten(0, 1)


def attention(module, q, k, v, blocked=None):
    """torch's attention from the same parameters, which stay on the graph."""
    output, _ = F.multi_head_attention_forward(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), module.embed_dim, module.num_heads,
        module.in_proj_weight, module.in_proj_bias, None, None, False, 0.0,
        module.out_proj.weight, module.out_proj.bias, attn_mask=blocked,
    )  # fmt: skip
    return output.transpose(0, 1)


def heads(decoder, x, mask_features):
    masks = torch.einsum("bqc,bchw->bqhw", decoder.mask_embed(x), mask_features)
    return {"pred_logits": None if decoder.class_embed is None else decoder.class_embed(x), "pred_masks": masks}


def masked_reference(decoder, maps, mask_features, pre_norm, num_heads):
    """Sections 3.2 and 3.3 of Mask2Former with dense masks. Also counts the rows that would attend nowhere."""
    memories = []
    for level, x in enumerate(maps):
        projected = decoder.input_proj[level](x)
        memory = projected.flatten(2).transpose(1, 2) + decoder.level_embed.weight[level]
        memories.append((memory, memory + positions(projected), tuple(x.shape[2:])))
    query_pos = decoder.query_embed.weight
    output = decoder.query_feat.weight[None].repeat(maps[0].shape[0], 1, 1)
    predictions = [heads(decoder, decoder.decoder_norm(output), mask_features)]
    nowhere = 0
    for number in range(decoder.num_layers):
        memory, keys, size = memories[number % 3]
        resized = F.interpolate(predictions[-1]["pred_masks"], size=size, mode="bilinear", align_corners=False)
        blocked = (resized.sigmoid().flatten(2) < 0.5).detach()
        full = blocked.sum(-1) == blocked.shape[-1]
        nowhere += int(full.sum())
        blocked[full] = False
        blocked = blocked[:, None].repeat(1, num_heads, 1, 1).flatten(0, 1)

        cross = decoder.transformer_cross_attention_layers[number]
        own = decoder.transformer_self_attention_layers[number]
        ffn = decoder.transformer_ffn_layers[number]

        def residual(layer, x, change):
            if pre_norm:
                return x + change(layer.norm(x))
            return layer.norm(x + change(x))

        output = residual(
            cross, output, lambda x: attention(cross.multihead_attn, x + query_pos, keys, memory, blocked)
        )
        output = residual(own, output, lambda x: attention(own.self_attn, x + query_pos, x + query_pos, x))
        output = residual(ffn, output, lambda x: ffn.linear2(ffn.linear1(x).relu()))
        predictions.append(heads(decoder, decoder.decoder_norm(output), mask_features))
    return predictions, nowhere


def assert_same_predictions(decoder, prediction, expected):
    """All values, and the gradient of every parameter."""
    everything = [*prediction["aux_outputs"], prediction]
    assert len(everything) == len(expected)
    pairs = []
    for actual, wanted in zip(everything, expected):
        pairs.append((actual["mask_logits"].dense(), wanted["pred_masks"]))
        if wanted["pred_logits"] is None:
            assert "pred_logits" not in actual
        else:
            pairs.append((actual["pred_logits"], wanted["pred_logits"]))
    for actual, wanted in pairs:
        torch.testing.assert_close(actual, wanted, **TOLERANCE)
    noise = [torch.randn_like(wanted) for _, wanted in pairs]
    names, parameters = zip(*decoder.named_parameters())
    found = torch.autograd.grad(sum((a * n).sum() for (a, _), n in zip(pairs, noise)), parameters)
    wanted = torch.autograd.grad(sum((w * n).sum() for (_, w), n in zip(pairs, noise)), parameters)
    for name, f, w in zip(names, found, wanted):
        scale = max(1.0, w.abs().max().item())
        torch.testing.assert_close(
            f / scale, w / scale, rtol=0, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


def levels(channels):
    return [torch.randn(2, channels, *size, dtype=torch.float64) for size in ((3, 4), (5, 7), (10, 13))]


def dividing_direction(decoder):
    """Added to all pixels, it makes some of the first masks cover everything and others nothing."""
    embed = decoder.mask_embed(decoder.decoder_norm(decoder.query_feat.weight)).detach()
    mean = embed.mean(0)
    direction = embed[0] - mean
    direction = direction - mean * (direction @ mean) / (mean @ mean)
    return direction / (direction @ direction)


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("in_channels, enforce", [(32, False), (32, True), (24, False)])
def test_masked(small_config, randomize, pre_norm, in_channels, enforce):
    cfg = small_config("MODEL.MASK_FORMER.PRE_NORM", pre_norm, "MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ", enforce)
    decoder = randomize(build_transformer_decoder(cfg, in_channels))
    assert ("input_proj.0.weight" in decoder.state_dict()) == (enforce or in_channels != 32)
    assert decoder.num_layers == 4  # DEC_LAYERS counts the prediction before the first layer
    maps = levels(in_channels)
    mask_features = torch.randn(2, 32, 19, 26, dtype=torch.float64) * 0.3 + dividing_direction(decoder)[:, None, None]
    prediction = decoder(maps, mask_features)
    expected, nowhere = masked_reference(decoder, maps, mask_features, pre_norm, num_heads=4)
    assert 0 < nowhere < 4 * 2 * 10
    assert_same_predictions(decoder, prediction, expected)


def test_allowed_places_by_loops():
    embed, features = torch.randn(2, 6, 3), torch.randn(2, 3, 8)
    embed[:, 0] = 0  # logit 0 is one half, which is inside
    embed[0, 1], features[0, 0] = torch.tensor([-1.0, 0, 0]), features[0, 0].abs() + 0.1  # nowhere
    allowed = allowed_places(embed, features)
    assert allowed.shape == (2, 1, 6, 8) and allowed.dtype == torch.bool
    for b in range(2):
        for q in range(6):
            row = [torch.dot(embed[b, q], features[b, :, s]).sigmoid().item() >= 0.5 for s in range(8)]
            assert allowed[b, 0, q].tolist() == (row if any(row) else [True] * 8)
    assert allowed[0, 0, 0].all() and allowed[0, 0, 1].all() and not allowed[:, :, 2:].all()


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("enc_layers", [0, 2])
@pytest.mark.parametrize("deep_supervision", [True, False])
def test_standard(small_config, randomize, pre_norm, enc_layers, deep_supervision):
    cfg = small_config(
        "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME", "StandardTransformerDecoder",
        "MODEL.MASK_FORMER.PRE_NORM", pre_norm,
        "MODEL.MASK_FORMER.ENC_LAYERS", enc_layers,
        "MODEL.MASK_FORMER.DEEP_SUPERVISION", deep_supervision,
        "MODEL.MASK_FORMER.DEC_LAYERS", 3,
    )  # fmt: skip
    decoder = randomize(build_transformer_decoder(cfg, 24))
    x, mask_features = torch.randn(2, 24, 3, 4, dtype=torch.float64), torch.randn(2, 32, 9, 13, dtype=torch.float64)
    projected = F.conv2d(x, decoder.input_proj.weight, decoder.input_proj.bias)
    pos, tokens = positions(projected), projected.flatten(2).transpose(1, 2)
    memory = decoder.transformer.encoder(tokens, pos)
    query_pos = decoder.query_embed.weight
    output, expected = torch.zeros(2, 10, 32, dtype=torch.float64), []
    for layer in decoder.transformer.decoder.layers:
        output = layer(output, query_pos, memory + pos, memory)
        expected.append(heads(decoder, decoder.transformer.decoder.norm(output), mask_features))
    assert len(expected) == 3
    prediction = decoder(x, mask_features)
    assert_same_predictions(decoder, prediction, expected if deep_supervision else expected[-1:])


def test_standard_without_classes(small_config, randomize):
    cfg = small_config("MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME", "StandardTransformerDecoder")
    decoder = build_transformer_decoder(cfg, 32, mask_classification=False)
    assert not any("class_embed" in name for name in decoder.state_dict())
    assert set(decoder(torch.randn(1, 32, 2, 3), torch.randn(1, 32, 5, 6))) == {"mask_logits", "aux_outputs"}


class LargestProducts(TorchDispatchMode):
    """Remembers the size of every tensor that has one row per query."""

    def __init__(self, queries):
        super().__init__()
        self.queries = queries
        self.pixels = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(tensor, torch.Tensor) and self.queries in tensor.shape and tensor.dim() > 2:
                after = tensor.shape[list(tensor.shape).index(self.queries) + 1 :]
                self.pixels.add(torch.Size(after).numel())
        return output


def test_masks_are_multiplied_out_at_the_size_of_the_attention_only(small_config, monkeypatch):
    decoder = build_transformer_decoder(small_config("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 11), 32).eval()
    maps = [torch.randn(1, 32, *size) for size in ((3, 5), (7, 9), (13, 17))]
    with torch.no_grad(), LargestProducts(11) as products:
        prediction = decoder(maps, torch.randn(1, 32, 40, 50))
    assert {3 * 5, 7 * 9, 13 * 17} <= products.pixels
    assert max(products.pixels) == 13 * 17
    assert all("pred_masks" not in p for p in [prediction, *prediction["aux_outputs"]])


@pytest.mark.parametrize("name", ["MultiScaleMaskedTransformerDecoder", "StandardTransformerDecoder"])
def test_nothing_waits_for_the_device(small_config, name):
    """On the meta device every branch on a value fails."""
    with torch.device("meta"):
        decoder = build_transformer_decoder(small_config("MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME", name), 32)
        maps = [torch.randn(2, 32, *size) for size in ((3, 4), (5, 7), (10, 13))]
        prediction = decoder(maps if decoder.multi_scale_input else maps[0], torch.randn(2, 32, 19, 26))
    assert prediction["pred_logits"].shape == (2, 10, 6)
    assert prediction["mask_logits"].embed.shape == (2, 10, 32)


def test_bfloat16(small_config):
    decoder = build_transformer_decoder(small_config(), 32).eval()
    maps, mask_features = [x.float() for x in levels(32)], torch.randn(2, 32, 19, 26)
    exact = decoder(maps, mask_features)["pred_logits"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = decoder(maps, mask_features)
    assert mixed["mask_logits"].embed.dtype == torch.bfloat16
    half = decoder.bfloat16()([x.bfloat16() for x in maps], mask_features.bfloat16())
    for prediction in (mixed, half):
        correlation = torch.corrcoef(torch.stack((prediction["pred_logits"].float().flatten(), exact.flatten())))[0, 1]
        assert correlation > 0.99


def test_gradient_does_not_flow_through_the_attention_mask(small_config, randomize):
    decoder = randomize(build_transformer_decoder(small_config(), 32))
    mask_features = torch.randn(2, 32, 19, 26, dtype=torch.float64, requires_grad=True)
    prediction = decoder(levels(32), mask_features)
    gradient = torch.autograd.grad(prediction["pred_logits"].sum(), mask_features, allow_unused=True)
    assert gradient == (None,)
    assert isinstance(prediction["mask_logits"], MaskLogits)


@pytest.mark.parametrize("dec_layers", [1, 2, 3, 4])
def test_every_parameter_that_is_trained_gets_a_gradient(small_config, dec_layers):
    """Also with fewer layers than levels: DistributedDataParallel stops at a parameter without a gradient."""
    decoder = build_transformer_decoder(small_config("MODEL.MASK_FORMER.DEC_LAYERS", dec_layers), 24).double()
    prediction = decoder(levels(24), torch.randn(2, 32, 19, 26, dtype=torch.float64))
    (prediction["pred_logits"].sum() + prediction["pred_masks"].sum()).backward()
    missing = [name for name, p in decoder.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert all(p.requires_grad for p in decoder.parameters()) == (dec_layers == 4)


def test_old_query_name(small_config):
    decoder = build_transformer_decoder(small_config(), 32)
    wanted = torch.randn(10, 32)
    state = {k.replace("query_feat", "static_query"): v for k, v in decoder.state_dict().items()}
    state["static_query.weight"] = wanted
    decoder.load_state_dict(dict(state), strict=True)
    assert torch.equal(decoder.query_feat.weight, wanted)
    # also as part of a model whose keys have a prefix, and numpy checkpoints lose their metadata
    nn.ModuleDict({"predictor": decoder}).load_state_dict({f"predictor.{k}": v for k, v in state.items()}, strict=True)
    assert decoder.state_dict()._metadata[""]["version"] == 2


def test_registry():
    assert TRANSFORMER_DECODER_REGISTRY._name == "TRANSFORMER_MODULE"


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda d: d(levels(32)[:2], torch.randn(2, 32, 9, 9)), "reads 3 feature maps, got 2"),
        (lambda d: d(levels(32), torch.randn(2, 32, 9, 9), torch.zeros(2, 9, 9)), "padding masks are not supported"),
    ],
)
def test_errors_of_the_call(small_config, call, message):
    with pytest.raises(ValueError, match=message):
        call(build_transformer_decoder(small_config(), 32).double())


def test_errors_of_the_configuration(small_config):
    with pytest.raises(ValueError, match="cannot do without the classes"):
        build_transformer_decoder(small_config(), 32, mask_classification=False)
    with pytest.raises(ValueError, match="DEC_LAYERS counts the prediction before the first layer"):
        build_transformer_decoder(small_config("MODEL.MASK_FORMER.DEC_LAYERS", 0), 32)
    with pytest.raises(ValueError, match="width 32 must be a multiple of the number of heads 5"):
        build_transformer_decoder(small_config("MODEL.MASK_FORMER.NHEADS", 5), 32)
