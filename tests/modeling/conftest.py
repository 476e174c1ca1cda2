"""Small configs and feature maps for tests of the networks."""

import math

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.projects.deeplab import add_deeplab_config

from mask2former_plugin.config import add_maskformer2_config

CHANNELS = {"res2": 8, "res3": 16, "res4": 24, "res5": 40}
STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}


@pytest.fixture
def full_config():
    """Published defaults of Mask2Former with overrides: ``full_config("KEY", value, …)``."""

    def make(*options):
        cfg = get_cfg()
        add_deeplab_config(cfg)
        add_maskformer2_config(cfg)
        cfg.MODEL.DEVICE = "cpu"
        cfg.merge_from_list(list(options))
        return cfg

    return make


@pytest.fixture
def small_config(full_config):
    """The same for a Mask2Former of 32 channels, 10 queries, 5 classes and few layers, without dropout."""
    options = [
        "MODEL.SEM_SEG_HEAD.NAME", "MaskFormerHead",
        "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "MSDeformAttnPixelDecoder",
        "MODEL.SEM_SEG_HEAD.IN_FEATURES", ["res2", "res3", "res4", "res5"],
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 5,
        "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32,
        "MODEL.SEM_SEG_HEAD.MASK_DIM", 32,
        "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 2,
        "MODEL.MASK_FORMER.HIDDEN_DIM", 32,
        "MODEL.MASK_FORMER.NHEADS", 4,
        "MODEL.MASK_FORMER.DIM_FEEDFORWARD", 48,
        "MODEL.MASK_FORMER.DROPOUT", 0.0,
        "MODEL.MASK_FORMER.DEC_LAYERS", 5,
        "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 10,
        "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME", "MultiScaleMaskedTransformerDecoder",
        "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "multi_scale_pixel_decoder",
    ]  # fmt: skip
    return lambda *overrides: full_config(*options, *overrides)


@pytest.fixture
def input_shape():
    return {name: ShapeSpec(channels=CHANNELS[name], stride=STRIDES[name]) for name in CHANNELS}


@pytest.fixture
def features():
    """Feature maps of a batch of two images whose size is no multiple of anything: ``features((height, width))``."""

    def make(size=(75, 101), dtype=torch.float64, device="cpu"):
        return {
            name: torch.randn(
                2, CHANNELS[name], *(math.ceil(s / STRIDES[name]) for s in size), dtype=dtype, device=device
            )
            for name in CHANNELS
        }

    return make


@pytest.fixture
def randomize():
    """Gives every parameter noise, so that zero and unit initial values hide nothing, and makes it float64."""

    def apply(module, scale=0.1):
        module.double()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter) * scale)
        return module

    return apply
