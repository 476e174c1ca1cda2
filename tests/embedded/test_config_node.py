"""Config trees: defaults, files with inheritance and versions, overrides, and errors that help."""

import pytest
import yaml

from detectron2.config import CfgNode, downgrade_config, get_cfg, global_cfg, set_global_cfg, upgrade_config


def leaves(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def write(path, text):
    path.write_text(text)
    return str(path)


def test_defaults_hold_every_upstream_key():
    cfg = get_cfg()
    names = list(leaves(cfg))
    assert len(names) == len(set(names)) == 192
    assert cfg.VERSION == 2
    # a sample of values and types that configs of the ecosystem rely on
    assert cfg.MODEL.PIXEL_MEAN == [103.53, 116.28, 123.675]
    assert cfg.INPUT.MIN_SIZE_TRAIN == (800,)
    assert cfg.SOLVER.STEPS == (30000,)
    assert cfg.SOLVER.WEIGHT_DECAY_BIAS is None
    assert cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS == (0.5, 0.6, 0.7)
    assert cfg.TEST.AUG.MIN_SIZES == tuple(range(400, 1300, 100))


def test_get_cfg_gives_independent_copies():
    first, second = get_cfg(), get_cfg()
    first.MODEL.PIXEL_MEAN.append(1.0)
    first.SOLVER.MAX_ITER = 1
    assert second == get_cfg()
    assert first != second


def test_a_dumped_config_reads_back_equal(tmp_path):
    cfg = get_cfg()
    cfg.SOLVER.BASE_LR = 1e-5
    cfg.INPUT.MIN_SIZE_TRAIN = (480, 512)
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 7
    path = write(tmp_path / "config.yaml", cfg.dump())
    again = get_cfg()
    again.merge_from_file(path)
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())  # inner tuples have become lists
    assert type(again.INPUT.MIN_SIZE_TRAIN) is tuple


def test_file_values_are_converted_to_the_types_of_the_tree(tmp_path):
    path = write(
        tmp_path / "c.yaml",
        "SOLVER: {BASE_LR: 1e-4, STEPS: [1, 2]}\n"
        "INPUT: {MIN_SIZE_TRAIN: '(5, 6)'}\nMODEL: {PIXEL_MEAN: !!python/tuple [1.0]}",
    )
    cfg = get_cfg()
    cfg.merge_from_file(path)
    assert cfg.SOLVER.BASE_LR == 1e-4  # YAML itself reads 1e-4 as text
    assert cfg.SOLVER.STEPS == (1, 2)
    assert cfg.INPUT.MIN_SIZE_TRAIN == (5, 6)
    assert cfg.MODEL.PIXEL_MEAN == [1.0]


@pytest.mark.embedded_only
def test_integers_are_accepted_for_floats(tmp_path):
    cfg = get_cfg()
    cfg.merge_from_file(write(tmp_path / "c.yaml", "SOLVER: {BASE_LR: 1, CLIP_GRADIENTS: {CLIP_VALUE: 5}}"))
    cfg.merge_from_list(["SOLVER.GAMMA", "2", "SOLVER.MOMENTUM", 1])
    values = (cfg.SOLVER.BASE_LR, cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE, cfg.SOLVER.GAMMA, cfg.SOLVER.MOMENTUM)
    assert values == (1.0, 5.0, 2.0, 1.0)
    assert all(type(value) is float for value in values)


def test_published_arithmetic_is_read_without_permission(tmp_path):
    path = write(
        tmp_path / "c.yaml",
        'INPUT: {MIN_SIZE_TRAIN: !!python/object/apply:eval ["[int(x * 0.1 * 512) for x in range(5, 21)]"]}',
    )
    cfg = get_cfg()
    cfg.merge_from_file(path)
    assert list(cfg.INPUT.MIN_SIZE_TRAIN) == [int(x * 0.1 * 512) for x in range(5, 21)]


@pytest.mark.embedded_only
def test_code_in_a_file_is_refused_and_runs_only_when_asked_for(tmp_path):
    victim = tmp_path / "made"
    path = write(tmp_path / "c.yaml", f'OUTPUT_DIR: !!python/object/apply:os.path.join ["a", "b"]\nSEED: 3\n# {victim}')
    with pytest.raises(ValueError, match=r"c\.yaml.*os\.path\.join"):
        get_cfg().merge_from_file(path)
    cfg = get_cfg()
    cfg.merge_from_file(path, allow_unsafe=True)
    assert cfg.OUTPUT_DIR == "a/b"


