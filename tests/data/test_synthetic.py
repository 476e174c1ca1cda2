"""The generated dataset: a valid COCO panoptic, instance and semantic dataset that agrees with itself."""

import json

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from mask2former_plugin.data.synthetic import CATEGORIES, MANIFEST, SyntheticOptions, generate

OPTIONS = SyntheticOptions(train_images=12, val_images=5, height=90, width=120, seed=3)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("data") / "shapes", OPTIONS, progress=False)


@pytest.mark.parametrize("split, count", [("train", 12), ("val", 5)])
def test_three_annotations_tell_the_same(root, split, count, capsys):
    panoptic = json.loads((root / f"annotations/panoptic_{split}.json").read_text())
    coco = COCO(str(root / f"annotations/instances_{split}.json"))
    names = {c["id"]: index for index, c in enumerate(panoptic["categories"])}
    things = {c["id"] for c in panoptic["categories"] if c["isthing"]}
    assert len(panoptic["images"]) == len(panoptic["annotations"]) == count
    found_crowd_or_things = 0
    for image, annotation in zip(panoptic["images"], panoptic["annotations"]):
        picture = cv2.imread(str(root / split / image["file_name"]))
        assert picture.shape == (image["height"], image["width"], 3) == (90, 120, 3)
        rgb = cv2.imread(str(root / f"panoptic_{split}" / annotation["file_name"]))[:, :, ::-1].astype(np.int64)
        ids = rgb @ [1, 256, 65536]
        semantic = cv2.imread(str(root / f"panoptic_semseg_{split}" / annotation["file_name"]), cv2.IMREAD_UNCHANGED)
        assert set(np.unique(ids)) - {0} == {s["id"] for s in annotation["segments_info"]}
        assert (semantic == 255).sum() == (ids == 0).sum()
        instances = {(a["category_id"], a["area"], tuple(a["bbox"])): a for a in coco.imgToAnns[image["id"]]}
        for segment in annotation["segments_info"]:
            mask = ids == segment["id"]
            ys, xs = np.nonzero(mask)
            assert segment["area"] == mask.sum() >= 12
            assert segment["bbox"] == [xs.min(), ys.min(), xs.max() + 1 - xs.min(), ys.max() + 1 - ys.min()]
            assert set(np.unique(semantic[mask])) == {names[segment["category_id"]]}
            if segment["category_id"] in things:
                instance = instances[segment["category_id"], segment["area"], tuple(segment["bbox"])]
                decoded = coco.annToMask(instance).astype(bool)
                # polygons are kept where they give the mask back to 98 %
                assert (decoded & mask).sum() / (decoded | mask).sum() >= 0.98
                assert instance["iscrowd"] == segment["iscrowd"]
                found_crowd_or_things += 1
    assert found_crowd_or_things == len(coco.anns)


def test_it_has_what_it_promises(root):
    annotations = json.loads((root / "annotations/instances_train.json").read_text())["annotations"]
    assert {a["category_id"] for a in annotations} == {c.id for c in CATEGORIES if c.isthing}
    assert any(a["iscrowd"] for a in annotations) and not all(a["iscrowd"] for a in annotations)
    assert any(isinstance(a["segmentation"], list) for a in annotations)
    assert any(isinstance(a["segmentation"], dict) for a in annotations)
    assert min(a["area"] for a in annotations) < 100


def test_equal_options_give_equal_files_and_are_not_written_twice(root, tmp_path):
    again = generate(tmp_path / "again", OPTIONS, progress=False)
    for path in sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file()):
        assert (root / path).read_bytes() == (again / path).read_bytes(), path
    stamp = (again / MANIFEST).stat().st_mtime_ns
    generate(again, OPTIONS, progress=False)
    assert (again / MANIFEST).stat().st_mtime_ns == stamp


def test_other_options_replace_the_dataset(tmp_path):
    first = SyntheticOptions(train_images=2, val_images=1, height=64, width=64)
    root = generate(tmp_path / "d", first, progress=False)
    generate(root, SyntheticOptions(train_images=1, val_images=1, height=64, width=64), progress=False)
    assert len(list((root / "train").iterdir())) == 1


def test_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="no synthetic dataset"):
        generate(tmp_path / "mine", OPTIONS, progress=False)
    assert (tmp_path / "mine" / "photo.txt").read_text() == "keep me"
