"""The pictures of the tools: they exist, have the right size, and show the colours of what is there."""

import json

import cv2
import numpy as np
import pytest
import torch
import visualize_data
import visualize_json_results
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BitMasks, Instances, PolygonMasks

from mask2former_plugin.visualization import draw_sample, indexed_by_contiguous_id

MAPPERS = (
    "mask_former_semantic",
    "mask_former_panoptic",
    "mask_former_instance",
    "coco_instance_lsj",
    "coco_panoptic_lsj",
    "detr_panoptic",
)


@pytest.mark.parametrize("mapper", MAPPERS)
def test_samples_of_every_mapper(tiny, mapper, tmp_path):
    arguments = ["--config-file", tiny.config, "--output-dir", str(tmp_path), "--num-images", "3"]
    overrides = ["INPUT.DATASET_MAPPER_NAME", mapper, "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MAX_SIZE_TRAIN", "96"]
    if "instance" in mapper:
        overrides += ["DATASETS.TRAIN", "('tiny_instances',)", "DATASETS.TEST", "()"]
        overrides += ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "4"]
    paths = visualize_data.main([*arguments, *overrides])
    assert len(paths) == 3
    for path in paths:
        picture = cv2.imread(str(path))
        width = (picture.shape[1] - 6) // 2
        image, overlay = picture[22:, :width].astype(int), picture[22:, -width:].astype(int)
        # targets are drawn over the image, not in place of it
        assert 1 < np.abs(image - overlay).mean() < 120


def test_mapper_that_does_not_suit_the_dataset_is_one_line(tiny, tmp_path):
    arguments = ["--config-file", tiny.config, "--output-dir", str(tmp_path)]
    with pytest.raises(SystemExit, match="error: .*MaskFormerInstanceDatasetMapper needs 'annotations'"):
        visualize_data.main([*arguments, "INPUT.DATASET_MAPPER_NAME", "mask_former_instance"])


def test_records_as_they_are_on_disk(tiny, tmp_path):
    arguments = ["--config-file", tiny.config, "--source", "annotation", "--output-dir", str(tmp_path)]
    paths = visualize_data.main([*arguments, "--scale", "2"])
    assert len(paths) == 4
    assert cv2.imread(str(paths[0])).shape == (128, 192, 3)


@pytest.mark.parametrize(
    "name",
    [
        # upstream's evaluator deletes the predicted PNGs
        pytest.param("predictions.json", marks=pytest.mark.embedded_only),
        "coco_instances_results.json",
        "sem_seg_predictions.json",
    ],
)
def test_predictions_beside_ground_truth(tiny, evaluated, name, tmp_path):
    arguments = ["--input", str(evaluated.folder / name), "--dataset-name", tiny.val, "--config-file", tiny.config]
    arguments += ["--output-dir", str(tmp_path), "--conf-threshold", "0"]
    paths = visualize_json_results.main(arguments)
    assert len(paths) == 3
    for path in paths:
        assert cv2.imread(str(path)).shape == (64 + 22, 3 * 96 + 2 * 6, 3)


def test_true_segments_as_predictions_look_like_the_ground_truth(tiny, tmp_path):
    gt = tiny.data / "annotations" / "panoptic_val.json"
    # crowds are drawn differently when they are predictions: leave their images out
    content = json.loads(gt.read_text())
    content["annotations"] = [
        a for a in content["annotations"] if not any(segment["iscrowd"] for segment in a["segments_info"])
    ]
    predictions = tmp_path / "predictions.json"
    predictions.write_text(json.dumps(content))
    arguments = ["--input", str(predictions), "--pred-folder", str(tiny.data / "panoptic_val")]
    arguments += ["--dataset-name", tiny.val, "--config-file", tiny.config, "--output-dir", str(tmp_path)]
    paths = visualize_json_results.main(arguments)
    assert paths
    for path in paths:
        picture = cv2.imread(str(path)).astype(int)[22:]
        image, truth, prediction = picture[:, :96], picture[:, 102:198], picture[:, 204:]
        # colours of instances are drawn at random; regions are where they are
        changed = [np.abs(drawn - image).max(2) > 8 for drawn in (truth, prediction)]
        assert (changed[0] == changed[1]).mean() > 0.8


def test_file_of_another_kind_is_refused(tiny, evaluated, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(json.dumps([{"bbox": [0, 0, 1, 1]}]))
    arguments = ["--input", str(other), "--dataset-name", tiny.val, "--config-file", tiny.config]
    with pytest.raises(SystemExit, match="error: .*other.json is neither coco_instances_results.json"):
        visualize_json_results.main([*arguments, "--output-dir", str(tmp_path)])


def test_sample_masks_of_every_kind_look_the_same():
    MetadataCatalog.get("sample_of_two").set(thing_classes=["cat", "dog"], thing_colors=[[255, 0, 0], [0, 0, 255]])
    image = torch.full((3, 60, 90), 100, dtype=torch.uint8)
    mask = torch.zeros(2, 60, 90, dtype=torch.bool)
    mask[0, 10:50, 20:70] = True  # the second target is empty and must not be drawn
    outline = [np.array([20.0, 10.0, 70.0, 10.0, 70.0, 50.0, 20.0, 50.0])]
    pictures = []
    for masks in (mask, BitMasks(mask), PolygonMasks([outline, [np.array([0.0, 0, 0, 0, 0, 0])]])):
        instances = Instances((60, 90), gt_classes=torch.tensor([0, 1]), gt_masks=masks)
        pictures.append(draw_sample({"image": image, "instances": instances}, MetadataCatalog.get("sample_of_two")))
    MetadataCatalog.remove("sample_of_two")
    inside = pictures[0][22 + 14 : 22 + 20, 96 + 25 : 96 + 65]
    assert inside[..., 0].mean() > 150 and inside[..., 2].mean() < 100  # red on grey
    for picture in pictures[1:]:
        assert np.abs(picture.astype(int) - pictures[0]).mean() < 2


def test_sample_without_targets_is_an_error():
    with pytest.raises(ValueError, match="photo.jpg has no targets to draw: file_name, image"):
        sample = {"file_name": "photo.jpg", "image": torch.zeros(3, 4, 4, dtype=torch.uint8)}
        draw_sample(sample, MetadataCatalog.get("sample_without_targets"))


def test_names_of_things_that_are_not_the_first_ids():
    """ADE20K panoptic lists its 100 things alone, while predictions count in 150 classes."""
    metadata = MetadataCatalog.get("ade20k_panoptic_val")
    adapted = indexed_by_contiguous_id(metadata)
    assert adapted.thing_classes[7] == metadata.stuff_classes[7] == metadata.thing_classes[0]
    assert metadata.thing_classes is not adapted.thing_classes
    coco = MetadataCatalog.get("coco_2017_val_panoptic_with_sem_seg")
    assert indexed_by_contiguous_id(coco) is coco
    assert "ade20k_panoptic_val" in DatasetCatalog
