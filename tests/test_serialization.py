"""Checkpoint files of all formats come back equal; files that refer to code, or are none, are refused by name."""

import argparse
import collections
import io
import os
import pickle
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mask2former_plugin.serialization import CheckpointFileError, ForbiddenObjectError, load_checkpoint_file


def make_content():
    return {
        "model": collections.OrderedDict(
            weight=torch.rand(3, 2),
            half=torch.rand(4).to(torch.bfloat16),
            steps=torch.tensor(7),
            strided=torch.rand(4, 6)[::2, 1::2],
            parameter=torch.nn.Parameter(torch.rand(2)),
        ),
        "float32": np.random.rand(2, 3).astype("float32"),
        "fortran": np.asfortranarray(np.random.rand(3, 4)),
        "bool": np.array([True, False]),
        "int16": np.arange(5, dtype=np.int16),
        "big_endian": np.arange(3, dtype=">f8"),
        "text": np.array(["a", "bcd"]),
        "objects": np.array([1, "x", None], dtype=object),
        "scalar": np.float64(3.25),
        "int_scalar": np.int32(-4),
        "plain": {"list": [1, 2.5, None, True], "tuple": (1, ("a",)), "bytes": b"\x00\xff", "size": torch.Size([1, 2])},
        "sets": ({1, 2}, frozenset({3}), 1 + 2j),
        "dtype": torch.float16,
    }


def assert_same(actual, expected):
    if isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected)
        assert isinstance(actual, torch.nn.Parameter) == isinstance(expected, torch.nn.Parameter)
    elif isinstance(expected, np.ndarray):
        native = expected.dtype.newbyteorder("=")  # numpy swaps bytes while it reads
        assert actual.dtype.newbyteorder("=") == native and np.array_equal(actual, expected)
    elif isinstance(expected, dict):
        assert type(actual) is type(expected) and list(actual) == list(expected)
        for key in expected:
            assert_same(actual[key], expected[key])
    else:
        assert type(actual) is type(expected) and actual == expected


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", ["pth", "pt", "bin", "pkl"])
def test_torch_files(tmp_path, zipped, suffix):
    content = make_content()
    path = tmp_path / f"file.{suffix}"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert_same(load_checkpoint_file(path), content)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles(tmp_path, protocol):
    content = make_content()
    path = tmp_path / "file.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    assert_same(load_checkpoint_file(str(path)), content)


