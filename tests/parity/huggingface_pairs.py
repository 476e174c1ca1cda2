"""Pairs of models with equal weights, Hugging Face's and ours, and what either makes of the same input.

Hugging Face's models run in evaluation mode throughout: dropout, LayerDrop and stochastic depth are off, and its
trainable batch norm does not move its statistics (the originals freeze it). Its losses do not depend on the mode.
"""

import functools
import os
import tempfile
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip(
    "transformers", minversion="5", reason="parity with Hugging Face: pip install 'transformers>=5'"
)

import torch
from detectron2.modeling import build_model
from safetensors.torch import load_file

from mask2former_plugin.checkpoint.huggingface_config import to_hf_config
from mask2former_plugin.checkpoint.huggingface_names import to_detectron2
from mask2former_plugin.config import load_config

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = {
    "mask2former_r50": "mask2former/coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml",
    "mask2former_swin_t": "mask2former/coco/panoptic-segmentation/swin/maskformer2_swin_tiny_bs16_50ep.yaml",
    "maskformer_r50": "maskformer/ade20k-150/maskformer_R50_bs16_160k.yaml",
    "maskformer_swin_t": "maskformer/ade20k-150/swin/maskformer_swin_tiny_bs16_160k.yaml",
}
NAMES = tuple(FILES)
NARROW = [
    "MODEL.RESNETS.STEM_OUT_CHANNELS", 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS", 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP", 4,
    "MODEL.SWIN.EMBED_DIM", 16,
    "MODEL.SWIN.NUM_HEADS", [1, 2, 4, 8],
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 6,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM", 64,
    "MODEL.SEM_SEG_HEAD.MASK_DIM", 24,
    "MODEL.MASK_FORMER.HIDDEN_DIM", 32,
    "MODEL.MASK_FORMER.NHEADS", 4,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD", 40,
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 12,
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS", 60,
]  # fmt: skip
NO_RANDOM_DEPTH = ["MODEL.MASK_FORMER.DROPOUT", 0.0, "MODEL.SWIN.DROP_PATH_RATE", 0.0]


def config(name, *overrides, narrow=True):
    """A published config without weights and dropout; ``narrow``: published depth, few channels, classes, queries."""
    options = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *NO_RANDOM_DEPTH, *(NARROW if narrow else [])]
    return load_config(CONFIGS / FILES[name], [*options, *overrides])


@functools.lru_cache(maxsize=None)
def pair(name, dtype, *overrides, narrow=True):
    """Hugging Face's model and ours of one config, with the same random weights; made once for each config."""
    cfg = config(name, *overrides, narrow=narrow)
    if name.startswith("mask2former"):
        config_class, model_class = transformers.Mask2FormerConfig, transformers.Mask2FormerForUniversalSegmentation
    else:
        config_class, model_class = transformers.MaskFormerConfig, transformers.MaskFormerForInstanceSegmentation
    torch.manual_seed(1)
    theirs = disturb(model_class(config_class.from_dict(to_hf_config(cfg)))).eval().to(dtype)
    ours = build_model(cfg).to(dtype)
    weights = in_our_names(theirs, theirs.state_dict())
    ours.load_state_dict({key: weights.pop(key) for key in ours.state_dict()})
    assert all(key.endswith("num_batches_tracked") for key in weights)  # frozen batch norm has none
    return theirs, ours


@torch.no_grad()
def disturb(model):
    """Noise on all weights and statistics, so that initial zeros and ones hide nothing."""
    for parameter in model.parameters():
        spread = parameter.std(correction=0)
        parameter.add_(torch.randn_like(parameter) * 0.1 * (spread if spread > 0 else 1))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.7, 1.5)
    return model


def in_our_names(theirs, tensors):
    """Weights, or anything linear in them such as gradients, of Hugging Face's model under our names.

    Through ``save_pretrained``, whose file names are stable while the names in memory changed between versions.
    """
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder, state_dict=dict(tensors))
        return to_detectron2(load_file(Path(folder) / "model.safetensors"))


