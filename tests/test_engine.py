"""Training, resuming and evaluating through ``tools/train_net.py``'s code path on a tiny generated dataset."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.engine import DefaultTrainer, default_argument_parser, hooks

from mask2former_plugin.config import load_config
from mask2former_plugin.data.synthetic import SyntheticOptions, generate
from mask2former_plugin.engine import MixedPrecisionTrainer, Predictor, Trainer, check_config, setup
from mask2former_plugin.modeling.optimization import InferenceOnly

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import train_net  # noqa: E402

SMALL = [
    "INPUT.IMAGE_SIZE", "64", "INPUT.MIN_SIZE_TEST", "48", "INPUT.MAX_SIZE_TEST", "64", "SOLVER.IMS_PER_BATCH", "2",
    "DATALOADER.NUM_WORKERS", "0", "MODEL.DEVICE", "cpu", "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", "5", "MODEL.MASK_FORMER.DEC_LAYERS", "2",
    "MODEL.SEM_SEG_HEAD.CONVS_DIM", "32", "MODEL.SEM_SEG_HEAD.MASK_DIM", "32", "MODEL.MASK_FORMER.HIDDEN_DIM", "32",
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS", "64", "MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD", "0.0", "SOLVER.WARMUP_ITERS", "0",
]  # fmt: skip


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    options = SyntheticOptions(train_images=4, val_images=2, height=48, width=64)
    generate(root / "quickstart", options, progress=False)
    return root


@pytest.fixture
def run(datasets, tmp_path, monkeypatch):
    """Calls train_net.main with a quickstart config, tiny settings and the given flags and overrides."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets))

    def call(arch, *flags_and_opts, flags=()):
        config_file = str(ROOT / "configs" / "quickstart" / f"{arch}.yaml")
        words = ["--config-file", config_file, *flags, "OUTPUT_DIR", str(tmp_path / arch), *SMALL, *flags_and_opts]
        return train_net.main(default_argument_parser().parse_args(words))

    call.output = tmp_path
    return call


@pytest.mark.parametrize("arch", ["mask2former", "maskformer"])
def test_train_evaluate_resume(run, arch):
    results = run(arch, "SOLVER.MAX_ITER", "3", "SOLVER.CHECKPOINT_PERIOD", "1")
    assert set(results) == {"panoptic_seg", "segm", "bbox", "sem_seg"}
    for metric in (results["panoptic_seg"]["PQ"], results["sem_seg"]["mIoU"]):
        assert math.isnan(metric) or 0 <= metric <= 100
    output = run.output / arch
    assert (output / "last_checkpoint").read_text() == "model_final.pth"

    # as if the run had been interrupted after two iterations: resumed, not started again
    (output / "model_final.pth").unlink()
    (output / "model_0000002.pth").unlink()
    (output / "last_checkpoint").write_text("model_0000001.pth")
    (output / "metrics.json").unlink()
    run(arch, "SOLVER.MAX_ITER", "3", flags=["--resume"])
    assert torch.load(output / "model_final.pth", weights_only=True)["iteration"] == 2
    trained = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    assert min(line["iteration"] for line in trained) >= 2

    # the same model evaluated alone gives the same numbers as at the end of training
    again = run(arch, "MODEL.WEIGHTS", str(output / "model_final.pth"), flags=["--eval-only"])
    assert set(again) == set(results)


@pytest.mark.embedded_only  # upstream's WarmupPolyLR restores the old end and fails (detectron2 issue 2424)
def test_resume_with_more_iterations(run):
    run("mask2former", "SOLVER.MAX_ITER", "1")
    run("mask2former", "SOLVER.MAX_ITER", "2", flags=["--resume"])
    assert torch.load(run.output / "mask2former" / "model_final.pth", weights_only=True)["iteration"] == 1


