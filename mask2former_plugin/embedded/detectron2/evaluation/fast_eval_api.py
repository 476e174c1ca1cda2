"""COCO average precision in C++ (faster-coco-eval) under the name of upstream's own; pycocotools without it."""

from __future__ import annotations

import logging

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
