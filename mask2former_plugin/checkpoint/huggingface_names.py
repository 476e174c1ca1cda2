"""Names of weights: Hugging Face's MaskFormer and Mask2Former, and ours, both ways."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from mask2former_plugin.modeling.backbones.swin import relative_position_index

MASKFORMER = "maskformer"
MASK2FORMER = "mask2former"

_ENCODER = "model.pixel_level_module.encoder."
_DECODER = "model.pixel_level_module.decoder."
_TRANSFORMER = "model.transformer_module."
_PIXEL_DECODER = "sem_seg_head.pixel_decoder."
_PREDICTOR = "sem_seg_head.predictor."

_FIELDS = {
    "p": "weight|bias",
    "s": "weight|bias|running_mean|running_var|num_batches_tracked",
    "part": None,  # one of a rule's parts
}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Rule:
    """A pair of name templates.

    ``{p}`` is weight or bias, ``{s}`` also a statistic of batch norm, every other field a number. With ``parts``,
    ``{part}`` stands for each of them in turn in their names, and our tensor is theirs stacked along dimension 0.
    """

    theirs: str
    ours: str
    parts: tuple[str, ...] = ()

    def _pattern(self, template: str) -> re.Pattern[str]:
        pieces = re.split(r"\{(\w+)\}", template)
        text = re.escape(pieces[0])
        for field, literal in zip(pieces[1::2], pieces[2::2]):
            alternatives = "|".join(self.parts) if field == "part" else _FIELDS.get(field, r"\d+")
            text += f"(?P<{field}>{alternatives})" + re.escape(literal)
        return re.compile(text)

    @cached_property
    def their_pattern(self) -> re.Pattern[str]:
        return self._pattern(self.theirs)

    @cached_property
    def our_pattern(self) -> re.Pattern[str]:
        return self._pattern(self.ours)


def _resnet(theirs: str) -> Iterator[Rule]:
    yield Rule(f"{theirs}embedder.embedder.convolution.weight", "backbone.stem.conv1.weight")
    yield Rule(f"{theirs}embedder.embedder.normalization.{{s}}", "backbone.stem.conv1.norm.{s}")
    for stage in range(4):
        block = f"{theirs}encoder.stages.{stage}.layers.{{j}}."
        our_block = f"backbone.res{stage + 2}.{{j}}."
        names = {f"layer.{k}": f"conv{k + 1}" for k in range(3)} | {"shortcut": "shortcut"}
        for name, our_name in names.items():
            yield Rule(f"{block}{name}.convolution.weight", f"{our_block}{our_name}.weight")
            yield Rule(f"{block}{name}.normalization.{{s}}", f"{our_block}{our_name}.norm.{{s}}")


def _swin(theirs: str) -> Iterator[Rule]:
    yield Rule(f"{theirs}embeddings.patch_embeddings.projection.{{p}}", "backbone.patch_embed.proj.{p}")
    yield Rule(f"{theirs}embeddings.norm.{{p}}", "backbone.patch_embed.norm.{p}")
    block, our_block = f"{theirs}encoder.layers.{{i}}.blocks.{{j}}.", "backbone.layers.{i}.blocks.{j}."
    names = {
        "layernorm_before.{p}": "norm1.{p}",
        "attention.self.relative_position_bias_table": "attn.relative_position_bias_table",
        "attention.self.relative_position_index": "attn.relative_position_index",
        "attention.output.dense.{p}": "attn.proj.{p}",
        "layernorm_after.{p}": "norm2.{p}",
        "intermediate.dense.{p}": "mlp.fc1.{p}",
        "output.dense.{p}": "mlp.fc2.{p}",
    }
    for name, our_name in names.items():
        yield Rule(block + name, our_block + our_name)
    yield Rule(f"{block}attention.self.{{part}}.{{p}}", f"{our_block}attn.qkv.{{p}}", ("query", "key", "value"))
    yield Rule(
        f"{theirs}encoder.layers.{{i}}.downsample.reduction.weight", "backbone.layers.{i}.downsample.reduction.weight"
    )
    yield Rule(f"{theirs}encoder.layers.{{i}}.downsample.norm.{{p}}", "backbone.layers.{i}.downsample.norm.{p}")


def _swin_norms(stage_names: list[str]) -> Iterator[Rule]:
    for number, name in enumerate(stage_names):
        yield Rule(f"{_ENCODER}hidden_states_norms.{name}.{{p}}", f"backbone.norm{number}.{{p}}")


def _attention(theirs: str, ours: str) -> Iterator[Rule]:
    yield Rule(f"{theirs}.{{part}}.{{p}}", f"{ours}.in_proj_{{p}}", _PROJECTIONS)
    yield Rule(f"{theirs}.out_proj.{{p}}", f"{ours}.out_proj.{{p}}")


def _shared() -> Iterator[Rule]:
    yield from _resnet(_ENCODER)
    yield Rule(f"{_DECODER}mask_projection.{{p}}", f"{_PIXEL_DECODER}mask_features.{{p}}")
    yield Rule(f"{_TRANSFORMER}queries_embedder.weight", f"{_PREDICTOR}query_embed.weight")
    yield Rule("class_predictor.{p}", f"{_PREDICTOR}class_embed.{{p}}")
    yield Rule("criterion.empty_weight", "criterion.empty_weight")


def _mask2former() -> Iterator[Rule]:
    yield from _shared()
    yield from _swin(_ENCODER)
    yield from _swin_norms([f"stage{number}" for number in range(1, 5)])
    yield Rule(f"{_DECODER}input_projections.{{l}}.{{m}}.{{p}}", f"{_PIXEL_DECODER}input_proj.{{l}}.{{m}}.{{p}}")
    yield Rule(f"{_DECODER}level_embed", f"{_PIXEL_DECODER}transformer.level_embed")
    layer, our_layer = f"{_DECODER}encoder.layers.{{n}}.", f"{_PIXEL_DECODER}transformer.encoder.layers.{{n}}."
    for name in ("sampling_offsets", "attention_weights", "value_proj", "output_proj"):
        yield Rule(f"{layer}self_attn.{name}.{{p}}", f"{our_layer}self_attn.{name}.{{p}}")
    names = {"self_attn_layer_norm": "norm1", "fc1": "linear1", "fc2": "linear2", "final_layer_norm": "norm2"}
    for name, our_name in names.items():
        yield Rule(f"{layer}{name}.{{p}}", f"{our_layer}{our_name}.{{p}}")
    for name in ("adapter", "layer"):
        yield Rule(f"{_DECODER}{name}_{{k}}.0.weight", f"{_PIXEL_DECODER}{name}_{{k}}.weight")
        yield Rule(f"{_DECODER}{name}_{{k}}.1.{{p}}", f"{_PIXEL_DECODER}{name}_{{k}}.norm.{{p}}")

    yield Rule(f"{_TRANSFORMER}queries_features.weight", f"{_PREDICTOR}query_feat.weight")
    yield Rule(f"{_TRANSFORMER}level_embed.weight", f"{_PREDICTOR}level_embed.weight")
    yield Rule(f"{_TRANSFORMER}input_projections.{{l}}.{{p}}", f"{_PREDICTOR}input_proj.{{l}}.{{p}}")
    layer = f"{_TRANSFORMER}decoder.layers.{{n}}."
    cross, own, feedforward = (
        f"{_PREDICTOR}transformer_{name}_layers.{{n}}." for name in ("cross_attention", "self_attention", "ffn")
    )
    # theirs packs the projections of the cross-attention as ours, but not those of the self-attention
    yield Rule(f"{layer}cross_attn.in_proj_{{p}}", f"{cross}multihead_attn.in_proj_{{p}}")
    yield Rule(f"{layer}cross_attn.out_proj.{{p}}", f"{cross}multihead_attn.out_proj.{{p}}")
    yield Rule(f"{layer}cross_attn_layer_norm.{{p}}", f"{cross}norm.{{p}}")
    yield from _attention(f"{layer}self_attn", f"{own}self_attn")
    yield Rule(f"{layer}self_attn_layer_norm.{{p}}", f"{own}norm.{{p}}")
    yield Rule(f"{layer}fc1.{{p}}", f"{feedforward}linear1.{{p}}")
    yield Rule(f"{layer}fc2.{{p}}", f"{feedforward}linear2.{{p}}")
    yield Rule(f"{layer}final_layer_norm.{{p}}", f"{feedforward}norm.{{p}}")
    yield Rule(f"{_TRANSFORMER}decoder.layernorm.{{p}}", f"{_PREDICTOR}decoder_norm.{{p}}")
    yield Rule(
        f"{_TRANSFORMER}decoder.mask_predictor.mask_embedder.{{m}}.0.{{p}}",
        f"{_PREDICTOR}mask_embed.layers.{{m}}.{{p}}",
    )


def _maskformer() -> Iterator[Rule]:
    yield from _shared()
    yield from _swin(f"{_ENCODER}model.")
    yield from _swin_norms([str(number) for number in range(4)])
    # theirs counts from the coarse end, ours from the fine one
    levels = {"stem": "layer_4"}
    for number in range(3):
        levels[f"layers.{number}.proj"] = f"adapter_{3 - number}"
        levels[f"layers.{number}.block"] = f"layer_{3 - number}"
    for name, our_name in levels.items():
        yield Rule(f"{_DECODER}fpn.{name}.0.weight", f"{_PIXEL_DECODER}{our_name}.weight")
        yield Rule(f"{_DECODER}fpn.{name}.1.{{p}}", f"{_PIXEL_DECODER}{our_name}.norm.{{p}}")
    yield Rule(f"{_TRANSFORMER}input_projection.{{p}}", f"{_PREDICTOR}input_proj.{{p}}")
    layer, our_layer = f"{_TRANSFORMER}decoder.layers.{{n}}.", f"{_PREDICTOR}transformer.decoder.layers.{{n}}."
    yield from _attention(f"{layer}self_attn", f"{our_layer}self_attn")
    yield from _attention(f"{layer}encoder_attn", f"{our_layer}multihead_attn")
    names = {
        "fc1": "linear1",
        "fc2": "linear2",
        "self_attn_layer_norm": "norm1",
        "encoder_attn_layer_norm": "norm2",
        "final_layer_norm": "norm3",
    }
    for name, our_name in names.items():
        yield Rule(f"{layer}{name}.{{p}}", f"{our_layer}{our_name}.{{p}}")
    yield Rule(f"{_TRANSFORMER}decoder.layernorm.{{p}}", f"{_PREDICTOR}transformer.decoder.norm.{{p}}")
    yield Rule("mask_embedder.{m}.0.{p}", f"{_PREDICTOR}mask_embed.layers.{{m}}.{{p}}")


@lru_cache(maxsize=None)
def rules(family: str) -> tuple[Rule, ...]:
    """All rules of ``MASKFORMER`` or ``MASK2FORMER``; each name fits at most one, whatever the backbone."""
    return tuple({MASKFORMER: _maskformer, MASK2FORMER: _mask2former}[family]())


# names of modules in the memory of transformers 5, which writes the former names to files
_IN_MEMORY = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^(model\.pixel_level_module\.encoder\.)swin\.(?=embeddings\.|encoder\.)", r"\1"),
        (r"(\.blocks\.\d+\.attention)\.q_proj\.", r"\1.self.query."),
        (r"(\.blocks\.\d+\.attention)\.k_proj\.", r"\1.self.key."),
        (r"(\.blocks\.\d+\.attention)\.v_proj\.", r"\1.self.value."),
        (r"(\.blocks\.\d+\.attention)\.o_proj\.", r"\1.output.dense."),
        (r"(\.blocks\.\d+\.attention)\.relative_position_bias\.", r"\1.self."),
        (r"(\.blocks\.\d+)\.mlp\.fc1\.", r"\1.intermediate.dense."),
        (r"(\.blocks\.\d+)\.mlp\.fc2\.", r"\1.output.dense."),
        (r"(\.decoder\.layers\.\d+\.(?:self|encoder)_attn)\.o_proj\.", r"\1.out_proj."),
        (r"(\.decoder\.layers\.\d+)\.mlp\.(fc[12])\.", r"\1.\2."),
    )
)
# what no output depends on
_UNUSED = re.compile(
    r"model\.pixel_level_module\.encoder\.(?:(?:model|swin)\.)?layernorm\.(?:weight|bias)|classifier\..*"
)


def is_huggingface(names: Mapping[str, object]) -> bool:
    """Whether the names are Hugging Face's: of a model with or without head, or of a backbone trained on ImageNet."""
    starts = ("model.pixel_level_module.", "pixel_level_module.", "resnet.embedder.", "swin.embeddings.")
    return any(name.startswith(starts) for name in names)


