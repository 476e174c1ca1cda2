"""Instance segmentation and detection on LVIS: average precision with federated ground truth."""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict
from collections.abc import Sequence

from detectron2.evaluation.coco_evaluation import COCOEvaluator
from detectron2.utils.logger import create_small_table

logger = logging.getLogger(__name__)

DEFAULT_MAX_DETS = 300
# metric: its name in faster-coco-eval
_METRICS = {
    "AP": "AP_all",
    "AP50": "AP_50",
    "AP75": "AP_75",
    "APs": "AP_small",
    "APm": "AP_medium",
    "APl": "AP_large",
    "APr": "APr",
    "APc": "APc",
    "APf": "APf",
}


class LVISEvaluator(COCOEvaluator):
    """Evaluates ``output["instances"]`` with LVIS' average precision over boxes (``bbox``) and masks (``segm``).

    In an image, a class counts that is annotated or listed as absent (``neg_category_ids``); where its annotation is not
    exhaustive, a prediction without a partner is no error. The results are a dict per task, in percent: ``AP``,
    ``AP50``, ``AP75``, ``APs``, ``APm``, ``APl``, and ``APr``, ``APc``, ``APf`` over rare, common and frequent classes;
    NaN where the ground truth has nothing to compare with, or if there is not one prediction.

    The numbers are computed by faster-coco-eval. Source: Gupta et al., LVIS, CVPR 2019, section 2.2.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        max_dets_per_image: int | None = None,
    ) -> None:
        """
        Args:
            dataset_name: a registered dataset with an LVIS file as ``json_file`` in its metadata.
            tasks: of "bbox" and "segm"; None for what the predictions allow.
            distributed: bring the predictions of all processes together; otherwise evaluate those of this process.
            output_dir: where to write ``instances_predictions.pth`` and ``lvis_instances_results.json``.
            max_dets_per_image: how many predictions of an image count, of all classes together; 300 by default.
        """
        super().__init__(dataset_name, tasks, distributed, output_dir)
        self._max_dets = max_dets_per_image or DEFAULT_MAX_DETS

    def _eval_predictions(self, predictions: Sequence[dict], img_ids: Sequence[int] | None = None) -> None:
        """Evaluate gathered predictions and put the numbers into ``_results``."""
        results = list(itertools.chain.from_iterable(prediction["instances"] for prediction in predictions))
        tasks = self._tasks or self._tasks_from_predictions(results)
        if self._metadata.get("thing_dataset_id_to_contiguous_id") is None:
            # LVIS' ids are contiguous and count from 1
            results = [{**result, "category_id": result["category_id"] + 1} for result in results]
        else:
            results = self._with_dataset_category_ids(results)
        self._save_results(results, "lvis_instances_results.json")
        if not self._do_evaluation:
            logger.info("Annotations are not available for evaluation.")
            return
        for task in sorted(tasks):
            self._results[task] = self._evaluate_task(_best_of_each_image(results, self._max_dets), task, img_ids)
            logger.info(f"Evaluation results for {task}:\n{create_small_table(self._results[task])}")

    def _evaluate_task(self, results: list[dict], task: str, img_ids: Sequence[int] | None) -> dict[str, float]:
        if not results:
            logger.warning(f"No predictions from the model for {task}.")
            return dict.fromkeys(_METRICS, float("nan"))
        from faster_coco_eval import COCO, COCOeval_faster

        ground_truth = COCO(self._coco_api.dataset)
        # loadRes takes the area, by which small and large are told apart, from the box if there is one
        fields = ("image_id", "category_id", "score", "segmentation" if task == "segm" else "bbox")
        predictions = ground_truth.loadRes([{field: result[field] for field in fields} for result in results])
        evaluation = COCOeval_faster(ground_truth, predictions, task, print_function=logger.debug, lvis_style=True)
        evaluation.params.maxDets = [self._max_dets]
        if img_ids is not None:
            evaluation.params.imgIds = list(img_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        values = {metric: evaluation.stats_as_dict[name] for metric, name in _METRICS.items()}
        return {metric: value * 100 if value >= 0 else float("nan") for metric, value in values.items()}


def _best_of_each_image(results: Sequence[dict], count: int) -> list[dict]:
    """The ``count`` results of the highest score of each image."""
    of_image = defaultdict(list)
    for result in results:
        of_image[result["image_id"]].append(result)
    best = (sorted(each, key=lambda result: -result["score"])[:count] for each in of_image.values())
    return list(itertools.chain.from_iterable(best))
