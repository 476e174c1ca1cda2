"""Steps that dataset mappers share: read images, transform annotations, turn them into Instances."""

from __future__ import annotations

import logging
import os
from typing import Any, Sequence

import numpy as np
import pycocotools.mask as mask_util
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from detectron2.data import transforms as T
from detectron2.data.catalog import MetadataCatalog
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, PolygonMasks, polygons_to_bitmask
from detectron2.utils.file_io import PathManager
from detectron2.utils.missing import needs_upstream

__all__ = [
    "SizeMismatchError",
    "annotations_to_instances",
    "build_augmentation",
    "build_transform_gen",
    "check_image_size",
    "check_metadata_consistency",
    "convert_PIL_to_numpy",
    "convert_image_to_rgb",
    "filter_empty_instances",
    "gen_crop_transform_with_instance",
    "read_image",
    "read_label_map",
    "transform_instance_annotations",
]

logger = logging.getLogger(__name__)

# ITU-R BT.601, full range
_RGB_TO_YUV = np.array([[0.299, 0.587, 0.114], [-0.14713, -0.28886, 0.436], [0.615, -0.51499, -0.10001]])
_YUV_TO_RGB = np.array([[1.0, 0.0, 1.13983], [1.0, -0.39465, -0.58060], [1.0, 2.03211, 0.0]])


class SizeMismatchError(ValueError):
    """An image has another size than its dataset dict or its annotations say."""


def _open_image(file_name: str) -> Image.Image:
    """Decode an image file and turn it upright as its EXIF tag says.

    Raises:
        FileNotFoundError, OSError: with the path in the message.
    """
    try:
        with PathManager.open(file_name, "rb") as f:
            image = Image.open(f)
            ImageOps.exif_transpose(image, in_place=True)
            image.load()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"Image file {os.fspath(file_name)} does not exist") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(f"Image file {os.fspath(file_name)} can't be opened: {error}") from error
    return image


def _is_deep(image: Image.Image) -> bool:
    """More than 8 bits per pixel of one integer channel."""
    return image.mode == "I" or image.mode.startswith("I;")


def convert_PIL_to_numpy(image: Image.Image, format: str | None) -> np.ndarray:
    """Pillow image to a writable array.

    Args:
        image: any mode.
        format: None (as stored), a mode of Pillow ("RGB", "L", …), "BGR" or "YUV-BT.601".

    Returns:
        (H, W, C), uint8 or, for YUV, float; "L" keeps a last axis of 1, and the 16 or 32 bits of deeper grey images.
        Deeper images asked for in color are reduced to their upper 8 bits. With format None (H, W) or (H, W, C) as
        stored.
    """
    if format is None:
        return np.array(image)
    if format == "L":
        return np.array(image if _is_deep(image) else image.convert("L"))[:, :, None]
    mode = "RGB" if format in ("BGR", "YUV-BT.601") else format
    if _is_deep(image) and mode == "RGB":
        grey = np.clip(np.array(image), 0, 65535) >> 8
        image = Image.fromarray(grey.astype(np.uint8))
    if image.mode != mode:
        try:
            image = image.convert(mode)
        except ValueError as error:
            raise ValueError(
                f"Image format must be None, a mode of Pillow, 'BGR' or 'YUV-BT.601', got {format!r} "
                f"(the image has mode {image.mode})"
            ) from error
    array = np.array(image)
    if format == "BGR":
        return np.ascontiguousarray(array[:, :, ::-1])
    if format == "YUV-BT.601":
        return array / 255.0 @ _RGB_TO_YUV.T
    return array


def convert_image_to_rgb(image: np.ndarray | torch.Tensor, format: str) -> np.ndarray:
    """Image of shape (H, W, C) in ``format`` (see :func:`convert_PIL_to_numpy`) to RGB, (H, W, 3) uint8."""
    if isinstance(image, torch.Tensor):
        image = image.cpu().numpy()
    if format == "BGR":
        return np.ascontiguousarray(image[:, :, ::-1])
    if format == "YUV-BT.601":
        return (image @ _YUV_TO_RGB.T * 255.0).clip(0, 255).astype(np.uint8)
    if format == "RGB":
        return image
    size = (image.shape[1], image.shape[0])
    return np.array(Image.frombytes(format, size, image.astype(np.uint8).tobytes()).convert("RGB"))


