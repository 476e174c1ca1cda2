"""Cityscapes' own metrics: the scores of cityscapesscripts, from counts that are taken image by image.

The official scripts read every prediction back from PNG files; here the counts that their formulas need are taken while
the images come in, so there are no files to share between processes.
"""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from tabulate import tabulate

from detectron2.data import MetadataCatalog
from detectron2.evaluation.evaluator import DatasetEvaluator
from detectron2.evaluation.sem_seg_evaluation import predicted_labels
from detectron2.utils.comm import gather, is_main_process, synchronize
from detectron2.utils.file_io import PathManager

logger = logging.getLogger(__name__)


class CityscapesEvaluator(DatasetEvaluator):
    """What both Cityscapes evaluators share: the ground truth files and the collection from all processes."""

    def __init__(self, dataset_name: str) -> None:
        """
        Args:
            dataset_name: a registered dataset with ``gt_dir`` in its metadata, the folder with
                ``<city>/<city>_<sequence>_<frame>_gtFine_{labelIds,instanceIds}.png``.
        """
        self._logger = logger
        self._cpu_device = torch.device("cpu")
        self._metadata = MetadataCatalog.get(dataset_name)
        self.reset()

    def reset(self) -> None:
        self._images: dict = {}

    def _truth(self, file_name: str, kind: str) -> np.ndarray:
        """The "labelIds" or "instanceIds" (H, W) of an image, as int64."""
        frame = "_".join(os.path.basename(file_name).split("_")[:3])
        path = os.path.join(self._metadata.gt_dir, frame.split("_")[0], f"{frame}_gtFine_{kind}.png")
        try:
            with PathManager.open(path, "rb") as file:
                return np.array(Image.open(file), dtype=np.int64)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"Cityscapes ground truth of {file_name!r} doesn't exist: {path!r}") from error

    def _gathered(self) -> dict | None:
        """What was kept per image, from all processes; None on processes other than the main one."""
        synchronize()
        parts = gather(self._images)
        if not is_main_process():
            return None
        return {name: kept for part in parts for name, kept in part.items()}


def _check_size(file_name: str, predicted: Sequence[int], truth: np.ndarray) -> None:
    if tuple(predicted) != truth.shape:
        raise ValueError(
            f"prediction for {file_name!r} is {tuple(predicted)} (height, width), its labels are {truth.shape}"
        )


