"""What most trainings share: command line, set-up, writers, the default trainer and the default predictor."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import sys
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import detectron2.data.transforms as T
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, LazyConfig
from detectron2.data import MetadataCatalog, build_detection_test_loader, build_detection_train_loader
from detectron2.engine import hooks
from detectron2.engine.train_loop import AMPTrainer, HookBase, SimpleTrainer, TrainerBase
from detectron2.evaluation import (
    DatasetEvaluator,
    DatasetEvaluators,
    inference_on_dataset,
    print_csv_format,
    verify_results,
)
from detectron2.layers.batch_norm import NaiveSyncBatchNorm, SyncBatchNorm
from detectron2.modeling import build_model
from detectron2.solver import LRScheduler, build_lr_scheduler, build_optimizer
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import CommonMetricPrinter, EventWriter, JSONWriter, TensorboardXWriter
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger

__all__ = [
    "DefaultPredictor",
    "DefaultTrainer",
    "create_ddp_model",
    "default_argument_parser",
    "default_setup",
    "default_writers",
]

logger = logging.getLogger(__name__)

AMP_PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# Ports from here on are not assigned to any service; that of a user is always the same.
FIRST_PRIVATE_PORT = 2**15 + 2**14


def create_ddp_model(model: nn.Module, *, fp16_compression: bool = False, **kwargs: Any) -> nn.Module:
    """Wrap ``model`` in DistributedDataParallel if there are several processes.

    Args:
        fp16_compression: exchange gradients as float16.
        kwargs: for DistributedDataParallel.
    """
    if comm.get_world_size() == 1:
        return model
    on_gpu = any(parameter.is_cuda for parameter in model.parameters())
    if not on_gpu:
        for module in model.modules():
            if type(module) is SyncBatchNorm:  # which DistributedDataParallel refuses on CPUs; computes the same
                module.__class__ = NaiveSyncBatchNorm
    kwargs.setdefault("device_ids", [comm.get_local_rank()] if on_gpu else None)
    ddp = DistributedDataParallel(model, **kwargs)
    if fp16_compression:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

        ddp.register_comm_hook(state=None, hook=fp16_compress_hook)
    return ddp


def default_argument_parser(epilog: str | None = None) -> argparse.ArgumentParser:
    """Command line of a training script: config file, resume, evaluation only, processes, config overrides.

    Args:
        epilog: text at the end of the help; None shows examples.
    """
    script = os.path.basename(sys.argv[0])
    examples = f"""
Examples:

  one GPU, or one process on the CPU:
    {script} --config-file cfg.yaml --num-gpus 1
    {script} --config-file cfg.yaml MODEL.DEVICE cpu
  eight GPUs, with overrides:
    {script} --num-gpus 8 --config-file cfg.yaml MODEL.WEIGHTS /path/to/weights.pth SOLVER.BASE_LR 0.001
  two machines:
    first:  {script} --config-file cfg.yaml --num-gpus 8 --num-machines 2 --machine-rank 0 --dist-url tcp://HOST:29500
    second: {script} --config-file cfg.yaml --num-gpus 8 --num-machines 2 --machine-rank 1 --dist-url tcp://HOST:29500
