"""What all preparations share: processes, resuming, complete files, the command line, run-length codes."""

import json
import os

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_util

from mask2former_plugin.data.preparation import command_line, files
from mask2former_plugin.data.preparation.jobs import Options, collect, default_workers, run, write_files
from mask2former_plugin.data.preparation.regions import regions

QUIET = Options(progress=False)


def square(number):
    if number < 0:
        raise ValueError(f"{number} is negative")
    return number * number


def process_of(number):
    return os.getpid()


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order(workers):
    options = Options(workers=workers, progress=False)
    assert list(run(square, list(range(50)), options, "squares")) == [n * n for n in range(50)]
    assert list(run(square, [], options, "squares")) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_error_ends_the_run(workers):
    results = []
    with pytest.raises(ValueError, match="-1 is negative"):
        for result in run(square, [1, 2, -1, *range(100)], Options(workers=workers, progress=False), "squares"):
            results.append(result)
    assert results in ([1, 4], [])  # processes get several at a time


def test_work_is_done_in_other_processes():
    used = set(run(process_of, list(range(8)), Options(workers=2, progress=False), "processes"))
    assert os.getpid() not in used and 1 <= len(used) <= 2
    assert set(run(process_of, [1, 2], QUIET, "processes")) == {os.getpid()}
    assert 1 <= default_workers() <= os.cpu_count()


def test_progress_bar(capsys):
    list(run(square, [1, 2, 3], Options(progress=True), "squares"))
    assert "squares: 100%" in capsys.readouterr().err
    list(run(square, [1, 2, 3], QUIET, "squares"))
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------------------------------- journal


def test_collect_goes_on_after_an_error(tmp_path):
    journal = tmp_path / "x.jsonl"
    with pytest.raises(ValueError, match="negative"):
        collect(square, {"a": 2, "b": 3, "c": -1, "d": 4}, journal, QUIET, "squares")
    with journal.open("a") as file:
        file.write('["d", 1')  # a process was killed while it wrote
    made = []

    def counted(number):
        made.append(number)
        return square(number)

    jobs = {"d": 4, "c": 5, "b": 3, "a": 2}
    assert collect(counted, jobs, journal, QUIET, "squares") == [16, 25, 9, 4]
    assert made == [4, 5]
    assert [json.loads(line)[0] for line in journal.read_text().splitlines()] == ["a", "b", "d", "c"]
    assert collect(counted, jobs, journal, Options(overwrite=True, progress=False), "squares") == [16, 25, 9, 4]
    assert made == [4, 5, 4, 5, 3, 2]


def test_collect_makes_results_again_whose_file_is_missing(tmp_path):
    paths = {name: tmp_path / f"{name}.txt" for name in "ab"}

    def write(name):
        made.append(name)
        paths[name].write_text("content")
        return name

    made, jobs = [], {"a": "a", "b": "b"}
    for _ in range(2):
        assert collect(write, jobs, tmp_path / "x.jsonl", QUIET, "files", paths) == ["a", "b"]
    assert made == ["a", "b"]
    paths["a"].unlink()
    collect(write, jobs, tmp_path / "x.jsonl", QUIET, "files", paths)
    assert made == ["a", "b", "a"]


# --------------------------------------------------------------------------------------------------------------- files


def test_files_appear_complete_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "folder/image.png"
    array = np.arange(12, dtype=np.uint8).reshape(3, 4)
    files.write_image(path, array)
    np.testing.assert_array_equal(files.read_image(path), array)

    def stop(self, file, **_):
        file.write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        files.write_image(path, array + 1)
    with pytest.raises(KeyboardInterrupt):
        files.write_image(path.with_name("other.png"), array)
    assert [p.name for p in path.parent.iterdir()] == ["image.png"]
    np.testing.assert_array_equal(files.read_image(path), array)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_is_complete(tmp_path, suffix):
    path = tmp_path / f"image{suffix}"
    assert not files.is_complete(path)
    files.write_image(path, np.zeros((30, 30), dtype=np.uint8))
    assert files.is_complete(path)
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert files.is_complete(path) == (suffix == ".tif")  # whose end is like its middle
    path.write_bytes(b"")
    assert not files.is_complete(path)
    path.write_bytes(b"x")
    assert files.is_complete(path) == (suffix == ".tif")


