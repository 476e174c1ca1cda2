"""What of a checkpoint went into a model, as a short table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

_ROWS = 12


def module_of(name: str) -> str:
    """The part of the model that a weight belongs to: three levels below a segmentation head, else two."""
    parts = name.split(".")[:-1]
    return ".".join(parts[: 3 if parts[:1] == ["sem_seg_head"] else 2]) or name


@dataclass
class LoadReport:
    """Differences between a checkpoint and a model.

    Attributes:
        loaded: number of tensors that went into the model.
        total: number of tensors of the model.
        missing: names of the model that the checkpoint lacks.
        unexpected: names of the checkpoint that the model lacks.
        wrong_shape: shapes in the checkpoint and in the model by name.
    """

    loaded: int
    total: int
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether there is any difference."""
        return bool(self.missing or self.unexpected or self.wrong_shape)

    def __str__(self) -> str:
        """One line, and below it the differences by module."""
        head = f"{self.loaded} of {self.total} tensors of the model are in the checkpoint"
        return "\n".join([head, *self._rows()])

    def _rows(self) -> list[str]:
        if not self:
            return []
        columns = (self.missing, self.unexpected, list(self.wrong_shape))
        counts = _count(columns)
        width = max(len("module"), *(len(module) for module in counts))
        rows = [f"  {'module':<{width}}  missing  unexpected  wrong shape"]
        for module, (missing, unexpected, wrong) in sorted(counts.items())[:_ROWS]:
            rows.append(f"  {module:<{width}}  {missing:>7}  {unexpected:>10}  {wrong:>11}{self._example(module)}")
        if len(counts) > _ROWS:
            rows.append(f"  … and {len(counts) - _ROWS} more modules")
        return rows

    def _example(self, module: str) -> str:
        for name, (found, wanted) in self.wrong_shape.items():
            if module_of(name) == module:
                return f"  {name.rpartition('.')[2]}: {found} in the checkpoint, {wanted} in the model"
        return ""


def _count(columns: tuple[Iterable[str], ...]) -> dict[str, list[int]]:
    counts: dict[str, list[int]] = {}
    for column, names in enumerate(columns):
        for name in names:
            counts.setdefault(module_of(name), [0] * len(columns))[column] += 1
    return counts
