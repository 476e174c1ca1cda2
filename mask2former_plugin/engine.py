"""Training and evaluation: the plugin's ``Trainer`` on Detectron2's, and the set-up that the tools share."""

from __future__ import annotations

import argparse
import functools
import logging
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_train_loader
from detectron2.engine import DefaultPredictor, DefaultTrainer, SimpleTrainer, default_setup, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY
from detectron2.projects.deeplab import build_lr_scheduler
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger
from torch import nn

from mask2former_plugin.checkpoint import Checkpointer
from mask2former_plugin.config import load_config
from mask2former_plugin.data.datasets.custom import check_num_classes, register_custom_datasets
from mask2former_plugin.data.mappers import MAPPERS, build_mapper
from mask2former_plugin.data.names import unknown_name
from mask2former_plugin.evaluation import build_evaluator, light_outputs
from mask2former_plugin.memory import keep_freed_memory
from mask2former_plugin.modeling.optimization import PRECISIONS as INFERENCE_PRECISIONS
from mask2former_plugin.modeling.optimization import optimize_for_inference
from mask2former_plugin.modeling.inference.windows import WindowOptions
from mask2former_plugin.modeling.transformer_decoders import TRANSFORMER_DECODER_REGISTRY
from mask2former_plugin.solver import build_optimizer
from mask2former_plugin.test_time_augmentation import build_model_with_TTA

logger = logging.getLogger(__name__)

PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# config keys that name a registered class
_REGISTRIES = {
    "MODEL.META_ARCHITECTURE": META_ARCH_REGISTRY,
    "MODEL.BACKBONE.NAME": BACKBONE_REGISTRY,
    "MODEL.SEM_SEG_HEAD.NAME": SEM_SEG_HEADS_REGISTRY,
    "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": SEM_SEG_HEADS_REGISTRY,
    "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME": TRANSFORMER_DECODER_REGISTRY,
}


class MixedPrecisionTrainer(SimpleTrainer):
    """One training step under autocast, on any device.

    Detectron2's own ``AMPTrainer`` is float16 on CUDA. bfloat16 has the range of float32: it needs no loss scaling and runs on CPUs too.
    """

    def __init__(self, model: nn.Module, data_loader, optimizer: torch.optim.Optimizer, precision: torch.dtype):
        super().__init__(model, data_loader, optimizer)
        self.precision = precision
        self.device_type = next(model.parameters()).device.type
        self.grad_scaler = torch.amp.GradScaler(self.device_type, enabled=precision == torch.float16)

    def run_step(self) -> None:
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        self.optimizer.zero_grad()  # before the forward pass, whose results would lie beside the old gradients
        with torch.autocast(self.device_type, dtype=self.precision):
            loss_dict = self.model(data)
            losses = sum(loss_dict.values())
        self.grad_scaler.scale(losses).backward()
        self.after_backward()
        self._write_metrics(loss_dict, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if self.grad_scaler.is_enabled() and state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


class Trainer(DefaultTrainer):
    """``DefaultTrainer`` with the mappers, optimizers, schedules and evaluators of MaskFormer and Mask2Former."""

    def __init__(self, cfg: CfgNode):
        amp = cfg.SOLVER.AMP.ENABLED
        # Detectron2 would build its CUDA-only AMP trainer: let it build the plain one, then exchange it
        plain = cfg.clone()
        plain.defrost()
        plain.SOLVER.AMP.ENABLED = False
        plain.freeze()
        super().__init__(plain)
        self.cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        if amp:
            inner = self._trainer
            self._trainer = MixedPrecisionTrainer(inner.model, inner.data_loader, inner.optimizer, PRECISIONS[cfg.SOLVER.AMP.PRECISION])
            self._trainer.register_hooks(inner._hooks)
        self._trainer.zero_grad_before_forward = True  # old gradients need no memory beside what the forward pass keeps
        self.checkpointer = Checkpointer.of_trainer(self)
        self._hooks.clear()
        self.register_hooks(self.build_hooks())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ``DefaultTrainer``; a ValueError says if the state is of another optimizer."""
        stored = state_dict["_trainer"]["optimizer"]["param_groups"]
        present = self._trainer.optimizer.state_dict()["param_groups"]
        # AdamW and SGD would take each other's state without a word
        if [(len(g["params"]), "betas" in g) for g in stored] != [(len(g["params"]), "betas" in g) for g in present]:
            raise ValueError("the checkpoint has the state of another optimizer or of other parameters; resume with the SOLVER keys of the stored run")
        super().load_state_dict(state_dict)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        return build_detection_train_loader(cfg, mapper=build_mapper(cfg, is_train=True))

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer):
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset_name, output_folder)

    def build_hooks(self) -> list[hooks.HookBase]:
        """Detectron2's hooks, and the one that keeps the best checkpoint if ``TEST.BEST_CHECKPOINT.METRIC`` names a metric."""
        result = super().build_hooks()
        best = self.cfg.TEST.BEST_CHECKPOINT
        if best.METRIC and comm.is_main_process():
            keeper = hooks.BestCheckpointer(self.cfg.TEST.EVAL_PERIOD, self.checkpointer, best.METRIC, best.MODE)
            # right after the evaluation, before the writers
            index = next(i for i, hook in enumerate(result) if isinstance(hook, hooks.EvalHook)) + 1
            result.insert(index, keeper)
        return result

    def train(self) -> OrderedDict | None:
        """Train, and return the results of the last evaluation, None in other than the main process."""
        super().train()
        return getattr(self, "_last_eval_results", None)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators=None) -> OrderedDict:
        """Evaluation on ``DATASETS.TEST``, with label maps and run lengths where all evaluators take them.

        Args:
            evaluators: one, or one per dataset; None: those of :meth:`build_evaluator`.
        """
        model = model_for_inference(cfg, model)
        if not cfg.TEST.LIGHT_OUTPUTS:
            return super().test(cfg, model, evaluators)
        if evaluators is None:
            evaluators = [cls.build_evaluator(cfg, name) for name in cfg.DATASETS.TEST]
        elif isinstance(evaluators, DatasetEvaluator):
            evaluators = [evaluators]
        with light_outputs(model, evaluators):
            return super().test(cfg, model, evaluators)

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: nn.Module) -> OrderedDict:
        """Evaluation with test-time augmentation on ``DATASETS.TEST``; the keys of the results end in ``_TTA``."""
        logger.info("Running inference with test-time augmentation")
        model = build_model_with_TTA(cfg, model_for_inference(cfg, model))
        evaluators = [
            cls.build_evaluator(cfg, name, output_folder=os.path.join(cfg.OUTPUT_DIR, "inference_TTA")) for name in cfg.DATASETS.TEST
        ]
        results = cls.test(cfg, model, evaluators)
        return OrderedDict((f"{key}_TTA", value) for key, value in results.items())