def test_resume_with_another_config(run):
    run("mask2former", "SOLVER.MAX_ITER", "1")
    for changed, message in (
        (["MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", "10"], "can't be resumed with another model.*query_feat"),
        (["MODEL.MASK_FORMER.DEC_LAYERS", "3"], "can't be resumed with another model.*predictor"),
        (["SOLVER.OPTIMIZER", "SGD"], "state of another optimizer"),
        (["MODEL.BACKBONE.FREEZE_AT", "2"], "state of another optimizer or of other parameters"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run("mask2former", "SOLVER.MAX_ITER", "2", *changed, flags=["--resume"])
        assert re.match(rf"(?s)error: .*{message}", stopped.value.code)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["SOLVER.OPTIMIZER", "ADAM"], "SOLVER.OPTIMIZER must be one of"),
        pytest.param(["SOLVER.IMS_PER_BATCH", "0"], "SOLVER.IMS_PER_BATCH", marks=pytest.mark.embedded_only),
        (["SOLVER.MAX_ITER", "0"], "SOLVER.MAX_ITER must be at least 1"),
        pytest.param(["MODEL.RESNETS.DEPTH", "51"], "no ResNet of depth 51", marks=pytest.mark.embedded_only),
        (["OUTPUT_DIR", __file__], "Not a directory|File exists"),
    ],
)
def test_one_sentence_about_what_only_building_finds(run, changed, message):
    with pytest.raises(SystemExit) as stopped:
        run("mask2former", *changed)
    assert re.match(rf"error: .*({message})", stopped.value.code)


def test_evaluation_alone_equals_the_evaluation_after_training(run):
    trained = run("mask2former", "SOLVER.MAX_ITER", "1")
    weights = str(run.output / "mask2former" / "model_final.pth")
    alone = run("mask2former", "MODEL.WEIGHTS", weights, flags=["--eval-only"])
    assert json.dumps(alone, default=float) == json.dumps(trained, default=float)