"""
    parser = argparse.ArgumentParser(
        epilog=epilog or examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="the YAML config")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint in OUTPUT_DIR, if any, with its iteration, optimizer and schedule",
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS on DATASETS.TEST, no training")
    parser.add_argument("--num-gpus", type=int, default=1, help="GPUs, that is processes, of each machine (default: 1)")
    parser.add_argument("--num-machines", type=int, default=1, help="number of machines (default: 1)")
    parser.add_argument("--machine-rank", type=int, default=0, help="number of this machine, from 0 (default: 0)")
    user = os.getuid() if hasattr(os, "getuid") else 1
    parser.add_argument(
        "--dist-url",
        default=f"tcp://127.0.0.1:{FIRST_PRIVATE_PORT + hash(user) % 2**14}",
        help="where the processes meet: tcp://HOST:PORT of the first machine; on a single machine also 'auto', a free "
        "port (default: %(default)s)",
    )
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        help="config overrides at the end of the command line: KEY VALUE pairs (YAML configs) or key=value (Python)",
    )
    return parser


def _first_key(cfg: Any, *keys: str, default: Any = None) -> Any:
    """Value of the first of the dotted keys that the config has; YAML and Python configs use different names."""
    for key in keys:
        node = cfg
        for part in key.split("."):
            if part not in node:
                break
            node = node[part]
        else:
            return node
    return default


def default_setup(cfg: Any, args: Any) -> None:
    """Prepare a run: output folder, loggers, environment and config in the log, ``config.yaml``, seeds, switches.

    Args:
        cfg: a CfgNode, or an omegaconf config.
        args: command line (``config_file``, ``eval_only``), a namespace or a mapping.
    """
    options = args if isinstance(args, Mapping) else vars(args)
    rank = comm.get_rank()
    output_dir = _first_key(cfg, "OUTPUT_DIR", "output_dir", "train.output_dir")
    if comm.is_main_process() and output_dir:
        PathManager.mkdirs(output_dir)
    # The others open log files in the folder.
    comm.synchronize()
    setup_logger(output_dir, distributed_rank=rank, name="fvcore")
    log = setup_logger(output_dir, distributed_rank=rank)

    log.info("Process %d of %d", rank, comm.get_world_size())
    log.info("Environment:\n%s", collect_env_info())
    log.info("Command line arguments: %s", args)
    config_file = options.get("config_file", "")
    if config_file:
        with PathManager.open(config_file, "r") as file:
            log.info("Contents of %s:\n%s", config_file, file.read())
    if comm.is_main_process() and output_dir:
        path = os.path.join(output_dir, "config.yaml")
        if isinstance(cfg, CfgNode):
            with PathManager.open(path, "w") as file:
                file.write(cfg.dump())
        else:
            LazyConfig.save(cfg, path)
        log.info("Full config saved to %s", path)

    seed = _first_key(cfg, "SEED", "train.seed", default=-1)
    seed_all_rng(None if seed < 0 else seed + rank)
    if not options.get("eval_only", False):
        # Its search pays off where image sizes stay the same; in an evaluation they rarely do.
        torch.backends.cudnn.benchmark = _first_key(cfg, "CUDNN_BENCHMARK", "train.cudnn_benchmark", default=False)
    precision = _first_key(cfg, "FLOAT32_PRECISION", "train.float32_precision", default="")
    if precision:
        log.info("Precision of float32 matrix products: %s", precision)
        torch.set_float32_matmul_precision(precision)


def default_writers(output_dir: str, max_iter: int | None = None) -> list[EventWriter]:
    """Writers for the terminal, ``metrics.json`` and, if it is installed, TensorBoard.

    Args:
        output_dir: where the files go.
        max_iter: for the remaining time on the terminal.
    """
    PathManager.mkdirs(output_dir)
    writers: list[EventWriter] = [CommonMetricPrinter(max_iter), JSONWriter(os.path.join(output_dir, "metrics.json"))]
    if importlib.util.find_spec("tensorboard") is not None:
        writers.append(TensorboardXWriter(output_dir))
    else:
        logger.info("TensorBoard is not installed, no event files are written")
    return writers


def _check_device(cfg: CfgNode) -> None:
    if torch.device(cfg.MODEL.DEVICE).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, but PyTorch finds no CUDA device here; set MODEL.DEVICE cpu "
            "(at the end of the command line, or in the config)"
        )


class DefaultPredictor:
    """One image in, one result out: the model of a config with MODEL.WEIGHTS, the input resized as for testing.

    Attributes:
        metadata: of the first dataset in DATASETS.TEST.
        aug: the resizing.
        input_format: channel order that the model expects, INPUT.FORMAT.
    """

    def __init__(self, cfg: CfgNode) -> None:
        _check_device(cfg)
        if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
            raise ValueError(f"INPUT.FORMAT must be RGB or BGR for prediction, got {cfg.INPUT.FORMAT!r}")
        self.cfg = cfg.clone()
        self.model = build_model(self.cfg)
        self.model.eval()
        self.metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0] if len(cfg.DATASETS.TEST) else "__unused")
        DetectionCheckpointer(self.model).load(cfg.MODEL.WEIGHTS)
        size = cfg.INPUT.MIN_SIZE_TEST
        self.aug = T.ResizeShortestEdge([size, size], cfg.INPUT.MAX_SIZE_TEST)
        self.input_format = cfg.INPUT.FORMAT

    def __call__(self, original_image: np.ndarray) -> dict[str, Any]:
        """Result of the model for an image (H, W, 3) of values 0..255 in BGR order, at the image's own size."""
        shape = getattr(original_image, "shape", type(original_image).__name__)
        if not isinstance(original_image, np.ndarray) or len(shape) != 3 or shape[2] != 3 or 0 in shape:
            raise ValueError(f"the image must be an array (H, W, 3) in BGR order, got {shape}")
        if original_image.dtype != np.uint8 and original_image.max() > 255:
            raise ValueError(
                f"the image must have values 0..255, got {original_image.dtype} up to {original_image.max()}"
            )
        image = original_image[:, :, ::-1] if self.input_format == "RGB" else original_image
        height, width = image.shape[:2]
        image = self.aug.get_transform(image).apply_image(image)
        tensor = torch.as_tensor(np.ascontiguousarray(image.astype(np.float32).transpose(2, 0, 1)))
        with torch.no_grad():
            return self.model([{"image": tensor.to(self.cfg.MODEL.DEVICE), "height": height, "width": width}])[0]


