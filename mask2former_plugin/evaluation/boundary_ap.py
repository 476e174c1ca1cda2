"""Boundary AP: COCO's average precision with min(mask IoU, boundary IoU) in place of mask IoU."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mask2former_plugin.evaluation.boundary import DEFAULT_DILATION_RATIO, mask_boundary
from mask2former_plugin.evaluation.instance_evaluation import InstanceSegEvaluator, RunLengthCOCOEvaluator

RESULT_KEY = "segm_boundary"


class BoundaryCOCOeval(COCOeval):
    """``COCOeval`` of masks in which two masks overlap as much as their boundaries do (Cheng et al., CVPR 2021).

    Args:
        coco_gt, coco_dt: ground truth, and predictions from its ``loadRes``.
        dilation_ratio: width of the boundary region in parts of the image's diagonal.
    """

    def __init__(self, coco_gt: COCO, coco_dt: COCO, dilation_ratio: float = DEFAULT_DILATION_RATIO) -> None:
        super().__init__(coco_gt, coco_dt, "segm")
        self.dilation_ratio = dilation_ratio

    def computeIoU(self, imgId: int, catId: int) -> np.ndarray | list:
        """The smaller one of mask IoU and boundary IoU, ``[predictions by score, true masks]``.

        A mask IoU below the lowest threshold stays as it is: the pair can't match, whatever its boundaries. So does the
        one with a crowd, whose contour is not that of an object (as in the paper's own code).
        """
        iou = super().computeIoU(imgId, catId)
        if not len(iou):
            return iou
        truths, predictions = self._instances(imgId, catId)
        single = np.array([not truth["iscrowd"] for truth in truths])
        rows, columns = np.nonzero((iou >= self.params.iouThrs.min()) & single)
        if not len(rows):
            return iou
        chosen_rows, chosen_columns = np.unique(rows), np.unique(columns)
        boundary_iou = coco_mask.iou(
            [self._boundary(predictions[row]) for row in chosen_rows],
            [self._boundary(truths[column]) for column in chosen_columns],
            [0] * len(chosen_columns),
        )
        chosen = np.ix_(chosen_rows, chosen_columns)
        iou[chosen] = np.minimum(iou[chosen], boundary_iou)
        return iou

    def _instances(self, image: int, category: int) -> tuple[list[dict], list[dict]]:
        """True masks and predictions in the order of the rows and columns of the IoU."""
        keys = [(image, category)] if self.params.useCats else [(image, c) for c in self.params.catIds]
        truths = [instance for key in keys for instance in self._gts[key]]
        predictions = [instance for key in keys for instance in self._dts[key]]
        order = np.argsort([-prediction["score"] for prediction in predictions], kind="mergesort")
        return truths, [predictions[i] for i in order[: self.params.maxDets[-1]]]

    def _boundary(self, instance: Mapping[str, Any]) -> dict:
        boundary = mask_boundary(coco_mask.decode(instance["segmentation"]), self.dilation_ratio)
        return coco_mask.encode(np.asfortranarray(boundary, dtype=np.uint8))


def evaluate_masks(
    coco_gt: COCO,
    results: Sequence[Mapping[str, Any]],
    dilation_ratio: float | None = DEFAULT_DILATION_RATIO,
    *,
    img_ids: Sequence[int] | None = None,
    max_dets: Sequence[int] = (1, 10, 100),
) -> COCOeval:
    """AP or boundary AP of masks.

    Args:
        coco_gt: the ground truth.
        results: at least one COCO result, with the dataset's category ids.
        dilation_ratio: width of the boundary region in parts of the diagonal; None: plain mask AP.
        img_ids: evaluate on these images only.
        max_dets: numbers of predictions per image, ascending.

    Returns:
        The evaluation, accumulated and summarised: ``stats`` holds the twelve numbers of COCO.
    """
    # without its box, so that small and large are told apart by the area of the mask
    fields = ("image_id", "category_id", "score", "segmentation")
    results = [{field: result[field] for field in fields} for result in results]
    with contextlib.redirect_stdout(io.StringIO()):
        predictions = coco_gt.loadRes(results)
        if dilation_ratio is None:
            evaluation = COCOeval(coco_gt, predictions, "segm")
        else:
            evaluation = BoundaryCOCOeval(coco_gt, predictions, dilation_ratio)
        evaluation.params.maxDets = list(max_dets)
        if img_ids is not None:
            evaluation.params.imgIds = list(img_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def evaluate_files(
    gt_json: str | Path, dt_json: str | Path, dilation_ratio: float | None = DEFAULT_DILATION_RATIO
) -> dict[str, float]:
    """AP, AP50, AP75, APs, APm and APl in percent of a COCO results file against COCO annotations.

    Args:
        dilation_ratio: as in :func:`evaluate_masks`.

    Raises:
        ValueError: one of the files does not hold what it should; the message names it.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        coco_gt = COCO(str(gt_json))
    if "annotations" not in coco_gt.dataset:
        raise ValueError(f"{gt_json} has no 'annotations' to compare with")
    results = json.loads(Path(dt_json).read_text(encoding="utf-8"))
    if not isinstance(results, list) or not results:
        raise ValueError(f"{dt_json} must hold a list of COCO results, at least one")
    if any("segmentation" not in result for result in results):
        raise ValueError(f"{dt_json} has results without 'segmentation': boundaries need masks, not boxes")
    unknown = {result["image_id"] for result in results} - set(coco_gt.getImgIds())
    if unknown:
        raise ValueError(f"{dt_json} has {len(unknown)} images that {gt_json} lacks, such as id {min(unknown)}")
    stats = evaluate_masks(coco_gt, results, dilation_ratio).stats[:6]
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    # COCO says -1 where the ground truth has nothing to compare with
    return {name: 100 * float(value) if value >= 0 else float("nan") for name, value in zip(names, stats)}


class _WithBoundaryAP:
    """Adds ``segm_boundary`` to the results of a ``COCOEvaluator``; to be mixed in before it.

    Args:
        dilation_ratio: width of the boundary region in parts of the image's diagonal.
    """

    def __init__(self, *args: Any, dilation_ratio: float = DEFAULT_DILATION_RATIO, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._dilation_ratio = dilation_ratio

    def _eval_predictions(self, predictions: Sequence[dict], img_ids: Sequence[int] | None = None) -> None:
        # copies: upstream's evaluation changes the category ids of the results in place
        results = [dict(result) for image in predictions for result in image["instances"] if "segmentation" in result]
        super()._eval_predictions(predictions, img_ids=img_ids)
        if not self._do_evaluation:
            return
        to_contiguous = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if to_contiguous is not None:
            dataset_id = {contiguous: category for category, contiguous in to_contiguous.items()}
            for result in results:
                result["category_id"] = dataset_id[result["category_id"]]
        evaluation = None
        if results:
            max_dets = self._max_dets_per_image or (1, 10, 100)
            evaluation = evaluate_masks(
                self._coco_api, results, self._dilation_ratio, img_ids=img_ids, max_dets=max_dets
            )
        self._logger.info("Boundary AP:")
        names = self._metadata.get("thing_classes")
        self._results[RESULT_KEY] = self._derive_coco_results(evaluation, "segm", class_names=names)


class BoundaryCOCOEvaluator(_WithBoundaryAP, RunLengthCOCOEvaluator):
    """``COCOEvaluator`` that reports boundary AP too, under ``segm_boundary``."""


class BoundaryInstanceSegEvaluator(_WithBoundaryAP, InstanceSegEvaluator):
    """``InstanceSegEvaluator`` that reports boundary AP too, under ``segm_boundary``."""
