"""COCO average precision in C++ (faster-coco-eval) under the name of upstream's own; pycocotools without it."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from collections.abc import Mapping

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

logger = logging.getLogger(__name__)

try:
    from faster_coco_eval import COCOeval_faster
except ImportError:
    logger.info("faster-coco-eval is not installed; COCO evaluation uses the slower pycocotools.")
    COCOeval_opt = COCOeval
else:

    class COCOeval_opt(COCOeval_faster):
        """Drop-in for ``pycocotools.cocoeval.COCOeval``: same inputs (also pycocotools' own ``COCO``) and numbers."""

        def __init__(self, cocoGt=None, cocoDt=None, iouType: str = "segm") -> None:
            super().__init__(cocoGt, cocoDt, iouType, print_function=logger.debug)

        def evaluate(self) -> None:
            """Compare the images of ``params.imgIds``; ids that are text (ADE20K) are numbered for the C++ code."""
            if any(isinstance(image_id, str) for image_id in self.cocoGt.imgs):
                numbers = {image_id: number for number, image_id in enumerate(sorted(self.cocoGt.imgs))}
                self.cocoGt, self.cocoDt = (_number_images(coco, numbers) for coco in (self.cocoGt, self.cocoDt))
                self.params.imgIds = [numbers[image_id] for image_id in self.params.imgIds]
            super().evaluate()


def _number_images(coco: COCO, numbers: Mapping[str, int]) -> COCO:
    """A copy with other image ids."""
    renumbered = copy.copy(coco)
    renumbered.dataset = {
        **coco.dataset,
        "images": [{**image, "id": numbers[image["id"]]} for image in coco.dataset["images"]],
        "annotations": [{**entry, "image_id": numbers[entry["image_id"]]} for entry in coco.dataset["annotations"]],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        renumbered.createIndex()
    return renumbered
