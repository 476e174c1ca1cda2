"""PQ and boundary PQ of panoptic predictions: of files, and of a model while it is evaluated."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from mask2former_plugin.data.names import some
from mask2former_plugin.evaluation.boundary import DEFAULT_DILATION_RATIO
from mask2former_plugin.evaluation.panoptic_quality import PanopticCounts, match_segments, summarize
from mask2former_plugin.evaluation.prediction_files import read_id_map, read_json

logger = logging.getLogger(__name__)

RESULT_KEY = "panoptic_seg_boundary"


class PanopticTruth:
    """Ground truth in COCO's panoptic format.

    Args:
        json_file: with ``categories`` and ``annotations``.
        folder: of the PNGs; by default the JSON's path without its extension.

    Raises:
        ValueError: the file lacks a field.
    """

    def __init__(self, json_file: str | Path, folder: str | Path | None = None) -> None:
        content = read_json(json_file, ("categories", "annotations"))
        self.json_file = json_file
        self.folder = Path(folder) if folder is not None else Path(json_file).with_suffix("")
        self.categories = sorted(content["categories"], key=lambda category: category["id"])
        self.category_index = {category["id"]: index for index, category in enumerate(self.categories)}
        self.is_thing = [bool(category["isthing"]) for category in self.categories]
        # an image id may be a number in one file and its digits in another
        self.annotations = {str(annotation["image_id"]): annotation for annotation in content["annotations"]}

    def id_map(self, image_id: str) -> np.ndarray:
        """Segment ids ``[H, W]`` of an image."""
        return read_id_map(self.folder / self.annotations[image_id]["file_name"])

    def match(
        self,
        image_id: int | str,
        predicted_map: np.ndarray,
        predicted_segments: Sequence[Mapping[str, Any]],
        dilation_ratios: Sequence[float | None],
    ) -> list[PanopticCounts]:
        """Counts of one image for each dilation ratio, see :func:`match_segments`.

        Raises:
            ValueError: the image is not in the ground truth, or the prediction is inconsistent; it names the image.
        """
        key = str(image_id)
        if key not in self.annotations:
            raise ValueError(f"{self.json_file} has no annotation for the image {image_id!r}")
        truth = (self.id_map(key), self.annotations[key]["segments_info"])
        try:
            return [
                match_segments(*truth, predicted_map, predicted_segments, self.category_index, ratio)
                for ratio in dilation_ratios
            ]
        except ValueError as error:
            raise ValueError(f"image {image_id!r}: {error}") from error

    def summarize(self, counts: PanopticCounts) -> dict[str, float]:
        """PQ, SQ, RQ of all, of things (``_th``) and of stuff (``_st``), and ``PQ-<category>``, in percent."""
        per_category = counts.per_category()[:, 0].tolist()
        names = [str(category.get("name", category["id"])) for category in self.categories]
        return {
            **summarize(counts, self.is_thing),
            **{f"PQ-{name}": value for name, value in zip(names, per_category)},
        }


def evaluate_files(
    gt_json: str | Path,
    pred_json: str | Path,
    *,
    gt_folder: str | Path | None = None,
    pred_folder: str | Path | None = None,
    dilation_ratio: float | None = DEFAULT_DILATION_RATIO,
    progress: Any = iter,
) -> dict[str, dict[str, float]]:
    """PQ, and boundary PQ, of a panoptic ``predictions.json`` with its folder of PNGs.

    Args:
        gt_json, gt_folder: ground truth in COCO's panoptic format.
        pred_json: with ``annotations`` of ``image_id``, ``file_name`` (of the PNG) and ``segments_info``.
        pred_folder: of the predicted PNGs; like ``gt_folder`` by default the JSON's path without its extension.
        dilation_ratio: width of the boundary region in parts of the diagonal; None: PQ only.
        progress: wraps the iterable of annotations, e.g. ``tqdm``.

    Returns:
        ``panoptic_seg`` and, with a ratio, ``panoptic_seg_boundary``: percent by name.

    Raises:
        ValueError: an image of the ground truth has no prediction, or a file does not fit; the message names it.
    """
    truth = PanopticTruth(gt_json, gt_folder)
    folder = Path(pred_folder) if pred_folder is not None else Path(pred_json).with_suffix("")
    annotations = read_json(pred_json, ("annotations",))["annotations"]
    predictions = {str(annotation["image_id"]): annotation for annotation in annotations}
    missing = truth.annotations.keys() - predictions.keys()
    if missing:
        raise ValueError(f"{pred_json} has no prediction for {len(missing)} images of {gt_json}: {some(missing)}")
    ratios = [None] if dilation_ratio is None else [None, dilation_ratio]
    totals = [PanopticCounts(len(truth.categories)) for _ in ratios]
    for image_id in progress(list(truth.annotations)):
        prediction = predictions[image_id]
        predicted_map = read_id_map(folder / prediction["file_name"])
        for total, counts in zip(totals, truth.match(image_id, predicted_map, prediction["segments_info"], ratios)):
            total += counts
    return dict(zip(("panoptic_seg", RESULT_KEY), map(truth.summarize, totals)))


class BoundaryPanopticEvaluator(DatasetEvaluator):
    """Boundary PQ of ``output["panoptic_seg"]``, under ``panoptic_seg_boundary``; stands beside Detectron2's for PQ.

    Args:
        dataset_name: a dataset whose metadata has ``panoptic_json``, ``panoptic_root`` and the two
            ``…_dataset_id_to_contiguous_id``.
        dilation_ratio: width of the boundary region in parts of the image's diagonal.
    """

    def __init__(self, dataset_name: str, dilation_ratio: float = DEFAULT_DILATION_RATIO) -> None:
        metadata = MetadataCatalog.get(dataset_name)
        self._truth = PanopticTruth(metadata.panoptic_json, metadata.panoptic_root)
        self._dataset_id = {
            isthing: {contiguous: dataset_id for dataset_id, contiguous in to_contiguous.items()}
            for isthing, to_contiguous in (
                (False, metadata.stuff_dataset_id_to_contiguous_id),
                (True, metadata.thing_dataset_id_to_contiguous_id),
            )
        }
        self._dilation_ratio = dilation_ratio
        self.reset()

    def reset(self) -> None:
        self._counts = PanopticCounts(len(self._truth.categories))
        self._seen = 0

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        """
        Args:
            inputs: dicts with ``image_id``.
            outputs: dicts with ``panoptic_seg``: segment ids ``[H, W]`` and a list of ``id``, ``category_id`` and
                ``isthing``.
        """
        for input, output in zip(inputs, outputs):
            ids, segments = output["panoptic_seg"]
            segments = list(self._with_dataset_ids(segments))
            (counts,) = self._truth.match(input["image_id"], ids.cpu().numpy(), segments, [self._dilation_ratio])
            self._counts += counts
            self._seen += 1

    def _with_dataset_ids(self, segments: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """As in Detectron2: a segment with ``isthing`` has a contiguous id, one without it the dataset's.

        Upstream's evaluator of PQ turns the former into the latter, in the very dicts that come here afterwards.
        """
        for segment in segments:
            category = segment["category_id"]
            if "isthing" in segment:
                category = self._dataset_id[bool(segment["isthing"])][category]
            yield {"id": segment["id"], "category_id": category}

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """``{"panoptic_seg_boundary": {"PQ": percent, …}}``; None on processes other than the main one."""
        comm.synchronize()
        parts = comm.gather((self._counts, self._seen))
        if not comm.is_main_process():
            return None
        total = PanopticCounts(len(self._truth.categories))
        for counts, _ in parts:
            total += counts
        seen, expected = sum(count for _, count in parts), len(self._truth.annotations)
        if seen < expected:
            logger.warning("Boundary PQ covers %d of the %d images of the ground truth", seen, expected)
        result = self._truth.summarize(total)
        logger.info("Boundary PQ %.2f, SQ %.2f, RQ %.2f", result["PQ"], result["SQ"], result["RQ"])
        return {RESULT_KEY: result}
