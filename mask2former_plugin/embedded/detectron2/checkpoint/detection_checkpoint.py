"""Saves training states so that an interruption loses nothing, and loads checkpoints of all common formats safely."""

from __future__ import annotations

import os
import time
import zipfile
from typing import Any
from urllib.parse import parse_qsl, urlparse

import numpy as np
import torch
from fvcore.common.checkpoint import Checkpointer

import detectron2.utils.comm as comm
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.utils.file_io import PathManager

_HEURISTICS = "matching_heuristics"
_LAST = "last_checkpoint"
_INCOMPLETE = ".incomplete"
_ABANDONED = 3600.0  # seconds after which nobody goes on writing an incomplete file


def _is_local(path: str) -> bool:
    return "://" not in path


class DetectionCheckpointer(Checkpointer):
    """Checkpointer of models in Detectron2's formats.

    * A file appears under its name only when it is complete; ``last_checkpoint`` names the last complete one. If that
      is damaged all the same, resuming takes the newest intact file. What a killed process has left of a file goes with
      a later one.
    * Reads ``.pth`` / ``.pt`` / ``.bin``, ``.pkl`` (numpy weights, Caffe2 and pycls included) and ``.safetensors``
      without running code that a file carries.
    * ``path?matching_heuristics=True`` fits the names of a foreign checkpoint to the model's, see
      :func:`~detectron2.checkpoint.c2_model_loading.align_and_update_state_dicts`; ``.pkl`` files of backbones ask for
      it themselves.
    * If only the main process can see a file, the others receive its content from there.
    """

    def __init__(
        self, model: torch.nn.Module, save_dir: str = "", *, save_to_disk: bool | None = None, **checkpointables: Any
    ) -> None:
        """
        Args:
            model: unwrapped if it is DataParallel or DistributedDataParallel.
            save_dir: folder to save to and to resume from.
            save_to_disk: default: in the main process only.
            checkpointables: further objects with ``state_dict`` and ``load_state_dict``, saved under these names.
        """
        if save_to_disk is None:
            save_to_disk = comm.is_main_process()
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self._all_processes_load = isinstance(model, torch.nn.parallel.DistributedDataParallel)
        self.path_manager = PathManager
        self._use_heuristics = False

    # ---- saving ----

    def save(self, name: str, **kwargs: Any) -> None:
        """Save model and checkpointables to ``<save_dir>/<name>.pth``.

        Args:
            name: file name without suffix.
            kwargs: further entries of the checkpoint; tensors, arrays, numbers, text and containers of these.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        basename = f"{name}.pth"
        if os.path.basename(basename) != basename:
            raise ValueError(f"the name of a checkpoint must not hold a folder, got {name!r}")
        data = {"model": self.model.state_dict()}
        data.update((key, checkpointable.state_dict()) for key, checkpointable in self.checkpointables.items())
        data.update(kwargs)
        path = os.path.join(self.save_dir, basename)
        self._remove_abandoned_files()
        self.logger.info("Saving checkpoint to %s", path)
        self._write_atomically(path, lambda file: torch.save(data, file))
        self.tag_last_checkpoint(basename)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Note in ``<save_dir>/last_checkpoint`` which file to resume from."""
        path = os.path.join(self.save_dir, _LAST)
        self._write_atomically(path, lambda file: file.write(last_filename_basename.encode()))

    def _write_atomically(self, path: str, write: Any) -> None:
        if not _is_local(path):  # other storages have no rename; theirs is to make a file appear when it is complete
            with self.path_manager.open(path, "wb") as file:
                write(file)
            return
        folder, name = os.path.split(path)
        os.makedirs(folder or ".", exist_ok=True)
        temporary = os.path.join(folder, f".{name}.{os.getpid()}{_INCOMPLETE}")
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            if os.path.exists(temporary):
                os.remove(temporary)

    def _remove_abandoned_files(self) -> None:
        """Remove what processes have left that were killed while they saved."""
        if not os.path.isdir(self.save_dir):
            return
        for name in os.listdir(self.save_dir):
            path = os.path.join(self.save_dir, name)
            if not (name.startswith(".") and name.endswith(_INCOMPLETE)):
                continue
            if time.time() - os.path.getmtime(path) > _ABANDONED:
                self.logger.info("Removing %s, which a process that was killed has left", path)
                os.remove(path)

    # ---- resuming ----

    def has_checkpoint(self) -> bool:
        """True if there is a checkpoint to resume from."""
        return bool(self.save_dir) and self.path_manager.exists(os.path.join(self.save_dir, _LAST))

    def get_checkpoint_file(self) -> str:
        """The checkpoint to resume from: what ``last_checkpoint`` names, or the newest intact one if that is damaged.

        Returns:
            Its path; empty if there is no ``last_checkpoint``.

        Raises:
            FileNotFoundError: there is a ``last_checkpoint``, but no intact file.
        """
        last = super().get_checkpoint_file()
        if not last or not _is_local(last) or _is_complete(last):
            return last
        intact = [path for path in self.get_all_checkpoint_files() if _is_complete(path)]
        if not intact:
            raise FileNotFoundError(
                f"cannot resume: {os.path.join(self.save_dir, _LAST)} names {os.path.basename(last)!r}, which is "
                f"missing or damaged, and {self.save_dir} holds no other intact checkpoint"
            )
        newest = max(intact, key=lambda path: (os.path.getmtime(path), path))
        self.logger.warning("%s is missing or damaged; resuming from %s instead", last, newest)
        return newest

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Load everything from the last checkpoint if ``resume`` and there is one, else only the model from ``path``.

        Returns:
            As :meth:`load`.
        """
        if resume and self.has_checkpoint():
            source: tuple[str, list[str] | None] = (self.get_checkpoint_file(), None)
        else:
            source = (path, [])
        if self._all_processes_load:  # other machines may not see the main process's folder
            source = comm.all_gather(source)[0]
        return self.load(source[0], checkpointables=source[1])

    # ---- loading ----

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint into the model and the checkpointables.

        Args:
            path: file or URL, optionally with ``?matching_heuristics=True``; empty loads nothing.
            checkpointables: names of the checkpointables to load; default all.

        Returns:
            The entries of the checkpoint that nothing took.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, is no checkpoint, refers to code, or an option behind ``?`` is unknown.
        """
        if not path:
            return super().load(path, *args, **kwargs)
        address, self._use_heuristics = _split_options(path)
        local = self.path_manager.get_local_path(address)
        found = [os.path.isfile(local)]
        if self._all_processes_load:
            found = comm.all_gather(found[0])
        if not found[0]:
            raise FileNotFoundError(f"checkpoint {address} does not exist")
        if all(found):
            return super().load(local, *args, **kwargs)
        return self._load_from_main_process(local, *args, **kwargs)

    def _load_from_main_process(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        self.logger.warning("Not all machines can see %s; it is sent by the main process", path)
        content = [self._load_file(path) if comm.is_main_process() else None]
        torch.distributed.broadcast_object_list(content, src=0, group=comm._get_global_gloo_group())
        checkpoint = content[0]
        self._log_incompatible_keys(self._load_model(checkpoint))
        for key in self.checkpointables if checkpointables is None else checkpointables:
            if key in checkpoint:
                self.checkpointables[key].load_state_dict(checkpoint.pop(key))
        return checkpoint

    def _load_file(self, filename: str) -> dict[str, Any]:
        from mask2former_plugin.serialization import load_checkpoint_file

        loaded = load_checkpoint_file(filename)
        if filename.endswith(".pyth") and "model_state" in loaded:  # pycls
            state = loaded["model_state"]
            weights = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
            loaded = {"model": weights, "__author__": "pycls", _HEURISTICS: True}
        elif filename.endswith(".pkl") and "model" not in loaded:  # Caffe2
            blobs = loaded.get("blobs", loaded)
            weights = {k: v for k, v in blobs.items() if isinstance(v, np.ndarray) and not k.endswith("_momentum")}
            loaded = {"model": weights, "__author__": "Caffe2", _HEURISTICS: True}
        elif "model" not in loaded:
            loaded = {"model": loaded}
        if not isinstance(loaded["model"], dict):
            kind = type(loaded["model"]).__name__
            raise ValueError(f"{filename}: its entry 'model' is a {kind}, not a dictionary of weights")
        if not loaded["model"] and self.model.state_dict():
            raise ValueError(f"{filename} holds no weights")
        for name, value in loaded["model"].items():
            if not isinstance(value, (torch.Tensor, np.ndarray)):
                raise ValueError(
                    f"{filename} is no checkpoint of Detectron2: its entry {name!r} is a {type(value).__name__}, not a "
                    "tensor; the weights must be the entry 'model', or the file hold nothing else"
                )
        if self._use_heuristics:
            loaded[_HEURISTICS] = True
        return loaded

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        if checkpoint.pop(_HEURISTICS, False):
            self._convert_ndarray_to_tensor(checkpoint["model"])
            checkpoint["model"] = align_and_update_state_dicts(
                self.model.state_dict(), checkpoint["model"], c2_conversion=checkpoint.get("__author__") == "Caffe2"
            )
        incompatible = super()._load_model(checkpoint)
        # the mean and deviation of pixels come from the config; older checkpoints lack them
        computed = {name for name, _ in self.model.named_buffers() if name in ("pixel_mean", "pixel_std")}
        incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key not in computed]
        incompatible.unexpected_keys[:] = [
            key for key in incompatible.unexpected_keys if not key.endswith("anchor_generator.cell_anchors")
        ]
        return incompatible


def _is_complete(path: str) -> bool:
    """Whether a file of ``torch.save`` is there as a whole; cheap, as such a file ends with its table of contents."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        head = file.read(4)
    return head.startswith(b"\x80") or (head == b"PK\x03\x04" and zipfile.is_zipfile(path))  # \x80: the legacy format


def _split_options(path: str) -> tuple[str, bool]:
    """Path without its query, and whether the query asks for the matching heuristics."""
    if os.path.isfile(path):
        return path, False
    url = urlparse(path)
    options = dict(parse_qsl(url.query, keep_blank_values=True))
    wanted = options.pop(_HEURISTICS, "False")
    if wanted not in ("True", "False"):
        raise ValueError(f"{path}: {_HEURISTICS} must be True or False, got {wanted!r}")
    if options and _is_local(path):
        raise ValueError(f"{path}: unknown option {', '.join(options)}; only {_HEURISTICS}=True is known")
    return url._replace(query="&".join(f"{k}={v}" for k, v in options.items())).geturl(), wanted == "True"
