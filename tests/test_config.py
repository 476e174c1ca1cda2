"""Config keys, the reading of both projects' YAML files, and the errors of a wrong key."""

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.projects.deeplab import add_deeplab_config

from mask2former_plugin.config import add_mask_former_config, add_maskformer2_config, differing_keys, load_config

# a published MaskFormer file sets these; a published Mask2Former file also names its decoder
MASKFORMER_YAML = """
MODEL:
  META_ARCHITECTURE: MaskFormer
  MASK_FORMER: {TRANSFORMER_IN_FEATURE: res5, DEC_LAYERS: 6, DICE_WEIGHT: 1.0}
INPUT:
  MIN_SIZE_TRAIN: !!python/object/apply:eval ["[int(x * 0.1 * 512) for x in range(5, 21)]"]
VERSION: 2
"""
MASK2FORMER_YAML = """
MODEL:
  META_ARCHITECTURE: MaskFormer
  MASK_FORMER: {TRANSFORMER_DECODER_NAME: MultiScaleMaskedTransformerDecoder, DEC_LAYERS: 10}
VERSION: 2
"""


def write(path, text):
    path.write_text(text)
    return path


def test_maskformer_file_selects_its_decoder_and_losses(tmp_path):
    cfg = load_config(write(tmp_path / "m1.yaml", MASKFORMER_YAML))
    assert cfg.MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME == "StandardTransformerDecoder"
    assert cfg.MODEL.MASK_FORMER.MASK_LOSS == "dense"
    assert cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_REQUIRE_MASK is False
    assert tuple(cfg.INPUT.MIN_SIZE_TRAIN) == tuple(int(k * 51.2) for k in range(5, 21))


def test_mask2former_file_keeps_the_masked_decoder(tmp_path):
    cfg = load_config(write(tmp_path / "m2.yaml", MASK2FORMER_YAML))
    assert cfg.MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME == "MultiScaleMaskedTransformerDecoder"
    assert cfg.MODEL.MASK_FORMER.MASK_LOSS == "point"
    assert cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_REQUIRE_MASK is True


def test_base_files_decide_together(tmp_path):
    write(tmp_path / "base.yaml", MASK2FORMER_YAML)
    cfg = load_config(write(tmp_path / "top.yaml", "_BASE_: base.yaml\nMODEL: {MASK_FORMER: {DEC_LAYERS: 4}}\n"))
    assert cfg.MODEL.MASK_FORMER.MASK_LOSS == "point" and cfg.MODEL.MASK_FORMER.DEC_LAYERS == 4


def test_dumped_config_reads_back_equal(tmp_path):
    cfg = load_config(write(tmp_path / "m1.yaml", MASKFORMER_YAML), ["SOLVER.BASE_LR", "0.5"])
    again = load_config(write(tmp_path / "dumped.yaml", cfg.dump()))
    assert differing_keys(cfg, again) == []


def test_differing_keys_names_them():
    assert differing_keys(load_config(), load_config(opts=["SEED", "3", "SOLVER.MAX_ITER", "7"])) == ["SEED", "SOLVER.MAX_ITER"]


def test_adders_work_on_a_plain_detectron2_config():
    first, second = get_cfg(), get_cfg()
    for cfg in (first, second):
        add_deeplab_config(cfg)
    add_maskformer2_config(first)
    add_mask_former_config(second)
    assert differing_keys(first, second) == [
        "MODEL.MASK_FORMER.MASK_LOSS",
        "MODEL.MASK_FORMER.TEST.PANOPTIC_REQUIRE_MASK",
        "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME",
    ]


@pytest.mark.parametrize("key, near", [("MODEL.MASK_FORMER.DEC_LAYER", "DEC_LAYERS"), ("SOLVER.BASE_RL", "SOLVER.BASE_LR")])
def test_unknown_key_names_file_and_nearest(tmp_path, key, near):
    nested: object = 1
    for part in reversed(key.split(".")):
        nested = {part: nested}
    path = write(tmp_path / "typo.yaml", CfgNode(nested).dump())
    with pytest.raises(KeyError, match="typo.yaml.*unknown config key.*did you mean") as error:
        load_config(path)
    assert key in str(error.value) and near in str(error.value)
    with pytest.raises(KeyError, match="command line.*did you mean"):
        load_config(opts=[key, "1"])


def test_wrong_type_names_the_file(tmp_path):
    path = write(tmp_path / "wrong.yaml", "SOLVER: {MAX_ITER: many}\n")
    with pytest.raises(ValueError, match="wrong.yaml.*MAX_ITER"):
        load_config(path)


def test_odd_overrides_are_refused():
    with pytest.raises(ValueError, match="pairs of KEY VALUE"):
        load_config(opts=["SEED"])


def test_custom_datasets_may_have_any_name(tmp_path):
    text = "DATASETS:\n  CUSTOM:\n    mine: {FORMAT: semantic_folder, IMAGES: x, CLASSES: [a, b]}\n"
    cfg = load_config(write(tmp_path / "own.yaml", text), ["DATASETS.CUSTOM.mine.IMAGES", "photos"])
    assert cfg.DATASETS.CUSTOM.mine.CLASSES == ["a", "b"] and cfg.DATASETS.CUSTOM.mine.IMAGES == "photos"
