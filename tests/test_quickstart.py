"""The quickstart: runs whole, and never mixes two runs."""

import argparse
import sys
from pathlib import Path

import cv2
import pytest

from mask2former_plugin.config import load_config
from mask2former_plugin.data.synthetic import MANIFEST, SyntheticOptions, manifest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import quickstart  # noqa: E402


def flags(resume=False, fresh=False):
    return argparse.Namespace(resume=resume, fresh=fresh)


@pytest.fixture
def earlier_run(tmp_path):
    """A folder with the config and a checkpoint of an earlier run, and that config."""
    folder = tmp_path / "run"
    folder.mkdir()
    cfg = load_config(ROOT / "configs/quickstart/mask2former.yaml", ["OUTPUT_DIR", str(folder)])
    (folder / "config.yaml").write_text(cfg.dump())
    (folder / "model_0000001.pth").write_text("weights")
    (folder / MANIFEST).write_text("images")
    return folder, cfg


def test_an_earlier_run_is_touched_on_request_only(earlier_run):
    folder, cfg = earlier_run
    with pytest.raises(SystemExit, match="earlier run; add --resume.*or --fresh"):
        quickstart.prepare_output(folder, flags(), cfg, "images")
    quickstart.prepare_output(folder, flags(resume=True), cfg, "images")
    assert (folder / "model_0000001.pth").read_text() == "weights"
    quickstart.prepare_output(folder, flags(fresh=True), cfg, "images")
    assert [path.name for path in folder.iterdir()] == [MANIFEST]


def test_a_run_is_resumed_with_its_own_config_only(earlier_run):
    folder, cfg = earlier_run
    cfg.SOLVER.MAX_ITER += 10  # more iterations are what resuming is for
    quickstart.prepare_output(folder, flags(resume=True), cfg, "images")
    cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES = 7
    with pytest.raises(SystemExit, match="another config .MODEL.MASK_FORMER.NUM_OBJECT_QUERIES."):
        quickstart.prepare_output(folder, flags(resume=True), cfg, "images")


def test_a_run_is_resumed_with_its_own_images_only(earlier_run):
    folder, cfg = earlier_run
    with pytest.raises(SystemExit, match="other images, images; give the same --images"):
        quickstart.prepare_output(folder, flags(resume=True), cfg, "other images")
    assert manifest(SyntheticOptions(train_images=3)) != manifest(SyntheticOptions(train_images=4))


def test_a_run_that_was_stopped_before_it_wrote_its_config_goes_on(earlier_run):
    folder, cfg = earlier_run
    (folder / "config.yaml").unlink()
    quickstart.prepare_output(folder, flags(resume=True), cfg, "images")


def test_nothing_to_resume(tmp_path):
    with pytest.raises(SystemExit, match="nothing to resume"):
        quickstart.prepare_output(tmp_path / "none", flags(resume=True), load_config(), "images")
    quickstart.prepare_output(tmp_path / "none", flags(), load_config(), "images")
    assert (tmp_path / "none" / MANIFEST).read_text() == "images"


@pytest.mark.parametrize("fresh", [False, True])
def test_foreign_files_are_never_deleted(tmp_path, fresh):
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "config.yaml").write_text("SEED: 1")  # as every Detectron2 training has one
    with pytest.raises(SystemExit, match="no quickstart run"):
        quickstart.prepare_output(tmp_path, flags(fresh=fresh), load_config(), "images")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_what_the_user_can_put_right_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", "")
    words = ["--data", str(tmp_path), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="error: .*did you mean SOLVER.MAX_ITER"):
        quickstart.main([*words, "SOLVER.MAX_ITR", "1"])
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match="error: .*is no synthetic dataset"):
        quickstart.main(words)


def test_the_whole_way(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DETECTRON2_DATASETS", "")  # restored afterwards: the quickstart sets it
    small = ["SOLVER.MAX_ITER", "1", "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0", "MODEL.MASK_FORMER.TRAIN_NUM_POINTS", "64"]
    output = tmp_path / "out"
    quickstart.main(["--data", str(tmp_path / "data"), "--output", str(output), "--images", "2", "--pictures", "1", *small])
    printed = capsys.readouterr().out
    for metric in ("PQ", "AP", "mIoU"):
        assert f"\n  {metric} " in printed
    for path in (output / "model_final.pth", output / "metrics.json", output / "log.txt", output / "inference" / "predictions.json"):
        assert path.is_file(), path
    assert cv2.imread(str(output / "pictures" / "000001.png")).shape[1] == 3 * 320 + 2 * 6
    assert str(output / "pictures" / "overview.png") in printed
