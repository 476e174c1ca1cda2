"""The image processor: options, images and maps to model inputs, predictions to results."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mask2former_plugin.processing.images import (
    CHANNELS_FIRST,
    CHANNELS_LAST,
    as_array,
    as_list,
    read_size,
    resize_image,
    resize_labels,
    target_size,
)
from mask2former_plugin.processing.label_maps import InstanceClasses, class_lookups, map_list, masks_and_classes
from mask2former_plugin.processing.results import PostProcessing

logger = logging.getLogger(__name__)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# what preprocessor_config.json says beside options
_BOOKKEEPING = {"image_processor_type", "feature_extractor_type", "processor_class", "_valid_processor_keys"}


class ImageProcessor(PostProcessing):
    """Prepares images and segmentation maps for MaskFormer and Mask2Former and turns predictions into results.

    The options and results of Hugging Face's ``MaskFormerImageProcessor`` and ``Mask2FormerImageProcessor``; the
    differences, all on purpose, are listed in ``docs/huggingface.md``. Options are given to the constructor and may be
    changed for one call of :meth:`preprocess`.

    Args:
        do_resize: resize the images.
        size: an int, the shorter side (the longer is at most ``max_size``); a pair (height, width); or a dict
            ``shortest_edge`` (and ``longest_edge``), ``height`` and ``width``, or ``max_height`` and ``max_width``.
            By default 800, at most 1333.
        max_size: most of the longer side, whatever ``size`` says.
        size_divisor: images are stretched until each side is a multiple of it; only with ``do_resize``.
        resample: filter of Pillow for the images, by default bilinear. Maps take the nearest label.
        do_rescale: multiply by ``rescale_factor``.
        rescale_factor: 1/255 brings bytes to 0..1.
        do_normalize: subtract ``image_mean`` and divide by ``image_std``.
        image_mean: per channel, by default ImageNet's.
        image_std: per channel, by default ImageNet's.
        ignore_index: id in the segmentation maps that gives no mask.
        do_reduce_labels: id 0 of the maps is background without a mask, and classes count from id 1; needs
            ``ignore_index``. What is ``ignore_index`` before stays ignored.
        num_labels: number of classes; where it is given, other classes are an error.
        do_pad: fill images up to the largest of the batch, or to ``pad_size``, with zeros below and to the right;
            without it all images of a batch must have one size.
        pad_size: ``{"height": …, "width": …}`` that every image is filled up to.
        do_convert_rgb: PIL images become RGB, one channel becomes three.
        reduce_labels: older name of ``do_reduce_labels``.
        size_divisibility: older name of ``size_divisor``.

    Raises:
        ValueError: an option makes no sense.
        TypeError: an unknown option.
    """

    def __init__(
        self,
        *,
        do_resize: bool = True,
        size: int | Sequence[int] | Mapping[str, int] | None = None,
        max_size: int | None = None,
        size_divisor: int = 32,
        resample: int = Image.Resampling.BILINEAR,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: float | Sequence[float] | None = None,
        image_std: float | Sequence[float] | None = None,
        ignore_index: int | None = None,
        do_reduce_labels: bool = False,
        num_labels: int | None = None,
        do_pad: bool = True,
        pad_size: Mapping[str, int] | None = None,
        do_convert_rgb: bool = True,
        reduce_labels: bool | None = None,
        size_divisibility: int | None = None,
    ) -> None:
        self.do_resize = do_resize
        self.size = read_size(size, max_size)
        self.size_divisor = size_divisor if size_divisibility is None else size_divisibility
        self.resample = Image.Resampling(resample)
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.image_mean = IMAGENET_MEAN if image_mean is None else image_mean
        self.image_std = IMAGENET_STD if image_std is None else image_std
        self.ignore_index = ignore_index
        self.do_reduce_labels = do_reduce_labels if reduce_labels is None else reduce_labels
        self.num_labels = num_labels
        self.do_pad = do_pad
        self.pad_size = None if pad_size is None else dict(pad_size)
        self.do_convert_rgb = do_convert_rgb
        if self.pad_size is not None and set(self.pad_size) != {"height", "width"}:
            raise ValueError(f"pad_size is {self.pad_size}; it must have 'height' and 'width'")
        if self.do_reduce_labels and self.ignore_index is None:
            raise ValueError("do_reduce_labels needs ignore_index, the id of what is no class (usually 255)")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ImageProcessor:
        """The processor that the content of a ``preprocessor_config.json`` describes; what is no option is logged."""
        values = {key: value for key, value in values.items() if key not in _BOOKKEEPING}
        known = cls.__init__.__kwdefaults__
        unknown = sorted(values.keys() - known.keys())
        if unknown:
            logger.warning("The image processor has no options %s; they are left out", unknown)
        return cls(**{key: value for key, value in values.items() if key in known and value is not None})

    @classmethod
    def from_pretrained(cls, path: str | Path) -> ImageProcessor:
        """The processor of a local folder of Hugging Face's, or of its ``preprocessor_config.json``."""
        path = Path(path)
        path = path / "preprocessor_config.json" if path.is_dir() else path
        return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))

    @classmethod
    def from_config(cls, cfg: Any) -> ImageProcessor:
        """Test size, divisor and pixel statistics of a config of ours.

        Raises:
            ValueError: the model reads BGR.
        """
        from mask2former_plugin.checkpoint.huggingface_config import to_hf_preprocessor

        return cls.from_dict(to_hf_preprocessor(cfg))

    def to_dict(self) -> dict[str, Any]:
        """The options by name; ``ImageProcessor(**options)`` is the same processor."""
        return dict(vars(self))

    def __call__(self, images: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        """See :meth:`preprocess`."""
        return self.preprocess(images, *arguments, **options)

    def preprocess(
        self,
        images: Any,
        segmentation_maps: Any = None,
        instance_id_to_semantic_id: InstanceClasses | Sequence[InstanceClasses] | None = None,
        *,
        return_tensors: str | None = "pt",
        data_format: str = CHANNELS_FIRST,
        input_data_format: str | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Model inputs, and targets where there are segmentation maps.

        Args:
            images: one or several PIL images, arrays or tensors; values as ``rescale_factor`` expects them.
            segmentation_maps: of each image the ids ``[H, W]``, at the size of the image.
            instance_id_to_semantic_id: class of each id, one dict for all images or one for each; without it the ids
                are classes.
            return_tensors: "pt" for tensors, "np" for arrays.
            data_format: of ``pixel_values``: "channels_first" or "channels_last".
            input_data_format: of ``images``; by default found out.
            device: of the tensors.
            options: options of the constructor that this call changes; None changes nothing.

        Returns:
            ``pixel_values`` float32 ``[B, C, H, W]``; ``pixel_mask`` int64 ``[B, H, W]``, 1 = image, 0 = padding; with
            maps ``mask_labels``, a list of float32 ``[n_i, H, W]`` (zeros in the padding), and ``class_labels``, a
            list of int64 ``[n_i]``.

        Raises:
            ValueError: numbers or sizes of images and maps differ; the image is named.
            KeyError: an id without a class.
        """
        changed = {key: value for key, value in options.items() if value is not None}
        if changed:
            processor = type(self)(**{**self.to_dict(), **changed})
            return processor.preprocess(
                images, segmentation_maps, instance_id_to_semantic_id, return_tensors=return_tensors,
                data_format=data_format, input_data_format=input_data_format, device=device,
            )  # fmt: skip
        arrays = [
            as_array(image, input_data_format, self.do_convert_rgb, f"image {i}")
            for i, image in enumerate(as_list(images))
        ]
        maps = map_list(segmentation_maps, len(arrays))
        if maps is not None:
            _check_sizes(arrays, maps)
        for i, array in enumerate(arrays):
            height, width = array.shape[1:]
            size = (height, width)
            if self.do_resize:
                size = target_size(height, width, self.size, self.size_divisor)
            arrays[i] = self._normalise(resize_image(array, size, self.resample), f"image {i}")
            if maps is not None:
                maps[i] = resize_labels(maps[i], size)
        return self._encode(
            arrays, maps, instance_id_to_semantic_id, self.ignore_index, self.do_reduce_labels,
            return_tensors, data_format, device,
        )  # fmt: skip

    def encode_inputs(
        self,
        pixel_values_list: Sequence[np.ndarray | Tensor],
        segmentation_maps: Any = None,
        instance_id_to_semantic_id: InstanceClasses | Sequence[InstanceClasses] | None = None,
        ignore_index: int | None = None,
        do_reduce_labels: bool = False,
        return_tensors: str | None = "pt",
        input_data_format: str | None = None,
        *,
        reduce_labels: bool | None = None,
    ) -> dict[str, Any]:
        """Padding and targets alone, for images that are resized and normalised already.

        ``ignore_index`` and ``do_reduce_labels`` are those of the call, not of the processor. Else see
        :meth:`preprocess`.

        Args:
            pixel_values_list: images ``[C, H, W]``, or ``[H, W, C]`` with ``input_data_format="channels_last"``.
            reduce_labels: older name of ``do_reduce_labels``.
        """
        arrays = [
            as_array(image, input_data_format or CHANNELS_FIRST, False, f"image {i}").astype(np.float32)
            for i, image in enumerate(as_list(pixel_values_list))
        ]
        maps = map_list(segmentation_maps, len(arrays))
        if maps is not None:
            _check_sizes(arrays, maps)
        reduce = do_reduce_labels if reduce_labels is None else reduce_labels
        return self._encode(
            arrays, maps, instance_id_to_semantic_id, ignore_index, reduce, return_tensors, CHANNELS_FIRST, None
        )

    def _normalise(self, image: np.ndarray, name: str) -> np.ndarray:
        image = image.astype(np.float32)
        if self.do_rescale:
            image *= np.float32(self.rescale_factor)
        if self.do_normalize:
            mean, std = np.ravel(self.image_mean), np.ravel(self.image_std)
            for statistics, option in ((mean, "image_mean"), (std, "image_std")):
                if len(statistics) not in (1, len(image)):
                    raise ValueError(f"{name}: {len(image)} channels, but {option} has {len(statistics)} values")
            image = (image - mean[:, None, None].astype(np.float32)) / std[:, None, None].astype(np.float32)
        return image

    def _padded_size(self, arrays: Sequence[np.ndarray]) -> tuple[int, int]:
        sizes = [array.shape[1:] for array in arrays]
        largest = (max(size[0] for size in sizes), max(size[1] for size in sizes))
        if self.pad_size is None:
            if not self.do_pad and len(set(sizes)) > 1:
                raise ValueError(f"images of the sizes {sorted(set(sizes))} are no batch without do_pad")
            return largest
        wanted = (self.pad_size["height"], self.pad_size["width"])
        for i, size in enumerate(sizes):
            if size[0] > wanted[0] or size[1] > wanted[1]:
                raise ValueError(
                    f"image {i} has {size[0]}x{size[1]} (height x width) after resizing, more than pad_size "
                    f"{wanted[0]}x{wanted[1]}"
                )
        return wanted

    def _encode(
        self,
        arrays: Sequence[np.ndarray],
        maps: Sequence[np.ndarray] | None,
        instance_id_to_semantic_id: InstanceClasses | Sequence[InstanceClasses] | None,
        ignore_index: int | None,
        reduce_labels: bool,
        return_tensors: str | None,
        data_format: str,
        device: torch.device | str | None,
    ) -> dict[str, Any]:
        if not arrays:
            raise ValueError("there are no images")
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f"return_tensors is {return_tensors!r}; there are 'pt' (torch) and 'np' (numpy)")
        if data_format not in (CHANNELS_FIRST, CHANNELS_LAST):
            raise ValueError(f"data_format is {data_format!r}; there are {CHANNELS_FIRST!r} and {CHANNELS_LAST!r}")
        size = self._padded_size(arrays)
        pixel_values = torch.zeros((len(arrays), arrays[0].shape[0], *size))
        pixel_mask = torch.zeros((len(arrays), *size), dtype=torch.int64)
        for i, array in enumerate(arrays):
            inside = (i, ..., slice(array.shape[1]), slice(array.shape[2]))
            pixel_values[inside] = torch.from_numpy(array)
            pixel_mask[inside] = 1
        if data_format == CHANNELS_LAST:
            pixel_values = pixel_values.permute(0, 2, 3, 1).contiguous()
        encoded: dict[str, Any] = {"pixel_values": pixel_values, "pixel_mask": pixel_mask}
        if maps is not None:
            lookups = class_lookups(instance_id_to_semantic_id, len(maps))
            pairs = [
                masks_and_classes(
                    labels, classes, ignore_index=ignore_index, reduce_labels=reduce_labels, padded_size=size,
                    name=f"segmentation map {i}",
                )
                for i, (labels, classes) in enumerate(zip(maps, lookups))
            ]  # fmt: skip
            encoded["mask_labels"] = [masks for masks, _ in pairs]
            encoded["class_labels"] = [classes for _, classes in pairs]
            self._check_classes(encoded["class_labels"])
        return {key: _convert(value, return_tensors, device) for key, value in encoded.items()}

    def _check_classes(self, class_labels: Sequence[Tensor]) -> None:
        if self.num_labels is None:
            return
        for i, classes in enumerate(class_labels):
            wrong = sorted({c for c in classes.tolist() if not 0 <= c < self.num_labels})
            if wrong:
                raise ValueError(
                    f"segmentation map {i}: classes {wrong[:5]} are outside 0..{self.num_labels - 1} (num_labels); "
                    "set ignore_index, do_reduce_labels or instance_id_to_semantic_id"
                )


def _check_sizes(arrays: Sequence[np.ndarray], maps: Sequence[np.ndarray]) -> None:
    for i, (array, labels) in enumerate(zip(arrays, maps)):
        if array.shape[1:] != labels.shape:
            (height, width), (rows, columns) = array.shape[1:], labels.shape
            raise ValueError(
                f"segmentation map {i} has {rows}x{columns} (height x width) for an image of {height}x{width}"
            )


def _convert(value: Any, return_tensors: str | None, device: torch.device | str | None) -> Any:
    if isinstance(value, list):
        return [_convert(one, return_tensors, device) for one in value]
    return value.numpy() if return_tensors == "np" else value.to(device)
