"""Semantic segmentation: IoU and accuracy from a confusion matrix, and boundary IoU."""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import torch
from PIL import Image
from tabulate import tabulate

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation.evaluator import DatasetEvaluator
from detectron2.evaluation.rle import encode_masks
from detectron2.utils.comm import gather, is_main_process, synchronize
from detectron2.utils.file_io import PathManager

logger = logging.getLogger(__name__)

BOUNDARY_RATIO = 0.02


def load_image_into_numpy_array(filename: str, copy: bool = False, dtype: np.dtype | type | None = None) -> np.ndarray:
    """Read an image file as an array of its stored values (palette indices, 16-bit labels), optionally as ``dtype``."""
    with PathManager.open(filename, "rb") as file:
        return (np.array if copy else np.asarray)(Image.open(file), dtype=dtype)


class SemSegEvaluator(DatasetEvaluator):
    """Evaluates ``output["sem_seg"]`` against the label files of a dataset.

    The results are one dict under ``"sem_seg"``, all numbers in percent: ``mIoU``, ``fwIoU`` (weighted by class
    frequency), ``mACC``, ``pACC``, and per class ``IoU-<name>``, ``BoundaryIoU-<name>``, ``min(IoU, B-Iou)-<name>`` and
    ``ACC-<name>``. Means run over the classes that occur in the ground truth; other classes have NaN. Pixels with the
    ignore label count nowhere.

    Boundary IoU (Cheng et al., CVPR 2021) compares only the pixels of a mask that lie within 2 % of the image's
    diagonal of its outline, summed over the dataset. The rim of an ignored area counts as outline for both sides, like
    the image's rim.
    """

    def __init__(
        self,
        dataset_name: str,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        sem_seg_loading_fn: Callable[..., np.ndarray] = load_image_into_numpy_array,
        num_classes: int | None = None,
        ignore_label: int | None = None,
    ) -> None:
        """
        Args:
            dataset_name: a registered dataset with ``stuff_classes`` and ``ignore_label`` in its metadata and
                ``sem_seg_file_name`` in its dicts.
            distributed: bring the results of all processes together; otherwise evaluate what this process has seen.
            output_dir: where to write ``sem_seg_predictions.json`` (COCO-stuff format) and ``sem_seg_evaluation.pth``;
                without it nothing is encoded or written.
            sem_seg_loading_fn: reads a label file; called with the file name and ``dtype=``, returns (H, W).
            num_classes: only checked against the metadata.
            ignore_label: replaces the one of the metadata.
        """
        self._logger = logger
        self._dataset_name = dataset_name
        self._distributed = distributed
        self._output_dir = output_dir
        self._cpu_device = torch.device("cpu")
        self.sem_seg_loading_fn = sem_seg_loading_fn
        metadata = MetadataCatalog.get(dataset_name)
        self._class_names = metadata.stuff_classes
        self._num_classes = len(self._class_names)
        if num_classes is not None and num_classes != self._num_classes:
            raise ValueError(
                f"num_classes={num_classes}, but dataset {dataset_name!r} has {self._num_classes} stuff_classes"
            )
        # -1 occurs in no label file, so it means that nothing is ignored.
        self._ignore_label = ignore_label if ignore_label is not None else metadata.get("ignore_label", -1)
        # Upstream's convention: the label files hold contiguous ids; dataset ids appear in the JSON only.
        to_contiguous = metadata.get("stuff_dataset_id_to_contiguous_id")
        self._contiguous_id_to_dataset_id = {v: k for k, v in to_contiguous.items()} if to_contiguous else None
        self.input_file_to_gt_file = {
            record["file_name"]: record["sem_seg_file_name"]
            for record in DatasetCatalog.get(dataset_name)
            if "sem_seg_file_name" in record
        }
        if not self.input_file_to_gt_file:
            raise ValueError(f"dataset {dataset_name!r} has no record with a sem_seg_file_name to evaluate against")
        self.reset()

    def reset(self) -> None:
        # Rows: prediction (the last is unused); columns: ground truth, the last one ignored pixels.
        self._conf_matrix = np.zeros((self._num_classes + 1, self._num_classes + 1), dtype=np.int64)
        # Per class: boundary pixels in both, in the prediction, in the ground truth.
        self._boundary_counts = np.zeros((3, self._num_classes), dtype=np.int64)
        self._predictions: list[dict] = []

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        """
        Args:
            inputs: dicts with ``file_name``.
            outputs: dicts with ``sem_seg``: scores (C, H, W) of which the largest wins, or an integer label map (H, W).
        """
        for input, output in zip(inputs, outputs):
            file_name = input["file_name"]
            prediction = predicted_labels(output["sem_seg"], self._num_classes, file_name)
            truth = self._truth_of(file_name)
            if truth.shape != tuple(prediction.shape):
                raise ValueError(
                    f"prediction for {file_name!r} is {tuple(prediction.shape)} (height, width), but its labels in "
                    f"{self.input_file_to_gt_file[file_name]!r} are {truth.shape}"
                )
            self._conf_matrix += confusion_matrix(prediction, torch.from_numpy(truth), self._num_classes)
            labels = prediction.cpu().numpy()
            self._boundary_counts += boundary_counts(labels, truth, self._num_classes)
            if self._output_dir:
                self._predictions.extend(self.encode_json_sem_seg(labels, file_name))

    def _truth_of(self, file_name: str) -> np.ndarray:
        """The label map (H, W) int32 of an image, with ``num_classes`` for ignored pixels."""
        if file_name not in self.input_file_to_gt_file:
            raise KeyError(f"{file_name!r} is not an image with semantic labels of dataset {self._dataset_name!r}")
        path = self.input_file_to_gt_file[file_name]
        labels = np.asarray(self.sem_seg_loading_fn(path, dtype=np.int32))
        if labels.ndim != 2:
            raise ValueError(f"{path!r} must hold one label per pixel, but has shape {labels.shape}")
        ignored = np.equal(labels, self._ignore_label)
        bad = ((labels < 0) | (labels >= self._num_classes)) & ~ignored
        if bad.any():
            raise ValueError(
                f"{path!r} holds the label ids {np.unique(labels[bad]).tolist()}, which are neither classes of "
                f"{self._dataset_name!r} (0..{self._num_classes - 1}) nor its ignore label ({self._ignore_label})"
            )
        return np.where(ignored, self._num_classes, labels).astype(np.int32)

    def evaluate(self) -> OrderedDict | None:
        """Return ``{"sem_seg": {metric: percent}}``; None on processes other than the main one."""
        parts = [(self._conf_matrix, self._boundary_counts, self._predictions)]
        if self._distributed:
            synchronize()
            parts = gather(parts[0])
            if not is_main_process():
                return None
        metrics = self._metrics(sum(part[0] for part in parts), sum(part[1] for part in parts))
        predictions = list(itertools.chain.from_iterable(part[2] for part in parts))
        if self._output_dir:
            PathManager.mkdirs(self._output_dir)
            with PathManager.open(os.path.join(self._output_dir, "sem_seg_predictions.json"), "w") as file:
                json.dump(predictions, file)
            with PathManager.open(os.path.join(self._output_dir, "sem_seg_evaluation.pth"), "wb") as file:
                torch.save(metrics, file)
        self._log(metrics)
        return OrderedDict(sem_seg=metrics)

    def _metrics(self, conf_matrix: np.ndarray, boundary_counts: np.ndarray) -> dict[str, float]:
        matrix = conf_matrix[:-1, :-1].astype(np.float64)
        correct, truth, predicted = matrix.diagonal(), matrix.sum(axis=0), matrix.sum(axis=1)
        occurs = truth > 0
        accuracy = _ratio(correct, truth, occurs)
        iou = _ratio(correct, truth + predicted - correct, occurs)
        both, predicted_boundary, true_boundary = boundary_counts
        boundary_iou = _ratio(both, predicted_boundary + true_boundary - both, occurs)
        total = truth.sum()
        metrics = {
            "mIoU": _mean(iou[occurs]),
            "fwIoU": float((iou * truth)[occurs].sum() / total) if total else float("nan"),
        }
        for name, value, boundary in zip(self._class_names, iou, boundary_iou):
            metrics[f"IoU-{name}"] = float(value)
            metrics[f"BoundaryIoU-{name}"] = float(boundary)
            metrics[f"min(IoU, B-Iou)-{name}"] = float(min(value, boundary))
        metrics["mACC"] = _mean(accuracy[occurs])
        metrics["pACC"] = float(correct.sum() / total) if total else float("nan")
        for name, value in zip(self._class_names, accuracy):
            metrics[f"ACC-{name}"] = float(value)
        return {name: 100 * value for name, value in metrics.items()}

    def _log(self, metrics: dict[str, float]) -> None:
        summary = ["mIoU", "fwIoU", "mACC", "pACC"]
        rows = [
            [name, *(metrics[f"{kind}-{name}"] for kind in ("IoU", "BoundaryIoU", "ACC"))] for name in self._class_names
        ]
        per_class = tabulate(rows, headers=["class", "IoU", "BoundaryIoU", "ACC"], floatfmt=".2f", tablefmt="pipe")
        overall = tabulate([[metrics[name] for name in summary]], headers=summary, floatfmt=".3f", tablefmt="pipe")
        logger.info(f"Semantic segmentation per class:\n{per_class}")
        logger.info(f"Semantic segmentation:\n{overall}")

    def encode_json_sem_seg(self, sem_seg: np.ndarray, input_file_name: str) -> list[dict]:
        """A label map (H, W) as COCO-stuff entries, one per class that occurs in it."""
        entries = []
        for label in np.unique(sem_seg).tolist():
            (code,) = encode_masks(torch.from_numpy(sem_seg[None] == label))
            if self._contiguous_id_to_dataset_id is not None:
                label = self._contiguous_id_to_dataset_id[label]
            entries.append({"file_name": input_file_name, "category_id": label, "segmentation": code})
        return entries


