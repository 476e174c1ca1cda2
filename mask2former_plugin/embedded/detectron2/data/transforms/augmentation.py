"""Augmentations: how a random transform is drawn, and applied to an image with its boxes and label map together."""

from __future__ import annotations

import inspect
import pprint
from typing import Any, Sequence

import numpy as np
from fvcore.transforms.transform import Transform, TransformList

__all__ = [
    "Augmentation",
    "AugmentationList",
    "AugInput",
    "TransformGen",
    "apply_transform_gens",
    "StandardAugInput",
    "apply_augmentations",
]


def _wanted_inputs(get_transform) -> tuple[str, ...]:
    """Names of the attributes of the input that ``get_transform`` takes as arguments."""
    parameters = inspect.signature(get_transform).parameters.values()
    for p in parameters:
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            raise TypeError(
                f"{get_transform.__qualname__} takes *args or **kwargs; name its arguments after the attributes of the "
                "input (image, boxes, sem_seg, …) or define __call__ as well"
            )
    names = tuple(p.name for p in parameters)
    # The only argument always is the image, whatever its name.
    return ("image",) if len(names) == 1 else names


class Augmentation:
    """A rule that draws a transform for an input.

    Subclasses define ``get_transform(self, image, …)``; its argument names select attributes of the :class:`AugInput`
    (a single argument always is the image). Calling the augmentation draws the transform and applies it to the input.
    """

    def _init(self, params: dict[str, Any] | None = None) -> None:
        """Keep the arguments of ``__init__`` as attributes: ``self._init(locals())``."""
        for name, value in (params or {}).items():
            if name != "self" and not name.startswith("_"):
                setattr(self, name, value)

    def get_transform(self, *args) -> Transform:
        """Draw a transform for these inputs. To be defined by subclasses.

        Images are uint8 in [0, 255] or float, of shape (H, W) or (H, W, C).
        """
        raise NotImplementedError(f"{type(self).__name__} must define get_transform")

    def __call__(self, aug_input: AugInput) -> Transform:
        """Draw a transform, apply it to ``aug_input`` in place and return it.

        Raises:
            AttributeError: ``get_transform`` asks for something that the input doesn't have.
        """
        args = []
        for name in _wanted_inputs(self.get_transform):
            if not hasattr(aug_input, name):
                raise AttributeError(
                    f"{type(self).__name__}.get_transform needs {name!r}, which the {type(aug_input).__name__} doesn't "
                    "have"
                )
            args.append(getattr(aug_input, name))
        transform = self.get_transform(*args)
        if not isinstance(transform, (Transform, TransformList)):
            raise TypeError(
                f"{type(self).__name__}.get_transform must return a Transform, got {type(transform).__name__}"
            )
        aug_input.transform(transform)
        return transform

    def _rand_range(self, low: float = 1.0, high: float | None = None, size=None):
        """Uniform number(s) in [low, high), or in [0, low) if ``high`` is not given, from numpy's global generator."""
        if high is None:
            low, high = 0, low
        return np.random.uniform(low, high, size)

    def __repr__(self) -> str:
        """The call of the constructor, without the arguments left at their defaults."""
        shown = []
        for name, parameter in inspect.signature(type(self).__init__).parameters.items():
            if name == "self":
                continue
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or not hasattr(self, name):
                return super().__repr__()
            value = getattr(self, name)
            # Identity, so that an argument given explicitly is shown even if it equals the default.
            if value is not parameter.default:
                shown.append(f"{name}={pprint.pformat(value)}")
        return f"{type(self).__name__}({', '.join(shown)})"

    __str__ = __repr__


class _FixedAugmentation(Augmentation):
    """A transform in the role of an augmentation: draws itself."""

    def __init__(self, transform: Transform):
        self.transform = transform

    def get_transform(self, *args) -> Transform:
        return self.transform

    def __call__(self, aug_input: AugInput) -> Transform:
        aug_input.transform(self.transform)
        return self.transform

    def __repr__(self) -> str:
        return repr(self.transform)

    __str__ = __repr__


def as_augmentation(augmentation_or_transform: Augmentation | Transform) -> Augmentation:
    """An augmentation unchanged, a transform wrapped in one.

    Raises:
        TypeError: neither of the two.
    """
    if isinstance(augmentation_or_transform, Augmentation):
        return augmentation_or_transform
    if isinstance(augmentation_or_transform, (Transform, TransformList)):
        return _FixedAugmentation(augmentation_or_transform)
    raise TypeError(f"Expected an Augmentation or a Transform, got {type(augmentation_or_transform).__name__}")


class AugmentationList(Augmentation):
    """Augmentations one after the other, each sees what the ones before have made.

    Args:
        augs: augmentations or transforms.
    """

    def __init__(self, augs: Sequence[Augmentation | Transform]):
        self.augs = [as_augmentation(a) for a in augs]

    def __call__(self, aug_input: AugInput) -> TransformList:
        return TransformList([aug(aug_input) for aug in self.augs])

    def __repr__(self) -> str:
        return f"AugmentationList[{', '.join(str(a) for a in self.augs)}]"

    __str__ = __repr__


class AugInput:
    """What is transformed together. The attributes may be read by augmentations and change with each transform.

    Args:
        image: uint8 in [0, 255] or float, of shape (H, W) or (H, W, C).
        boxes: (N, 4) as x0, y0, x1, y1 in pixels.
        sem_seg: label map of shape (H, W).
    """

    def __init__(self, image: np.ndarray, *, boxes: np.ndarray | None = None, sem_seg: np.ndarray | None = None):
        if not isinstance(image, np.ndarray) or image.ndim not in (2, 3):
            got = f"an array of shape {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
            raise TypeError(f"The image must be a numpy array of shape (H, W) or (H, W, C), got {got}")
        self.image = image
        self.boxes = boxes
        self.sem_seg = sem_seg

    def transform(self, tfm: Transform) -> None:
        """Apply a transform to everything that is there, in place."""
        self.image = tfm.apply_image(self.image)
        if self.boxes is not None:
            self.boxes = tfm.apply_box(self.boxes)
        if self.sem_seg is not None:
            self.sem_seg = tfm.apply_segmentation(self.sem_seg)

    def apply_augmentations(self, augmentations: Sequence[Augmentation | Transform]) -> TransformList:
        """Apply augmentations in place; returns the transforms that were drawn."""
        return AugmentationList(augmentations)(self)


def apply_augmentations(
    augmentations: Sequence[Augmentation | Transform], inputs: AugInput | np.ndarray
) -> tuple[AugInput | np.ndarray, TransformList]:
    """Apply augmentations to an image, or to an AugInput in place.

    Returns:
        the new image, or the AugInput, whichever was given; and the transforms that were drawn.
    """
    if isinstance(inputs, np.ndarray):
        aug_input = AugInput(inputs)
        transforms = aug_input.apply_augmentations(augmentations)
        return aug_input.image, transforms
    return inputs, inputs.apply_augmentations(augmentations)


# Names of the first Detectron2 release, still in use by projects.
TransformGen = Augmentation
StandardAugInput = AugInput
apply_transform_gens = apply_augmentations
