"""Label maps and run lengths: the numbers and files of an evaluation are those of scores and dense masks."""

import json
from pathlib import Path

import numpy as np
import pycocotools.mask
import pytest
import torch
import torch.nn.functional as F
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluators,
    SemSegEvaluator,
    inference_on_dataset,
)
from detectron2.structures import Instances
from torch import nn

from mask2former_plugin.config import load_config
from mask2former_plugin.data.datasets.custom import register_custom_datasets
from mask2former_plugin.data.synthetic import SyntheticOptions, generate
from mask2former_plugin.engine import Trainer
from mask2former_plugin.evaluation import (
    InstanceSegEvaluator,
    RunLengthCOCOEvaluator,
    SemanticPQEvaluator,
    build_evaluator,
    light_outputs,
)
from mask2former_plugin.evaluation.prediction_files import read_id_map
from mask2former_plugin.modeling.inference.light_outputs import (
    LabelMap,
    RunLengthEncoder,
    RunLengths,
    encode_changes,
)
from mask2former_plugin.modeling.mask_logits import MaskLogits, MaskPrediction
from mask2former_plugin.modeling.meta_arch import MaskFormer
from mask2former_plugin.test_time_augmentation import SemanticSegmentorWithTTA
from mask2former_plugin.visualization import draw_prediction

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "quickstart" / "mask2former.yaml"
SIZE = (48, 64)


class IdentityBackbone(nn.Module):
    size_divisibility = 16

    def forward(self, images):
        return images


class NoisyTruth(nn.Module):
    """Predicts the segments of the image whose number all its pixels have, with wrong borders, classes and extras."""

    def __init__(self, records, metadata):
        super().__init__()
        self.num_classes = len(metadata.stuff_classes)
        self._predictions = [self._prediction(record) for record in records]

    def _prediction(self, record):
        ids = torch.from_numpy(read_id_map(record["pan_seg_file_name"]))
        masks, labels = [], []
        for segment in record["segments_info"]:
            masks.append((ids == segment["id"]).float() * 6 - 3)
            labels.append(segment["category_id"] if torch.rand(()) < 0.8 else int(torch.randint(self.num_classes, ())))
        masks = F.interpolate(torch.stack(masks)[None], size=(12, 16), mode="bilinear")[0]
        masks = torch.cat([masks + torch.randn_like(masks), torch.randn(4, 12, 16) - 1])
        classes = torch.randn(len(masks), self.num_classes + 1)
        classes[torch.arange(len(labels)), labels] += 4
        factors = MaskLogits(torch.eye(len(masks))[None], masks[None])
        return MaskPrediction(pred_logits=classes[None], mask_logits=factors, aux_outputs=[])

    def forward(self, images):
        return self._predictions[int(images[0, 0, 0, 0])]


def make_model(head, metadata, **options):
    arguments = {
        "backbone": IdentityBackbone(),
        "sem_seg_head": head,
        "criterion": nn.Identity(),
        "num_queries": 10,
        "object_mask_threshold": 0.2,
        "overlap_threshold": 0.5,
        "metadata": metadata,
        "size_divisibility": 16,
        "sem_seg_postprocess_before_inference": True,
        "pixel_mean": (0.0, 0.0, 0.0),
        "pixel_std": (1.0, 1.0, 1.0),
        "semantic_on": True,
        "panoptic_on": True,
        "instance_on": True,
        "test_topk_per_image": 12,
    }
    return MaskFormer(**{**arguments, **options}).eval()


@pytest.fixture
def scene(tmp_path, monkeypatch):
    """Config with all evaluators on, name of its dataset, and a loader of its images."""
    generate(
        tmp_path / "quickstart", SyntheticOptions(train_images=1, val_images=5, height=48, width=64), progress=False
    )
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    opts = ["OUTPUT_DIR", str(tmp_path), "TEST.BOUNDARY", "True", "TEST.SEMANTIC_PQ", "True", "MODEL.DEVICE", "cpu"]
    cfg = load_config(CONFIG, opts)
    register_custom_datasets(cfg)
    name = cfg.DATASETS.TEST[0]
    loader = []
    for i, record in enumerate(DatasetCatalog.get(name)):
        names = {key: record[key] for key in ("file_name", "image_id")}
        loader.append(
            [{"image": torch.full((3, *SIZE), i, dtype=torch.uint8), "height": SIZE[0], "width": SIZE[1], **names}]
        )
    yield cfg, name, loader
    for name in {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST}:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def model_of(name):
    metadata = MetadataCatalog.get(name)
    return make_model(NoisyTruth(DatasetCatalog.get(name), metadata), metadata)


class Spy:
    """Keeps what a model gives."""

    def __init__(self, model):
        self.model, self.seen = model, []

    def __call__(self, inputs):
        outputs = self.model(inputs)
        self.seen += outputs
        return outputs


