"""COCO-style AP: masks as run lengths, and datasets whose things are not the first ids (ADE20K, Mapillary Vistas)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.evaluation import COCOEvaluator, LVISEvaluator


class _ReadsRunLengths:
    """Takes ``pred_masks_rle`` in the place of ``pred_masks``; to be mixed in before an evaluator of COCO's kind."""

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]) -> None:
        """
        Args:
            inputs: dicts with ``image_id``.
            outputs: dicts with ``instances``: ``pred_boxes``, ``scores``, ``pred_classes``, and ``pred_masks`` or a list
                ``pred_masks_rle`` of COCO's ``{"size": [H, W], "counts": str}``.
        """
        before = len(self._predictions)
        super().process(inputs, outputs)
        with_instances = [output["instances"] for output in outputs if "instances" in output]
        for instances, prediction in zip(with_instances, self._predictions[before:]):
            if instances.has("pred_masks_rle"):
                for result, code in zip(prediction["instances"], instances.pred_masks_rle):
                    result["segmentation"] = code


class RunLengthCOCOEvaluator(_ReadsRunLengths, COCOEvaluator):
    """``COCOEvaluator`` that takes masks as run lengths, too."""


class RunLengthLVISEvaluator(_ReadsRunLengths, LVISEvaluator):
    """``LVISEvaluator`` that takes masks as run lengths, too."""


class InstanceSegEvaluator(RunLengthCOCOEvaluator):
    """``COCOEvaluator`` that asks of a predicted class only that it is a thing of the dataset.

    Detectron2's own demands that things are exactly the ids 0 … n-1. Here the predicted contiguous ids are renumbered
    to that range, with metadata to match, before its evaluation runs.
    """

    def __init__(self, dataset_name: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(dataset_name, *args, **kwargs)
        to_contiguous = self._metadata.thing_dataset_id_to_contiguous_id
        things = sorted(to_contiguous.values())
        self._thing_index = {contiguous: index for index, contiguous in enumerate(things)}
        names = self._metadata.thing_classes
        # a private copy: the catalog's own may be shared with the other evaluators of the dataset
        self._metadata = copy.copy(self._metadata)
        vars(self._metadata).update(
            thing_dataset_id_to_contiguous_id={key: self._thing_index[value] for key, value in to_contiguous.items()},
            # a list of all classes is indexed by contiguous id, a list of things is in order already
            thing_classes=names if len(names) == len(things) else [names[contiguous] for contiguous in things],
        )

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]) -> None:
        kept = []
        for output in outputs:
            if "instances" in output:
                instances = output["instances"]
                classes = instances.pred_classes.tolist()
                is_thing = [index for index, label in enumerate(classes) if label in self._thing_index]
                instances = instances[is_thing]
                renumbered = [self._thing_index[classes[index]] for index in is_thing]
                instances.pred_classes = instances.pred_classes.new_tensor(renumbered)
                output = {**output, "instances": instances}
            kept.append(output)
        super().process(inputs, kept)