def _forwarded(name: str) -> property:
    def get(self: DefaultTrainer) -> Any:
        return getattr(self._trainer, name)

    def set_(self: DefaultTrainer, value: Any) -> None:
        setattr(self._trainer, name, value)

    return property(get, set_, doc=f"The ``{name}`` of the trainer that does the steps.")


class _HandOnBackward(HookBase):
    """Lets hooks of the outer trainer see the backward pass of the inner one."""

    def __init__(self, outer: TrainerBase) -> None:
        self._outer = weakref.proxy(outer)

    def after_backward(self) -> None:
        self._outer.after_backward()


class DefaultTrainer(TrainerBase):
    """Builds everything from a config and trains: model, optimizer, loader, schedule, checkpointer, hooks.

    Subclasses replace the ``build_*`` methods. The step itself is done by ``_trainer``, a SimpleTrainer or, with
    SOLVER.AMP.ENABLED, an AMPTrainer. If the config has a key SOLVER.AMP.PRECISION, it is "float16" or "bfloat16".

    Attributes:
        cfg: the config, with the solver scaled to the number of processes if REFERENCE_WORLD_SIZE says so.
        model, data_loader, optimizer: those of ``_trainer``; can be set.
        scheduler, checkpointer: as built.
    """

    model = _forwarded("model")
    data_loader = _forwarded("data_loader")
    optimizer = _forwarded("optimizer")

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        model = create_ddp_model(model, broadcast_buffers=False)
        self._trainer = _build_step(cfg, model, data_loader, optimizer)
        self._trainer.register_hooks([_HandOnBackward(self)])
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        # A weak reference: the trainer holds the checkpointer.
        self.checkpointer = DetectionCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """Go on from the last checkpoint in OUTPUT_DIR if ``resume`` and there is one, else load MODEL.WEIGHTS only.

        A resumed trainer has the iteration, optimizer, schedule, loss scale and hooks' states of the checkpoint.
        """
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if resume and self.checkpointer.has_checkpoint():
            # The checkpoint counts finished iterations from 0.
            self.start_iter = self.iter + 1

    def build_hooks(self) -> list[HookBase]:
        """Timer, schedule, batch norm statistics, checkpoints, evaluation, writers, in this order."""
        cfg = self.cfg.clone()
        cfg.defrost()
        # The loader for the batch norm statistics gets no worker processes of its own.
        cfg.DATALOADER.NUM_WORKERS = 0
        result: list[HookBase] = [hooks.IterationTimer(), hooks.LRScheduler()]
        if cfg.TEST.PRECISE_BN.ENABLED and get_bn_modules(self.model):
            loader = self.build_train_loader(cfg)
            result.append(hooks.PreciseBN(cfg.TEST.EVAL_PERIOD, self.model, loader, cfg.TEST.PRECISE_BN.NUM_ITER))
        # Before the evaluation, which takes long and may fail.
        if comm.is_main_process():
            result.append(hooks.PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD))

        trainer = weakref.proxy(self)

        def evaluate() -> dict[str, Any]:
            trainer._last_eval_results = trainer.test(trainer.cfg, trainer.model)
            return trainer._last_eval_results

        result.append(hooks.EvalHook(cfg.TEST.EVAL_PERIOD, evaluate))
        # Last, so that they write what the other hooks have added.
        if comm.is_main_process():
            result.append(hooks.PeriodicWriter(self.build_writers(), period=20))
        return result

    def build_writers(self) -> list[EventWriter]:
        return default_writers(self.cfg.OUTPUT_DIR, self.max_iter)

    def train(self) -> dict[str, Any] | None:
        """Train to SOLVER.MAX_ITER; compare with TEST.EXPECTED_RESULTS, if there are any.

        Returns:
            The results of the last evaluation, in the main process; None if there was none.
        """
        super().train(self.start_iter, self.max_iter)
        results = getattr(self, "_last_eval_results", None)
        if not comm.is_main_process():
            return None
        if len(self.cfg.TEST.EXPECTED_RESULTS):
            if results is None:
                raise RuntimeError("TEST.EXPECTED_RESULTS is set, but the training ended without an evaluation")
            verify_results(self.cfg, results)
        return results

    def run_step(self) -> None:
        self._trainer.iter = self.iter
        self._trainer.run_step()

    def flush_metrics(self) -> None:
        self._trainer.flush_metrics()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The model of the config on MODEL.DEVICE, without weights."""
        _check_device(cfg)
        model = build_model(cfg)
        logger.info("Model:\n%s", model)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: Optimizer) -> LRScheduler:
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        return build_detection_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        return build_detection_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator | DatasetEvaluators | None:
        """Evaluator of a test dataset; there is no default, subclasses define it."""
        raise NotImplementedError(
            f"{cls.__name__} has no evaluator for {dataset_name!r}: define build_evaluator() or give test() evaluators"
        )

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: DatasetEvaluator | Sequence[DatasetEvaluator] | None = None
    ) -> dict[str, Any]:
        """Evaluate on every dataset of DATASETS.TEST.

        Args:
            evaluators: one for each dataset; None builds them.

        Returns:
            task -> metrics if there is a single dataset, else dataset name -> task -> metrics; empty in all processes
            but the main one.
        """
        if isinstance(evaluators, DatasetEvaluator):
            evaluators = [evaluators]
        if evaluators is not None and len(evaluators) != len(cfg.DATASETS.TEST):
            raise ValueError(f"{len(evaluators)} evaluators for {len(cfg.DATASETS.TEST)} datasets in DATASETS.TEST")
        results: OrderedDict[str, Any] = OrderedDict()
        for index, dataset_name in enumerate(cfg.DATASETS.TEST):
            try:
                evaluator = cls.build_evaluator(cfg, dataset_name) if evaluators is None else evaluators[index]
            except NotImplementedError as error:
                logger.warning("No evaluation: %s", error)
                results[dataset_name] = {}
                continue
            of_dataset = inference_on_dataset(model, cls.build_test_loader(cfg, dataset_name), evaluator)
            results[dataset_name] = of_dataset
            if comm.is_main_process():
                if not isinstance(of_dataset, Mapping):
                    raise TypeError(f"an evaluator must return a dict in the main process, got {of_dataset!r}")
                logger.info("Evaluation results of %s in csv format:", dataset_name)
                print_csv_format(of_dataset)
        if len(results) == 1:
            return next(iter(results.values()))
        return results

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        """Adapt the solver to another number of processes than SOLVER.REFERENCE_WORLD_SIZE, for which it was written.

        With n times as many processes the batch and the learning rate are n times as large, and iterations, warm-up,
        steps and periods as many times shorter (arXiv:1706.02677). A reference of 0 switches this off.

        Returns:
            ``cfg`` itself if nothing changes, else a changed copy.
        """
        reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
        if reference in (0, num_workers):
            return cfg
        if cfg.SOLVER.IMS_PER_BATCH % reference != 0:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH = {cfg.SOLVER.IMS_PER_BATCH} is no multiple of "
                f"SOLVER.REFERENCE_WORLD_SIZE = {reference}"
            )
        frozen = cfg.is_frozen()
        cfg = cfg.clone()
        cfg.defrost()
        factor = num_workers / reference
        solver = cfg.SOLVER
        solver.IMS_PER_BATCH = round(solver.IMS_PER_BATCH * factor)
        solver.BASE_LR *= factor
        solver.MAX_ITER = round(solver.MAX_ITER / factor)
        solver.WARMUP_ITERS = round(solver.WARMUP_ITERS / factor)
        solver.STEPS = tuple(round(step / factor) for step in solver.STEPS)
        solver.CHECKPOINT_PERIOD = round(solver.CHECKPOINT_PERIOD / factor)
        cfg.TEST.EVAL_PERIOD = round(cfg.TEST.EVAL_PERIOD / factor)
        solver.REFERENCE_WORLD_SIZE = num_workers
        logger.info(
            "Solver adapted from %d to %d processes: batch %d, learning rate %g, %d iterations, warm-up %d",
            reference,
            num_workers,
            solver.IMS_PER_BATCH,
            solver.BASE_LR,
            solver.MAX_ITER,
            solver.WARMUP_ITERS,
        )
        if frozen:
            cfg.freeze()
        return cfg


def _build_step(cfg: CfgNode, model: nn.Module, data_loader: Any, optimizer: Optimizer) -> SimpleTrainer:
    if not cfg.SOLVER.AMP.ENABLED:
        return SimpleTrainer(model, data_loader, optimizer)
    name = cfg.SOLVER.AMP.get("PRECISION")
    if name is not None and name not in AMP_PRECISIONS:
        raise ValueError(f"SOLVER.AMP.PRECISION must be one of {', '.join(AMP_PRECISIONS)}, got {name!r}")
    trainer = AMPTrainer(model, data_loader, optimizer, precision=None if name is None else AMP_PRECISIONS[name])
    logger.info("Mixed precision: %s on %s", trainer.precision, trainer.device_type)
    return trainer