def predicted_labels(sem_seg: torch.Tensor, num_classes: int, file_name: str) -> torch.Tensor:
    """A model's semantic output as a label map (H, W) int32 on the same device.

    Args:
        sem_seg: scores (C, H, W), of which the largest wins, or an integer label map (H, W).
        num_classes: how many classes the dataset has.
        file_name: of the image, for error messages.

    Raises:
        ValueError: neither of the two, or classes that the dataset doesn't have.
    """
    if sem_seg.ndim == 3:
        if sem_seg.shape[0] > num_classes:
            raise ValueError(
                f"prediction for {file_name!r} has scores for {sem_seg.shape[0]} classes, but its dataset has "
                f"{num_classes}; check MODEL.SEM_SEG_HEAD.NUM_CLASSES"
            )
        # On the CPU max is 3 times as fast as argmax; elsewhere it doesn't promise the first of equal scores.
        best = sem_seg.max(dim=0).indices if sem_seg.device.type == "cpu" else sem_seg.argmax(dim=0)
        return best.int()
    if sem_seg.ndim != 2 or sem_seg.is_floating_point():
        raise ValueError(
            f"sem_seg of {file_name!r} must be scores (C, H, W) or an integer label map (H, W), "
            f"got {sem_seg.dtype} of shape {tuple(sem_seg.shape)}"
        )
    if sem_seg.numel() and not 0 <= int(sem_seg.min()) <= int(sem_seg.max()) < num_classes:
        raise ValueError(
            f"the label map predicted for {file_name!r} holds {int(sem_seg.min())}..{int(sem_seg.max())}, "
            f"but the classes of its dataset are 0..{num_classes - 1}"
        )
    return sem_seg.int()