def predict_theirs(model, images):
    """``(class logits, mask logits)`` of every prediction: last, then auxiliary 0, 1, …

    MaskFormer's auxiliary outputs are wrong in Hugging Face's model (the decoder's final norm is left out and the
    all-zero initial state counts as a prediction; fact sheet 3.6), so they are made of its own modules as the paper
    has it: final norm, then heads, for every layer.
    """
    outputs = model(images, output_hidden_states=True, output_auxiliary_logits=True)
    last = (outputs.class_queries_logits, outputs.masks_queries_logits)
    if isinstance(model, transformers.Mask2FormerForUniversalSegmentation):
        return [last] + [(aux["class_queries_logits"], aux["masks_queries_logits"]) for aux in outputs.auxiliary_logits]
    predictions = [last]
    for state in outputs.transformer_decoder_hidden_states[1:-1]:
        state = model.model.transformer_module.decoder.layernorm(state)
        masks = torch.einsum("bqc,bchw->bqhw", model.mask_embedder(state), outputs.pixel_decoder_last_hidden_state)
        predictions.append((model.class_predictor(state), masks))
    return predictions


def predict_ours(model, images):
    """The same from our model."""
    outputs = model.sem_seg_head(model.backbone(images))
    return [(p["pred_logits"], p["pred_masks"]) for p in [outputs, *outputs["aux_outputs"]]]


def losses_of_theirs(model, images, masks, labels):
    """Losses by our names, not weighted, of all predictions; ``masks`` padded to the size of ``images``."""
    last, *auxiliary = [
        {"class_queries_logits": c, "masks_queries_logits": m} for c, m in predict_theirs(model, images)
    ]
    losses = model.criterion(**last, mask_labels=masks, class_labels=labels, auxiliary_predictions=auxiliary)
    return {key.replace("cross_entropy", "ce"): loss for key, loss in losses.items()}


def gradients(model, total):
    """Gradient of every parameter of a model under its own names, zero where there is none."""
    names, parameters = zip(*model.named_parameters())
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found)}


def errors(ours, theirs, floor=0.0):
    """Largest difference of each tensor as a part of its largest value; names, shapes and types have to be equal.

    Args:
        floor: values below this part of the largest one of all tensors count as so large; for gradients that are zero
            but for rounding, such as those of the biases of attention keys.
    """
    assert ours.keys() == theirs.keys()
    largest = max(t.abs().max().item() for t in theirs.values() if t.numel())
    result = {}
    for name, expected in theirs.items():
        assert (ours[name].shape, ours[name].dtype) == (expected.shape, expected.dtype), name
        if expected.numel():
            scale = max(expected.abs().max().item(), floor * largest)
            error = (ours[name] - expected).abs().max().item()
            result[name] = error / scale if error else 0.0
    return result


def assert_close(ours, theirs, tolerance, floor=0.0):
    """All :func:`errors` are at most ``tolerance``."""
    wrong = {name: error for name, error in errors(ours, theirs, floor).items() if not error <= tolerance}
    assert not wrong, f"more than {tolerance}: {wrong}"


def assert_single_precision_gradients_close(inputs, tolerance):
    """Float32 gradients of ``(ours, theirs)`` for several inputs: each tensor agrees for one input at least.

    Where a unit or a sampling position lies so close to a kink (ReLU, the border between two pixels, the threshold of
    an attention mask, the ranking of uncertain points) that float32 puts it on different sides, some gradients jump;
    that happens for one input and not for the next, an error would be there for all. Gradients below a hundredth of
    the largest one are compared with that.
    """
    least = {}
    for ours, theirs in inputs:
        for name, error in errors(ours, theirs, floor=1e-2).items():
            least[name] = min(error, least.get(name, float("inf")))
    wrong = {name: error for name, error in least.items() if not error <= tolerance}
    assert not wrong, f"more than {tolerance}: {wrong}"
