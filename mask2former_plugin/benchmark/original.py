"""The side of the original projects: a checkout of MaskFormer or Mask2Former on whichever Detectron2 is importable.

The checkout's code runs as it is. What it needs and a plain machine lacks is stood in for, before it is imported:

- its compiled attention operator, by an empty module: the original then computes its own PyTorch formula;
- timm, torchvision and panopticapi, where they are not installed, by the few helpers that it uses of them.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mask2former_plugin.benchmark import common, outputs
from mask2former_plugin.benchmark.cases import Case
from mask2former_plugin.benchmark.workload import Context, NotOffered, Workload

PACKAGES = {"mask2former": "mask2former", "maskformer": "mask_former"}  # family to the package in the checkout


def family_of(checkout: Path) -> str:
    """Which of the two projects a checkout holds.

    Raises:
        FileNotFoundError: none of them.
    """
    for family, package in PACKAGES.items():
        if (checkout / package / "__init__.py").is_file() and (checkout / "train_net.py").is_file():
            return family
    raise FileNotFoundError(
        f"--original {checkout}: no checkout of Mask2Former or MaskFormer (it holds no train_net.py beside "
        f"{' or '.join(PACKAGES.values())}/)"
    )


class _DropPath(nn.Identity):
    """Stochastic depth of probability 0, which is what all sides are measured with."""

    def __init__(self, probability: float = 0.0) -> None:
        super().__init__()


def _rgb_to_id(color: np.ndarray) -> np.ndarray:
    """Segment ids ``[H, W]`` of a panoptic PNG ``[H, W, 3]``."""
    return color.astype(np.int32) @ np.array([1, 256, 256**2], dtype=np.int32)


def _stand_in(name: str, **content: Any) -> None:
    module = ModuleType(name)
    module.__dict__.update(content)
    sys.modules[name] = module


def import_project(checkout: Path) -> SimpleNamespace:
    """The modules of a checkout: ``package``, ``train_net``, ``matcher``, ``model``."""
    family = family_of(checkout)
    _stand_in("MultiScaleDeformableAttention")
    if importlib.util.find_spec("timm") is None:
        for name in ("timm", "timm.models"):
            _stand_in(name)
        _stand_in(
            "timm.models.layers",
            DropPath=_DropPath,
            to_2tuple=lambda value: (value, value),
            trunc_normal_=nn.init.trunc_normal_,
        )
    if importlib.util.find_spec("torchvision") is None:
        _stand_in("torchvision", __version__="0.20", _is_tracing=torch.jit.is_tracing)
    if importlib.util.find_spec("panopticapi") is None:
        _stand_in("panopticapi")
        _stand_in("panopticapi.utils", rgb2id=_rgb_to_id)
    sys.path.insert(0, str(checkout))
    package = PACKAGES[family]
    modules = {
        "package": package,
        "train_net": "train_net",
        "matcher": f"{package}.modeling.matcher",
        "model": f"{package}.maskformer_model" if family == "mask2former" else f"{package}.mask_former_model",
    }
    if family == "mask2former":
        modules["attention"] = f"{package}.modeling.pixel_decoder.ops.functions.ms_deform_attn_func"
    return SimpleNamespace(family=family, **{key: importlib.import_module(name) for key, name in modules.items()})


_imported: dict[Path, SimpleNamespace] = {}


def _project(context: Context) -> SimpleNamespace:
    if context.original not in _imported:
        _imported[context.original] = import_project(context.original)
    return _imported[context.original]


def config(options: Mapping[str, Any], context: Context) -> Any:
    """The checkout's own config of a case."""
    from detectron2.config import get_cfg
    from detectron2.projects.deeplab import add_deeplab_config

    project = _project(context)
    cfg = get_cfg()
    add_deeplab_config(cfg)
    if project.family == "mask2former":
        project.package.add_maskformer2_config(cfg)
    else:
        project.package.add_mask_former_config(cfg)
    cfg.merge_from_file(str(context.original / "configs" / options["config"]), allow_unsafe=True)
    cfg.merge_from_list(common.overrides(options))
    return cfg


def _inference(case: Case, context: Context) -> Workload:
    model = common.load_model(config(case.options, context), case.options, context).eval().requires_grad_(False)
    batch = common.inference_batch(case.options)

    def run() -> list[dict[str, Any]]:
        with torch.no_grad():
            return model(batch)

    def compared() -> dict[str, np.ndarray]:
        caught: list[Mapping[str, Tensor]] = []
        hook = model.sem_seg_head.register_forward_hook(lambda module, inputs, found: caught.append(found))
        results = run()[0]
        hook.remove()
        predictions = outputs.of_predictions(caught[0]["pred_logits"][0], caught[0]["pred_masks"][0])
        workload.facts.update(outputs.facts_of_results(results))
        return {**predictions, **outputs.of_results(results)}

    workload = Workload(run, compared, (model, batch))
    return workload


def _training(case: Case, context: Context) -> Workload:
    cfg = config(case.options, context)
    model = common.load_model(cfg, case.options, context)
    batch = common.training_batch(case.options, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
    optimizer = _project(context).train_net.Trainer.build_optimizer(cfg, model)

    def losses() -> dict[str, Tensor]:
        return model(batch)

    run = common.step(model, losses, optimizer)
    return Workload(run, lambda: common.training_outputs(model, losses, optimizer), (model, batch))


def _attention(case: Case, context: Context) -> Workload:
    function = _project(context).attention.ms_deform_attn_core_pytorch
    shapes = torch.tensor(case.options["shapes"], dtype=torch.int64)
    return common.attention_workload(case, context, lambda value, *samples: function(value, shapes, *samples))


def _matching(case: Case, context: Context) -> Workload:
    factors, features, target = common.matching_inputs(case.options, context.device)
    dense = common.dense_masks(case.options, factors, features)
    matcher = _project(context).matcher.HungarianMatcher(**common.matcher_weights())

    def run() -> list:
        return [matcher({"pred_logits": c, "pred_masks": m()}, [target]) for (c, _), m in zip(factors, dense)]

    def compared() -> dict[str, np.ndarray]:
        torch.manual_seed(0)
        return outputs.of_assignments([images[0] for images in run()], len(target["labels"]))

    return Workload(run, compared, (factors, features, target))


def _postprocess(case: Case, context: Context) -> Workload:
    if case.options["light"]:
        raise NotOffered("there are no light results")
    classes, embed, features = common.postprocess_inputs(case.options, context.device)
    predictions = {"pred_logits": classes[None], "pred_masks": torch.einsum("qc,chw->qhw", embed, features)[None]}
    model = common.postprocess_model(case, _project(context).model.MaskFormer, predictions)
    return common.postprocess_workload(case, context, model, predictions)


def _loading(case: Case, context: Context) -> Workload:
    cfg = config({**case.options, "queries": 100, "narrow": False}, context)
    cfg.INPUT.IMAGE_SIZE = case.options["side"]
    mapper = _project(context).package.COCOPanopticNewBaselineDatasetMapper(cfg, True)
    return common.loading_workload(case.options, context, mapper)


BUILDERS: dict[str, Callable[[Case, Context], Workload]] = {
    "inference": _inference,
    "training": _training,
    "attention": _attention,
    "attention_backward": _attention,
    "matching": _matching,
    "postprocess": _postprocess,
    "loading": _loading,
}