class CityscapesSemSegEvaluator(CityscapesEvaluator):
    """Evaluates ``output["sem_seg"]`` (scores of the 19 training classes, or a map of them).

    The results are ``{"sem_seg": {"IoU", "iIoU", "IoU_sup", "iIoU_sup"}}`` in percent: over classes and over
    categories, plain and weighted by instance size.
    """

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        from cityscapesscripts.helpers.labels import trainId2label

        id_of_class = np.array([trainId2label[k].id for k in sorted(trainId2label) if 0 <= k < 255])
        for input, output in zip(inputs, outputs):
            file_name = input["file_name"]
            classes = predicted_labels(output["sem_seg"], len(id_of_class), file_name)
            truth = self._truth(file_name, "labelIds")
            _check_size(file_name, classes.shape, truth)
            self._images[file_name] = self._counts(
                file_name, id_of_class[classes.cpu().numpy()], truth, self._truth(file_name, "instanceIds")
            )

    def _counts(
        self, file_name: str, predicted: np.ndarray, truth: np.ndarray, instances: np.ndarray
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The confusion matrix (truth, prediction) over label ids, and weighted correct and wrong pixels of instances.

        The second is by class and category name: the sums over their instances of correct and wrong pixels, each
        weighted with the mean size of the class over the size of the instance.
        """
        from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as script
        from cityscapesscripts.helpers.labels import id2label

        side = len(script.generateMatrix(script.args))
        if truth.min() < 0 or truth.max() >= side:
            raise ValueError(
                f"label ids of {file_name!r} must lie in 0..{side - 1}, found {truth.min()}..{truth.max()}"
            )
        matrix = np.bincount((truth * side + predicted).ravel(), minlength=side * side).reshape(side, side)
        groups = script.generateInstanceStats(script.args)
        weighted = {name: np.zeros(2) for name in (*groups["classes"], *groups["categories"])}
        single = instances > 1000
        ids, index = np.unique(instances[single], return_inverse=True)
        table = np.bincount(index * side + predicted[single], minlength=len(ids) * side).reshape(len(ids), side)
        for instance, counts in zip(ids, table):
            label = id2label[instance // 1000]
            if label.ignoreInEval:
                continue
            size = counts.sum()
            weight = script.args.avgClassSize[label.name] / size
            labels_of_category = groups["categories"].get(label.category, {}).get("labelIds")
            for name, label_ids in ((label.name, [label.id]), (label.category, labels_of_category)):
                if label_ids is not None:
                    correct = counts[label_ids].sum()
                    weighted[name] += weight * correct, weight * (size - correct)
        return matrix, weighted

    def evaluate(self) -> OrderedDict | None:
        images = self._gathered()
        if images is None:
            return None
        from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as script
        from cityscapesscripts.helpers.labels import category2labels, id2label

        args = copy.copy(script.args)
        matrix = script.generateMatrix(args).astype(np.int64)
        stats = script.generateInstanceStats(args)
        for counts, weighted in images.values():
            matrix += counts
            for group in (stats["classes"], stats["categories"]):
                for name, sums in group.items():
                    sums["tpWeighted"] += weighted[name][0]
                    sums["fnWeighted"] += weighted[name][1]
        by_class = {
            "IoU": {id2label[i].name: script.getIouScoreForLabel(i, matrix, args) for i in args.evalLabels},
            "iIoU": {
                id2label[i].name: script.getInstanceIouScoreForLabel(i, matrix, stats, args) for i in args.evalLabels
            },
        }
        by_category = {
            "IoU_sup": {c: script.getIouScoreForCategory(c, matrix, args) for c in category2labels},
            "iIoU_sup": {c: script.getInstanceIouScoreForCategory(c, matrix, stats, args) for c in category2labels},
        }
        results = {
            name: 100 * float(script.getScoreAverage(scores, args))
            for name, scores in {**by_class, **by_category}.items()
        }
        rows = [
            [name, 100 * iou, 100 * by_class["iIoU"][name]]
            for name, iou in by_class["IoU"].items()
            if not np.isnan(iou)
        ]
        logger.info(
            "Cityscapes classes:\n" + tabulate(rows, headers=["class", "IoU", "iIoU"], floatfmt=".2f", tablefmt="pipe")
        )
        return OrderedDict(sem_seg=results)


class CityscapesInstanceEvaluator(CityscapesEvaluator):
    """Evaluates ``output["instances"]`` (masks, scores, classes); gives ``{"segm": {"AP", "AP50"}}`` in percent."""

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        for input, output in zip(inputs, outputs):
            file_name, instances = input["file_name"], output["instances"]
            truth = self._truth(file_name, "instanceIds")
            predictions = []
            if len(instances):
                masks = getattr(instances.pred_masks, "tensor", instances.pred_masks)
                _check_size(file_name, masks.shape[1:], truth)
                names = [self._metadata.thing_classes[k] for k in instances.pred_classes.tolist()]
                predictions = list(zip(names, instances.scores.tolist(), masks))
            self._images[file_name] = _match_instances(file_name, truth, predictions)

    def evaluate(self) -> OrderedDict | None:
        images = self._gathered()
        if images is None:
            return None
        from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as script

        args = copy.copy(script.args)
        script.setInstanceLabels(args)
        with warnings.catch_warnings():
            # The mean over classes that occur nowhere is NaN, and that is what it should say.
            warnings.filterwarnings("ignore", message="Mean of empty slice", category=RuntimeWarning)
            averages = script.computeAverages(script.evaluateMatches(images, args), args)
        rows = [[name, 100 * v["ap"], 100 * float(np.squeeze(v["ap50%"]))] for name, v in averages["classes"].items()]
        logger.info(
            "Cityscapes instances:\n" + tabulate(rows, headers=["class", "AP", "AP50"], floatfmt=".2f", tablefmt="pipe")
        )
        return OrderedDict(segm={"AP": 100 * float(averages["allAp"]), "AP50": 100 * float(averages["allAp50%"])})


def _match_instances(
    file_name: str, truth: np.ndarray, predictions: Sequence[tuple[str, float, torch.Tensor]]
) -> dict[str, dict[str, list[dict]]]:
    """Which instances of an image overlap by how much, in the form that the official script makes its curves of.

    Args:
        file_name: of the image.
        truth: (H, W) ids of Cityscapes: ``1000 * label + number``, or the label alone for groups and stuff.
        predictions: class name, score and mask (H, W) of each; masks may lie on a GPU.

    Returns:
        Under "groundTruth" and "prediction", a list of instances for each class that is evaluated.
    """
    from cityscapesscripts.helpers.labels import id2label, labels, name2label

    evaluated = [label.name for label in labels if label.hasInstances and not label.ignoreInEval]
    ids, index = np.unique(truth, return_inverse=True)
    sizes = np.bincount(index.ravel(), minlength=len(ids)).tolist()
    is_void = np.isin(ids, [label.id for label in labels if label.ignoreInEval])
    true_instances = {name: [] for name in evaluated}
    for column, (number, size) in enumerate(zip(ids.tolist(), sizes)):
        label = id2label[number // 1000 if number >= 1000 else number]
        if label.name in true_instances:
            # The two distance fields have the values that the official scripts give them when there is no depth.
            entry = {"instID": number, "labelID": label.id, "pixelCount": size, "medDist": -1, "distConf": 0.0}
            true_instances[label.name].append((column, {**entry, "matchedPred": []}, entry))

    predicted_instances = {name: [] for name in evaluated}
    predictions = [prediction for prediction in predictions if prediction[0] in predicted_instances]
    index_map = torch.from_numpy(index.reshape(truth.shape))
    for number, (name, score, mask) in enumerate(predictions):
        index_map = index_map.to(mask.device)
        inside = mask > 0.5 if mask.is_floating_point() else mask != 0
        common = torch.bincount(index_map[inside], minlength=len(ids)).cpu().numpy()
        if not common.any():
            continue
        prediction = {
            "imgName": f"{file_name}#{number}",
            "predID": number,
            "labelID": name2label[name].id,
            "pixelCount": int(common.sum()),
            "confidence": float(score),
            "voidIntersection": int(common[is_void].sum()),
        }
        matched = []
        for column, matches, entry in true_instances[name]:
            if common[column]:
                intersection = {"intersection": int(common[column])}
                matched.append({**entry, **intersection})
                matches["matchedPred"].append({**prediction, **intersection})
        predicted_instances[name].append({**prediction, "matchedGt": matched})
    return {
        "groundTruth": {name: [matches for _, matches, _ in found] for name, found in true_instances.items()},
        "prediction": predicted_instances,
    }
