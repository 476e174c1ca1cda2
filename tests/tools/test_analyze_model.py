"""Counts of operations against formulas written out layer by layer."""

import math

import analyze_model
import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from mask2former_plugin.analysis import NetworkOnly, count, input_size, mean_counts, table
from mask2former_plugin.config import load_config
from mask2former_plugin.modeling.layers.attention import MultiheadAttention
from mask2former_plugin.modeling.layers.deformable_attention import MSDeformAttn

SIZE = (64, 96)


@pytest.fixture(scope="module")
def model(tiny):
    return build_model(load_config(tiny.config)).eval()


class ByHand:
    """Multiply-adds of one forward pass by kind, from the shapes that hooks see."""

    def __init__(self, network):
        self.total = dict.fromkeys(("convolution", "linear", "attention", "projection", "samples", "norm"), 0)
        rules = {
            nn.Conv2d: ("convolution", self.convolution),
            nn.Linear: ("linear", lambda m, i, o: o.numel() * m.in_features),
            MultiheadAttention: ("attention", self.attention),
            nn.LayerNorm: ("norm", lambda m, i, o: 5 * o.numel()),
            nn.GroupNorm: ("norm", lambda m, i, o: 5 * o.numel()),
            nn.BatchNorm2d: ("norm", lambda m, i, o: 2 * o.numel()),
        }
        for module in network.modules():
            if isinstance(module, MSDeformAttn):
                # the encoder calls its parts
                module.value_proj.register_forward_hook(lambda m, i, output, attn=module: self.samples(attn, output))
            for kind, (name, rule) in rules.items():
                if isinstance(module, kind):
                    module.register_forward_hook(
                        lambda m, inputs, output, n=name, r=rule: self.add(n, r(m, inputs, output))
                    )

    def add(self, name, number):
        self.total[name] += number

    def convolution(self, module, inputs, output):
        return output.numel() * module.in_channels // module.groups * math.prod(module.kernel_size)

    def attention(self, module, inputs, output):
        query, key = inputs[:2]
        batch, length, width = query.shape
        # queries from one sequence, keys and values from the other
        self.total["projection"] += batch * width * width * (length + 2 * key.shape[1])
        return batch * length * key.shape[1] * width * 2

    def samples(self, module, values):
        batch, length, width = values.shape
        # four neighbours of each sampled value; every token asks, at points of every level
        self.add("samples", 4 * batch * length * module.num_levels * module.num_points * width)


def test_flops_equal_the_formulas(model):
    network = NetworkOnly(model)
    by_hand = ByHand(network)
    with torch.no_grad():
        features = model.backbone(torch.zeros(1, 3, *SIZE))
        network(torch.zeros(1, 3, *SIZE))
    for module in network.modules():
        module._forward_hooks.clear()
    # the backbone ran twice under the hooks
    once = ByHand(model.backbone)
    with torch.no_grad():
        model.backbone(torch.zeros(1, 3, *SIZE))
    for module in network.modules():
        module._forward_hooks.clear()
    layers = {name: by_hand.total[name] - once.total[name] for name in by_hand.total}
    assert all(layers.values())

    # masks: the final product at stride 4, and one at the size of the level that each decoder layer reads
    queries, channels = 8, 32
    height, width = SIZE[0] // 4, SIZE[1] // 4
    products = queries * channels * height * width + queries * channels * (SIZE[0] // 32) * (SIZE[1] // 32)
    counted = count(model, "flop", SIZE)
    assert counted["backbone"] == once.total["convolution"] + once.total["norm"]
    # the tracer drops what no result depends on: the class logits of the prediction before the last
    unused = queries * channels * (model.sem_seg_head.num_classes + 1)
    rest = counted[""] - sum(layers.values()) - products + unused
    # what remains is resizing: four multiply-adds per value of the upsampled map and of the mask features
    assert rest == 4 * channels * height * width + 4 * channels * (SIZE[0] // 32) * (SIZE[1] // 32)
    assert features["res2"].shape[-2:] == (height, width)


def test_activations_are_the_results_of_products(model):
    sizes = []
    for module in model.backbone.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, i, output: sizes.append(output.numel()))
    with torch.no_grad():
        model.backbone(torch.zeros(1, 3, *SIZE))
    for module in model.backbone.modules():
        module._forward_hooks.clear()
    assert count(model, "activation", SIZE)["backbone"] == sum(sizes)


def test_parameters_are_all_parameters(model):
    counted = count(model, "parameter")
    assert counted[""] == sum(p.numel() for p in model.parameters())
    assert counted["backbone"] == sum(p.numel() for p in model.backbone.parameters())


def test_mean_over_sizes(model):
    one, other = (count(model, "flop", size)[""] for size in ((64, 96), (32, 64)))
    mean, deviation = mean_counts(model, "flop", [(64, 96), (32, 64), (64, 96)])
    assert mean[""] == pytest.approx((2 * one + other) / 3)
    assert deviation == pytest.approx(math.sqrt(2) / 3 * (one - other))


def test_sizes_are_padded_as_the_model_pads(model):
    assert input_size(model, 64, 97) == (64, 128)


def test_table_lists_modules_in_their_order(model):
    text = table(model, {"parameter": count(model, "parameter")}, depth=1)
    lines = [line.split("|")[1].strip() for line in text.splitlines()[2:]]
    assert lines == ["all", "backbone", "sem_seg_head"]


def test_unknown_model_is_an_error():
    with pytest.raises(ValueError, match="Linear has no backbone"):
        NetworkOnly(nn.Linear(2, 2))


def test_per_pixel_baseline_is_counted_too(tiny):
    overrides = ["MODEL.META_ARCHITECTURE", "SemanticSegmentor", "MODEL.SEM_SEG_HEAD.NAME", "PerPixelBaselineHead"]
    overrides += ["MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "BasePixelDecoder"]
    baseline = build_model(load_config(tiny.config, overrides)).eval()
    counted = count(baseline, "flop", SIZE)
    assert counted[""] > counted["backbone"] > 0


def test_tool_averages_over_images(tiny, capsys):
    arguments = ["--config-file", tiny.config, "--tasks", "flop", "parameter", "-n", "2", "--depth", "1"]
    counts = analyze_model.main(arguments)
    # images of 64x96 need no resizing and no padding
    assert counts["flop"][""] == count(build_model(load_config(tiny.config)), "flop", SIZE)[""]
    printed = capsys.readouterr().out
    assert "± 0.000 GFLOP" in printed and "backbone" in printed


def test_tool_with_fixed_size_reads_no_data(tiny, capsys, monkeypatch):
    monkeypatch.setattr(analyze_model, "build_detection_test_loader", None)
    arguments = ["--config-file", tiny.config, "--tasks", "activation", "structure", "--use-fixed-input-size"]
    counts = analyze_model.main([*arguments, "INPUT.CROP.SIZE", "(64, 64)"])
    expected = count(build_model(load_config(tiny.config)), "activation", (64, 64))
    assert counts["activation"][""] == expected[""]
    assert "MaskFormer(" in capsys.readouterr().out
