"""Small models of both families on both backbones, with every weight random."""

import pytest
import torch
from detectron2.modeling import build_model

from mask2former_plugin.config import load_config

SWIN = [
    "MODEL.BACKBONE.NAME", "D2SwinTransformer",
    "MODEL.SWIN.EMBED_DIM", 8,
    "MODEL.SWIN.DEPTHS", [1, 2, 1, 1],
    "MODEL.SWIN.NUM_HEADS", [1, 2, 2, 4],
    "MODEL.SWIN.WINDOW_SIZE", 4,
]  # fmt: skip
RESNET = [
    "MODEL.BACKBONE.NAME", "build_resnet_backbone",
    "MODEL.BACKBONE.FREEZE_AT", 0,
    "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"],
    "MODEL.RESNETS.STEM_OUT_CHANNELS", 4,
    "MODEL.RESNETS.RES2_OUT_CHANNELS", 8,
    "MODEL.RESNETS.WIDTH_PER_GROUP", 2,
    "MODEL.RESNETS.STRIDE_IN_1X1", False,
    "MODEL.RESNETS.STEM_TYPE", "basic",
    "MODEL.RESNETS.RES5_MULTI_GRID", [1, 1, 1],
]  # fmt: skip
HEAD = [
    "MODEL.DEVICE", "cpu",
    "MODEL.META_ARCHITECTURE", "MaskFormer",
    "MODEL.SEM_SEG_HEAD.NAME", "MaskFormerHead",
    "MODEL.SEM_SEG_HEAD.NORM", "GN",
    "MODEL.SEM_SEG_HEAD.IN_FEATURES", ["res2", "res3", "res4", "res5"],
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32,
    "MODEL.SEM_SEG_HEAD.MASK_DIM", 16,
    "MODEL.MASK_FORMER.HIDDEN_DIM", 24,
    "MODEL.MASK_FORMER.NHEADS", 4,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD", 20,
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 5,
    "INPUT.FORMAT", "RGB",
    "MODEL.PIXEL_MEAN", [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD", [58.395, 57.12, 57.375],
    "DATASETS.TRAIN", (), "DATASETS.TEST", (),
]  # fmt: skip
FAMILIES = {
    "mask2former": [
        "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "MSDeformAttnPixelDecoder",
        "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 2,
        "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "multi_scale_pixel_decoder",
        "MODEL.MASK_FORMER.DEC_LAYERS", 4,
    ],
    "maskformer": [
        "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "BasePixelDecoder",
        "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME", "StandardTransformerDecoder",
        "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "res5",
        "MODEL.MASK_FORMER.MASK_LOSS", "dense",
        "MODEL.MASK_FORMER.DEC_LAYERS", 2,
    ],
}  # fmt: skip


@pytest.fixture
def small_config():
    """``small_config("mask2former" or "maskformer", "swin" or "resnet", KEY, value, …)``"""

    def make(family="mask2former", backbone="swin", *overrides):
        options = [*HEAD, *FAMILIES[family], *(SWIN if backbone == "swin" else RESNET), *overrides]
        return load_config(opts=options)

    return make


@pytest.fixture
def random_model():
    """A model of a config in which no two tensors agree, statistics and buffers of the loss included."""

    def make(cfg):
        model = build_model(cfg).eval()
        with torch.no_grad():
            for name, value in model.state_dict().items():
                if value.is_floating_point():
                    value.copy_(torch.rand(value.shape) + 0.5)
        return model

    return make


@pytest.fixture
def load_fresh():
    """Loads a file into a new model of a config, all of whose floating-point values were 7 before."""

    def load(cfg, path, checkpointer):
        model = build_model(cfg).eval()
        with torch.no_grad():
            for value in model.state_dict().values():
                if value.is_floating_point():
                    value.fill_(7)
        loader = checkpointer(model)
        loader.load(str(path))
        return model, loader

    return load
