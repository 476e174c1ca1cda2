"""The benchmark tool: what it runs, how it notices sides that disagree, crash or are missing, and its reports."""

import json
import math

import numpy as np
import pytest
import torch
from detectron2.structures import Instances

from mask2former_plugin.benchmark import agreement, outputs, plots, report, samples
from mask2former_plugin.benchmark.cases import CASES, GROUPS, choose_cases
from mask2former_plugin.benchmark.command_line import CONFIGS, main
from mask2former_plugin.benchmark.measure import Meter, Operations, is_out_of_memory
from mask2former_plugin.benchmark.runner import Runner, Settings, WorkerError
from mask2former_plugin.benchmark.worker import Worker
from mask2former_plugin.benchmark.workload import SIDES, NotOffered, number_of_bytes
from mask2former_plugin.modeling.layers.linear import linear
from mask2former_plugin.modeling.layers.products import product

WRONG_ATTENTION = """
import torch
def ms_deform_attn_core_pytorch(value, shapes, locations, weights):
    return torch.zeros(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])
"""
CRASHING_MATCHER = """
import os, sys
class HungarianMatcher:
    def __init__(self, **options):
        pass
    def __call__(self, outputs, targets):
        sys.stderr.write("something went terribly wrong")
        sys.stderr.flush()
        os._exit(3)
"""


@pytest.fixture
def wrong_original(tmp_path):
    """A checkout in Mask2Former's layout whose attention gives zeros and whose matcher ends the process."""
    modules = {
        "train_net.py": "",
        "mask2former/__init__.py": "import MultiScaleDeformableAttention, timm.models.layers",
        "mask2former/maskformer_model.py": "",
        "mask2former/modeling/matcher.py": CRASHING_MATCHER,
        "mask2former/modeling/pixel_decoder/ops/functions/ms_deform_attn_func.py": WRONG_ATTENTION,
    }
    for name, text in modules.items():
        path = tmp_path / "Mask2Former" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "Mask2Former"


@pytest.fixture
def worker(tmp_path):
    """A side of this package, in this process."""

    def make(side="ours"):
        settings = {
            "side": side,
            "threads": torch.get_num_threads(),
            "device": "cpu",
            "configs": str(CONFIGS),
            "keep_freed_memory": False,
        }
        return Worker({**settings, "scratch": str(tmp_path), "original": None, "quick": True})

    return make


def _run(output, *arguments):
    code = main("", ["--quick", "--rounds", "2", "--threads", "1", "--output", str(output), *map(str, arguments)])
    return code, json.loads((output / "results.json").read_text())


def test_sides_that_agree_are_timed_and_reported(tmp_path):
    code, results = _run(
        tmp_path, "--cases", "attention/forward", "matching/10-targets", "--sides", "ours", "reference"
    )
    assert code == 0
    assert results["format"] == report.FORMAT and results["settings"]["quick"]
    assert results["machine"]["cores"] >= 1 and results["versions"]["torch"] == torch.__version__
    assert min(results["rates"].values()) > 0
    attention, matching = results["cases"]
    ours, reference = attention["sides"]
    assert len(ours["times"]) == 2 and ours["least"] <= ours["median"] <= ours["most"]
    assert 0 <= reference["agreement"]["attention"]["difference"] < 1e-5
    assert attention["limit"]["bytes"] > 0
    assert [side["status"] for side in matching["sides"]] == ["measured", "not offered"]
    table = (tmp_path / "table.md").read_text()
    assert attention["title"] in table and "Trial run" in table and "What was not measured" not in table