def read_image(file_name: str, format: str | None = None) -> np.ndarray:
    """Read an image file, upright as its EXIF tag says.

    Args:
        file_name: path or address that PathManager knows.
        format: see :func:`convert_PIL_to_numpy`.

    Returns:
        writable array, see :func:`convert_PIL_to_numpy`.

    Raises:
        FileNotFoundError, OSError: the file is missing or not an image; the message has the path.
    """
    return convert_PIL_to_numpy(_open_image(file_name), format)


def read_label_map(file_name: str) -> np.ndarray:
    """Read an image of class ids: (H, W), integers as stored (8, 16 or 32 bits); of a palette image the indices.

    Raises:
        FileNotFoundError, OSError: as :func:`read_image`.
        ValueError: the image has several channels or is not of integers.
    """
    image = _open_image(file_name)
    if not (image.mode in ("L", "P", "1") or _is_deep(image)):
        raise ValueError(
            f"Label file {os.fspath(file_name)} has mode {image.mode}; a label map must have one channel of class ids "
            "(grey with 8 or 16 bits, or palette)"
        )
    labels = np.array(image)
    return labels.astype(np.uint8) if labels.dtype == bool else labels


def check_metadata_consistency(key: str, dataset_names: Sequence[str]) -> None:
    """Check that datasets that are used together agree on a metadata value.

    Raises:
        AttributeError: a dataset doesn't have the key.
        ValueError: they differ.
    """
    if len(dataset_names) == 0:
        return
    first = getattr(MetadataCatalog.get(dataset_names[0]), key)
    for name in dataset_names[1:]:
        if getattr(MetadataCatalog.get(name), key) != first:
            raise ValueError(
                f"Datasets {dataset_names[0]!r} and {name!r} have different {key!r} in their metadata; "
                "only datasets with the same can be used together"
            )


def check_image_size(dataset_dict: dict, image: np.ndarray) -> None:
    """Compare an image with the ``width`` and ``height`` of its dataset dict; fill them in if they are missing.

    Raises:
        SizeMismatchError: they differ; the message has the file and both sizes.
    """
    height, width = image.shape[:2]
    if "width" in dataset_dict and "height" in dataset_dict:
        expected = dataset_dict["width"], dataset_dict["height"]
        if expected != (width, height):
            of_file = f" {os.fspath(dataset_dict['file_name'])}" if "file_name" in dataset_dict else ""
            hint = " The image is turned as its EXIF tag says." if expected == (height, width) else ""
            raise SizeMismatchError(
                f"Image{of_file} is {width}x{height} (width x height), but its annotations are for "
                f"{expected[0]}x{expected[1]}.{hint}"
            )
    dataset_dict.setdefault("width", width)
    dataset_dict.setdefault("height", height)


def get_bbox(annotation: dict) -> np.ndarray:
    """Box of an annotation as x0, y0, x1, y1 in pixels."""
    return np.asarray(BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS), dtype=float)


def _decode_rle(rle: dict) -> np.ndarray:
    """Mask (H, W) uint8 from COCO's RLE, compressed or not."""
    if isinstance(rle["counts"], list):
        rle = mask_util.frPyObjects(rle, *rle["size"])
    return mask_util.decode(rle)


def transform_instance_annotations(
    annotation: dict, transforms: T.Transform, image_size: tuple[int, int], *, keypoint_hflip_indices=None
) -> dict:
    """Apply transforms to the box and the mask of an annotation, in place.

    Args:
        annotation: of one instance; ``bbox`` in any absolute ``bbox_mode``, ``segmentation`` (optional) as polygons
            (list) or RLE (dict).
        transforms: those of the image.
        image_size: (height, width) after the transforms.
        keypoint_hflip_indices: must be None; keypoints need upstream.

    Returns:
        the same dict with ``bbox`` as XYXY_ABS clipped to the image, and ``segmentation`` as polygons or, from RLE, as
        mask array (H, W).

    Raises:
        ValueError: another kind of segmentation, or a mask of another size than the image.
        ImportError: polygons are cropped and shapely is missing.
    """
    if "keypoints" in annotation or keypoint_hflip_indices is not None:
        needs_upstream("Transforming keypoints")
    if isinstance(transforms, (tuple, list)):
        transforms = T.TransformList(transforms)
    height, width = image_size
    box = transforms.apply_box(get_bbox(annotation)[None])[0]
    annotation["bbox"] = np.minimum(box.clip(min=0), [width, height, width, height])
    annotation["bbox_mode"] = BoxMode.XYXY_ABS
    if "segmentation" in annotation:
        annotation["segmentation"] = _transform_segmentation(annotation["segmentation"], transforms, image_size)
    return annotation


