"""The demo on photos and a video, and the pictures that compare prediction and ground truth."""

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances

import mask2former_plugin  # noqa: F401
from mask2former_plugin.config import load_config
from mask2former_plugin.data.datasets.custom import register_custom_datasets
from mask2former_plugin.data.synthetic import SyntheticOptions, generate
from mask2former_plugin.engine import Trainer
from mask2former_plugin.visualization import compare, draw_prediction, save_picture, side_by_side, stack

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import demo  # noqa: E402

CONFIG = str(ROOT / "configs" / "quickstart" / "mask2former.yaml")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Options that name a checkpoint of the quickstart's model (random weights) and its generated dataset."""
    root = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(root))
        generate(root / "quickstart", SyntheticOptions(train_images=1, val_images=2, height=48, width=64), progress=False)
        cfg = load_config(CONFIG, ["MODEL.DEVICE", "cpu"])
        register_custom_datasets(cfg)
        torch.save({"model": Trainer.build_model(cfg).state_dict()}, root / "model.pth")
        yield root, ["--config-file", CONFIG], ["--opts", "MODEL.WEIGHTS", str(root / "model.pth"), "MODEL.DEVICE", "cpu"]


def test_photos_to_a_folder(trained, tmp_path):
    root, config, opts = trained
    demo.main([*config, "--input", str(root / "quickstart/val/*.jpg"), "--output", str(tmp_path / "out"), *opts])
    written = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert written == ["000001.png", "000002.png"]
    assert cv2.imread(str(tmp_path / "out" / "000001.png")).shape == (48, 64, 3)


def test_one_photo_to_a_file(trained, tmp_path):
    root, config, opts = trained
    demo.main([*config, "--input", str(root / "quickstart/val/000001.jpg"), "--output", str(tmp_path / "one.png"), *opts])
    assert cv2.imread(str(tmp_path / "one.png")) is not None


def test_video(trained, tmp_path):
    root, config, opts = trained
    clip = str(tmp_path / "clip.avi")
    writer = cv2.VideoWriter(clip, cv2.VideoWriter_fourcc(*"MJPG"), 5.0, (64, 48))
    for name in ("000001.jpg", "000002.jpg", "000001.jpg"):
        writer.write(cv2.imread(str(root / "quickstart/val" / name)))
    writer.release()
    demo.main([*config, "--video-input", clip, "--output", str(tmp_path / "out.mp4"), *opts])
    result = cv2.VideoCapture(str(tmp_path / "out.mp4"))
    assert int(result.get(cv2.CAP_PROP_FRAME_COUNT)) == 3


@pytest.mark.parametrize(
    "source, message",
    [(["--input", "nothing/*.jpg"], "no image matches nothing"), (["--video-input", "nothing.mp4"], "nothing.mp4 can't be opened")],
)
def test_missing_input_is_one_sentence(trained, source, message):
    _, config, opts = trained
    with pytest.raises(SystemExit, match=message):
        demo.main([*config, *source, *opts])


def test_an_image_that_is_none_is_one_sentence(trained, tmp_path):
    root, config, opts = trained
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(SystemExit, match="error: .*text.jpg"):
        demo.main([*config, "--input", str(tmp_path / "text.jpg"), "--output", str(tmp_path / "out"), *opts])


def test_a_name_with_pattern_characters_is_a_name(trained, tmp_path):
    root, config, opts = trained
    photo = tmp_path / "photo[1].jpg"
    photo.write_bytes((root / "quickstart/val/000001.jpg").read_bytes())
    demo.main([*config, "--input", str(photo), "--output", str(tmp_path / "out"), *opts])
    assert (tmp_path / "out" / "photo[1].png").is_file()


def test_equal_names_of_several_folders_do_not_overwrite_each_other(trained, tmp_path):
    root, config, opts = trained
    photos = [str(root / f"quickstart/{split}/000001.jpg") for split in ("train", "val")]
    demo.main([*config, "--input", *photos, "--output", str(tmp_path / "out"), *opts])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["000001.png", "000001_2.png"]


def test_saved_pictures_are_rgb_and_failures_are_errors(tmp_path):
    picture = np.zeros((2, 3, 3), dtype=np.uint8)
    picture[..., 0] = 200
    save_picture(tmp_path / "new" / "red.png", picture)
    assert (cv2.imread(str(tmp_path / "new" / "red.png")) == (0, 0, 200)).all()
    with pytest.raises(OSError, match="'?.xyz is no picture format"):
        save_picture(tmp_path / "red.xyz", picture)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(OSError, match="folder.png can't be written"):
        save_picture(tmp_path / "folder.png", picture)