def confusion_matrix(prediction: torch.Tensor, truth: torch.Tensor, num_classes: int) -> np.ndarray:
    """Count label pairs, on the prediction's device.

    Args:
        prediction: (H, W) int32 in 0..num_classes-1.
        truth: (H, W) int32 in 0..num_classes, the last one for ignored pixels.

    Returns:
        (num_classes+1, num_classes+1) int64; row: prediction, column: truth.
    """
    side = num_classes + 1
    pairs = prediction * side + truth.to(prediction.device)
    return torch.bincount(pairs.flatten(), minlength=side * side).reshape(side, side).cpu().numpy()


def boundary_counts(prediction: np.ndarray, truth: np.ndarray, num_classes: int) -> np.ndarray:
    """Count boundary pixels per class: in both, in the prediction, in the truth.

    Args:
        prediction: (H, W) labels in 0..num_classes-1.
        truth: (H, W) labels in 0..num_classes, the last one for ignored pixels.

    Returns:
        (3, num_classes) int64.
    """
    ignored = truth == num_classes
    prediction = np.where(ignored, num_classes, prediction)
    distance = max(1, round(BOUNDARY_RATIO * float(np.hypot(*truth.shape))))
    in_prediction = boundary_pixels(prediction, distance) & ~ignored
    in_truth = boundary_pixels(truth, distance) & ~ignored
    in_both = in_prediction & in_truth & (prediction == truth)
    return np.stack(
        [
            np.bincount(labels[mask], minlength=num_classes)
            for labels, mask in ((truth, in_both), (prediction, in_prediction), (truth, in_truth))
        ]
    )


def boundary_pixels(labels: np.ndarray, distance: int) -> np.ndarray:
    """Pixels that an erosion of their own label's mask by ``distance`` (3×3 steps, nothing outside the image) removes.

    All labels at once: the first step removes the pixels with another label, or the image's rim, among their eight
    neighbours; every further step removes the neighbours of what went before.

    Args:
        labels: (H, W) below 65535.

    Returns:
        (H, W) bool.
    """
    padded = cv2.copyMakeBorder(labels.astype(np.uint16), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=65535)
    neighbours = np.ones((3, 3), np.uint8)
    outermost = (cv2.erode(padded, neighbours) != cv2.dilate(padded, neighbours))[1:-1, 1:-1].astype(np.uint8)
    reach = 2 * distance - 1
    return cv2.dilate(outermost, np.ones((reach, reach), np.uint8)).astype(bool)


def _ratio(numerator: np.ndarray, denominator: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Element-wise quotient, NaN outside ``where``."""
    result = np.full(len(numerator), np.nan)
    np.divide(numerator, denominator, out=result, where=where)
    return result


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")
