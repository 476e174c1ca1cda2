"""Models: registries, ResNet backbones, the per-pixel semantic segmentor."""

from typing import NoReturn

from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import (
    BACKBONE_REGISTRY,
    Backbone,
    ResNet,
    ResNetBlockBase,
    build_backbone,
    build_resnet_backbone,
    make_stage,
)
from detectron2.modeling.meta_arch import (
    META_ARCH_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
    GeneralizedRCNN,
    SemanticSegmentor,
    build_model,
    build_sem_seg_head,
)
from detectron2.modeling.test_time_augmentation import DatasetMapperTTA
from detectron2.utils.missing import missing_name

__all__ = [
    "BACKBONE_REGISTRY",
    "META_ARCH_REGISTRY",
    "SEM_SEG_HEADS_REGISTRY",
    "Backbone",
    "DatasetMapperTTA",
    "GeneralizedRCNN",
    "ResNet",
    "ResNetBlockBase",
    "SemanticSegmentor",
    "ShapeSpec",
    "build_backbone",
    "build_model",
    "build_resnet_backbone",
    "build_sem_seg_head",
    "make_stage",
]

_UPSTREAM_ONLY = {
    "ANCHOR_GENERATOR_REGISTRY",
    "BaseKeypointRCNNHead",
    "BaseMaskRCNNHead",
    "FCOS",
    "FPN",
    "FastRCNNOutputLayers",
    "GeneralizedRCNNWithTTA",
    "MMDetBackbone",
    "MMDetDetector",
    "MViT",
    "PROPOSAL_GENERATOR_REGISTRY",
    "PanopticFPN",
    "ProposalNetwork",
    "ROIHeads",
    "ROI_BOX_HEAD_REGISTRY",
    "ROI_HEADS_REGISTRY",
    "ROI_KEYPOINT_HEAD_REGISTRY",
    "ROI_MASK_HEAD_REGISTRY",
    "RPN_HEAD_REGISTRY",
    "RetinaNet",
    "SimpleFeaturePyramid",
    "StandardROIHeads",
    "SwinTransformer",
    "ViT",
    "build_anchor_generator",
    "build_box_head",
    "build_keypoint_head",
    "build_mask_head",
    "build_proposal_generator",
    "build_roi_heads",
    "build_rpn_head",
    "detector_postprocess",
    "get_vit_lr_decay_rate",
}


def __getattr__(name: str) -> NoReturn:
    missing_name(__name__, _UPSTREAM_ONLY, name)
