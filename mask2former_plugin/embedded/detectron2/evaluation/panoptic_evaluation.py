"""Panoptic segmentation in the COCO format: PQ, SQ and RQ, image by image."""

from __future__ import annotations

import json
import logging
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image
from tabulate import tabulate

from detectron2.data import MetadataCatalog
from detectron2.evaluation.evaluator import DatasetEvaluator
from detectron2.evaluation.panoptic_quality import PQStat, id2rgb, match_segments, rgb2id
from detectron2.utils.comm import gather, is_main_process, synchronize
from detectron2.utils.file_io import PathManager

logger = logging.getLogger(__name__)


class COCOPanopticEvaluator(DatasetEvaluator):
    """Evaluates ``output["panoptic_seg"]`` against a COCO panoptic dataset.

    Images are matched while they come in, so only a few counts per image are kept and sent between processes. Images
    that were not seen don't count; how many there were is logged.
    """

    def __init__(self, dataset_name: str, output_dir: str | None = None) -> None:
        """
        Args:
            dataset_name: a registered dataset whose metadata has ``panoptic_json``, ``panoptic_root``,
                ``thing_dataset_id_to_contiguous_id``, ``stuff_dataset_id_to_contiguous_id`` and, for models that give
                no ``segments_info``, ``label_divisor``.
            output_dir: where to write ``predictions.json`` and, in ``predictions/``, the PNGs, in the format of the
                COCO panoptic challenge; without it nothing is written.
        """
        self._metadata = MetadataCatalog.get(dataset_name)
        self._dataset_name = dataset_name
        self._dataset_id = {
            True: {v: k for k, v in self._metadata.thing_dataset_id_to_contiguous_id.items()},
            False: {v: k for k, v in self._metadata.stuff_dataset_id_to_contiguous_id.items()},
        }
        self._output_dir = output_dir
        self._png_dir = os.path.join(output_dir, "predictions") if output_dir else None
        path = self._metadata.panoptic_json
        try:
            with PathManager.open(path) as file:
                truth = json.load(file)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"panoptic_json of dataset {dataset_name!r} doesn't exist: {path!r}") from error
        self._json_path = path
        self._categories = {category["id"]: category for category in truth["categories"]}
        self._do_evaluation = "annotations" in truth
        # An image id may be a number in one file and its digits in another.
        self._truth = {str(annotation["image_id"]): annotation for annotation in truth.get("annotations", [])}
        self.reset()

    def reset(self) -> None:
        self._stats: dict[str, PQStat] = {}
        self._predictions: list[dict] = []

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        """
        Args:
            inputs: dicts with ``file_name`` and ``image_id``.
            outputs: dicts with ``panoptic_seg``: a map of segment ids (H, W), 0 for void, and a list of dicts with
                ``id``, ``category_id`` and ``isthing`` (with ``isthing`` the category id is a contiguous one, without
                it the data set's). The list may be None; then the map holds ``category_id * label_divisor + instance``,
                -1 for void.
        """
        for input, output in zip(inputs, outputs):
            panoptic_map, segments = output["panoptic_seg"]
            panoptic_map = panoptic_map.cpu().numpy()
            if segments is None:
                panoptic_map, segments = self._segments_from_labels(panoptic_map)
            try:
                segments = [self._convert_category_id(segment) for segment in segments]
                if self._do_evaluation:
                    self._stats[str(input["image_id"])] = self._match(input["image_id"], panoptic_map, segments)
            except ValueError as error:
                raise ValueError(
                    f"panoptic prediction for image {input['image_id']!r} ({input['file_name']!r}): {error}"
                ) from error
            if self._output_dir:
                self._write(input, panoptic_map, segments)

    def _segments_from_labels(self, labels: np.ndarray) -> tuple[np.ndarray, list[dict]]:
        """Segments of a map of ``category_id * label_divisor + instance``; ids are labels plus one, so 0 is void."""
        divisor = self._metadata.label_divisor
        things = self._metadata.thing_dataset_id_to_contiguous_id.values()
        segments = [
            {"id": label + 1, "category_id": label // divisor, "isthing": label // divisor in things}
            for label in np.unique(labels).tolist()
            if label != -1
        ]
        return labels + 1, segments

    def _convert_category_id(self, segment: Mapping) -> dict:
        """A copy of the segment with the data set's category id and plain numbers."""
        converted = {key: value for key, value in segment.items() if key != "isthing"}
        category = int(segment["category_id"])
        if segment.get("isthing") is not None:
            isthing = bool(segment["isthing"])
            if category not in self._dataset_id[isthing]:
                kind = "thing" if isthing else "stuff"
                raise ValueError(f"category {category} is no {kind} of dataset {self._dataset_name!r}")
            category = self._dataset_id[isthing][category]
        if category not in self._categories:
            raise ValueError(f"category id {category} is not among the categories of {self._json_path!r}")
        converted.update(id=int(segment["id"]), category_id=category)
        return converted

    def _match(self, image_id: int | str, panoptic_map: np.ndarray, segments: Sequence[dict]) -> PQStat:
        annotation = self._truth.get(str(image_id))
        if annotation is None:
            raise ValueError(f"{self._json_path!r} has no annotation for this image")
        for segment in annotation["segments_info"]:
            if segment["category_id"] not in self._categories:
                raise ValueError(f"{self._json_path!r} uses the unknown category id {segment['category_id']} for it")
        truth = read_panoptic_png(os.path.join(self._metadata.panoptic_root, annotation["file_name"]))
        return match_segments(truth, annotation["segments_info"], panoptic_map, segments)

    def _write(self, input: Mapping, panoptic_map: np.ndarray, segments: list[dict]) -> None:
        PathManager.mkdirs(self._png_dir)
        png_name = os.path.splitext(os.path.basename(input["file_name"]))[0] + ".png"
        with PathManager.open(os.path.join(self._png_dir, png_name), "wb") as file:
            Image.fromarray(id2rgb(panoptic_map)).save(file, format="PNG", compress_level=1)
        self._predictions.append({"image_id": input["image_id"], "file_name": png_name, "segments_info": segments})

    def evaluate(self) -> OrderedDict | None:
        """Return ``{"panoptic_seg": {PQ, SQ, RQ, PQ_th, ...}}`` in percent; None except on the main process."""
        synchronize()
        parts = gather((self._stats, self._predictions))
        if not is_main_process():
            return None
        if self._output_dir:
            self._save_predictions([prediction for _, predictions in parts for prediction in predictions])
        if not self._do_evaluation:
            logger.info(f"{self._json_path!r} has no annotations; nothing to evaluate.")
            return OrderedDict()
        stats = {image_id: stat for per_image, _ in parts for image_id, stat in per_image.items()}
        if len(stats) < len(self._truth):
            logger.warning(f"PQ covers {len(stats)} of the {len(self._truth)} images of {self._dataset_name!r}.")
        total = PQStat()
        for image_id in self._truth:
            if image_id in stats:
                total += stats[image_id]
        return OrderedDict(panoptic_seg=self._summarize(total))

    def _save_predictions(self, predictions: list[dict]) -> None:
        PathManager.mkdirs(self._output_dir)
        content = {"annotations": predictions, "categories": list(self._categories.values())}
        with PathManager.open(os.path.join(self._output_dir, "predictions.json"), "w") as file:
            json.dump(content, file)

    def _summarize(self, total: PQStat) -> dict[str, float]:
        results, rows = {}, []
        for title, suffix, isthing in (("All", "", None), ("Things", "_th", True), ("Stuff", "_st", False)):
            mean, per_class = total.pq_average(self._categories, isthing)
            values = [100 * mean[key] for key in ("pq", "sq", "rq")]
            results.update(zip((f"PQ{suffix}", f"SQ{suffix}", f"RQ{suffix}"), values))
            rows.append([title, *values, mean["n"]])
            if isthing is None:
                classes = [
                    [self._categories[category_id].get("name", category_id), *(100 * v[k] for k in ("pq", "sq", "rq"))]
                    for category_id, v in per_class.items()
                    if (total[category_id].tp, total[category_id].fp, total[category_id].fn) != (0, 0, 0)
                ]
        options = {"floatfmt": ".3f", "tablefmt": "pipe"}
        logger.info("Panoptic quality per class:\n" + tabulate(classes, headers=["class", "PQ", "SQ", "RQ"], **options))
        headers = ["", "PQ", "SQ", "RQ", "#categories"]
        logger.info("Panoptic quality:\n" + tabulate(rows, headers=headers, **options))
        return results


def read_panoptic_png(path: str) -> np.ndarray:
    """The segment ids (H, W) int32 of a COCO panoptic PNG."""
    try:
        with PathManager.open(path, "rb") as file:
            image = Image.open(file)
            image.load()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"panoptic ground truth doesn't exist: {path!r}") from error
    if image.mode not in ("RGB", "RGBA"):
        raise ValueError(
            f"{path!r} must be an RGB picture with R + 256 G + 65536 B as segment id, but is {image.mode!r}"
        )
    return rgb2id(np.asarray(image)[..., :3])
