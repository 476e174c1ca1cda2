"""COCO's label maps from panoptic annotations, and COCO-Stuff 10k, on trees of the published layout."""

import sys
from unittest import mock

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from preparation_scripts import load, panoptic_png, read_json, registered_at, run_script, save, times, write_json

PANOPTIC = "prepare_coco_semantic_annos_from_panoptic_annos.py"
STUFF_10K = "prepare_coco_stuff_10k_v1.0_sem_seg.py"
# category id, contiguous id, segment id: person, toothbrush (the last thing), banner (the first stuff), rug (the last)
SEGMENTS = ((1, 0, 5), (90, 79, 70_000), (92, 80, 256), (200, 132, 0xFFFFFF))


def segment_map():
    """Five columns of two pixels, the last one without a segment."""
    return np.repeat([[segment_id for _, _, segment_id in SEGMENTS] + [0]], 3, axis=0).repeat(2, axis=1)


@pytest.fixture
def panoptic_tree(tmp_path):
    for split in ("train2017", "val2017"):
        segments = [{"id": s, "category_id": c, "iscrowd": int(c == 90), "area": 6} for c, _, s in SEGMENTS]
        images, annotations = [], []
        for image_id in (139, 285):
            stem = f"{image_id:012d}"
            save(tmp_path / f"coco/panoptic_{split}/{stem}.png", panoptic_png(segment_map()))
            save(tmp_path / f"coco/{split}/{stem}.jpg", np.zeros((3, 10, 3)))
            images.append({"id": image_id, "file_name": f"{stem}.jpg", "height": 3, "width": 10})
            annotations.append({"image_id": image_id, "file_name": f"{stem}.png", "segments_info": segments})
        content = {"images": images, "annotations": annotations, "categories": COCO_CATEGORIES}
        write_json(tmp_path / f"coco/annotations/panoptic_{split}.json", content)
    return tmp_path


def test_label_maps_from_panoptic(panoptic_tree):
    run_script(PANOPTIC, panoptic_tree, workers=2)
    expected = np.repeat([[0, 79, 80, 132, 255]], 3, axis=0).repeat(2, axis=1)
    for split in ("train", "val"):
        folder = panoptic_tree / f"coco/panoptic_semseg_{split}2017"
        assert sorted(path.name for path in folder.iterdir()) == ["000000000139.png", "000000000285.png"]
        made = load(folder / "000000000285.png")
        assert made.dtype == np.uint8
        np.testing.assert_array_equal(made, expected)
    before = times(panoptic_tree)
    run_script(PANOPTIC, panoptic_tree)
    assert times(panoptic_tree) == before
    name = "coco_2017_val_panoptic_with_sem_seg"
    with registered_at(panoptic_tree, name):
        sample = DatasetCatalog.get(name)[0]
    labels = load(sample["sem_seg_file_name"])
    for segment in sample["segments_info"]:
        assert (labels == segment["category_id"]).sum() == 6


def test_errors_of_panoptic(panoptic_tree, tmp_path):
    message = r"(?s)none/coco/annotations/panoptic_val2017.json does not exist.*\{train,val\}2017.json"
    with pytest.raises(SystemExit, match=message):
        run_script(PANOPTIC, tmp_path / "none", "--splits", "val")
    png = panoptic_tree / "coco/panoptic_val2017/000000000285.png"
    png.unlink()
    with pytest.raises(SystemExit, match="panoptic_val2017 lacks .* for 1 images: 000000000285"):
        run_script(PANOPTIC, panoptic_tree)
    assert not (panoptic_tree / "coco/panoptic_semseg_train2017").exists()
    path = panoptic_tree / "coco/annotations/panoptic_val2017.json"
    content = read_json(path)
    content["annotations"][1]["segments_info"][2]["category_id"] = 83
    write_json(path, content)
    with pytest.raises(SystemExit, match="000000000285.png: segment 256 has the category_id 83, .*133 categories"):
        run_script(PANOPTIC, panoptic_tree)
    write_json(path, {"images": []})
    with pytest.raises(SystemExit, match="panoptic_val2017.json is no panoptic JSON: it has no 'annotations'"):
        run_script(PANOPTIC, panoptic_tree)