def test_inheritance(tmp_path):
    write(tmp_path / "base.yaml", "SEED: 1\nSOLVER: {MAX_ITER: 1, GAMMA: 0.5}")
    path = write(tmp_path / "child.yaml", "_BASE_: base.yaml\nSOLVER: {MAX_ITER: 2}")
    cfg = get_cfg()
    cfg.merge_from_file(path)
    assert (cfg.SEED, cfg.SOLVER.MAX_ITER, cfg.SOLVER.GAMMA) == (1, 2, 0.5)
    assert "_BASE_" not in cfg


@pytest.mark.embedded_only
def test_unknown_keys_of_a_file_are_named_with_the_nearest_known_ones(tmp_path):
    text = "SOLVER: {BASE_LRR: 1.0, MAX_ITER: 5}\nMODEL: {SEMSEG_HEAD: {NUM_CLASSES: 3}}\nQQQQ: 1"
    path = write(tmp_path / "c.yaml", text)
    cfg = get_cfg()
    with pytest.raises(KeyError) as error:
        cfg.merge_from_file(path)
    text = str(error.value)
    assert path in text
    assert "SOLVER.BASE_LRR (nearest known key: SOLVER.BASE_LR)" in text
    assert "MODEL.SEMSEG_HEAD.NUM_CLASSES (nearest known key: MODEL.SEM_SEG_HEAD.NUM_CLASSES)" in text
    assert "QQQQ" in text and "QQQQ (" not in text
    assert cfg == get_cfg()  # nothing was merged


def test_unknown_keys_raise_what_upstream_raises(tmp_path):
    with pytest.raises(KeyError, match="QQQQ"):
        get_cfg().merge_from_file(write(tmp_path / "c.yaml", "QQQQ: 1"))
    with pytest.raises(AssertionError, match="QQQQ"):
        get_cfg().merge_from_list(["QQQQ", 1])


@pytest.mark.embedded_only
def test_unknown_overrides_are_named_with_the_nearest_known_key():
    cfg = get_cfg()
    with pytest.raises(AssertionError, match=r"SOLVER\.MAXITER \(nearest known key: SOLVER\.MAX_ITER\)"):
        cfg.merge_from_list(["SEED", "5", "SOLVER.MAXITER", "5"])
    with pytest.raises(AssertionError, match="SEED.MORE"):
        cfg.merge_from_list(["SEED.MORE", "5"])
    with pytest.raises(AssertionError, match="pairs of a key and a value"):
        cfg.merge_from_list(["SEED"])
    assert cfg == get_cfg()


def test_overrides():
    cfg = get_cfg()
    cfg.merge_from_list(["DATASETS.TRAIN", "('a', 'b')", "MODEL.DEVICE", "cpu", "SOLVER.STEPS", "[3]"])
    cfg.merge_from_list(["SEED", 4, "OUTPUT_DIR", "x/y"])
    assert cfg.DATASETS.TRAIN == ("a", "b")
    assert (cfg.MODEL.DEVICE, cfg.SOLVER.STEPS, cfg.SEED, cfg.OUTPUT_DIR) == ("cpu", (3,), 4, "x/y")


@pytest.mark.embedded_only
def test_a_value_of_another_type_names_file_and_key(tmp_path):
    path = write(tmp_path / "c.yaml", "SOLVER: {MAX_ITER: many}")
    with pytest.raises(ValueError, match=r"c\.yaml.*SOLVER\.MAX_ITER"):
        get_cfg().merge_from_file(path)
    with pytest.raises(ValueError, match=r"SOLVER\.MAX_ITER"):
        get_cfg().merge_from_list(["SOLVER.MAX_ITER", "many"])


@pytest.mark.embedded_only
def test_missing_file():
    with pytest.raises(FileNotFoundError, match=r"gone\.yaml does not exist"):
        get_cfg().merge_from_file("gone.yaml")