def python2_pickle(array: np.ndarray) -> bytes:
    """``{"blobs": {"conv1_w": array}}`` as Python 2 with numpy 1 wrote it, byte by byte."""
    raw = array.tobytes()

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    return b"".join(
        [
            b"\x80\x02}",
            text(b"blobs") + b"}" + text(b"conv1_w"),
            b"cnumpy.core.multiarray\n_reconstruct\n",
            b"cnumpy\nndarray\n" + b"K\x00\x85" + text(b"b") + b"\x87R",
            b"(K\x01" + b"".join(b"K" + bytes([n]) for n in array.shape) + b"\x86",
            b"cnumpy\ndtype\n" + text(b"f4") + b"K\x00K\x01\x87R",
            b"(K\x03" + text(b"<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",
            b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb",
            b"ss.",
        ]
    )


def test_pickles_of_python_2(tmp_path):
    array = np.random.rand(3, 4).astype("<f4")
    path = tmp_path / "R-50.pkl"
    path.write_bytes(python2_pickle(array))
    assert_same(load_checkpoint_file(path), {"blobs": {"conv1_w": array}})


@pytest.mark.parametrize("core", ["core", "_core"])
def test_arrays_of_either_numpy(tmp_path, core):
    """numpy 2 renamed the module that pickled arrays refer to."""
    content = {"a": np.arange(4.0), "s": np.float32(2)}
    raw = pickle.dumps(content, protocol=2)
    own = np.empty(0).__reduce__()[0].__module__.split(".")[1]
    raw = raw.replace(f"cnumpy.{own}.multiarray\n".encode(), f"cnumpy.{core}.multiarray\n".encode())
    path = tmp_path / "file.pkl"
    path.write_bytes(raw)
    assert_same(load_checkpoint_file(path), content)

    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    renamed = buffer.getvalue().replace(f"cnumpy.{own}.multiarray\n".encode(), f"cnumpy.{core}.multiarray\n".encode())
    path = tmp_path / "file.pth"
    path.write_bytes(renamed)
    assert_same(load_checkpoint_file(path), content)


def test_safetensors_by_content_and_suffix(tmp_path):
    content = {"a.weight": torch.rand(2, 3), "b": torch.arange(4), "h": torch.rand(2).to(torch.bfloat16)}
    for name in ("model.safetensors", "model.pth"):
        save_file(content, tmp_path / name)
        loaded = load_checkpoint_file(tmp_path / name)
        assert sorted(loaded) == sorted(content)
        for key, value in content.items():
            assert_same(loaded[key], value)


class Custom:
    def __reduce__(self):
        return os.mkdir, (os.environ["VICTIM"],)


def write(path, content, how):
    if how == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_code_is_refused_by_name_and_does_not_run(tmp_path, monkeypatch, how):
    victim = tmp_path / "made"
    monkeypatch.setenv("VICTIM", str(victim))
    path = tmp_path / ("file.pkl" if how == "pickle" else "file.pth")
    for content, name in (
        (Custom(), f"{os.mkdir.__module__}.mkdir"),
        (argparse.Namespace(a=1), "argparse.Namespace"),
        (collections.Counter("ab"), "collections.Counter"),
        (getattr, "builtins.getattr|__builtin__.getattr|getattr"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    ):
        if how != "pickle" and isinstance(content, collections.Counter):
            continue  # torch's own loader allows counters
        write(path, {"model": {}, "extra": content}, how)
        with pytest.raises(ForbiddenObjectError, match=f"{path} refers to ({name})"):
            load_checkpoint_file(path)
    assert not victim.exists()


def test_a_storage_inside_a_pickle_cannot_carry_code(tmp_path, monkeypatch):
    """Plain pickles of tensors hold files of torch.save, which torch itself would read without any check."""
    victim = tmp_path / "made"
    monkeypatch.setenv("VICTIM", str(victim))
    inner = io.BytesIO()
    torch.save(Custom(), inner, _use_new_zipfile_serialization=False)
    payload = inner.getvalue()
    call = b"ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(payload)) + payload + b"\x85R"
    raw = b"\x80\x03}X\x01\x00\x00\x00a" + call + b"s."
    path = tmp_path / "file.pkl"
    path.write_bytes(raw)
    with pytest.raises(ForbiddenObjectError, match="mkdir"):
        load_checkpoint_file(path)
    assert not victim.exists()


def test_a_pickle_cannot_change_what_it_refers_to(tmp_path):
    name = torch._utils._rebuild_tensor_v2.__name__
    raw = f"\x80\x02ctorch._utils\n{name}\n}}U\x07changedK\x01sb.".encode("latin1")
    path = tmp_path / "file.pkl"
    path.write_bytes(raw)
    with pytest.raises(CheckpointFileError):
        load_checkpoint_file(path)
    assert not hasattr(torch._utils._rebuild_tensor_v2, "changed")


def test_loading_leaves_torchs_list_of_safe_objects_as_it_was(tmp_path):
    before = list(torch.serialization.get_safe_globals())  # torch 2.4 gives the list itself
    torch.save({"a": np.zeros(2)}, tmp_path / "file.pth")
    load_checkpoint_file(tmp_path / "file.pth")
    write(tmp_path / "bad.pth", {"a": argparse.Namespace()}, "zip")
    with pytest.raises(ForbiddenObjectError):
        load_checkpoint_file(tmp_path / "bad.pth")
    assert set(torch.serialization.get_safe_globals()) == set(before)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"\n  <html><body>404</body></html>", "web page"),
        (b"just some text " * 50, "is no checkpoint"),
        (b"\x00" * 1000, "is no checkpoint"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path, raw, reason):
    path = tmp_path / "model_final.pth"
    path.write_bytes(raw)
    with pytest.raises(CheckpointFileError, match=reason) as error:
        load_checkpoint_file(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle", "safetensors"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.97])
def test_truncated_files_are_damaged(tmp_path, how, share):
    path = tmp_path / ("file.pkl" if how == "pickle" else "file.pth")
    content = {"a": torch.rand(50, 50), "b": torch.rand(3)}
    if how == "safetensors":
        save_file(content, path)
    else:
        write(path, content, how)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(CheckpointFileError, match="damaged or incomplete") as error:
        load_checkpoint_file(path)
    assert str(path) in str(error.value)


def test_other_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth does not exist"):
        load_checkpoint_file(tmp_path / "nothing.pth")
    with pytest.raises(FileNotFoundError):
        load_checkpoint_file(tmp_path)
    torch.save([torch.rand(2)], tmp_path / "list.pth")
    with pytest.raises(CheckpointFileError, match=r"list\.pth holds a list, not a dictionary"):
        load_checkpoint_file(tmp_path / "list.pth")
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.rand(1, 2)), tmp_path / "script.pth")
    with pytest.raises(CheckpointFileError, match="TorchScript"):
        load_checkpoint_file(tmp_path / "script.pth")