def test_wrong_and_crashing_sides_are_named_and_the_others_go_on(tmp_path, wrong_original, capsys):
    cases = ("attention/forward", "matching/10-targets")
    arguments = ("--cases", *cases, "--sides", "ours", "original", "--original", wrong_original)
    code, results = _run(tmp_path / "out", *arguments)
    assert code == 1
    wrong, crashed = (case["sides"][1] for case in results["cases"])
    assert [case["sides"][0]["status"] for case in results["cases"]] == ["measured", "measured"]
    assert wrong["status"] == "disagrees" and "times" not in wrong
    assert wrong["agreement"]["attention"]["difference"] == pytest.approx(1)
    assert crashed["status"] == "crashed" and "something went terribly wrong" in crashed["reason"]
    said = capsys.readouterr().out
    assert "attention/forward, original: disagrees: attention differ by 1" in said
    assert "matching/10-targets, original: crashed" in said
    problems = (tmp_path / "out" / "table.md").read_text().split("## What was not measured")[1]
    assert problems.count("original") == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cases", "inference/mask2former-r50-coc"], "did you mean 'inference/mask2former-r50-coco'"),
        (["--sides", "our"], "did you mean 'ours'"),
        (["--sides", "original"], "--original"),
        (["--original", "nowhere"], "no checkout of Mask2Former or MaskFormer"),
        (["--configs", "nowhere"], "--configs nowhere"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--device", "gpu"], "take cpu, cuda or cuda:<number>"),
        (["--device", "cpu:0"], "take cpu, cuda or cuda:<number>"),
        (["--output", __file__], "File exists"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments, words):
    with pytest.raises(SystemExit) as error:
        main("", arguments)
    assert words in str(error.value)


def test_missing_transformers_is_one_sentence(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="transformers is not installed"):
        main("", ["--sides", "transformers"])


def test_list_and_groups(capsys):
    assert main("", ["--list", "--cases", "matching/*-targets", "*/panoptic"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["matching/10-targets", "matching/50-targets", "matching/200-targets", "evaluation/panoptic"]
    assert {case.group for case in CASES.values()} == set(GROUPS)
    assert len(choose_cases(list(GROUPS))) == len(CASES)


def test_equal_work_is_measured_once(monkeypatch):
    settings = Settings(["ours", "ours-bf16"], 1, 0.0, 1, "cpu", True, CONFIGS, {})
    calls = []

    def measure(self, case):
        calls.append(case.name)
        return None, [{"side": name} for name in settings.sides]

    monkeypatch.setattr(Runner, "_measure", measure)
    names = ("training/mask2former-r50-1024", "growth/training-pixels/1024", "growth/training-pixels/512")
    with Runner(settings, print) as runner:
        found = [runner.run(CASES[name]) for name in names]
    assert calls == [names[0], names[2]]
    assert [case["name"] for case in found] == list(names)
    assert [len(case["sides"]) for case in found] == [2, 1, 1]


def test_differences():
    expected = {"class_logits": np.array([3.0, 4.0]), "semantic_labels": np.array([1, 2, 3, 4])}
    found = {
        "class_logits": np.array([3.0, 4.5]),
        "other_semantic_labels": np.array([1, 2, 3, 5]),
        "instance_masks": np.zeros(2),
    }
    compared = agreement.compare(found, expected, "float32")
    assert {name: one["difference"] for name, one in compared.items()} == {
        "class_logits": pytest.approx(0.1),
        "other_semantic_labels": 0.25,
    }
    assert len(agreement.disagreements(compared)) == 2
    assert not agreement.disagreements(agreement.compare(expected, expected, "float32"))


def test_missing_outputs_disagree():
    """A side that does less of the work must not be timed as one that agrees."""
    everything = {"class_logits": np.ones(2), "semantic_labels": np.array([1, 2])}
    less = {"class_logits": np.ones(2)}
    missing = agreement.compare(less, everything, "float32")
    assert missing["semantic_labels"]["difference"] == math.inf and len(agreement.disagreements(missing)) == 1
    assert not agreement.disagreements(agreement.compare(less, everything, "float32", whole=False))
    nothing = agreement.compare({"losses": np.ones(1)}, everything, "float32", whole=False)
    assert len(agreement.disagreements(nothing)) == 2


def test_fewer_instances_disagree():
    """Sure ones alone have nearly the same scores and masks, and are less work."""

    def found(count):
        instances = Instances((8, 8))
        instances.scores = torch.tensor([0.9] * 5 + [0.001] * 95)[:count]
        instances.pred_masks = torch.ones(100, 8, 8, dtype=torch.bool)[:count]
        return outputs.of_results({"instances": instances})

    compared = agreement.compare(found(5), found(100), "float32")
    assert compared["instance_count"]["difference"] == 0.95 and agreement.disagreements(compared)
    assert not agreement.disagreements(agreement.compare(found(99), found(100), "float32"))


def test_the_order_of_sides_does_not_matter():
    ours, other = {"semantic_labels": np.arange(20)}, {"other_semantic_labels": np.arange(20) // 2 * 2}
    compared = agreement.compare(other, ours, "float32"), agreement.compare(ours, other, "float32")
    assert compared[0] == compared[1] == {"other_semantic_labels": {"difference": 0.5, "tolerance": 0.1}}


@pytest.mark.parametrize("value", [np.zeros((2, 3)), np.full(2, np.nan)])
def test_other_shapes_and_nan_disagree(value):
    compared = agreement.compare({"class_logits": value}, {"class_logits": np.ones(2)}, "bfloat16")
    assert compared["class_logits"]["difference"] == math.inf and agreement.disagreements(compared)


def test_void_pixels_of_panoptic_maps_do_not_count():
    expected = {"panoptic_classes": np.array([-1, 2, 2, 3])}
    compared = agreement.compare({"other_panoptic_classes": np.array([7, 2, 2, 4])}, expected, "float32")
    assert compared["other_panoptic_classes"]["difference"] == pytest.approx(1 / 3)


def test_every_output_of_quick_cases_has_a_rule(worker, tmp_path):
    """Inference, training, loading and evaluation once through, as a worker does it."""
    ours = worker()
    for name in (
        "inference/mask2former-r50-coco",
        "training/maskformer-r50-512",
        "loading/coco-panoptic-lsj",
        "evaluation/panoptic",
    ):
        if CASES[name].kind in ("inference", "training"):
            ours.weights(name)
        ours.prepare(name)
        ours.outputs(str(tmp_path / "outputs.npz"))
        with np.load(tmp_path / "outputs.npz") as arrays:
            assert arrays.files and set(arrays.files) <= set(agreement.RULES)
        assert ours.warm_up()["seconds"] > 0
        assert ours.time()["seconds"] > 0
        assert ours.memory()["result"] >= 0
        if CASES[name].kind == "inference":
            assert ours.operations()["flop"] > 1e8
        ours.finish()


@pytest.mark.parametrize("what", ["forward", "forward-backward"])
@pytest.mark.parametrize("suffix", ["", "-from-logits"])
def test_attention_agrees_with_the_reference(worker, tmp_path, what, suffix):
    found = []
    for side in ("ours", "reference"):
        one = worker(side)
        one.prepare(f"attention/{what}{suffix}")
        one.outputs(str(tmp_path / "outputs.npz"))
        with np.load(tmp_path / "outputs.npz") as arrays:
            found.append(dict(arrays))
    assert found[0].keys() == found[1].keys()
    assert not agreement.disagreements(agreement.compare(*found, "float32"))


@pytest.mark.parametrize("task", ["panoptic", "instances", "semantic"])
def test_light_results_agree_with_dense_ones(worker, tmp_path, task):
    found = []
    for name in dict.fromkeys(
        (f"postprocess/{task}-2000x3000", f"postprocess/{task}{'-light' * (task != 'panoptic')}-2000x3000")
    ):
        ours = worker()
        ours.prepare(name)
        facts = ours.outputs(str(tmp_path / "outputs.npz"))["facts"]
        assert all(facts.values())
        with np.load(tmp_path / "outputs.npz") as arrays:
            found.append(dict(arrays))
    assert not agreement.disagreements(agreement.compare(found[-1], found[0], "float32", whole=False))


def test_weights_are_realistic_and_reproducible(worker, tmp_path):
    ours = worker()
    case = "inference/maskformer-r50-coco"
    ours.weights(case)
    ours.prepare(case)
    facts = ours.outputs(str(tmp_path / "outputs.npz"))["facts"]
    with np.load(tmp_path / "outputs.npz") as arrays:
        scores = torch.from_numpy(arrays["class_logits"]).softmax(-1)
    best, labels = scores.max(-1)
    kept = int(((best > samples.KEPT_SCORE) & (labels != scores.shape[-1] - 1)).sum())
    assert 1 <= kept <= len(scores) // 2  # a quarter on the image that they were made with
    assert facts["segments"] >= 1


def test_samples_depend_on_seeds_alone():
    assert torch.equal(samples.image((20, 30), 1), samples.image((20, 30), 1))
    assert not torch.equal(samples.image((20, 30), 1), samples.image((20, 30), 2))
    target = samples.target(7, (40, 50), 5)
    assert target["masks"].shape == (7, 40, 50) and target["masks"].flatten(1).any(1).all()
    logits = samples.class_logits(20, 9, 4)
    assert ((logits.softmax(-1)[:, :-1] > 0.8).any(1)).sum() == 4


def test_memory_meter_sees_a_peak():
    meter = Meter(torch.device("cpu"))
    before = meter.level()
    meter.reset_peak()
    if before is None:
        pytest.skip("no /proc here")
    large = torch.ones(2**24)
    del large
    assert meter.peak() - before >= 0.9 * 2**26


class _Product(torch.autograd.Function):
    """A product by a module, once more by hand in the backward pass."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return layer(x)

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.layer.weight, None


def test_operations_are_counted_inside_of_autograd_functions():
    conv, layer = torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(16, 5)
    x = torch.randn(2, 7, 16, requires_grad=True)
    with Operations() as counter:
        conv(torch.randn(4, 3, 10, 12))
        assert counter.total == 2 * 4 * 8 * 8 * 10 * 27
        _Product.apply(x, layer).sum().backward()
    assert counter.total == 2 * 4 * 8 * 8 * 10 * 27 + 2 * (2 * 14 * 16 * 5)


def test_operations_of_fused_steps_are_counted():
    x, layer = torch.randn(600, 64), torch.nn.Linear(64, 128)
    with torch.no_grad(), Operations() as counter:
        linear(x, layer.weight, layer.bias)
        product(x, layer.weight.T)
    assert counter.total == 2 * (2 * 600 * 64 * 128)
    convolve = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
    if convolve is None or not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no fused convolutions")
    with torch.no_grad(), Operations() as counter:
        convolve(torch.randn(2, 3, 10, 12), torch.randn(8, 3, 3, 3), None, [1, 1], [1, 1], [1, 1], 1, "relu", [], "")
    assert counter.total == 2 * 2 * 8 * 10 * 12 * 27


@pytest.mark.parametrize("family", ["mask2former", "maskformer"])
def test_checkpointed_training_has_the_same_losses(worker, tmp_path, family):
    name = f"training/{family}-r50-512"
    found = []
    for side in ("ours", "ours-checkpoint"):
        one = worker(side)
        one.weights(name)
        one.prepare(name)
        one.outputs(str(tmp_path / "outputs.npz"))
        with np.load(tmp_path / "outputs.npz") as arrays:
            found.append(dict(arrays))
    assert not agreement.disagreements(agreement.compare(*found, "float32"))
    assert one.operations()["flop"] > 1e8
    with pytest.raises(NotOffered, match="training only"):
        one.prepare("inference/mask2former-r50-coco")


def test_missing_memory_is_recognised():
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried")
    )
    assert is_out_of_memory(
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
    )
    assert not is_out_of_memory(RuntimeError("shapes differ"))


def test_bytes_are_counted_once():
    values = torch.zeros(4)
    assert number_of_bytes([values, {"again": values}, torch.zeros(2, dtype=torch.uint8), "text"]) == 18


def _side(name, median, memory, **more):
    return {
        "side": name,
        "status": "measured",
        "times": [median],
        "median": median,
        "least": median,
        "most": median,
        "memory": memory,
        "result": 2**20,
        **more,
    }


def _case(name, sides, **more):
    case = CASES[name]
    limit = {"flop": 10**9, "bytes": 10**6}
    values = {
        "name": name,
        "title": case.title,
        "group": case.group,
        "curve": case.curve,
        "axis": case.axis,
        "value": case.value,
    }
    return {**values, "images": case.images, "limit": limit, "sides": sides, **more}


@pytest.fixture
def results():
    return {
        "format": report.FORMAT,
        "date": "2020-01-02T03:04:05+00:00",
        "machine": {"cpu": "Some CPU", "cores": 2, "memory": 2**34, "system": "Linux"},
        "versions": {"python": "3.11", "torch": "2.9"},
        "settings": {"threads": 2, "quick": False, "device": "cpu", "keep_freed_memory": "ours"},
        "rates": {
            "matmul_float32": 1e9,
            "conv_float32": 2e9,
            "matmul_bfloat16": 4e9,
            "conv_bfloat16": 1e9,
            "copy": 1e9,
        },
        "cases": [],
    }


def test_table_has_ratios_and_distance_from_the_limit(results):
    sides = [_side("ours", 1.0, 2**28), _side("ours-bf16", 0.5, 2**28), _side("original", 3.0, 2**30)]
    sides.append({"side": "transformers", "status": "out of memory", "reason": "too large"})
    results["cases"] = [
        _case("inference/mask2former-r50-coco", sides),
        _case("loading/coco-panoptic-lsj", [_side("ours", 2.0, None)], limit=None),
    ]
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in report.tables(results).splitlines()
        if line.startswith("|")
    ]
    ours, bf16, original, transformers = rows[2:6]
    # 1 GFLOP at the faster of two rates: 0.5 s in float32, 0.25 s in bfloat16
    assert ours[1:] == ["ours", "1 s", "1 s … 1 s", "256 MB", "3.00×, 0.25×", "500 ms", "2.0"]
    assert bf16[1:] == ["ours-bf16", "500 ms", "500 ms … 500 ms", "256 MB", "6.00×, 0.25×", "250 ms", "2.0"]
    assert original[4:6] == ["1.00 GB", "-"]
    assert transformers[1:4] == ["transformers", "out of memory", "-"]
    assert rows[-1][1:] == ["ours", "2 s", "2 s … 2 s", "4.0", "-"]  # images/s, memory unknown


def test_memory_of_post_processing_is_on_top_of_the_result(results):
    results["cases"] = [_case("postprocess/panoptic-2000x3000", [_side("ours", 0.25, 3 * 2**20)])]
    text = report.tables(results)
    assert "memory on top of the result" in text and "| 2 MB " in text


def test_curves_become_pictures(results, tmp_path):
    names = [name for name in CASES if name.startswith(("growth/inference-pixels/", "growth/training-targets/"))]
    results["cases"] = [_case(name, [_side("ours", 1.0, 2**28), _side("original", 3.0, None)]) for name in names]
    files = plots.write(results, tmp_path)
    assert [file.name for file in files] == ["growth-inference-pixels.png", "growth-training-targets.png"]
    assert all(file.stat().st_size > 10_000 for file in files)


def test_resume_keeps_cases_of_the_same_settings_only(results, tmp_path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps({**results, "cases": ["kept"]}))
    assert report.kept_cases(file, results) == ["kept"]
    with pytest.raises(ValueError, match="settings differs"):
        report.kept_cases(file, {**results, "settings": {"threads": 4}})


@pytest.mark.parametrize(("content", "words"), [('{"format": 1, "machi', "is no JSON"), ("[]", "holds no results")])
def test_resume_of_a_damaged_file(results, tmp_path, content, words):
    file = tmp_path / "results.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=f"--resume: .*results.json {words}"):
        report.kept_cases(file, results)


def test_interrupted_runs_keep_what_is_measured(tmp_path, monkeypatch):
    case = {"name": "matching/10-targets", "axis": "", "group": "matching", "sides": []}

    def run(self, chosen):
        if chosen.name != case["name"]:
            raise KeyboardInterrupt
        return case

    monkeypatch.setattr(Runner, "run", run)
    monkeypatch.setattr(Runner, "rates", lambda self: {})
    monkeypatch.setattr(report, "tables", lambda results: "")
    with pytest.raises(SystemExit, match="interrupted; --resume goes on with .*results.json"):
        _run(tmp_path, "--cases", "matching")
    assert [one["name"] for one in json.loads((tmp_path / "results.json").read_text())["cases"]] == [case["name"]]


def test_a_side_that_takes_too_long_is_said_to(tmp_path):
    settings = Settings(["ours"], 1, 0.0, 1, "cpu", True, CONFIGS, {}, timeout=0.01)
    with Runner(settings, print) as runner, pytest.raises(WorkerError, match="'rates', 0.01 s without an answer"):
        runner.rates()


def test_sides_have_the_names_of_the_command_line():
    assert all(name == side.name for name, side in SIDES.items())