def test_write_files_skips_what_is_there(tmp_path):
    made = []

    def write(path):
        made.append(path.name)
        path.write_text("content")

    jobs = {path: path for path in (tmp_path / "a.txt", tmp_path / "b.txt")}
    (tmp_path / "a.txt").write_text("mine")
    write_files(write, jobs, QUIET, "files")
    assert made == ["b.txt"] and (tmp_path / "a.txt").read_text() == "mine"
    write_files(write, jobs, Options(overwrite=True, progress=False), "files")
    assert made == ["b.txt", "a.txt", "b.txt"]


def test_checks_of_the_input(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    for name in ("a.jpg", "b.jpg", ".hidden.jpg", "c.png"):
        (tmp_path / "full" / name).write_text("x")
    files.require([tmp_path / "full", tmp_path / "full/a.jpg"], "the layout")
    with pytest.raises(FileNotFoundError, match="(?s)empty is empty.*the layout"):
        files.require([tmp_path / "full", tmp_path / "empty"], "the layout")
    with pytest.raises(FileNotFoundError, match="(?s)none does not exist.*the layout"):
        files.require([tmp_path / "none"], "the layout")
    assert files.stems(tmp_path / "full", ".jpg") == ["a", "b"]
    with pytest.raises(FileNotFoundError, match=r"full holds no files \*.tif"):
        files.stems(tmp_path / "full", ".tif")
    files.require_partners(["c"], tmp_path / "full", ".png")
    with pytest.raises(FileNotFoundError, match=r"full lacks \*.png for 8 images: a, b, d, e, f, and 3 more"):
        files.require_partners(list("abcdefghi"), tmp_path / "full", ".png")


# -------------------------------------------------------------------------------------------------------- command line


def test_command_line(tmp_path, monkeypatch):
    calls = []

    def prepare(*arguments):
        calls.append(arguments)

    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    command_line.main("text", prepare, {"train": 1, "val": 2}, [])
    arguments = ["--root", "/x", "--splits", "val", "--workers", "3", "--overwrite"]
    command_line.main("text", prepare, ("train", "val"), arguments)
    (root, splits, options), (other_root, other_splits, other_options) = calls
    assert (root, splits, options) == (tmp_path, ["train", "val"], Options(workers=default_workers()))
    assert (str(other_root), other_splits, other_options) == ("/x", ["val"], Options(workers=3, overwrite=True))
    for wrong in (["--splits", "test"], ["--workers", "0"]):
        with pytest.raises(SystemExit) as error:
            command_line.main("text", prepare, ("train", "val"), wrong)
        assert error.value.code == 2
    assert len(calls) == 2


def test_command_line_turns_errors_of_input_into_one_line():
    def interrupted(*_):
        raise KeyboardInterrupt

    def mistaken(*_):
        raise TypeError("a bug")

    with pytest.raises(SystemExit, match="goes on where"):
        command_line.main("text", interrupted, ["train"], [])
    with pytest.raises(TypeError, match="a bug"):  # of the program, not of the input
        command_line.main("text", mistaken, ["train"], [])

    def killed(*_):
        list(run(os._exit, [3, 3], Options(workers=2, progress=False), "exits"))

    with pytest.raises(SystemExit, match="a process was killed.*--workers"):
        command_line.main("text", killed, ["train"], [])


# -------------------------------------------------------------------------------------------------------------- regions


def test_regions_against_pycocotools():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, (7, 9)).repeat(2, axis=0)
    labels[:, 3] = 2  # a whole column joins the runs of its neighbours
    labels[-1, -1] = 9
    found = {region.label: region for region in regions(labels)}
    assert list(found) == [1, 2, 3, 9]
    for label, region in found.items():
        mask = labels == label
        code = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
        assert region.rle() == {"size": [14, 9], "counts": code["counts"].decode()}
        assert region.area == mask.sum()
        rows, columns = np.nonzero(mask)
        x, y, w, h = region.bbox
        assert (x, y) == (columns.min(), rows.min()) and (x + w - 1, y + h - 1) == (columns.max(), rows.max())


def test_regions_of_full_and_empty_maps():
    (region,) = regions(np.ones((3, 4), dtype=np.uint8))
    assert mask_util.decode(region.rle()).all() and region.bbox == [0, 0, 4, 3]
    assert json.dumps([region.area, region.bbox]) == "[12, [0, 0, 4, 3]]"
    assert list(regions(np.zeros((3, 4), dtype=np.uint8))) == []
