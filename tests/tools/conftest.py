"""A tiny generated dataset, a config for it, and the files that one evaluation writes."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from detectron2.engine import default_argument_parser

from mask2former_plugin.data.synthetic import SyntheticOptions, generate
from mask2former_plugin.safe_yaml import load_config_dict

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

SMALL = {
    "INPUT.IMAGE_SIZE": 96,
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.MAX_SIZE_TEST": 96,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 1,
    "DATALOADER.NUM_WORKERS": 0,
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 8,
    "MODEL.MASK_FORMER.DEC_LAYERS": 2,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 32,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 32,
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 64,
    "MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD": 0.0,
    "MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD": 0.0,
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """``config`` (a YAML), ``data`` (the dataset's folder), ``train``/``val`` (names of the datasets)."""
    root = tmp_path_factory.mktemp("tiny")
    data = generate(
        root / "shapes", SyntheticOptions(train_images=4, val_images=3, height=64, width=96), progress=False
    )
    values = load_config_dict(ROOT / "configs" / "quickstart" / "mask2former.yaml")
    datasets = values["DATASETS"]
    # own names and whole paths: other tests register the quickstart datasets of their own
    custom = {}
    for split in ("train", "val"):
        options = datasets["CUSTOM"][f"quickstart_{split}"]
        paths = {key: str(root / value.replace("quickstart", "shapes")) for key, value in options.items()}
        custom[f"tiny_{split}"] = {**paths, "FORMAT": options["FORMAT"]}
    custom["tiny_instances"] = {
        "FORMAT": "coco_instances",
        "IMAGES": str(data / "train"),
        "JSON": str(data / "annotations" / "instances_train.json"),
    }
    values["DATASETS"] = {"TRAIN": ["tiny_train"], "TEST": ["tiny_val"], "CUSTOM": custom}
    for key, value in SMALL.items():
        *sections, name = key.split(".")
        node = values
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    config = root / "tiny.yaml"
    config.write_text(yaml.safe_dump(values))
    return SimpleNamespace(config=str(config), data=data, train="tiny_train", val="tiny_val", root=root)


@pytest.fixture(scope="session")
def train_net(tiny):
    """Calls ``tools/train_net.py`` with flags and overrides on the tiny config."""
    import train_net

    def call(*flags, opts=()):
        arguments = ["--config-file", tiny.config, *flags, *map(str, opts)]
        return train_net.main(default_argument_parser().parse_args(arguments))

    return call


@pytest.fixture(scope="session")
def evaluated(tiny, train_net):
    """``results`` of an evaluation with everything switched on, its ``folder`` of predictions, the ``weights``."""
    output = tiny.root / "run"
    switches = ["TEST.BOUNDARY", True, "TEST.BOUNDARY_DILATION_RATIO", 0.05, "TEST.SEMANTIC_PQ", True]
    results = train_net(opts=["OUTPUT_DIR", output, *switches])
    return SimpleNamespace(results=results, folder=output / "inference", weights=output / "model_final.pth")
