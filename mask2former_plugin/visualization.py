"""Pictures of ground truth and predictions, side by side."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from detectron2.data import Metadata
from detectron2.data.detection_utils import read_image
from detectron2.utils.visualizer import ColorMode, Visualizer

_GAP = 6  # pixels between two pictures
_CAPTION = 22  # pixels of the line above a picture


def draw_prediction(image: np.ndarray, output: dict[str, Any], metadata: Metadata, *, scale: float = 1.0, min_score: float = 0.0) -> np.ndarray:
    """Overlay of what a model has found.

    Args:
        image: RGB, ``[H, W, 3]`` uint8.
        output: the model's output of this image; panoptic segments are drawn if there are any, else instances, else semantic classes.
        scale: enlarges the picture.
        min_score: instances below it are not drawn.

    Returns:
        RGB, ``[scale·H, scale·W, 3]`` uint8.
    """
    visualizer = Visualizer(image, metadata, scale=scale, instance_mode=ColorMode.IMAGE)
    if "panoptic_seg" in output:
        segments, info = output["panoptic_seg"]
        return visualizer.draw_panoptic_seg(segments.cpu(), info).get_image()
    if "instances" in output:
        instances = output["instances"].to("cpu")
        return visualizer.draw_instance_predictions(instances[instances.scores >= min_score]).get_image()
    if "sem_seg" in output:
        return visualizer.draw_sem_seg(output["sem_seg"].argmax(0).cpu()).get_image()
    raise ValueError(f"nothing to draw: the model's output has {', '.join(output) or 'no fields'}; switch on a task in MODEL.MASK_FORMER.TEST")


def draw_ground_truth(record: dict[str, Any], metadata: Metadata, *, scale: float = 1.0) -> np.ndarray:
    """Overlay of a dataset record's own segments or annotations, RGB ``[scale·H, scale·W, 3]`` uint8."""
    image = read_image(record["file_name"], "RGB")
    return Visualizer(image, metadata, scale=scale).draw_dataset_dict(record).get_image()


def side_by_side(pictures: dict[str, np.ndarray]) -> np.ndarray:
    """Pictures of equal height in a row, each below its caption; RGB uint8."""
    columns = []
    for caption, picture in pictures.items():
        strip = np.full((_CAPTION, picture.shape[1], 3), 255, dtype=np.uint8)
        cv2.putText(strip, caption, (4, _CAPTION - 7), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
        columns += [np.vstack([strip, picture]), np.full((picture.shape[0] + _CAPTION, _GAP, 3), 255, dtype=np.uint8)]
    return np.hstack(columns[:-1])


def stack(rows: list[np.ndarray]) -> np.ndarray:
    """Pictures below one another, padded to equal width with white; RGB uint8."""
    width = max(row.shape[1] for row in rows)
    return np.vstack([np.pad(row, ((0, _GAP), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows])


def compare(record: dict[str, Any], output: dict[str, Any], metadata: Metadata, *, scale: float = 1.0, min_score: float = 0.5) -> np.ndarray:
    """The photo, its ground truth and the prediction in a row, RGB uint8."""
    image = read_image(record["file_name"], "RGB")
    enlarged = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    return side_by_side(
        {
            "image": enlarged,
            "ground truth": draw_ground_truth(record, metadata, scale=scale),
            "prediction": draw_prediction(image, output, metadata, scale=scale, min_score=min_score),
        }
    )