def test_predictor_and_evaluation_use_an_optimised_copy(run, monkeypatch):
    run("mask2former", "SOLVER.MAX_ITER", "1")
    weights = str(run.output / "mask2former" / "model_final.pth")
    config_file = ROOT / "configs" / "quickstart" / "mask2former.yaml"
    image = torch.randint(0, 256, (48, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).numpy()

    def scores(*opts):
        predictor = Predictor(load_config(config_file, [*SMALL, "MODEL.WEIGHTS", weights, *opts]))
        assert isinstance(predictor.model, InferenceOnly) == ("MODEL.INFERENCE.OPTIMIZE" not in opts)
        return predictor(image)["sem_seg"]

    plain = scores("MODEL.INFERENCE.OPTIMIZE", "False")
    torch.testing.assert_close(scores(), plain, rtol=0, atol=1e-4)  # float32, one decoder layer
    half = scores("MODEL.INFERENCE.PRECISION", "bfloat16")
    assert half.dtype == torch.float32 and 0 < (half - plain).norm() / plain.norm() < 0.05

    evaluated = []
    test = DefaultTrainer.test.__func__
    monkeypatch.setattr(DefaultTrainer, "test", classmethod(lambda cls, cfg, model, *args: evaluated.append(model) or test(cls, cfg, model, *args)))
    run("mask2former", "MODEL.WEIGHTS", weights, "MODEL.INFERENCE.PRECISION", "bfloat16", flags=["--eval-only"])
    assert isinstance(evaluated[0], InferenceOnly) and evaluated[0].backbone.autocast_to == ("cpu", torch.bfloat16)


def test_best_checkpoint_is_kept(run):
    run("mask2former", "SOLVER.MAX_ITER", "2", "TEST.EVAL_PERIOD", "1", "TEST.BEST_CHECKPOINT.METRIC", "sem_seg/mIoU")
    assert (run.output / "mask2former" / "model_best.pth").is_file()
    assert (run.output / "mask2former" / "last_checkpoint").read_text() == "model_final.pth"


def test_bfloat16_training_on_any_device(run):
    run("mask2former", "SOLVER.MAX_ITER", "1", "SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", "bfloat16")
    saved = torch.load(run.output / "mask2former" / "model_final.pth", weights_only=True)
    assert all(torch.isfinite(v).all() for v in saved["model"].values() if v.is_floating_point())


@pytest.mark.embedded_only  # upstream calls after_backward of hooks of the inner trainer only
@pytest.mark.parametrize("amp", [False, True])
def test_hooks_see_the_gradients(run, monkeypatch, amp):
    seen = []

    class SeesGradients(hooks.HookBase):
        def after_backward(self):
            seen.append(any(p.grad is not None for p in self.trainer.model.parameters()))

    build_hooks = Trainer.build_hooks
    monkeypatch.setattr(Trainer, "build_hooks", lambda self: [*build_hooks(self), SeesGradients()])
    run("mask2former", "SOLVER.MAX_ITER", "2", "SOLVER.AMP.ENABLED", str(amp), "SOLVER.AMP.PRECISION", "bfloat16", "DATASETS.TEST", "()")
    assert seen == [True, True]


def test_scaled_float16_step_equals_plain_float32_step():
    """The scaler's factor cancels: a linear model whose numbers are exact in float16 gets the same update either way."""

    class Model(torch.nn.Linear):
        def forward(self, data):
            return {"loss": super().forward(data).float().sum()}

    plain, mixed = Model(4, 1), Model(4, 1)
    for model in (plain, mixed):
        torch.nn.init.constant_(model.weight, 0.5)
        torch.nn.init.zeros_(model.bias)
    data = torch.tensor([[1.0, 2.0, 0.5, -1.0]])
    plain(data)["loss"].backward()
    torch.optim.SGD(plain.parameters(), lr=0.25).step()

    trainer = MixedPrecisionTrainer(mixed, [data], torch.optim.SGD(mixed.parameters(), lr=0.25), torch.float16)
    # at the usual 65536 the first steps overflow float16 and are skipped, as they should be
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    trainer._write_metrics = lambda *args, **kwargs: None  # needs an event storage, which is not the point here
    trainer.run_step()
    torch.testing.assert_close(mixed.weight, plain.weight, rtol=0, atol=0)
    assert trainer.state_dict()["grad_scaler"]["scale"] == 256.0


def test_hook_order_keeps_the_best_after_the_evaluation(run, datasets, tmp_path):
    words = ["--config-file", str(ROOT / "configs/quickstart/mask2former.yaml"), "OUTPUT_DIR", str(tmp_path / "hooks"), *SMALL]
    cfg = setup(default_argument_parser().parse_args([*words, "TEST.BEST_CHECKPOINT.METRIC", "panoptic_seg/PQ", "TEST.EVAL_PERIOD", "1"]))
    kinds = [type(hook) for hook in Trainer(cfg)._hooks]
    assert kinds.index(hooks.BestCheckpointer) == kinds.index(hooks.EvalHook) + 1
    assert len(kinds) == len(set(kinds))


@pytest.mark.parametrize(
    "opts, message",
    [
        (["DATASETS.TRAIN", "('coco_2017_trian',)"], "Unknown dataset in DATASETS.TRAIN 'coco_2017_trian'. Did you mean 'coco_2017_train'"),
        (["DATASETS.TRAIN", "()"], "DATASETS.TRAIN is empty"),
        (["DATASETS.TEST", "('nothing_like_it',)"], "Unknown dataset in DATASETS.TEST 'nothing_like_it'"),
        (["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "7"], "NUM_CLASSES.*7.*8|8.*NUM_CLASSES.*7"),
        (["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", "float8"], "SOLVER.AMP.PRECISION must be one of"),
        (["MODEL.INFERENCE.PRECISION", "half"], "MODEL.INFERENCE.PRECISION must be one of float32, bfloat16, float16, got 'half'"),
        (["MODEL.INFERENCE.PRECISION", "bfloat16", "MODEL.INFERENCE.OPTIMIZE", "False"], "set MODEL.INFERENCE.OPTIMIZE True"),
        (["MODEL.INFERENCE.COMPILE", "True", "MODEL.INFERENCE.OPTIMIZE", "False"], "set MODEL.INFERENCE.OPTIMIZE True"),
        (["MODEL.WEIGHTS", "nowhere.pth"], "nowhere.pth does not exist"),
        (["MODEL.DEVICE", "gpu"], "MODEL.DEVICE 'gpu' is no device"),
        (["MODEL.META_ARCHITECTURE", "MaskFormr"], "Unknown MODEL.META_ARCHITECTURE 'MaskFormr'. Did you mean 'MaskFormer'"),
        (["MODEL.BACKBONE.NAME", "SwinTransformer"], "Unknown MODEL.BACKBONE.NAME .* Did you mean 'D2SwinTransformer'"),
        (["MODEL.SEM_SEG_HEAD.NAME", "MaskFormerHed"], "Unknown MODEL.SEM_SEG_HEAD.NAME .* Did you mean 'MaskFormerHead'"),
        (["MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "MSDeformPixelDecoder"], "PIXEL_DECODER_NAME .* Did you mean 'MSDeformAttnPixelDecoder'"),
        (["MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME", "StandardDecoder"], "Did you mean 'StandardTransformerDecoder'"),
        (["INPUT.DATASET_MAPPER_NAME", "coco_panoptic"], "Unknown INPUT.DATASET_MAPPER_NAME .* Did you mean 'coco_panoptic_lsj'"),
        (["TEST.BEST_CHECKPOINT.METRIC", "segm/AP", "TEST.BEST_CHECKPOINT.MODE", "maximum"], "TEST.BEST_CHECKPOINT.MODE 'maximum'"),
    ],
)
def test_what_would_fail_late_fails_first(run, opts, message):
    with pytest.raises(SystemExit, match=message):
        run("mask2former", *opts)
    assert not (run.output / "mask2former").exists()


def test_missing_files_of_a_builtin_dataset_are_named(tmp_path):
    config_file = ROOT / "configs/mask2former/coco/instance-segmentation/maskformer2_R50_bs16_50ep.yaml"
    words = ["--config-file", str(config_file), "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "OUTPUT_DIR", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="dataset 'coco_2017_train' in DATASETS.TRAIN: its .* does not exist.*DETECTRON2_DATASETS"):
        train_net.main(default_argument_parser().parse_args(words))
    assert not (tmp_path / "out").exists()


def test_a_broken_dataset_for_the_evaluation_stops_before_the_training(datasets, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets))
    images, labels = tmp_path / "images", tmp_path / "labels"
    for folder, names in ((images, ("1.jpg", "2.jpg")), (labels, ("1.png",))):
        folder.mkdir()
        for name in names:
            (folder / name).touch()
    classes = ", ".join(f"class {number}" for number in range(8))
    config = tmp_path / "config.yaml"
    config.write_text(
        f"_BASE_: {ROOT / 'configs/quickstart/mask2former.yaml'}\n"
        f"DATASETS: {{TEST: [broken], CUSTOM: {{broken: {{FORMAT: semantic_folder, IMAGES: {images}, LABELS: {labels}, CLASSES: [{classes}]}}}}}}\n"
        f"OUTPUT_DIR: {tmp_path / 'out'}\n"
    )
    with pytest.raises(SystemExit, match="error: Dataset 'broken': 1 images without a label map .2."):
        train_net.main(default_argument_parser().parse_args(["--config-file", str(config), "MODEL.DEVICE", "cpu"]))
    assert not (tmp_path / "out").exists()


def test_several_processes_complain_once():
    config_file = str(ROOT / "configs" / "quickstart" / "mask2former.yaml")
    words = [str(ROOT / "tools" / "train_net.py"), "--config-file", config_file, "--num-gpus", "2", "SOLVER.MAX_ITR", "3"]
    ended = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.endswith("error: command line: unknown config key SOLVER.MAX_ITR, did you mean SOLVER.MAX_ITER?\n")
    assert "Traceback" not in ended.stderr and ended.stderr.count("error:") == 1


def test_a_config_file_is_needed():
    with pytest.raises(SystemExit, match="no --config-file given"):
        train_net.main(default_argument_parser().parse_args([]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_not_there():
    cfg = load_config(opts=["MODEL.DEVICE", "cuda", "DATASETS.TEST", "('coco_2017_val',)", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "80"])
    with pytest.raises(ValueError, match="no CUDA device; add MODEL.DEVICE cpu"):
        check_config(cfg, training=False)


def test_checkpoint_of_another_architecture_is_refused(run):
    run("maskformer", "SOLVER.MAX_ITER", "1")
    other = str(run.output / "maskformer" / "model_final.pth")
    with pytest.raises(SystemExit, match="error: the checkpoint is of another architecture"):
        run("mask2former", "MODEL.WEIGHTS", other, flags=["--eval-only"])


def test_evaluation_with_another_number_of_classes_is_refused(run):
    """The classifier would be random, and its results only look like results."""
    run("mask2former", "SOLVER.MAX_ITER", "1")
    weights = torch.load(run.output / "mask2former" / "model_final.pth", weights_only=True)["model"]
    for part in ("weight", "bias"):
        name = f"sem_seg_head.predictor.class_embed.{part}"
        weights[name] = weights[name][:4].clone()
    other = run.output / "three_classes.pth"
    torch.save({"model": weights}, other)
    with pytest.raises(SystemExit, match="error: the model would be used with random weights"):
        run("mask2former", "MODEL.WEIGHTS", str(other), flags=["--eval-only"])