def _transform_segmentation(segmentation: Any, transforms: T.Transform, image_size: tuple[int, int]):
    if isinstance(segmentation, list):
        polygons = [np.array(p, dtype=np.float64).reshape(-1, 2) for p in segmentation]
        try:
            return [p.reshape(-1) for p in transforms.apply_polygons(polygons)]
        except ModuleNotFoundError as error:
            if error.name is None or not error.name.startswith("shapely"):
                raise
            raise ImportError(
                "Cropping polygon masks needs shapely: pip install shapely (or use masks in RLE format)"
            ) from error
    if isinstance(segmentation, dict):
        mask = transforms.apply_segmentation(_decode_rle(segmentation))
        if mask.shape[:2] != tuple(image_size):
            raise ValueError(
                f"Mask and image have different sizes: an RLE mask of size {segmentation['size']} (height, width) "
                f"becomes {list(mask.shape[:2])} with the transforms of its image, but the image becomes "
                f"{list(image_size)}"
            )
        return mask
    raise ValueError(
        f"Can't transform a segmentation of type {type(segmentation).__name__}; it must be polygons as a list of "
        "[x0, y0, x1, y1, …] or RLE as a dict"
    )


def annotations_to_instances(annos: list[dict], image_size: tuple[int, int], mask_format: str = "polygon") -> Instances:
    """Annotations of one image, transformed already, to Instances.

    Args:
        annos: as :func:`transform_instance_annotations` returns them.
        image_size: (height, width).
        mask_format: "polygon" or "bitmask".

    Returns:
        Instances with ``gt_boxes`` (Boxes), ``gt_classes`` (int64) and, if the first annotation has a segmentation,
        ``gt_masks`` (PolygonMasks or BitMasks).

    Raises:
        ValueError: a mask does not fit ``mask_format`` or ``image_size``.
    """
    if any("keypoints" in a for a in annos):
        needs_upstream("gt_keypoints in Instances")
    boxes = np.array([get_bbox(a) for a in annos]).reshape(-1, 4)
    target = Instances(image_size)
    target.gt_boxes = Boxes(torch.from_numpy(boxes))
    target.gt_classes = torch.tensor([int(a["category_id"]) for a in annos], dtype=torch.int64)
    if len(annos) and "segmentation" in annos[0]:
        segmentations = [a["segmentation"] for a in annos]
        if mask_format == "polygon":
            target.gt_masks = _to_polygon_masks(segmentations)
        elif mask_format == "bitmask":
            masks = [_to_bitmask(s, image_size) for s in segmentations]
            target.gt_masks = BitMasks(torch.from_numpy(np.stack(masks)))
        else:
            raise ValueError(f"mask_format must be 'polygon' or 'bitmask', got {mask_format!r}")
    return target


def _to_polygon_masks(segmentations: list) -> PolygonMasks:
    for s in segmentations:
        if not isinstance(s, list):
            raise ValueError(
                f"Mask format 'polygon' needs polygons, but an instance has a {type(s).__name__}; "
                "set INPUT.MASK_FORMAT to 'bitmask' for datasets with RLE masks"
            )
    return PolygonMasks(segmentations)


def _to_bitmask(segmentation: Any, image_size: tuple[int, int]) -> np.ndarray:
    """Boolean mask (H, W) from polygons, RLE or an array."""
    if isinstance(segmentation, list):
        return polygons_to_bitmask(segmentation, *image_size)
    if isinstance(segmentation, dict):
        mask = _decode_rle(segmentation)
    elif isinstance(segmentation, np.ndarray):
        mask = segmentation
    else:
        raise ValueError(
            f"Can't make a mask of a {type(segmentation).__name__}; a segmentation must be polygons as a list of "
            "[x0, y0, x1, y1, …], RLE as a dict, or a mask array (H, W)"
        )
    if mask.ndim != 2:
        raise ValueError(f"A mask array must have shape (H, W), got {mask.shape}")
    return np.ascontiguousarray(mask).astype(bool)


