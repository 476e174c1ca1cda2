"""Instance segmentation and detection: COCO average precision."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_json
from detectron2.evaluation.evaluator import DatasetEvaluator
from detectron2.evaluation.fast_eval_api import COCOeval_opt
from detectron2.evaluation.rle import encode_masks
from detectron2.structures import Instances
from detectron2.utils.comm import gather, is_main_process, synchronize
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import create_small_table
from detectron2.utils.missing import needs_upstream

logger = logging.getLogger(__name__)

TASKS = ("bbox", "segm")
DEFAULT_MAX_DETS = [1, 10, 100]


class COCOEvaluator(DatasetEvaluator):
    """Evaluates ``output["instances"]`` with COCO's average precision over boxes (``bbox``) and masks (``segm``).

    The results are a dict per task, in percent: ``AP``, ``AP50``, ``AP75``, ``APs``, ``APm``, ``APl`` and
    ``AP-<class>``; NaN where the ground truth has nothing to compare with, or if there is not one prediction.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        max_dets_per_image: int | None = None,
        use_fast_impl: bool = True,
        kpt_oks_sigmas: Sequence[float] = (),
        allow_cached_coco: bool = True,
    ) -> None:
        """
        Args:
            dataset_name: a registered dataset. Without ``json_file`` in its metadata it is converted to COCO's format,
                into ``output_dir``.
            tasks: of "bbox" and "segm"; None for what the predictions allow.
            distributed: bring the predictions of all processes together; otherwise evaluate those of this process.
            output_dir: where to write ``instances_predictions.pth`` and ``coco_instances_results.json``.
            max_dets_per_image: how many predictions of an image count, the best first; 100 by default.
            use_fast_impl: evaluate with faster-coco-eval where it is installed; otherwise with pycocotools.
            kpt_oks_sigmas: accepted for compatibility; keypoints need upstream Detectron2.
            allow_cached_coco: use the result of an earlier conversion.
        """
        if isinstance(tasks, CfgNode):
            logger.warning("COCOEvaluator no longer takes a config; the tasks follow from the predictions.")
            tasks = None
        if tasks is not None:
            tasks = tuple(tasks)
            for task in tasks:
                _check_task(task)
        self._logger = logger
        self._distributed = distributed
        self._output_dir = output_dir
        self._use_fast_impl = use_fast_impl
        self._max_dets_per_image = [*DEFAULT_MAX_DETS[:2], max_dets_per_image or DEFAULT_MAX_DETS[2]]
        self._tasks = tasks
        self._cpu_device = torch.device("cpu")
        self._metadata = MetadataCatalog.get(dataset_name)
        path = self._metadata.get("json_file")
        if path is None:
            if output_dir is None:
                raise ValueError(
                    f"dataset {dataset_name!r} has no json_file in its metadata; give COCOEvaluator an output_dir "
                    "to convert the dataset into"
                )
            path = os.path.join(output_dir, f"{dataset_name}_coco_format.json")
            logger.info(f"{dataset_name!r} has no json_file; converting it to COCO format in {path!r}")
            convert_to_coco_json(dataset_name, path, allow_cached=allow_cached_coco)
            if "json_file" not in self._metadata.as_dict():  # a panoptic dataset without instances has None there
                self._metadata.json_file = path
        path = PathManager.get_local_path(path)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"json_file of dataset {dataset_name!r} doesn't exist: {path!r}")
        with contextlib.redirect_stdout(io.StringIO()):
            self._coco_api = COCO(path)
        self._do_evaluation = "annotations" in self._coco_api.dataset
        self._kpt_oks_sigmas = kpt_oks_sigmas
        self.reset()

    def reset(self) -> None:
        self._predictions: list[dict] = []
        self._results: OrderedDict = OrderedDict()

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        """
        Args:
            inputs: dicts with ``image_id``.
            outputs: dicts with ``instances``: Instances with ``pred_boxes``, ``scores``, ``pred_classes`` and possibly
                ``pred_masks`` (N, H, W). Masks are encoded where they are.
        """
        for input, output in zip(inputs, outputs):
            if "proposals" in output:
                needs_upstream("Evaluation of box proposals")
            if "instances" in output:
                instances = instances_to_coco_json(output["instances"], input["image_id"])
                self._predictions.append({"image_id": input["image_id"], "instances": instances})

    def evaluate(self, img_ids: Sequence[int] | None = None) -> OrderedDict | None:
        """Return ``{task: {metric: percent}}``; None on processes other than the main one.

        Args:
            img_ids: evaluate on these images only.
        """
        predictions = self._predictions
        if self._distributed:
            synchronize()
            predictions = list(itertools.chain.from_iterable(gather(predictions)))
            if not is_main_process():
                return None
        if not predictions:
            logger.warning("COCOEvaluator received no predictions.")
            return OrderedDict()
        if self._output_dir:
            PathManager.mkdirs(self._output_dir)
            with PathManager.open(os.path.join(self._output_dir, "instances_predictions.pth"), "wb") as file:
                torch.save(predictions, file)
        self._results = OrderedDict()
        self._eval_predictions(predictions, img_ids=img_ids)
        return copy.deepcopy(self._results)

    def _tasks_from_predictions(self, predictions: Sequence[dict]) -> list[str]:
        """The tasks for which COCO-format predictions have what is needed."""
        return ["bbox", "segm"] if any("segmentation" in prediction for prediction in predictions) else ["bbox"]

    def _eval_predictions(self, predictions: Sequence[dict], img_ids: Sequence[int] | None = None) -> None:
        """Evaluate gathered predictions and put the numbers into ``_results``."""
        coco_results = list(itertools.chain.from_iterable(prediction["instances"] for prediction in predictions))
        tasks = self._tasks or self._tasks_from_predictions(coco_results)
        coco_results = self._with_dataset_category_ids(coco_results)
        self._save_results(coco_results, "coco_instances_results.json")
        if not self._do_evaluation:
            logger.info("Annotations are not available for evaluation.")
            return
        for task in sorted(tasks):
            coco_eval = None
            if coco_results:
                coco_eval = _evaluate_predictions_on_coco(
                    self._coco_api,
                    coco_results,
                    task,
                    kpt_oks_sigmas=self._kpt_oks_sigmas,
                    use_fast_impl=self._use_fast_impl,
                    img_ids=img_ids,
                    max_dets_per_image=self._max_dets_per_image,
                )
            class_names = self._metadata.get("thing_classes")
            self._results[task] = self._derive_coco_results(coco_eval, task, class_names=class_names)

    def _save_results(self, results: list[dict], file_name: str) -> None:
        """Write results to a JSON file in the output folder, if there is one."""
        if self._output_dir:
            path = os.path.join(self._output_dir, file_name)
            logger.info(f"Saving results to {path}")
            with PathManager.open(path, "w") as file:
                json.dump(results, file)

    def _with_dataset_category_ids(self, coco_results: list[dict]) -> list[dict]:
        """Copies of the results with the data set's category ids in place of the contiguous classes."""
        to_contiguous = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if to_contiguous is None:
            return coco_results
        to_dataset = {contiguous: dataset for dataset, contiguous in to_contiguous.items()}
        for category in {result["category_id"] for result in coco_results}:
            if category not in to_dataset:
                # The type that upstream raises; its callers catch it.
                raise AssertionError(
                    f"a prediction has class {category}, but the thing classes of dataset {self._metadata.name!r} are "
                    f"{min(to_dataset)}..{max(to_dataset)}; check the number of classes in the config"
                )
        return [{**result, "category_id": to_dataset[result["category_id"]]} for result in coco_results]

    def _derive_coco_results(
        self, coco_eval: COCOeval | None, iou_type: str, class_names: Sequence[str] | None = None
    ) -> dict[str, float]:
        """The numbers of one task from an accumulated evaluation, logged as tables.

        Args:
            coco_eval: None if there was nothing to evaluate.
            iou_type: "bbox" or "segm".
            class_names: in the order of the sorted category ids; without more than one, no AP per class.
        """
        if coco_eval is None:
            logger.warning(f"No predictions from the model for {iou_type}.")
            return dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm", "APl"), float("nan"))
        # IoU threshold × recall × class × area × number of detections; -1 where the ground truth has nothing
        precision = coco_eval.eval["precision"][..., -1]
        thresholds = np.asarray(coco_eval.params.iouThrs)
        areas = {label: precision[..., index] for index, label in enumerate(coco_eval.params.areaRngLbl)}
        results = {
            "AP": _average_precision(areas["all"]),
            "AP50": _average_precision(areas["all"][np.isclose(thresholds, 0.5)]),
            "AP75": _average_precision(areas["all"][np.isclose(thresholds, 0.75)]),
            "APs": _average_precision(areas["small"]),
            "APm": _average_precision(areas["medium"]),
            "APl": _average_precision(areas["large"]),
        }
        logger.info(f"Evaluation results for {iou_type}:\n{create_small_table(results)}")
        if not all(np.isfinite(list(results.values()))):
            logger.info("NaN: the ground truth has no such instances.")
        if class_names is None or len(class_names) <= 1:
            return results
        if len(class_names) != precision.shape[2]:
            raise ValueError(
                f"dataset {self._metadata.name!r} has {len(class_names)} thing_classes, but its json_file "
                f"{self._metadata.get('json_file')!r} has {precision.shape[2]} categories"
            )
        per_class = {name: _average_precision(areas["all"][:, :, index]) for index, name in enumerate(class_names)}
        logger.info(f"{iou_type} AP per class:\n{_table_in_columns(per_class)}")
        results.update({f"AP-{name}": value for name, value in per_class.items()})
        return results