@contextmanager
def user_errors(*errors: type[Exception]) -> Iterator[None]:
    """For tools: what a user can put right in a config or a checkpoint ends the program with one sentence, no traceback.

    Args:
        errors: which exceptions are that, default those of reading and checking a config.
    """
    try:
        yield
    except errors or (KeyError, ValueError, OSError) as error:
        sys.exit(f"error: {error.args[0] if isinstance(error, KeyError) else error}")


def load_for_evaluation(model: nn.Module, cfg: CfgNode, *, resume: bool = False) -> None:
    """Load ``MODEL.WEIGHTS``, or with ``resume`` the last checkpoint in ``OUTPUT_DIR``, for use and not for training.

    Raises:
        CheckpointMismatchError: weights would stay random, such as a classifier of another number of classes, and
            ``MODEL.ALLOW_RANDOM_WEIGHTS`` is False.
    """
    checkpointer = Checkpointer(model, save_dir=cfg.OUTPUT_DIR)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    if not cfg.MODEL.ALLOW_RANDOM_WEIGHTS:
        checkpointer.require_weights(classifier=True)


def model_for_inference(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """A copy of the model, without ``DistributedDataParallel``, as ``MODEL.INFERENCE`` asks for, or the model itself."""
    options = cfg.MODEL.INFERENCE
    if not options.OPTIMIZE:
        return model
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    return optimize_for_inference(inner, precision=options.PRECISION, compiled=options.COMPILE)


class Predictor(DefaultPredictor):
    """``DefaultPredictor`` that reads every checkpoint that :class:`Checkpointer` reads, and refuses random weights."""

    def __init__(self, cfg: CfgNode):
        _set_up_memory(cfg)
        without_weights = cfg.clone()
        without_weights.defrost()
        without_weights.MODEL.WEIGHTS = ""
        super().__init__(without_weights)
        self.cfg = cfg.clone()
        load_for_evaluation(self.model, cfg)
        self.model = model_for_inference(cfg, self.model)


def read_config(args: argparse.Namespace) -> CfgNode:
    """Config of a run from the command line, checked and frozen, its own datasets registered.

    Raises:
        KeyError, ValueError, FileNotFoundError: what the config asks for can't be had; one sentence says what to change.
    """
    if not args.config_file:
        raise ValueError("no --config-file given; the published models are in configs/, see configs/README.md")
    cfg = load_config(args.config_file, args.opts)
    register_custom_datasets(cfg)
    check_config(cfg, training=not args.eval_only)
    check_dataset_files(cfg, training=not args.eval_only)
    cfg.freeze()
    return cfg


def setup(args: argparse.Namespace) -> CfgNode:
    """:func:`read_config`, and loggers and output folder are ready."""
    cfg = read_config(args)
    _set_up_memory(cfg)
    default_setup(cfg, args)
    setup_logger(output=cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="mask2former_plugin", abbrev_name="m2f")
    return cfg


def _set_up_memory(cfg: CfgNode) -> None:
    if cfg.MODEL.KEEP_FREED_MEMORY and torch.device(cfg.MODEL.DEVICE).type == "cpu":
        keep_freed_memory()


def check_config(cfg: CfgNode, *, training: bool) -> None:
    """Raise one clear error for what would otherwise fail late: unknown datasets and classes, class counts, device, precision."""
    _check_datasets(cfg, training)
    check_num_classes(cfg)
    _check_device(cfg.MODEL.DEVICE)
    _check_names(cfg, training)
    WindowOptions.from_config(cfg)
    if cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.PRECISION not in PRECISIONS:
        raise ValueError(f"SOLVER.AMP.PRECISION must be one of {', '.join(PRECISIONS)}, got {cfg.SOLVER.AMP.PRECISION!r}")
    _check_inference(cfg.MODEL.INFERENCE)
    if training and cfg.SOLVER.MAX_ITER < 1:
        raise ValueError(f"SOLVER.MAX_ITER must be at least 1, got {cfg.SOLVER.MAX_ITER}; to evaluate without training take --eval-only")
    weights = cfg.MODEL.WEIGHTS
    if weights and "://" not in weights and not os.path.exists(weights.removesuffix("?matching_heuristics=True")):
        raise FileNotFoundError(f"MODEL.WEIGHTS: {weights} does not exist")


def _check_inference(options: CfgNode) -> None:
    if options.PRECISION not in INFERENCE_PRECISIONS:
        raise ValueError(f"MODEL.INFERENCE.PRECISION must be one of {', '.join(INFERENCE_PRECISIONS)}, got {options.PRECISION!r}")
    if not options.OPTIMIZE and (options.PRECISION != "float32" or options.COMPILE):
        raise ValueError("MODEL.INFERENCE.PRECISION and COMPILE work on the optimised copy of the model; set MODEL.INFERENCE.OPTIMIZE True")


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"MODEL.DEVICE {name!r} is no device; it is cpu, cuda or cuda:<number>") from error
    if device.type != "cuda":
        return
    if not torch.cuda.is_available():
        raise ValueError(f"MODEL.DEVICE is {name!r}, but torch sees no CUDA device; add MODEL.DEVICE cpu to the command line")
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(f"MODEL.DEVICE is {name!r}, but torch sees {torch.cuda.device_count()} CUDA device(s), counted from 0")


