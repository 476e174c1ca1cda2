"""Per-image container of annotated or predicted objects."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch


class Instances:
    """The N objects of one image as fields of length N: boxes, masks, classes, scores, …

    Fields are attributes (``instances.gt_boxes = boxes``) of any type with ``len`` and indexing.
    Indexing gives an ``Instances`` with the chosen objects. Names that start with an underscore are not fields.
    """

    def __init__(self, image_size: tuple[int, int], **kwargs: Any):
        """
        Args:
            image_size: (height, width) of the image.
            kwargs: fields.
        """
        self._image_size = image_size
        self._fields: dict[str, Any] = {}
        for name, value in kwargs.items():
            self.set(name, value)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width)."""
        return self._image_size

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:
            self.set(name, value)

    def __getattr__(self, name: str) -> Any:
        if name == "_fields" or name not in self._fields:
            raise AttributeError(
                f"these Instances have no field '{name}'; there are {list(self.__dict__.get('_fields', ()))}"
            )
        return self._fields[name]

    def set(self, name: str, value: Any) -> None:
        """Add or replace a field.

        Raises:
            AssertionError: its length differs from that of the other fields, or the name is ``image_size``.
        """
        assert name != "image_size", "image_size is fixed; make new Instances for another size"
        if self._fields:
            assert len(value) == len(self), (
                f"field '{name}' has length {len(value)}, these Instances have length {len(self)}"
            )
        self._fields[name] = value

    def has(self, name: str) -> bool:
        """True if there is a field of this name."""
        return name in self._fields

    def remove(self, name: str) -> None:
        """Delete a field; KeyError if there is none."""
        del self._fields[name]

    def get(self, name: str) -> Any:
        """A field; KeyError if there is none."""
        return self._fields[name]

    def get_fields(self) -> dict[str, Any]:
        """All fields by name (the dict itself, not a copy)."""
        return self._fields

    def to(self, *args: Any, **kwargs: Any) -> Instances:
        """New Instances whose fields are moved by their own ``to``, where they have one."""
        moved = Instances(self._image_size)
        for name, value in self._fields.items():
            moved.set(name, value.to(*args, **kwargs) if hasattr(value, "to") else value)
        return moved

    def __getitem__(self, item: int | slice | list | np.ndarray | torch.Tensor) -> Instances:
        """The chosen objects; an int keeps the axis (length 1).

        Raises:
            IndexError: int out of range.
        """
        if isinstance(item, (int, np.integer)):
            count = len(self)
            if not -count <= item < count:
                raise IndexError(f"index {item} is out of range for {count} instances")
            position = int(item) % count
            item = slice(position, position + 1)
        elif isinstance(item, list) and not item:
            item = slice(0)  # as a tensor it would be one of float32
        chosen = Instances(self._image_size)
        for name, value in self._fields.items():
            if isinstance(value, (list, tuple)) and not isinstance(item, slice):
                positions = torch.arange(len(value))[torch.as_tensor(item).cpu()]
                chosen.set(name, type(value)(value[i] for i in positions.tolist()))
            else:
                chosen.set(name, value[item])
        return chosen

    def __len__(self) -> int:
        for value in self._fields.values():
            return len(value)
        raise NotImplementedError("Instances without fields have no length")

    def __iter__(self) -> Any:
        raise NotImplementedError("Instances cannot be iterated; index them, or iterate over a field")

    @staticmethod
    def cat(instance_lists: list[Instances]) -> Instances:
        """Join Instances of one image that have the same fields.

        Tensors and lists are concatenated; other types need a ``cat`` of their own.
        """
        assert len(instance_lists) > 0, "need at least one Instances to join"
        assert all(isinstance(part, Instances) for part in instance_lists), "can join Instances only"
        first = instance_lists[0]
        if len(instance_lists) == 1:
            return first
        for part in instance_lists[1:]:
            # In a traced model the sizes are tensors; comparing them would fix them in the graph.
            if not isinstance(first.image_size, torch.Tensor):
                assert tuple(part.image_size) == tuple(first.image_size), (
                    f"cannot join instances of images of the sizes {first.image_size} and {part.image_size}"
                )
            if part._fields.keys() != first._fields.keys():
                raise KeyError(f"cannot join instances with the fields {list(first._fields)} and {list(part._fields)}")
        joined = Instances(first.image_size)
        for name, value in first._fields.items():
            values = [part.get(name) for part in instance_lists]
            if isinstance(value, torch.Tensor):
                joined.set(name, torch.cat(values, dim=0))
            elif isinstance(value, list):
                joined.set(name, list(itertools.chain(*values)))
            elif hasattr(type(value), "cat"):
                joined.set(name, type(value).cat(values))
            else:
                raise ValueError(f"cannot join field '{name}' of type {type(value).__name__}")
        return joined

    def __str__(self) -> str:
        count = len(self) if self._fields else 0
        fields = ", ".join(f"{name}: {value}" for name, value in self._fields.items())
        height, width = self._image_size
        return f"Instances(num_instances={count}, image_height={height}, image_width={width}, fields=[{fields}])"

    __repr__ = __str__