def instances_to_coco_json(instances: Instances, img_id: int | str) -> list[dict]:
    """Predictions of one image as COCO results.

    Args:
        instances: with ``pred_boxes`` (Boxes or a tensor (N, 4), XYXY), ``scores``, ``pred_classes``, and possibly
            ``pred_masks`` (N, H, W) or their codes ``pred_masks_rle``; on any device.
        img_id: the image's id in the dataset.

    Returns:
        N dicts of plain Python values: ``image_id``, ``category_id`` (the contiguous class), ``bbox`` (XYWH), ``score``
        and, with masks, ``segmentation``.
    """
    if len(instances) == 0:
        return []
    if instances.has("pred_keypoints"):
        needs_upstream("Evaluation of keypoints")
    boxes = getattr(instances.pred_boxes, "tensor", instances.pred_boxes)
    if boxes.shape[1] != 4:
        needs_upstream("Evaluation of rotated boxes")
    xywh = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()
    results = [
        {"image_id": img_id, "category_id": category, "bbox": box, "score": score}
        for category, box, score in zip(instances.pred_classes.tolist(), xywh, instances.scores.tolist())
    ]
    codes = None
    if instances.has("pred_masks_rle"):
        codes = instances.pred_masks_rle
    elif instances.has("pred_masks"):
        codes = encode_masks(getattr(instances.pred_masks, "tensor", instances.pred_masks))
    if codes is not None:
        for result, code in zip(results, codes):
            result["segmentation"] = code
    return results