@pytest.mark.parametrize("instances", ["coco", "ade20k"])
def test_all_numbers_and_files_are_the_same(scene, tmp_path, instances):
    cfg, name, loader = scene
    vars(MetadataCatalog.get(name)).update(evaluator_type=f"{instances}_panoptic_seg")
    model = model_of(name)
    results, outputs = [], []
    for light in (False, True):
        folder = tmp_path / str(light)
        evaluator = build_evaluator(cfg, name, str(folder))
        spy = Spy(model)
        if light:
            with light_outputs(model, [evaluator]):
                results.append(inference_on_dataset(spy, loader, evaluator))
        else:
            results.append(inference_on_dataset(spy, loader, evaluator))
        outputs.append(spy.seen)
    dense, small = results
    assert {"panoptic_seg", "panoptic_seg_boundary", "sem_seg", "sem_seg_pq", "segm", "segm_boundary"} <= set(small)
    assert json.dumps(small, default=float) == json.dumps(dense, default=float)
    assert 0 < dense["segm"]["AP"] < 100 and 0 < dense["sem_seg"]["mIoU"] < 100
    files = [{p.name: p for p in (tmp_path / str(light)).rglob("*.json")} for light in (False, True)]
    assert set(files[0]) == set(files[1]) >= {"coco_instances_results.json", "sem_seg_predictions.json"}
    for file in ("coco_instances_results.json", "sem_seg_predictions.json"):
        assert files[0][file].read_bytes() == files[1][file].read_bytes()
    for full, light in zip(*outputs):
        assert type(light["sem_seg"]) is LabelMap and full["sem_seg"].ndim == 3
        assert light["instances"].has("pred_masks_rle") and not light["instances"].has("pred_masks")
        assert torch.equal(light["instances"].pred_masks_rle.dense(), full["instances"].pred_masks)


def test_train_net_switches_where_it_is_safe(scene, monkeypatch):
    cfg, name, loader = scene
    seen = []
    monkeypatch.setattr(Trainer, "build_test_loader", classmethod(lambda cls, cfg, name: loader))

    model = model_of(name)
    forward = MaskFormer.forward
    monkeypatch.setattr(MaskFormer, "forward", lambda self, x: seen.append(forward(self, x)[0]) or [seen[-1]])
    cfg.TEST.LIGHT_OUTPUTS = False
    dense = Trainer.test(cfg, model)
    cfg.TEST.LIGHT_OUTPUTS = True
    light = Trainer.test(cfg, model)
    given = Trainer.test(cfg, model, build_evaluator(cfg, name))
    assert json.dumps(light, default=float) == json.dumps(dense, default=float) == json.dumps(given, default=float)
    kinds = [type(output["sem_seg"]) is LabelMap for output in seen]
    assert kinds == [False] * len(loader) + [True] * 2 * len(loader)
    assert not model.semantic_label_map and not model.instance_run_lengths


class OwnSemSegEvaluator(SemSegEvaluator):
    pass


class OwnRunLengthEvaluator(RunLengthCOCOEvaluator):
    takes_run_lengths = True


class HeirOfOwn(OwnRunLengthEvaluator):
    pass


def bare(kind):
    return object.__new__(kind)


