"""Evaluation from files gives the numbers of the evaluation that has written them; test-time augmentation runs."""

import evaluate_coco_boundary_ap
import evaluate_panoptic
import evaluate_pq_for_semantic_segmentation
import pytest

from mask2former_plugin.data.synthetic import CATEGORIES


def common(first, second):
    """Both dicts restricted to the keys that both have."""
    keys = first.keys() & second.keys()
    return {key: first[key] for key in keys}, {key: second[key] for key in keys}


def test_switches_add_results(evaluated):
    assert set(evaluated.results) == {
        "panoptic_seg", "panoptic_seg_boundary", "sem_seg", "sem_seg_pq", "bbox", "segm", "segm_boundary",
    }  # fmt: skip


@pytest.mark.embedded_only  # upstream's evaluator deletes the predicted PNGs
def test_panoptic_files(tiny, evaluated, capsys):
    gt = tiny.data / "annotations" / "panoptic_val.json"
    arguments = ["--gt-json-file", gt, "--gt-folder", tiny.data / "panoptic_val"]
    arguments += ["--pred-json-file", evaluated.folder / "predictions.json", "--dilation-ratio", "0.05"]
    results = evaluate_panoptic.main([*map(str, arguments), "--per-class"])
    for key in ("panoptic_seg", "panoptic_seg_boundary"):
        ours, live = common(results[key], evaluated.results[key])
        assert {"PQ", "SQ", "RQ", "PQ_th", "PQ_st"} <= ours.keys()
        assert ours == pytest.approx(live, nan_ok=True)
    printed = capsys.readouterr().out
    assert "boundary PQ" in printed and all(f"PQ-{category.name}" in printed for category in CATEGORIES)


def test_panoptic_truth_against_itself_is_perfect(tiny):
    gt = str(tiny.data / "annotations" / "panoptic_val.json")
    folder = str(tiny.data / "panoptic_val")
    results = evaluate_panoptic.main(
        ["--gt-json-file", gt, "--gt-folder", folder, "--pred-json-file", gt, "--pred-folder", folder]
    )
    assert results["panoptic_seg"]["PQ"] == results["panoptic_seg_boundary"]["PQ"] == 100


def test_boundary_ap_of_files(tiny, evaluated, capsys):
    arguments = ["--gt-json-file", tiny.data / "annotations" / "instances_val.json", "--dt-json-file"]
    arguments = [*map(str, arguments), str(evaluated.folder / "coco_instances_results.json")]
    boundary = evaluate_coco_boundary_ap.main([*arguments, "--dilation-ratio", "0.05"])
    assert boundary == pytest.approx(common(boundary, evaluated.results["segm_boundary"])[1], nan_ok=True)
    mask = evaluate_coco_boundary_ap.main([*arguments, "--iou-type", "segm"])
    assert mask == pytest.approx(common(mask, evaluated.results["segm"])[1], nan_ok=True)
    assert "boundary AP" in capsys.readouterr().out


def test_semantic_pq_of_files(tiny, evaluated, capsys):
    arguments = ["--dataset-name", tiny.val, "--config-file", tiny.config]
    arguments += ["--json-file", str(evaluated.folder / "sem_seg_predictions.json")]
    results = evaluate_pq_for_semantic_segmentation.main(arguments)
    assert results == pytest.approx(evaluated.results["sem_seg_pq"], nan_ok=True)
    printed = capsys.readouterr().out
    assert "mIoU" in printed and "PQ-" not in printed


def test_unknown_dataset_is_one_line(evaluated):
    arguments = ["--dataset-name", "tiny_vall", "--json-file", str(evaluated.folder / "sem_seg_predictions.json")]
    with pytest.raises(SystemExit, match="error: Unknown dataset 'tiny_vall'. Did you mean 'tiny_val'"):
        evaluate_pq_for_semantic_segmentation.main(arguments)


def test_missing_file_is_one_line(tiny):
    with pytest.raises(SystemExit, match="error: .*nowhere.json"):
        evaluate_panoptic.main(["--gt-json-file", str(tiny.root / "nowhere.json"), "--pred-json-file", "x.json"])


@pytest.mark.parametrize("tool", [evaluate_panoptic, evaluate_coco_boundary_ap, evaluate_pq_for_semantic_segmentation])
def test_help_has_examples(tool, capsys):
    with pytest.raises(SystemExit, match="0"):
        tool.main(["--help"])
    printed = capsys.readouterr().out
    assert f"python tools/{tool.__name__}.py" in printed


def test_augmented_evaluation_of_all_tasks(tiny, evaluated, train_net):
    sizes = ["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", "(48, 64)", "TEST.AUG.MAX_SIZE", 128]
    opts = ["OUTPUT_DIR", tiny.root / "augmented", "MODEL.WEIGHTS", evaluated.weights, *sizes]
    results = train_net("--eval-only", opts=opts)
    tasks = {"panoptic_seg", "sem_seg", "bbox", "segm"}
    assert set(results) == tasks | {f"{task}_TTA" for task in tasks}
    assert (tiny.root / "augmented" / "inference_TTA" / "predictions.json").is_file()


def test_one_unflipped_size_changes_nothing(tiny, evaluated, train_net):
    sizes = ["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", "(64,)", "TEST.AUG.FLIP", False]
    opts = ["OUTPUT_DIR", tiny.root / "same", "MODEL.WEIGHTS", evaluated.weights, *sizes]
    results = train_net("--eval-only", opts=opts)
    for task in ("panoptic_seg", "sem_seg", "segm"):
        plain, augmented = results[task], results[f"{task}_TTA"]
        assert augmented == pytest.approx(plain, nan_ok=True, abs=1e-3)
