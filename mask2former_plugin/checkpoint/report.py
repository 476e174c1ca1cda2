"""What of a checkpoint went into a model, as a short table."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

_ROWS = 12


@dataclass
class LoadReport:
    """Differences between a checkpoint and a model.

    Attributes:
        names: names of the tensors of the model.
        missing: those that the checkpoint lacks.
        unexpected: names of the checkpoint that the model lacks.
        wrong_shape: shapes in the checkpoint and in the model by name.
    """

    names: Collection[str]
    missing: Collection[str] = ()
    unexpected: Collection[str] = ()
    wrong_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    @property
    def unset(self) -> set[str]:
        """Names of the model that the checkpoint gives nothing for."""
        return {*self.missing, *self.wrong_shape}

    def __bool__(self) -> bool:
        """Whether there is any difference."""
        return bool(self.unset or self.unexpected)

    def __str__(self) -> str:
        """One line, and below it the differences by module."""
        loaded = len(set(self.names) - self.unset)
        head = f"{loaded} of {len(self.names)} tensors of the model are loaded"
        return "\n".join([head, *self._rows()]) if self else head

    def _rows(self) -> Iterator[str]:
        counts = self._count()
        width = max(len(module) for module in counts)
        yield f"  {'module':<{width}}  missing  unexpected  wrong shape"
        for module, (missing, unexpected, wrong) in sorted(counts.items())[:_ROWS]:
            yield f"  {module:<{width}}  {missing:>7}  {unexpected:>10}  {wrong:>11}{self._example(module)}"
        if len(counts) > _ROWS:
            yield f"  … and {len(counts) - _ROWS} more modules"

    def _count(self) -> dict[str, list[int]]:
        columns: tuple[Iterable[str], ...] = (self.missing, self.unexpected, self.wrong_shape)
        absent = wholly_missing(self.missing, self.names)
        counts: dict[str, list[int]] = {}
        for column, names in enumerate(columns):
            for name in names:
                whole = next((module for module in absent if name.startswith(f"{module}.")), None)
                module = f"{whole} (all of it)" if whole else module_of(name)
                counts.setdefault(module, [0] * len(columns))[column] += 1
        return counts

    def _example(self, module: str) -> str:
        for name, (found, wanted) in self.wrong_shape.items():
            if module_of(name) == module:
                return f"  {name.rpartition('.')[2]}: {found} in the checkpoint, {wanted} in the model"
        return ""


def module_of(name: str) -> str:
    """The part of a model that a weight belongs to: three levels below a segmentation head, else two."""
    parts = name.split(".")[:-1]
    return ".".join(parts[: 3 if parts[:1] == ["sem_seg_head"] else 2]) or name


def wholly_missing(missing: Collection[str], names: Collection[str]) -> list[str]:
    """Modules, at most two levels deep and not inside each other, of which every tensor is missing."""
    present = set(names) - set(missing)
    found: list[str] = []
    for depth in (1, 2):
        modules = {".".join(name.split(".")[:depth]) for name in missing if name.count(".") >= depth}
        for module in sorted(modules):
            inside = any(module.startswith(f"{outer}.") for outer in found)
            if not inside and not any(name.startswith(f"{module}.") for name in present):
                found.append(module)
    return found