@pytest.mark.parametrize(
    ("kinds", "label_map", "run_lengths"),
    [
        ([SemSegEvaluator, COCOPanopticEvaluator, RunLengthCOCOEvaluator, SemanticPQEvaluator], True, True),
        ([InstanceSegEvaluator], True, True),
        ([CityscapesSemSegEvaluator, CityscapesInstanceEvaluator], True, False),
        ([COCOEvaluator], False, False),
        ([SemSegEvaluator, OwnSemSegEvaluator], False, False),
        ([OwnRunLengthEvaluator], False, True),
        ([HeirOfOwn], False, False),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_which_evaluators_take_what(kinds, label_map, run_lengths, nested):
    model = make_model(nn.Identity(), None, panoptic_on=False)
    evaluators = [bare(kind) for kind in kinds]
    with light_outputs(model, [DatasetEvaluators(evaluators)] if nested else evaluators):
        assert (model.semantic_label_map, model.instance_run_lengths) == (label_map, run_lengths)
    assert (model.semantic_label_map, model.instance_run_lengths) == (False, False)


def test_switches_of_the_model_come_back_after_an_error():
    model = make_model(nn.Identity(), None, panoptic_on=False, semantic_label_map=True)
    with pytest.raises(RuntimeError), light_outputs(model, [bare(SemSegEvaluator)]):
        assert model.instance_run_lengths
        raise RuntimeError
    assert (model.semantic_label_map, model.instance_run_lengths) == (True, False)
    with light_outputs(model, [bare(COCOEvaluator)]):
        assert model.semantic_label_map  # what was asked for stays
    with light_outputs(nn.Identity(), [bare(SemSegEvaluator)]):  # no MaskFormer: nothing to switch
        pass


def test_test_time_augmentation_averages_scores_and_gives_label_maps(scene):
    cfg, name, loader = scene
    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.FLIP = [48], False
    model = model_of(name)
    scores = model(loader[1])[0]["sem_seg"]
    with light_outputs(SemanticSegmentorWithTTA(cfg, model), [bare(SemSegEvaluator)]):
        found = SemanticSegmentorWithTTA(cfg, model)(loader[1])[0]["sem_seg"]
        assert model.semantic_label_map
    assert type(found) is LabelMap and torch.equal(found.argmax(dim=0), scores.argmax(dim=0))


def test_pictures_are_the_same(scene):
    _, name, loader = scene
    model = model_of(name)
    image = torch.randint(0, 256, (*SIZE, 3), dtype=torch.uint8).numpy()
    pictures = []
    for model.instance_run_lengths in (False, True):
        output = model(loader[0])[0]
        np.random.seed(0)  # upstream draws random colours
        pictures.append(
            draw_prediction(image, {"instances": output["instances"]}, MetadataCatalog.get(name), min_score=0.2)
        )
    assert np.array_equal(*pictures) and not np.array_equal(pictures[0], image)


def test_keys_switch_the_forms_on():
    cfg = load_config(
        CONFIG,
        ["MODEL.DEVICE", "cpu", "MODEL.MASK_FORMER.TEST.SEMANTIC_LABEL_MAP", "True"]
        + ["MODEL.MASK_FORMER.TEST.INSTANCE_RUN_LENGTHS", "True"],
    )
    arguments = MaskFormer.from_config(cfg)
    assert arguments["semantic_label_map"] and arguments["instance_run_lengths"]


def test_label_map_is_a_tensor_of_classes():
    labels = torch.tensor([[3, 1], [0, 2]]).as_subclass(LabelMap)
    assert torch.equal(labels.argmax(dim=0), torch.tensor([[3, 1], [0, 2]]))
    assert torch.equal(labels.to("cpu").argmax(0), torch.tensor([[3, 1], [0, 2]]))
    assert type(labels.argmax(dim=0)) is torch.Tensor
    assert labels.shape == (2, 2) and labels.numpy().tolist() == [[3, 1], [0, 2]]
    with pytest.raises(ValueError, match="SEMANTIC_LABEL_MAP"):
        labels.argmax(dim=1)
    with pytest.raises(ValueError, match="keepdim=True"):
        labels.argmax(dim=0, keepdim=True)
    with pytest.raises(ValueError, match="dim=None"):
        labels.argmax()


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (40, 50), (2000, 300)])
@pytest.mark.parametrize("kind", ["noise", "blocks", "empty", "full", "one pixel", "last pixel"])
def test_run_lengths_are_written_as_pycocotools_does(size, kind):
    mask = np.zeros(size, dtype=np.uint8)
    if kind == "noise":
        mask[:] = np.random.default_rng(0).random(size) > 0.5
    elif kind == "blocks":
        mask[size[0] // 4 : size[0] // 2, size[1] // 3 :] = 1
    elif kind == "full":
        mask[:] = 1
    elif kind != "empty":
        mask.ravel()[-1 if kind == "last pixel" else mask.size // 2] = 1
    expected = pycocotools.mask.encode(np.asfortranarray(mask))
    expected = {"size": list(size), "counts": expected["counts"].decode()}
    assert encoded(torch.from_numpy(mask).bool()) == expected
    flat = np.concatenate([[0], mask.T.ravel()])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    for step in (1, 2, 3, 5):
        encoder = RunLengthEncoder(size)
        for start in range(0, len(changes) + 1, step):
            encoder.add(changes[start : start + step])
        assert encoder.finish() == expected


def encoded(mask):
    flat = np.concatenate([[False], mask.numpy().T.ravel()])
    return encode_changes(np.flatnonzero(flat[1:] != flat[:-1]), tuple(mask.shape))


def test_run_lengths_are_indexed_like_masks():
    masks = torch.rand(4, 5, 7) > 0.5
    codes = RunLengths(encoded(mask) for mask in masks)
    assert torch.equal(codes.dense(), masks)
    instances = Instances((5, 7), pred_masks_rle=codes, scores=torch.rand(4))
    for chosen in (
        torch.tensor([2, 0]),
        [2, 0],
        np.array([2, 0]),
        slice(1, 3),
        torch.tensor([True, False, False, True]),
    ):
        assert torch.equal(instances[chosen].pred_masks_rle.dense(), masks[chosen])
        assert type(instances[chosen].pred_masks_rle) is RunLengths
    for nothing in ([], torch.zeros(0, dtype=torch.int64), torch.zeros(4, dtype=torch.bool), slice(0, 0)):
        assert instances[nothing].pred_masks_rle == RunLengths() and len(instances[nothing]) == 0
    assert instances[1].pred_masks_rle == [codes[1]]
    assert instances.to("cpu").pred_masks_rle == codes
    with pytest.raises(ValueError, match="no masks"):
        RunLengths().dense()
