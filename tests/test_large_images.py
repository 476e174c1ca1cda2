"""Windows through the ways that users take: keys, evaluation and predictor."""

import sys
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.engine import default_argument_parser

from mask2former_plugin.config import load_config
from mask2former_plugin.data.datasets.custom import register_custom_datasets
from mask2former_plugin.data.synthetic import SyntheticOptions, generate
from mask2former_plugin.engine import Predictor, check_config
from mask2former_plugin.modeling.meta_arch import MaskFormer
from mask2former_plugin.test_time_augmentation import build_model_with_TTA

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import train_net

CONFIG = str(ROOT / "configs" / "quickstart" / "mask2former.yaml")
WINDOW = "MODEL.MASK_FORMER.TEST.WINDOW."
SMALL = [
    "INPUT.MIN_SIZE_TEST", "0", "DATALOADER.NUM_WORKERS", "0", "MODEL.DEVICE", "cpu",
    "MODEL.ALLOW_RANDOM_WEIGHTS", "True", "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", "5",
    "MODEL.MASK_FORMER.DEC_LAYERS", "2", "MODEL.MASK_FORMER.HIDDEN_DIM", "32",
    "MODEL.SEM_SEG_HEAD.CONVS_DIM", "32", "MODEL.SEM_SEG_HEAD.MASK_DIM", "32",
    "MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD", "0.0",
]  # fmt: skip
IN_WINDOWS = [WINDOW + "ENABLED", "True", WINDOW + "SIZE", "[32, 48]", WINDOW + "OVERLAP", "8"]


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    generate(
        tmp_path / "quickstart", SyntheticOptions(train_images=1, val_images=2, height=48, width=64), progress=False
    )
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    yield tmp_path
    for name in ("quickstart_train", "quickstart_val"):
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


@pytest.fixture
def crops(monkeypatch):
    """Sizes of what the network gets."""
    seen = []
    preprocess = MaskFormer.preprocess
    monkeypatch.setattr(
        MaskFormer,
        "preprocess",
        lambda self, inputs: seen.extend(tuple(x["image"].shape[1:]) for x in inputs) or preprocess(self, inputs),
    )
    return seen


def config(*opts):
    cfg = load_config(CONFIG, [*SMALL, *opts])
    register_custom_datasets(cfg)
    return cfg


def test_evaluation_in_windows(dataset, crops, tmp_path):
    words = ["--config-file", CONFIG, "--eval-only", "OUTPUT_DIR", str(tmp_path / "out"), *SMALL, *IN_WINDOWS]
    results = train_net.main(default_argument_parser().parse_args(words))
    assert set(results) == {"panoptic_seg", "segm", "bbox", "sem_seg"}
    assert crops == [(32, 48)] * 4 * 2  # two rows, two columns, two images


def test_predictor_in_windows(dataset, crops):
    cfg = config(*IN_WINDOWS)
    image = read_image(DatasetCatalog.get(cfg.DATASETS.TEST[0])[0]["file_name"], "BGR")
    output = Predictor(cfg)(image)
    assert crops == [(32, 48)] * 4
    assert output["sem_seg"].shape[1:] == output["panoptic_seg"][0].shape == (48, 64)
    assert output["instances"].pred_masks.shape[1:] == (48, 64)
    assert torch.isfinite(output["sem_seg"]).all() and torch.isfinite(output["instances"].scores).all()


def test_one_window_is_the_whole_image(dataset):
    whole = config()
    one = config(*IN_WINDOWS[:2])
    image = read_image(DatasetCatalog.get(whole.DATASETS.TEST[0])[0]["file_name"], "BGR")
    torch.manual_seed(0)
    expected = Predictor(whole)(image)
    torch.manual_seed(0)
    found = Predictor(one)(image)
    assert torch.equal(found["sem_seg"], expected["sem_seg"])
    assert torch.equal(found["panoptic_seg"][0], expected["panoptic_seg"][0])


def test_windows_that_cannot_be_are_one_sentence(dataset):
    with pytest.raises(ValueError, match=r"WINDOW.SIZE .* got SIZE \[32, 48\] and OVERLAP 32"):
        check_config(config(*IN_WINDOWS, WINDOW + "OVERLAP", "32"), training=False)


def test_augmented_segments_in_windows_are_refused(dataset):
    cfg = config(*IN_WINDOWS)
    model = build_model_with_TTA(cfg, Predictor(cfg).model)
    with pytest.raises(ValueError, match="TEST.AUG.ENABLED"):
        model([{"image": torch.zeros(3, 48, 64)}])