def filter_empty_instances(
    instances: Instances,
    by_box: bool = True,
    by_mask: bool = True,
    box_threshold: float = 1e-5,
    return_mask: bool = False,
) -> Instances | tuple[Instances, torch.Tensor]:
    """Drop instances whose box or mask is empty.

    Args:
        instances: with ``gt_boxes`` and / or ``gt_masks``.
        by_box: look at the boxes: empty if a side is not longer than ``box_threshold``.
        by_mask: look at the masks, if there are any.
        return_mask: also return which were kept, bool of shape (N,).
    """
    if not (by_box or by_mask):
        raise ValueError("filter_empty_instances needs by_box or by_mask")
    keep = torch.ones(len(instances), dtype=torch.bool)
    if by_box:
        keep &= instances.gt_boxes.nonempty(threshold=box_threshold).cpu()
    if by_mask and instances.has("gt_masks"):
        keep &= instances.gt_masks.nonempty().cpu()
    kept = instances[keep]
    return (kept, keep) if return_mask else kept


def gen_crop_transform_with_instance(
    crop_size: tuple[int, int], image_size: tuple[int, int], instance: dict
) -> T.CropTransform:
    """Draw a crop that has the middle of an instance inside.

    Args:
        crop_size, image_size: (height, width).
        instance: annotation with ``bbox`` and ``bbox_mode``.

    Raises:
        AssertionError: the middle is outside of the image, or the crop is larger than the image.
    """
    crop_size = np.asarray(crop_size, dtype=np.int64)
    image_size = np.asarray(image_size, dtype=np.int64)
    x0, y0, x1, y1 = get_bbox(instance)
    middle = np.array([(y0 + y1) / 2, (x0 + x1) / 2])
    if (middle < 0).any() or (middle > image_size).any():
        raise AssertionError(f"The middle of the box {instance['bbox']} lies outside of the image of size {image_size}")
    if (crop_size > image_size).any():
        raise AssertionError(f"Can't crop {crop_size} from an image of size {image_size}")
    lowest = np.maximum(np.floor(middle).astype(np.int64) - crop_size, 0)
    highest = np.minimum(np.ceil(middle).astype(np.int64), image_size - crop_size)
    top = np.random.randint(lowest[0], highest[0] + 1)
    left = np.random.randint(lowest[1], highest[1] + 1)
    return T.CropTransform(left, top, int(crop_size[1]), int(crop_size[0]))


def build_augmentation(cfg, is_train: bool) -> list[T.Augmentation]:
    """Augmentations of the default mapper: resize the shorter side; in training also flip.

    Reads ``cfg.INPUT.{MIN,MAX}_SIZE_{TRAIN,TEST}``, ``MIN_SIZE_TRAIN_SAMPLING`` and ``RANDOM_FLIP``.
    """
    if not is_train:
        return [T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, "choice")]
    augmentations: list[T.Augmentation] = [
        T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING)
    ]
    direction = cfg.INPUT.RANDOM_FLIP
    if direction not in ("none", "horizontal", "vertical"):
        raise ValueError(f"INPUT.RANDOM_FLIP must be 'none', 'horizontal' or 'vertical', got {direction!r}")
    if direction != "none":
        augmentations.append(T.RandomFlip(horizontal=direction == "horizontal", vertical=direction == "vertical"))
    return augmentations


build_transform_gen = build_augmentation


def annotations_to_instances_rotated(*args: Any, **kwargs: Any) -> Any:
    """Needs upstream Detectron2."""
    needs_upstream("annotations_to_instances_rotated")


def create_keypoint_hflip_indices(*args: Any, **kwargs: Any) -> Any:
    """Needs upstream Detectron2."""
    needs_upstream("create_keypoint_hflip_indices")


def transform_keypoint_annotations(*args: Any, **kwargs: Any) -> Any:
    """Needs upstream Detectron2."""
    needs_upstream("transform_keypoint_annotations")


def transform_proposals(*args: Any, **kwargs: Any) -> Any:
    """Needs upstream Detectron2."""
    needs_upstream("transform_proposals")


def get_fed_loss_cls_weights(*args: Any, **kwargs: Any) -> Any:
    """Needs upstream Detectron2."""
    needs_upstream("get_fed_loss_cls_weights")
