"""COCO-style AP for datasets whose things are not the first contiguous ids (ADE20K panoptic, Mapillary Vistas)."""

from __future__ import annotations

import copy

from detectron2.evaluation import COCOEvaluator


class InstanceSegEvaluator(COCOEvaluator):
    """``COCOEvaluator`` that asks of a predicted class only that it is a thing of the dataset.

    Detectron2's own demands that things are exactly the ids 0 … n-1. Here the predicted contiguous ids are renumbered to that range, with
    metadata to match, before its evaluation runs.
    """

    def __init__(self, dataset_name: str, *args, **kwargs):
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

    def process(self, inputs, outputs):
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
