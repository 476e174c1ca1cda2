"""PQ and mIoU of semantic predictions: every class of an image is one segment, as if all of it were stuff."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from mask2former_plugin.data.mappers.steps import read_label_map
from mask2former_plugin.evaluation.panoptic_quality import VOID, PanopticCounts, match_segments, summarize
from mask2former_plugin.evaluation.prediction_files import ImageIndex, semantic_map, semantic_predictions

logger = logging.getLogger(__name__)

RESULT_KEY = "sem_seg_pq"


class SemanticQuality:
    """Accumulates PQ and mIoU of class maps.

    Args:
        class_names: names by class id.
        ignore_label: of the ground truth; its pixels count nowhere.
        dilation_ratio: for boundary PQ, see :func:`match_segments`; None: plain PQ.
    """

    def __init__(
        self, class_names: Sequence[str], ignore_label: int | None, dilation_ratio: float | None = None
    ) -> None:
        self._class_names = list(class_names)
        self._ignore_label = ignore_label
        self._dilation_ratio = dilation_ratio
        number = len(self._class_names)
        self._index = {label: label for label in range(number)}
        self.counts = PanopticCounts(number)
        # pixels of each class in both, in the ground truth, in the prediction
        self.pixels = np.zeros((3, number), dtype=np.int64)

    def add(self, truth: np.ndarray, prediction: np.ndarray) -> None:
        """Take one image: class maps ``[H, W]`` of equal size.

        Raises:
            ValueError: sizes differ, or a label is no class.
        """
        number = len(self._class_names)
        truth, prediction = truth.astype(np.int64), prediction.astype(np.int64)
        counted = np.ones(truth.shape, dtype=bool)
        if self._ignore_label is not None:
            counted = truth != self._ignore_label
        for whose, labels in (("the ground truth", truth[counted]), ("the prediction", prediction)):
            if labels.size and not 0 <= labels.min() <= labels.max() < number:
                raise ValueError(f"{whose} holds the labels {np.unique(labels).tolist()}, classes are 0..{number - 1}")
        # ids are labels plus one: 0 is void
        maps = (np.where(counted, truth + 1, VOID), prediction + 1)
        segments = [
            [{"id": i, "category_id": i - 1} for i in np.unique(ids).tolist() if i != VOID] for ids in maps
        ]
        self.counts += match_segments(
            maps[0], segments[0], maps[1], segments[1], self._index, self._dilation_ratio
        )
        truth, prediction = truth[counted], prediction[counted]
        for row, labels in zip(self.pixels, (truth[truth == prediction], truth, prediction)):
            row += np.bincount(labels, minlength=number)

    def results(self) -> dict[str, float]:
        """PQ, SQ, RQ and mIoU, then ``PQ-<class>`` and ``IoU-<class>``; percent, NaN for what occurs nowhere."""
        overall = summarize(self.counts, [False] * len(self._class_names))
        both, truth, prediction = self.pixels
        union = truth + prediction - both
        iou = np.full(len(both), np.nan)
        # a class that is predicted and never there counts as 0 (published); SemSegEvaluator leaves it out of its mean
        np.divide(100.0 * both, union, out=iou, where=union > 0)
        result = {name: overall[name] for name in ("PQ", "SQ", "RQ")}
        result["mIoU"] = float(np.nanmean(iou)) if union.any() else float("nan")
        for prefix, values in (("PQ", self.counts.per_category()[:, 0]), ("IoU", iou)):
            result.update({f"{prefix}-{name}": value for name, value in zip(self._class_names, values.tolist())})
        return result


def evaluate_file(
    dataset_name: str, json_file: str | Path, *, dilation_ratio: float | None = None, progress: Any = iter
) -> dict[str, float]:
    """PQ and mIoU of a ``sem_seg_predictions.json``.

    Args:
        dataset_name: a registered dataset with ``sem_seg_file_name`` in its records.
        json_file: what ``SemSegEvaluator`` has written.
        dilation_ratio: for boundary PQ; None: plain PQ.
        progress: wraps the iterable of images, e.g. ``tqdm``.

    Returns:
        See :meth:`SemanticQuality.results`.

    Raises:
        ValueError: file and dataset don't belong together; the message names the file.
    """
    metadata = MetadataCatalog.get(dataset_name)
    index = _labelled_images(dataset_name)
    predictions = semantic_predictions(json_file)
    quality = SemanticQuality(metadata.stuff_classes, metadata.get("ignore_label"), dilation_ratio)
    to_contiguous = metadata.get("stuff_dataset_id_to_contiguous_id")
    for file_name in progress(list(predictions)):
        truth = read_label_map(index.find(file_name)["sem_seg_file_name"])
        try:
            quality.add(truth, semantic_map(predictions[file_name], to_contiguous))
        except ValueError as error:
            raise ValueError(f"{json_file}, {file_name}: {error}") from error
    if len(predictions) < len(index):
        logger.warning("%s covers %d of the %d images of %s", json_file, len(predictions), len(index), dataset_name)
    return quality.results()


def _labelled_images(dataset_name: str) -> ImageIndex:
    records = [record for record in DatasetCatalog.get(dataset_name) if "sem_seg_file_name" in record]
    if not records:
        raise ValueError(f"dataset {dataset_name!r} has no semantic labels (sem_seg_file_name) to compare with")
    return ImageIndex(records)


class SemanticPQEvaluator(DatasetEvaluator):
    """PQ of ``output["sem_seg"]``, under ``sem_seg_pq``; stands beside Detectron2's ``SemSegEvaluator``.

    Args:
        dataset_name: a registered dataset with ``sem_seg_file_name`` in its records.
        dilation_ratio: for boundary PQ; None: plain PQ.
    """

    def __init__(self, dataset_name: str, dilation_ratio: float | None = None) -> None:
        metadata = MetadataCatalog.get(dataset_name)
        self._arguments = (metadata.stuff_classes, metadata.get("ignore_label"), dilation_ratio)
        self._index = _labelled_images(dataset_name)
        self.reset()

    def reset(self) -> None:
        self._quality = SemanticQuality(*self._arguments)

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]) -> None:
        """
        Args:
            inputs: dicts with ``file_name``.
            outputs: dicts with ``sem_seg``: scores ``[K, H, W]`` of which the largest wins.
        """
        for input, output in zip(inputs, outputs):
            truth = read_label_map(self._index.find(input["file_name"])["sem_seg_file_name"])
            try:
                self._quality.add(truth, output["sem_seg"].argmax(0).cpu().numpy())
            except ValueError as error:
                raise ValueError(f"{input['file_name']}: {error}") from error

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """``{"sem_seg_pq": {"PQ": percent, …}}``; None on processes other than the main one."""
        comm.synchronize()
        parts = comm.gather((self._quality.counts, self._quality.pixels))
        if not comm.is_main_process():
            return None
        total = SemanticQuality(*self._arguments)
        for counts, pixels in parts:
            total.counts += counts
            total.pixels += pixels
        result = total.results()
        logger.info("PQ of semantic predictions %.2f, mIoU %.2f", result["PQ"], result["mIoU"])
        return {RESULT_KEY: result}