def _file_name(name: str) -> str:
    """The name that a file of the whole model has for ``name``."""
    if name.startswith(("pixel_level_module.", "transformer_module.")):
        name = f"model.{name}"  # the model without head
    for backbone in ("resnet.", "swin."):
        if name.startswith(backbone):
            name = _ENCODER + name.removeprefix(backbone)
    for pattern, replacement in _IN_MEMORY:
        name = pattern.sub(replacement, name)
    return name


def family_of(names: Mapping[str, object]) -> str:
    """``MASKFORMER`` or ``MASK2FORMER``, by the names of either side."""
    marks = (f"{_DECODER}fpn.", f"{_ENCODER}model.", f"{_PREDICTOR}transformer.")
    return MASKFORMER if any(name.startswith(marks) for name in names) else MASK2FORMER


def _find(name: str, patterns: list[tuple[re.Pattern[str], Rule]]) -> tuple[Rule, dict[str, str]] | None:
    for pattern, rule in patterns:
        match = pattern.fullmatch(name)
        if match:
            return rule, match.groupdict()
    return None


def to_detectron2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's weights under our names; queries, keys and values that they keep apart become one tensor.

    Weights that no output depends on are left out; unknown names stay as they are.

    Raises:
        ValueError: one of the three projections of an attention layer is missing.
    """
    state = {_file_name(name): value for name, value in state.items()}
    patterns = [(rule.their_pattern, rule) for rule in rules(family_of(state))]
    result: dict[str, Tensor] = {}
    stacks: dict[str, tuple[Rule, dict[str, Tensor]]] = {}
    for name, value in state.items():
        found = _find(name, patterns)
        if found is None:
            if not _UNUSED.fullmatch(name):
                result[name] = value
            continue
        rule, fields = found
        part = fields.pop("part", None)
        ours = rule.ours.format(**fields)
        if part is None:
            result[ours] = value
        else:
            stacks.setdefault(ours, (rule, {}))[1][part] = value
    for ours, (rule, parts) in stacks.items():
        missing = [part for part in rule.parts if part not in parts]
        if missing:
            raise ValueError(
                f"the Hugging Face checkpoint lacks {', '.join(missing)} of what is {ours} here; the file is incomplete"
            )
        result[ours] = torch.cat([parts[part] for part in rule.parts])
    for name in [name for name in result if name.endswith(".relative_position_bias_table")]:
        index = name.replace("_bias_table", "_index")
        if index not in result:  # newer files lack it, as it follows from the size of the table
            side = int(result[name].shape[0] ** 0.5)
            result[index] = relative_position_index((side + 1) // 2)
    return result


def from_detectron2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under Hugging Face's names, as in the files that transformers 5 writes.

    Raises:
        ValueError: Hugging Face's models have no such weight.
    """
    family = family_of(state)
    patterns = [(rule.our_pattern, rule) for rule in rules(family)]
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        found = _find(name, patterns)
        if found is None:
            raise ValueError(
                f"Hugging Face's {family} has nothing like {name}; only its own architectures can be saved as theirs"
            )
        rule, fields = found
        if not rule.parts:
            result[rule.theirs.format(**fields)] = value
            continue
        for part, piece in zip(rule.parts, value.chunk(len(rule.parts))):
            result[rule.theirs.format(part=part, **fields)] = piece
    _add_unneeded(result, family)
    return result


def _add_unneeded(result: dict[str, Tensor], family: str) -> None:
    """What their modules hold beyond ours, with the values that it has before training."""
    for name in [name for name in result if name.endswith(".normalization.running_mean")]:
        result.setdefault(name.replace("running_mean", "num_batches_tracked"), torch.tensor(0))
    if family == MASK2FORMER:
        for name in [name for name in result if name.endswith(".relative_position_index")]:
            del result[name]
    norm = f"{_ENCODER}hidden_states_norms.{'stage4' if family == MASK2FORMER else '3'}.weight"
    if norm in result:
        unused = f"{_ENCODER}{'swin' if family == MASK2FORMER else 'model'}.layernorm."
        result[f"{unused}weight"] = torch.ones_like(result[norm])
        result[f"{unused}bias"] = torch.zeros_like(result[norm])