def test_an_output_that_is_no_picture_or_video_is_one_sentence(trained, tmp_path):
    root, config, opts = trained
    photo = str(root / "quickstart/val/000001.jpg")
    with pytest.raises(SystemExit, match="error: .*one.xyz can't be written"):
        demo.main([*config, "--input", photo, "--output", str(tmp_path / "one.xyz"), *opts])
    clip = str(tmp_path / "clip.avi")
    writer = cv2.VideoWriter(clip, cv2.VideoWriter_fourcc(*"MJPG"), 5.0, (64, 48))
    writer.write(cv2.imread(photo))
    writer.release()
    with pytest.raises(SystemExit, match="error: the video .*out.mp4 can't be written"):
        demo.main([*config, "--video-input", clip, "--output", str(tmp_path / "missing" / "out.mp4"), *opts])


def test_missing_weights_are_one_sentence(trained):
    with pytest.raises(SystemExit, match="no weights"):
        demo.main(["--config-file", CONFIG, "--input", "x.jpg", "--opts", "MODEL.DEVICE", "cpu"])


@pytest.fixture
def metadata():
    name = "pictures_of_two_classes"
    data = MetadataCatalog.get(name)
    data.set(thing_classes=["cup", "hat"], thing_colors=[(250, 0, 0), (0, 0, 250)], stuff_classes=["cup", "hat"])
    yield data
    MetadataCatalog.remove(name)


def instances(scores):
    result = Instances((120, 240))
    masks = torch.zeros(len(scores), 120, 240, dtype=torch.bool)
    for index in range(len(scores)):
        masks[index, 20:110, 10 + 120 * index : 90 + 120 * index] = True
    result.pred_masks, result.scores = masks, torch.tensor(scores)
    result.pred_classes = torch.zeros(len(scores), dtype=torch.int64)
    result.pred_boxes = Boxes(torch.tensor([[10.0 + 120 * i, 20, 90 + 120 * i, 110] for i in range(len(scores))]))
    return result


def test_confidence_threshold_hides_instances(metadata):
    image = np.full((120, 240, 3), 128, dtype=np.uint8)
    output = {"instances": instances([0.9, 0.2])}
    all_drawn = draw_prediction(image, output, metadata)
    one_drawn = draw_prediction(image, output, metadata, min_score=0.5)
    first, second = (slice(60, 100), slice(20, 80)), (slice(60, 100), slice(150, 200))  # inside the masks, away from the labels
    assert np.abs(all_drawn[second].astype(int) - 128).max() > 20
    assert np.abs(one_drawn[second].astype(int) - 128).max() <= 2
    assert np.abs(one_drawn[first].astype(int) - 128).max() > 20


def test_semantic_output_is_drawn_at_scale(metadata):
    scores = torch.zeros(2, 40, 60)
    scores[1, :, 30:] = 1
    picture = draw_prediction(np.zeros((40, 60, 3), dtype=np.uint8), {"sem_seg": scores}, metadata, scale=2.0)
    assert picture.shape == (80, 120, 3) and picture.dtype == np.uint8


def test_nothing_to_draw_is_explained(metadata):
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_prediction(np.zeros((4, 4, 3), dtype=np.uint8), {}, metadata)


def test_layout_of_the_pictures():
    row = side_by_side({"a": np.zeros((10, 20, 3), np.uint8), "b": np.full((10, 30, 3), 9, np.uint8)})
    assert row.shape[1] == 20 + 6 + 30 and (row[-10:, :20] == 0).all() and (row[-10:, 26:] == 9).all()
    column = stack([row, row[:, :20]])
    assert column.shape[1] == row.shape[1] and (column[-12:-6, 30:] == 255).all()


def test_compare_puts_three_pictures_in_a_row(trained):
    root, _, _ = trained
    from detectron2.data import DatasetCatalog

    record = DatasetCatalog.get("quickstart_val")[0]
    ids = torch.ones(48, 64, dtype=torch.int32)
    output = {"panoptic_seg": (ids, [{"id": 1, "isthing": False, "category_id": 5}])}
    picture = compare(record, output, MetadataCatalog.get("quickstart_val"), scale=2.0)
    assert picture.shape[1] == 3 * 128 + 2 * 6 and picture.shape[0] > 96