# ------------------------------------------------------------------------------------------------------- COCO-Stuff 10k

LISTS = {
    "train": ["COCO_train2014_000000000077", "COCO_train2014_000000000194"],
    "test": ["COCO_train2014_000000000283"],
}
# values of the MATLAB files and labels: unlabelled, the first class (person), another one, the last (wood)
VALUES = {1: 255, 2: 0, 80: 78, 172: 170}


@pytest.fixture
def stuff_tree(tmp_path):
    h5py = pytest.importorskip("h5py")
    base = tmp_path / "coco/coco_stuff_10k"
    for split, stems in LISTS.items():
        (base / "imageLists").mkdir(parents=True, exist_ok=True)
        (base / f"imageLists/{split}.txt").write_text("".join(f"{stem}\n" for stem in stems))
        for number, stem in enumerate(stems):
            save(base / f"images/{stem}.jpg", np.full((4, 6, 3), 40 * number))
            labels = np.resize(list(VALUES), 24).reshape(4, 6)
            labels[0] = 2  # not symmetric
            (base / "annotations").mkdir(exist_ok=True)
            with h5py.File(base / f"annotations/{stem}.mat", "w") as file:
                file["S"] = labels.T.astype(np.uint16)  # MATLAB: columns first
    return tmp_path


def test_stuff_10k(stuff_tree):
    run_script(STUFF_10K, stuff_tree)
    base = stuff_tree / "coco/coco_stuff_10k"
    expected = np.vectorize(VALUES.get)(np.resize(list(VALUES), 24).reshape(4, 6))
    expected[0] = 0
    for split, stems in LISTS.items():
        assert sorted(path.stem for path in (base / f"images_detectron2/{split}").iterdir()) == stems
        for stem in stems:
            image = base / f"images_detectron2/{split}/{stem}.jpg"
            assert image.read_bytes() == (base / f"images/{stem}.jpg").read_bytes()
            made = load(base / f"annotations_detectron2/{split}/{stem}.png")
            assert made.dtype == np.uint8
            np.testing.assert_array_equal(made, expected)
    before = times(stuff_tree)
    run_script(STUFF_10K, stuff_tree)
    assert times(stuff_tree) == before
    name = "coco_2017_test_stuff_10k_sem_seg"
    with registered_at(stuff_tree, name):
        (sample,) = DatasetCatalog.get(name)
    assert sample["file_name"].endswith("images_detectron2/test/COCO_train2014_000000000283.jpg")


def test_errors_of_stuff_10k(stuff_tree, tmp_path):
    with pytest.raises(SystemExit, match="(?s)images does not exist.*coco/coco_stuff_10k/.*imageLists"):
        run_script(STUFF_10K, tmp_path / "none")
    base = stuff_tree / "coco/coco_stuff_10k"
    import h5py

    for wrong in (0, 173):
        with h5py.File(base / "annotations/COCO_train2014_000000000283.mat", "w") as file:
            file["S"] = np.array([[2, wrong]])
        with pytest.raises(SystemExit, match=rf"000000000283.mat has the labels .*{wrong}.* release 1.0 are 1 … 172"):
            run_script(STUFF_10K, stuff_tree, "--splits", "test")
    (base / "annotations/COCO_train2014_000000000283.mat").write_bytes(b"MATLAB 5.0 MAT-file")
    with pytest.raises(SystemExit, match="000000000283.mat is no MATLAB 7.3 file with a label map S"):
        run_script(STUFF_10K, stuff_tree, "--splits", "test")
    (base / "annotations/COCO_train2014_000000000283.mat").unlink()
    with pytest.raises(SystemExit, match="annotations lacks .*mat for 1 images: COCO_train2014_000000000283"):
        run_script(STUFF_10K, stuff_tree)


def test_stuff_10k_without_h5py(tmp_path):
    with mock.patch.dict(sys.modules, {"h5py": None}), pytest.raises(SystemExit, match="pip install h5py"):
        run_script(STUFF_10K, tmp_path)
