"""Pictures of ground truth and predictions, side by side."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.data import Metadata
from detectron2.data.detection_utils import convert_image_to_rgb, read_image
from detectron2.structures import BitMasks, Instances, PolygonMasks
from detectron2.utils.visualizer import ColorMode, Visualizer

_GAP = 6  # pixels between two pictures
_CAPTION = 22  # pixels of the line above a picture


def indexed_by_contiguous_id(metadata: Metadata) -> Metadata:
    """Metadata whose ``thing_classes`` and ``thing_colors`` can be looked up by contiguous ids, as drawing does.

    Where things are not the first ids (ADE20K panoptic), the catalog lists the things alone; the names of all classes
    are in ``stuff_classes`` then.
    """
    to_contiguous = metadata.get("thing_dataset_id_to_contiguous_id") or {}
    things, everything = metadata.get("thing_classes") or [], metadata.get("stuff_classes") or []
    if max(to_contiguous.values(), default=-1) < len(things) or len(everything) <= len(things):
        return metadata
    adapted = copy.copy(metadata)
    vars(adapted).update(thing_classes=everything, thing_colors=metadata.get("stuff_colors"))
    return adapted


def draw_prediction(
    image: np.ndarray, output: dict[str, Any], metadata: Metadata, *, scale: float = 1.0, min_score: float = 0.0
) -> np.ndarray:
    """Overlay of what a model has found.

    Args:
        image: RGB, ``[H, W, 3]`` uint8.
        output: the model's output of this image; panoptic segments are drawn if there are any, else instances, else
            semantic classes (scores ``[K, H, W]`` or a class map ``[H, W]``).
        scale: enlarges the picture.
        min_score: instances below it are not drawn.

    Returns:
        RGB, ``[scale·H, scale·W, 3]`` uint8.
    """
    metadata = indexed_by_contiguous_id(metadata)
    visualizer = Visualizer(image, metadata, scale=scale, instance_mode=ColorMode.IMAGE)
    if "panoptic_seg" in output:
        segments, info = output["panoptic_seg"]
        return visualizer.draw_panoptic_seg(segments.cpu(), info).get_image()
    if "instances" in output:
        instances = output["instances"].to("cpu")
        instances = instances[instances.scores >= min_score]
        if instances.has("pred_masks_rle"):
            instances.pred_masks = list(instances.pred_masks_rle)
        return visualizer.draw_instance_predictions(instances).get_image()
    if "sem_seg" in output:
        scores = output["sem_seg"]
        labels = scores.argmax(0) if scores.ndim == 3 else scores
        return visualizer.draw_sem_seg(labels.cpu()).get_image()
    fields = ", ".join(output) or "no fields"
    raise ValueError(f"nothing to draw: the model's output has {fields}; switch on a task in MODEL.MASK_FORMER.TEST")


def draw_ground_truth(record: dict[str, Any], metadata: Metadata, *, scale: float = 1.0) -> np.ndarray:
    """Overlay of a dataset record's own segments or annotations, RGB ``[scale·H, scale·W, 3]`` uint8."""
    image = read_image(record["file_name"], "RGB")
    visualizer = Visualizer(image, indexed_by_contiguous_id(metadata), scale=scale)
    return visualizer.draw_dataset_dict(record).get_image()


def draw_sample(
    sample: dict[str, Any], metadata: Metadata, image_format: str = "RGB", *, scale: float = 1.0
) -> np.ndarray:
    """What a mapper gives the model: the augmented image and its targets on it, side by side; RGB uint8.

    Args:
        sample: ``image`` ``[C, H, W]`` and ``instances`` with ``gt_classes`` and ``gt_masks``, or else ``sem_seg``.
        image_format: of the image, ``INPUT.FORMAT``.
    """
    image = convert_image_to_rgb(sample["image"].permute(1, 2, 0).numpy(), image_format).astype(np.uint8)
    visualizer = Visualizer(image, indexed_by_contiguous_id(metadata), scale=scale)
    if "instances" in sample:
        masks, classes = _targets(sample["instances"])
        names, colors = _class_names_and_colors(metadata)
        labels = [names[c] if c < len(names) else str(c) for c in classes]
        assigned = [[channel / 255 for channel in colors[c]] for c in classes] if colors else None
        picture = visualizer.overlay_instances(masks=masks, labels=labels, assigned_colors=assigned, alpha=0.5)
    elif "sem_seg" in sample:
        picture = visualizer.draw_sem_seg(sample["sem_seg"])
    else:
        raise ValueError(f"{sample.get('file_name', 'the sample')} has no targets to draw: {', '.join(sample)}")
    plain = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    return side_by_side({"image": plain, f"targets: {len(sample.get('instances', []))}": picture.get_image()})


def _targets(instances: Instances) -> tuple[np.ndarray, list[int]]:
    """Masks ``[n, H, W]`` and classes of the targets that have pixels."""
    masks = instances.gt_masks
    if isinstance(masks, PolygonMasks):
        masks = BitMasks.from_polygon_masks(masks, *instances.image_size)
    masks = getattr(masks, "tensor", masks)
    keep = masks.flatten(1).any(1)
    return masks[keep].numpy(), instances.gt_classes[keep].tolist()


def _class_names_and_colors(metadata: Metadata) -> tuple[Sequence[str], Sequence[Sequence[int]] | None]:
    """Of the classes that targets count in: those of ``stuff_classes``, which cover things too, if there are any."""
    kind = "stuff" if metadata.get("stuff_classes") else "thing"
    return metadata.get(f"{kind}_classes") or [], metadata.get(f"{kind}_colors")


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


def save_picture(path: str | Path, picture: np.ndarray) -> None:
    """Write an RGB picture ``[H, W, 3]`` uint8; folders are made, the extension says the format.

    Raises:
        OSError: the file can't be written, or its extension names no format.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # OpenCV gives False for some failures and an exception of its own for others
    try:
        written = cv2.imwrite(str(path), picture[:, :, ::-1])
    except cv2.error as error:
        raise OSError(f"{path} can't be written: {path.suffix or 'no extension'} is no picture format (take .png)") from error
    if not written:
        raise OSError(f"{path} can't be written")


def compare(
    record: dict[str, Any], output: dict[str, Any], metadata: Metadata, *, scale: float = 1.0, min_score: float = 0.5
) -> np.ndarray:
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
