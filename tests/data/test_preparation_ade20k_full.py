"""ADE20K-Full's preparation on a tree of the published layout."""

import io
import pickle

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from preparation_scripts import load, registered_at, run_script, times

SCRIPT = "prepare_ade20k_full_sem_seg.py"
# class ids of the release with their labels among the 847: the first, some between, the last
LABELS = {2978: 0, 312: 1, 976: 5, 1831: 11, 3148: 846, 0: 65535, 1: 65535, 3147: 65535}
IMAGES = {
    "ADE_train_00000001": (40, 30),
    "ADE_train_00000002": (520, 700),
    "ADE_frame_00000003": (24, 24),
    "ADE_val_00000001": (1030, 515),
}


def class_ids(height, width):
    """Rectangles of all the classes above."""
    ids = np.resize(list(LABELS), ((height + 9) // 10, (width + 6) // 7))
    return ids.repeat(10, 0).repeat(7, 1)[:height, :width]


def photo(height, width):
    y, x = np.mgrid[:height, :width]
    return np.stack([x % 256, y % 256, (x + y) % 256], axis=-1).astype(np.uint8)


def jpeg(pixels, **options):
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG", **options)
    return data.getvalue()


@pytest.fixture
def tree(tmp_path):
    index = {"filename": [], "folder": [], "objectPresence": np.zeros((2, 4)), "scene": ["/street"] * 4}
    for stem, (height, width) in IMAGES.items():
        split = "validation" if "val" in stem else "training"
        folder = f"ADE20K_2021_17_01/images/ADE/{split}/urban/street"
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / f"{stem}.jpg").write_bytes(jpeg(photo(height, width), quality=95))
        ids = class_ids(height, width)
        instances = np.arange(width) // 20 % 255 * np.ones((height, 1), dtype=int)
        rgb = np.stack([ids // 256 * 10 + ids % 10, ids % 256, instances], axis=-1).astype(np.uint8)
        Image.fromarray(rgb).save(tmp_path / folder / f"{stem}_seg.png")
        index["filename"].append(f"{stem}.jpg")
        index["folder"].append(folder)
    (tmp_path / "ADE20K_2021_17_01/index_ade20k.pkl").write_bytes(pickle.dumps(index))
    return tmp_path


def folders(root, split):
    return (root / "ADE20K_2021_17_01" / kind / split for kind in ("images_detectron2", "annotations_detectron2"))


def test_files(tree):
    run_script(SCRIPT, tree)
    images, labels = folders(tree, "training")
    assert sorted(p.name for p in images.iterdir()) == [f"{s}.jpg" for s in sorted(IMAGES) if "val" not in s]
    assert sorted(p.name for p in labels.iterdir()) == [f"{s}.tif" for s in sorted(IMAGES) if "val" not in s]

    # what is small keeps its size, yet is written anew
    source = load(tree / "ADE20K_2021_17_01/images/ADE/training/urban/street/ADE_train_00000001.jpg")
    assert (images / "ADE_train_00000001.jpg").read_bytes() == jpeg(source)
    made = load(labels / "ADE_train_00000001.tif")
    assert made.dtype == np.uint16
    np.testing.assert_array_equal(made, np.vectorize(LABELS.get)(class_ids(40, 30)))


@pytest.mark.parametrize(("stem", "size"), [("ADE_train_00000002", (512, 689)), ("ADE_val_00000001", (1024, 512))])
def test_large_images_become_512_on_the_shorter_side(tree, stem, size):
    run_script(SCRIPT, tree)
    images, labels = folders(tree, "validation" if "val" in stem else "training")
    height, width = IMAGES[stem]
    source = load(tree / f"ADE20K_2021_17_01/images/ADE/{labels.name}/urban/street/{stem}.jpg")
    assert (images / f"{stem}.jpg").read_bytes() == jpeg(cv2.resize(source, size[::-1], interpolation=cv2.INTER_LINEAR))
    made = load(labels / f"{stem}.tif")
    assert made.shape == size
    expected = np.vectorize(LABELS.get)(class_ids(height, width))
    rows, columns = (np.floor(np.arange(n) * s / n).astype(int) for n, s in zip(size, (height, width)))
    np.testing.assert_array_equal(made, expected[rows][:, columns])


def test_registered_dataset(tree):
    run_script(SCRIPT, tree, "--splits", "val")
    assert not next(folders(tree, "training")).exists()
    with registered_at(tree, "ade20k_full_sem_seg_train", "ade20k_full_sem_seg_val"):
        (sample,) = DatasetCatalog.get("ade20k_full_sem_seg_val")
        metadata = MetadataCatalog.get("ade20k_full_sem_seg_val")
    classes = set(np.unique(load(sample["sem_seg_file_name"]))) - {metadata.ignore_label}
    assert classes == {0, 1, 5, 11, 846} and len(metadata.stuff_classes) == 847


def test_a_second_run_makes_what_is_missing(tree):
    run_script(SCRIPT, tree)
    images, labels = folders(tree, "training")
    before = times(tree)
    content = (images / "ADE_train_00000001.jpg").read_bytes()
    (images / "ADE_train_00000001.jpg").write_bytes(content[:-40])
    (labels / "ADE_frame_00000003.tif").write_bytes(b"")
    run_script(SCRIPT, tree)
    assert (images / "ADE_train_00000001.jpg").read_bytes() == content
    after = times(tree)
    made = {path.name for path in before if after[path] != before[path]}
    assert made == {"ADE_train_00000001.jpg", "ADE_frame_00000003.tif"}


def test_errors(tree, tmp_path):
    with pytest.raises(SystemExit, match="(?s)nowhere.* does not exist.*index_ade20k.pkl"):
        run_script(SCRIPT, tmp_path / "nowhere")
    base = tree / "ADE20K_2021_17_01"
    (base / "images/ADE/training/urban/street/ADE_train_00000002_seg.png").unlink()
    with pytest.raises(SystemExit, match="1 files of .*index_ade20k.pkl do not exist, first .*_00000002_seg.png"):
        run_script(SCRIPT, tree)
    (base / "index_ade20k.pkl").write_bytes(pickle.dumps({"folder": []}))
    with pytest.raises(SystemExit, match="is not ADE20K's index: it has no 'filename'"):
        run_script(SCRIPT, tree)
    (base / "index_ade20k.pkl").write_bytes(pickle.dumps({"filename": print}))
    with pytest.raises(SystemExit, match="index_ade20k.pkl refers to builtins.print"):
        run_script(SCRIPT, tree)