def test_new_deprecated_and_renamed_keys(tmp_path):
    cfg = get_cfg()
    cfg.FREE = CfgNode(new_allowed=True)
    cfg.register_deprecated_key("SOLVER.OLD")
    cfg.register_renamed_key("SOLVER.ITERATIONS", "SOLVER.MAX_ITER")
    cfg.merge_from_file(write(tmp_path / "a.yaml", "FREE: {ANY: {THING: 1}}\nSOLVER: {OLD: 1}"))
    assert cfg.FREE.ANY.THING == 1 and "OLD" not in cfg.SOLVER
    cfg.merge_from_list(["SOLVER.OLD", 1])
    with pytest.raises(KeyError, match=r"renamed to SOLVER\.MAX_ITER"):
        cfg.merge_from_file(write(tmp_path / "b.yaml", "SOLVER: {ITERATIONS: 1}"))
    with pytest.raises(KeyError, match=r"renamed to SOLVER\.MAX_ITER"):
        cfg.merge_from_list(["SOLVER.ITERATIONS", 1])


def test_frozen_and_computed_keys():
    cfg = get_cfg()
    cfg.freeze()
    with pytest.raises(AttributeError):
        cfg.SOLVER.MAX_ITER = 3
    cfg.COMPUTED_THING = 5
    assert cfg.COMPUTED_THING == 5
    with pytest.raises(KeyError):
        cfg.COMPUTED_THING = 6


def test_old_files_are_translated(tmp_path):
    cfg = get_cfg()
    path = write(tmp_path / "c.yaml", "VERSION: 1\nMODEL: {WEIGHT: w.pkl}\nTEST: {AUG_ON: true, DETECTIONS_PER_IMG: 7}")
    cfg.merge_from_file(path)
    assert (cfg.MODEL.WEIGHTS, cfg.VERSION) == ("w.pkl", 2)
    assert (cfg.TEST.AUG.ENABLED, cfg.TEST.DETECTIONS_PER_IMAGE) == (True, 7)
    cfg = get_cfg()
    cfg.merge_from_file(write(tmp_path / "d.yaml", "MODEL: {WEIGHT: v.pkl}"))  # no version: judged by its keys
    assert cfg.MODEL.WEIGHTS == "v.pkl"


@pytest.mark.embedded_only
def test_translations_are_logged_and_newer_files_refused(tmp_path, caplog):
    get_cfg().merge_from_file(write(tmp_path / "old.yaml", "MODEL: {WEIGHT: w.pkl}"))
    assert "MODEL.WEIGHT -> MODEL.WEIGHTS" in caplog.text and "old.yaml" in caplog.text
    with pytest.raises(ValueError, match=r"c\.yaml has config version 3; .* up to version 2"):
        get_cfg().merge_from_file(write(tmp_path / "c.yaml", "VERSION: 3"))
    with pytest.raises(ValueError, match="does not exist"):
        upgrade_config(get_cfg(), 3)
    with pytest.raises(ValueError, match="cannot downgrade"):
        downgrade_config(get_cfg(), 3)


@pytest.mark.parametrize("version", [0, 1])
def test_down_and_up_again(version):
    cfg = get_cfg()
    cfg.OWN = 1
    cfg.MODEL.WEIGHTS = "w"
    cfg.TEST.AUG.FLIP = False
    old = downgrade_config(cfg, version)
    assert old.VERSION == version and old.MODEL.WEIGHT == "w" and old.TEST.AUG_FLIP is False
    assert "WEIGHTS" not in old.MODEL
    assert upgrade_config(old) == cfg
    assert cfg.MODEL.WEIGHTS == "w"  # untouched


@pytest.mark.embedded_only
def test_a_tree_without_version_merges_any_file(tmp_path):
    cfg = CfgNode({"A": {"B": 1}})
    cfg.merge_from_file(write(tmp_path / "c.yaml", "A: {B: 2}"))
    assert cfg.A.B == 2


def test_global_cfg_is_replaced_in_place():
    before = dict(global_cfg)
    try:
        set_global_cfg(CfgNode({"X": {"Y": 1}}))
        assert global_cfg.X.Y == 1
        set_global_cfg(CfgNode({"Z": 2}))
        assert list(global_cfg) == ["Z"]
    finally:
        set_global_cfg(CfgNode(before))


def test_dump_is_plain_yaml():
    assert yaml.safe_load(get_cfg().dump())["SOLVER"]["STEPS"] == [30000]
