"""Small generated images, labels and annotations, and a config for the mappers."""

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.projects.deeplab import add_deeplab_config
from PIL import Image
from pycocotools import mask as mask_util

from mask2former_plugin.config import add_maskformer2_config

IGNORE = 255
CLASSES = 6


@pytest.fixture
def cfg():
    """Config with a small resize, whose training dataset has the ignore label 255 and six classes."""
    MetadataCatalog.get("mapper_test").set(ignore_label=IGNORE)
    cfg = get_cfg()
    add_deeplab_config(cfg)
    add_maskformer2_config(cfg)
    cfg.DATASETS.TRAIN = ("mapper_test",)
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.MIN_SIZE_TRAIN = (48, 60)
    cfg.INPUT.MAX_SIZE_TRAIN = 100
    cfg.INPUT.IMAGE_SIZE = 64
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = CLASSES
    return cfg


class Scene:
    """An image of 40x56 (height x width) with four rectangles: labels, segments and annotations of the same regions."""

    height, width = 40, 56
    # y0, y1, x0, x1, class, crowd
    regions = ((2, 18, 3, 25, 1, 0), (20, 39, 5, 30, 3, 0), (5, 30, 32, 44, 1, 0), (1, 12, 46, 55, 5, 1))

    def __init__(self, folder):
        rng = np.random.default_rng(7)
        self.folder = folder
        self.image = rng.integers(0, 256, (self.height, self.width, 3), dtype=np.uint8)
        self.labels = np.full((self.height, self.width), IGNORE, dtype=np.uint8)
        self.ids = np.zeros((self.height, self.width), dtype=np.int64)
        self.segments = []
        for index, (y0, y1, x0, x1, label, crowd) in enumerate(self.regions):
            self.labels[y0:y1, x0:x1] = label
            segment_id = 7 + 70_001 * (index + 1)
            self.ids[y0:y1, x0:x1] = segment_id
            self.segments.append({"id": segment_id, "category_id": label, "isthing": True, "iscrowd": crowd})
        self.file_name = self.save("image.png", self.image)

    def save(self, name, array):
        path = self.folder / name
        Image.fromarray(array).save(path)
        return str(path)

    def masks(self, crowds=False):
        return [self.ids == segment["id"] for segment in self.segments if crowds or not segment["iscrowd"]]

    def base(self):
        return {"file_name": self.file_name, "height": self.height, "width": self.width, "image_id": 3}

    def semantic(self, labels=None, name="labels.png"):
        return {**self.base(), "sem_seg_file_name": self.save(name, self.labels if labels is None else labels)}

    def panoptic(self, semantic=True):
        rgb = np.stack([self.ids % 256, self.ids // 256 % 256, self.ids // 65536], -1).astype(np.uint8)
        sample = self.semantic() if semantic else self.base()
        return {**sample, "pan_seg_file_name": self.save("panoptic.png", rgb), "segments_info": self.segments}

    def instances(self, kind="polygon"):
        annotations = []
        for mask, (y0, y1, x0, x1, label, crowd) in zip(self.masks(crowds=True), self.regions):
            rle = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
            segmentation = {
                "polygon": [[x0, y0, x1, y0, x1, y1, x0, y1]],
                "rle": rle,
                "uncompressed": {"size": rle["size"], "counts": _run_lengths(mask)},
            }[kind]
            bbox = [x0, y0, x1 - x0, y1 - y0]
            annotations.append(
                {"bbox": bbox, "bbox_mode": 1, "category_id": label, "iscrowd": crowd, "segmentation": segmentation}
            )
        return {**self.base(), "annotations": annotations}


def _run_lengths(mask):
    counts, value, run = [], False, 0
    for pixel in mask.flatten(order="F"):
        if pixel != value:
            counts.append(run)
            value, run = pixel, 0
        run += 1
    return [*counts, run]


@pytest.fixture
def scene(tmp_path):
    return Scene(tmp_path)
