"""Loads checkpoints of every published layout safely, reports what does not fit, refuses what fits another model."""

from __future__ import annotations

import logging
import os
import re
import weakref
from typing import TYPE_CHECKING, Any

from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from mask2former_plugin.checkpoint.huggingface import read_weights, weight_file
from mask2former_plugin.checkpoint.layouts import fit_names, unwrap
from mask2former_plugin.checkpoint.report import LoadReport

if TYPE_CHECKING:
    from mask2former_plugin.engine import Trainer

_HEAD = "sem_seg_head."
_HEURISTICS = "matching_heuristics"
# follow from the config, or count training steps: a model without them is no worse
_DERIVED = re.compile(r"(?:.*\.)?(?:relative_position_index|num_batches_tracked)|criterion\..*|pixel_mean|pixel_std")
# the last layer of a head, which a new set of classes replaces
_CLASSIFIER = re.compile(r"sem_seg_head\.predictor\.(?:class_embed\.)?(?:weight|bias)")


class CheckpointMismatchError(ValueError):
    """A checkpoint that does not fit the model; the text has the table of what is missing."""


class Checkpointer(DetectionCheckpointer):
    """``DetectionCheckpointer`` that never unpickles arbitrary code and reads every published layout.

    The names in a file decide what it is: a checkpoint of Detectron2, MaskFormer or Mask2Former of any age, of
    Hugging Face (file or folder, whole or in shards), a torchvision or Detectron2 ResNet, a Swin release.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", **options: Any) -> None:
        """As ``DetectionCheckpointer``."""
        super().__init__(model, save_dir, **options)
        self._match_names = False
        self._resuming = False
        self._names = [name for name in self.model.state_dict() if not _DERIVED.fullmatch(name)]
        #: what the last checkpoint gave the model
        self.report = LoadReport(self._names, missing=self._names)
        #: names of the weights that no checkpoint has given yet
        self.random_weights = set(self._names)

    @classmethod
    def of_trainer(cls, trainer: Trainer) -> Checkpointer:
        """The checkpointer of a training: saves the model and the trainer's state to ``OUTPUT_DIR``."""
        return cls(trainer.model, trainer.cfg.OUTPUT_DIR, trainer=weakref.proxy(trainer))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Remember where to resume; the best checkpoint so far is no such place, training has gone on since."""
        if not last_filename_basename.startswith("model_best"):
            super().tag_last_checkpoint(last_filename_basename)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """As ``DetectionCheckpointer.resume_or_load``.

        Raises:
            CheckpointMismatchError: a training would go on with another model than that of its checkpoint.
        """
        self._resuming = bool(self.checkpointables) and resume and self.has_checkpoint()
        try:
            return super().resume_or_load(path, resume=resume)
        finally:
            self._resuming = False

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As ``DetectionCheckpointer.load``; ``path`` may also be a Hugging Face folder or an index of its shards."""
        path = os.fspath(path) if path else ""
        query = f"?{_HEURISTICS}=True"
        self._match_names = path.endswith(query)
        path = path.removesuffix(query)
        if path and os.path.isdir(path):
            path = str(weight_file(path))
        return super().load(path, *args, **kwargs)

    def require_weights(self, *, classifier: bool = False) -> None:
        """Refuse a model that is random beyond its classifier; to call after loading, before an evaluation.

        Args:
            classifier: refuse a random classifier, too.

        Raises:
            CheckpointMismatchError: other weights are still those of the initialisation; the text has the table by module.
        """
        if classifier:
            random = self.random_weights
        else:
            random = {name for name in self.random_weights if not _CLASSIFIER.fullmatch(name)}
        if random:
            report = LoadReport(self._names, missing=sorted(self.random_weights))
            raise CheckpointMismatchError(
                f"the model would be used with random weights: {report}\nSet MODEL.WEIGHTS to a checkpoint of the "
                "config's model, or MODEL.ALLOW_RANDOM_WEIGHTS True if you mean it."
            )

    def _load_file(self, filename: str) -> dict[str, Any]:
        checkpoint = unwrap(read_weights(filename))
        if self._match_names:
            checkpoint[_HEURISTICS] = True
        return checkpoint

    def _load_model(self, checkpoint: dict[str, Any]):
        checkpoint["model"], translated = fit_names(checkpoint["model"], self.model.state_dict().keys())
        if translated:
            checkpoint.pop(_HEURISTICS, None)
        whole_model = any(_HEAD in name for name in checkpoint["model"])
        incompatible = super()._load_model(checkpoint)
        incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if not _DERIVED.fullmatch(name)]
        wrong_shape = {name: (tuple(found), tuple(wanted)) for name, found, wanted in incompatible.incorrect_shapes}
        missing = [name for name in incompatible.missing_keys if name not in wrong_shape]
        self.report = LoadReport(self._names, missing, list(incompatible.unexpected_keys), wrong_shape)
        if self._resuming:
            self._check_same_model()
        self._check_architecture(whole_model)
        self.random_weights &= self.report.unset
        return incompatible

    def _log_incompatible_keys(self, incompatible) -> None:
        self.logger.log(logging.WARNING if self.report else logging.INFO, "%s", self.report)

    def _check_same_model(self) -> None:
        unexpected = [name for name in self.report.unexpected if not _DERIVED.fullmatch(name)]
        if self.report.unset or unexpected:
            raise CheckpointMismatchError(
                f"a training can't be resumed with another model: {self.report}\nTake the config of the stored run; "
                "or, for a new training from these weights, another OUTPUT_DIR and MODEL.WEIGHTS."
            )

    def _check_architecture(self, whole_model: bool) -> None:
        unset = self.report.unset
        names = [name for name, _ in self.model.named_parameters()]
        loaded = [name for name in names if name not in unset]
        head = [name for name in names if _HEAD in name]
        loaded_head = [name for name in head if name not in unset]
        # weights of a backbone alone are fine; a whole model has to fill most of the head
        if loaded and (not whole_model or 2 * len(loaded_head) >= len(head)):
            return
        raise CheckpointMismatchError(
            f"the checkpoint is of another architecture than the config's model: {self.report}"
        )
