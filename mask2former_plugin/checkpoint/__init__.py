"""Checkpoints: safe loading, and a refusal to go on with weights of another architecture."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from detectron2.checkpoint import DetectionCheckpointer

from mask2former_plugin.serialization import load_checkpoint_file

if TYPE_CHECKING:
    from mask2former_plugin.engine import Trainer

_HEAD = "sem_seg_head."


class Checkpointer(DetectionCheckpointer):
    """``DetectionCheckpointer`` that never unpickles arbitrary code and recognises a checkpoint of another architecture."""

    @classmethod
    def of_trainer(cls, trainer: Trainer) -> Checkpointer:
        """The checkpointer of a training: saves the model and the trainer's state to ``OUTPUT_DIR``."""
        return cls(trainer.model, trainer.cfg.OUTPUT_DIR, trainer=weakref.proxy(trainer))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Remember where to resume; the best checkpoint so far is no such place, training has gone on since."""
        if not last_filename_basename.startswith("model_best"):
            super().tag_last_checkpoint(last_filename_basename)

    def _load_file(self, filename: str) -> dict[str, Any]:
        loaded = load_checkpoint_file(filename)
        return loaded if "model" in loaded else {"model": loaded}

    def _load_model(self, checkpoint: dict[str, Any]):
        available = set(checkpoint["model"])
        incompatible = super()._load_model(checkpoint)
        if incompatible is not None:
            self._check_architecture(available, incompatible)
        return incompatible

    def _check_architecture(self, available: set[str], incompatible) -> None:
        wrong_shape = {entry[0]: entry[1:] for entry in incompatible.incorrect_shapes}
        unset = set(incompatible.missing_keys) | set(wrong_shape)
        names = [name for name, _ in self.model.named_parameters()]
        loaded = [name for name in names if name not in unset]
        head = [name for name in names if _HEAD in name]
        loaded_head = [name for name in head if name not in unset]
        # weights of a backbone alone are fine; a whole model has to fill most of the head
        whole_model = any(_HEAD in name for name in available)
        if loaded and (not whole_model or 2 * len(loaded_head) >= len(head)):
            return
        rows = [f"{len(loaded)} of {len(names)} parameters fit, {len(loaded_head)} of {len(head)} of the head"]
        rows += [f"missing: {name}" for name in sorted(incompatible.missing_keys)[:3]]
        rows += [f"unexpected: {name}" for name in sorted(incompatible.unexpected_keys)[:3]]
        rows += [f"shape of {name}: {tuple(have)} in the checkpoint, {tuple(want)} in the model" for name, (have, want) in list(wrong_shape.items())[:3]]
        raise ValueError("the checkpoint is of another architecture than the config's model:\n  " + "\n  ".join(rows))