def _evaluate_predictions_on_coco(
    coco_gt: COCO,
    coco_results: list[dict],
    iou_type: str,
    kpt_oks_sigmas: Sequence[float] | None = None,
    cocoeval_fn: Callable[..., COCOeval] = COCOeval_opt,
    img_ids: Sequence[int] | None = None,
    max_dets_per_image: Sequence[int] | None = None,
    *,
    use_fast_impl: bool | None = None,
) -> COCOeval:
    """Evaluate COCO results, and return the evaluation after ``evaluate``, ``accumulate`` and ``summarize``.

    Args:
        coco_gt: the ground truth.
        coco_results: at least one result, with the data set's category ids.
        iou_type: "bbox" or "segm".
        kpt_oks_sigmas: unused; keypoints need upstream.
        cocoeval_fn: the class that evaluates.
        img_ids: evaluate on these images only.
        max_dets_per_image: three counts, [1, 10, 100] by default.
        use_fast_impl: chooses ``cocoeval_fn`` (the way it was called before 2022).
    """
    _check_task(iou_type)
    if not coco_results:
        raise ValueError("there are no results to evaluate")
    if use_fast_impl is not None:
        cocoeval_fn = COCOeval_opt if use_fast_impl else COCOeval
    # loadRes fills in fields, and takes the area, which tells small from large, from the box if there is one.
    fields = ("image_id", "category_id", "score", "segmentation" if iou_type == "segm" else "bbox")
    results = [{field: result[field] for field in fields} for result in coco_results]
    with contextlib.redirect_stdout(io.StringIO()):
        coco_eval = cocoeval_fn(coco_gt, coco_gt.loadRes(results), iou_type)
        coco_eval.params.maxDets = list(max_dets_per_image or DEFAULT_MAX_DETS)
        if img_ids is not None:
            coco_eval.params.imgIds = list(img_ids)
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
    return coco_eval


def _check_task(task: str) -> None:
    if task not in TASKS:
        needs_upstream(f"COCO evaluation of {task!r} (here: {', '.join(TASKS)})")


def _average_precision(precision: np.ndarray) -> float:
    """Mean of the defined values in percent, NaN if there is none."""
    defined = precision[precision > -1]
    return float(defined.mean() * 100) if defined.size else float("nan")


def _table_in_columns(values: dict[str, float], pairs: int = 3) -> str:
    """A table of name and value, several pairs side by side."""
    cells = list(itertools.chain.from_iterable(values.items()))
    rows = [cells[start : start + 2 * pairs] for start in range(0, len(cells), 2 * pairs)]
    headers = ["category", "AP"] * min(pairs, len(values))
    return tabulate(rows, headers=headers, floatfmt=".3f", tablefmt="pipe", numalign="left")