def _check_names(cfg: CfgNode, training: bool) -> None:
    known = {key: [name for name, _ in registry] for key, registry in _REGISTRIES.items()}
    if training:
        known["INPUT.DATASET_MAPPER_NAME"] = list(MAPPERS)
        if cfg.TEST.BEST_CHECKPOINT.METRIC:
            known["TEST.BEST_CHECKPOINT.MODE"] = ["max", "min"]
    for key, names in known.items():
        name = functools.reduce(getattr, key.split("."), cfg)
        if name not in names:
            raise ValueError(unknown_name(key, name, names))


def check_dataset_files(cfg: CfgNode, *, training: bool) -> None:
    """Look whether the datasets that will be used are whole, before the work starts.

    Raises:
        FileNotFoundError: a dataset lacks its images or annotations, as far as its metadata names them.
        ValueError, KeyError: an own dataset for the evaluation is wrong in itself, e.g. has images without labels.
    """
    for key in _used(training):
        for name in cfg.DATASETS[key]:
            metadata = MetadataCatalog.get(name)
            needed = ["image_root", "image_dir", "gt_dir", "panoptic_root", "panoptic_json"]
            if metadata.get("evaluator_type") in ("coco", "lvis"):
                needed.append("json_file")
            for what in needed:
                path = metadata.get(what)
                if path and not PathManager.exists(path):
                    raise FileNotFoundError(
                        f"dataset {name!r} in DATASETS.{key}: its {what} {path} does not exist. $DETECTRON2_DATASETS (default ./datasets) is the "
                        "folder of the built-in datasets; datasets/README.md shows their layouts"
                    )
    for name in cfg.DATASETS.TEST:
        if MetadataCatalog.get(name).get("custom_options"):
            DatasetCatalog.get(name)  # what is wrong here would otherwise end the training at its first evaluation


def _used(training: bool) -> tuple[str, ...]:
    return ("TRAIN", "TEST") if training else ("TEST",)


def _check_datasets(cfg: CfgNode, training: bool) -> None:
    known = DatasetCatalog.list()
    for key in _used(training):
        names = cfg.DATASETS[key]
        if not names and (key == "TRAIN" or not training):
            raise ValueError(f"DATASETS.{key} is empty: name at least one registered dataset")
        for name in names:
            if name not in known:
                raise KeyError(unknown_name(f"dataset in DATASETS.{key}", name, known))
