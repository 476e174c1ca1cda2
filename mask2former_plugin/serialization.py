"""Reads checkpoint files of every common format without ever running code that they carry."""

from __future__ import annotations

import _codecs
import functools
import io
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import torch

# the pickled number with which torch.save began before it wrote zip files
_LEGACY_TORCH_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


class CheckpointFileError(ValueError):
    """A checkpoint that cannot be read; the text names the file and says why."""


class ForbiddenObjectError(CheckpointFileError):
    """A checkpoint that holds something else than tensors, arrays, numbers, text and containers of these."""


# ---- what a pickle may refer to ----


def _load_storage(payload: bytes) -> Any:
    """Stands for ``torch.storage._load_from_bytes``, which would unpickle anything."""
    return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)


def _array_functions() -> dict[str, Callable]:
    """numpy's functions that pickled arrays and scalars refer to, by their names in numpy 1 and 2."""
    functions = {
        "multiarray._reconstruct": np.empty(0).__reduce__()[0],
        "multiarray.scalar": np.float32(0).__reduce__()[0],
        "numeric._frombuffer": np.zeros(1).__reduce_ex__(5)[0],
    }
    return {f"numpy.{core}.{name}": value for core in ("core", "_core") for name, value in functions.items()}


_DTYPE_CLASSES = tuple({type(np.dtype(code)) for code in np.typecodes["All"]})

_FUNCTIONS: dict[str, Callable] = {
    **_array_functions(),
    "_codecs.encode": _codecs.encode,
    "torch.storage._load_from_bytes": _load_storage,
    "torch._utils._rebuild_tensor": torch._utils._rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
}
_CLASSES: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "builtins.complex": complex,
    "__builtin__.set": set,
    "__builtin__.frozenset": frozenset,
    "__builtin__.complex": complex,
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    **{f"{cls.__module__}.{cls.__name__}": cls for cls in _DTYPE_CLASSES},
    **{str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)},
}


class _RestrictedUnpickler(pickle.Unpickler):
    """Knows the names above only."""

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name in _CLASSES:
            return _CLASSES[full_name]
        if full_name in _FUNCTIONS:
            # a pickle can set attributes of what it refers to: let it have a throw-away object
            return functools.partial(_FUNCTIONS[full_name])
        raise ForbiddenObjectError(full_name)


def _alias(full_name: str, function: Callable) -> Callable:
    """A function that torch's safe unpickler finds under ``full_name``."""

    def forward(*args):
        return function(*args)

    forward.__module__, _, forward.__qualname__ = full_name.rpartition(".")
    forward.__name__ = forward.__qualname__
    return forward


@contextmanager
def _arrays_allowed() -> Iterator[None]:
    """Let torch's safe unpickler build numpy arrays and scalars, of either numpy's names."""
    before = list(torch.serialization.get_safe_globals())  # torch 2.4 gives the list itself
    allowed = [_alias(name, function) for name, function in _array_functions().items()]
    plain = [_codecs.encode, np.ndarray, np.dtype, *_DTYPE_CLASSES, set, frozenset, complex]
    torch.serialization.add_safe_globals([*allowed, *plain])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


# ---- formats ----


def _read_torch(path: str, file: BinaryIO) -> Any:
    with _arrays_allowed():
        return torch.load(file, map_location="cpu", weights_only=True)


def _read_zipped_torch(path: str, file: BinaryIO) -> Any:
    if not zipfile.is_zipfile(path):
        raise pickle.UnpicklingError("its table of contents, which comes last, is missing")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("/constants.pkl") for name in names):
        raise CheckpointFileError(f"{path} is a TorchScript program, not a checkpoint with weights")
    return _read_torch(path, file)


def _read_pickle(path: str, file: BinaryIO) -> Any:
    return _RestrictedUnpickler(file, encoding="latin1").load()


def _read_safetensors(path: str, file: BinaryIO) -> Any:
    from safetensors.torch import load_file

    return load_file(path)


def _is_safetensors(head: bytes, size: int) -> bool:
    return head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= size - 8


def _choose_reader(path: str, head: bytes, size: int) -> Callable[[str, BinaryIO], Any]:
    """Judge by the content; the suffix lies often enough."""
    if size == 0:
        raise CheckpointFileError(f"{path} is empty; the download or the copy of it did not finish")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointFileError(f"{path} is a Git LFS pointer, not the weights; fetch them with 'git lfs pull'")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise CheckpointFileError(f"{path} is a web page, not a checkpoint; its address was wrong or needs a login")
    if head.startswith(b"PK\x03\x04"):
        return _read_zipped_torch
    if head.startswith(_LEGACY_TORCH_MAGIC):
        return _read_torch
    if _is_safetensors(head, size):
        return _read_safetensors
    if head.startswith(b"\x80") or path.endswith(".pkl"):
        return _read_pickle
    raise CheckpointFileError(f"{path} is no checkpoint: it is neither a torch, a pickle nor a safetensors file")


def load_checkpoint_file(path: str | os.PathLike) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Args:
        path: a file written by ``torch.save`` (``.pth``, ``.pt``, ``.bin``; new and legacy format), ``pickle``
            (``.pkl``; Python 2 too) or safetensors. The content decides, not the suffix.

    Returns:
        The dictionary that the file holds, as it is.

    Raises:
        FileNotFoundError: there is no such file.
        ForbiddenObjectError: the file refers to classes or functions beyond tensors, arrays and containers.
        CheckpointFileError: the file is damaged, is no checkpoint, or holds no dictionary.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    with open(path, "rb") as file:
        head = file.read(512)
        reader = _choose_reader(path, head, os.path.getsize(path))
        file.seek(0)
        try:
            content = reader(path, file)
        except ForbiddenObjectError as error:
            raise ForbiddenObjectError(_forbidden_text(path, str(error))) from None
        except (CheckpointFileError, OSError):
            raise
        except Exception as error:  # damaged data can raise anything; it is reported with its cause
            forbidden = re.search(r"(?i)unsupported (?:global: )?(?:global|class) ([\w.]+)", str(error))
            if isinstance(error, pickle.UnpicklingError) and forbidden:
                raise ForbiddenObjectError(_forbidden_text(path, forbidden.group(1))) from error
            _, _, detail = str(error).rpartition("WeightsUnpickler error: ")
            reason = detail.strip().splitlines()[0] if detail.strip() else type(error).__name__
            raise CheckpointFileError(f"{path} cannot be read; it is damaged or incomplete ({reason})") from error
    if not isinstance(content, dict):
        raise CheckpointFileError(f"{path} holds a {type(content).__name__}, not a dictionary of weights")
    return content


def _forbidden_text(path: str, name: str) -> str:
    return (
        f"{path} refers to {name}; loading it could run code, so only tensors, arrays, numbers, text and containers "
        "are read. If you trust the file, load it yourself and save its weights alone."
    )
