"""The cases of the benchmark: what is measured, at which sizes, and how well the sides have to agree."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

COCO = "coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml"
ADE_SWIN = "ade20k/semantic-segmentation/swin/maskformer2_swin_tiny_bs16_160k.yaml"
CITYSCAPES = "cityscapes/panoptic-segmentation/maskformer2_R50_bs16_90k.yaml"
MASKFORMER_ADE = "ade20k-150/maskformer_R50_bs16_160k.yaml"
MASKFORMER_COCO = "coco-panoptic/maskformer_panoptic_R50_bs64_554k.yaml"

GROUPS = {
    "inference": "Inference, from a uint8 image to results",
    "training": "Training step: losses, backward, optimizer",
    "attention": "Multi-scale deformable attention alone",
    "matching": "Matching of ten predictions",
    "postprocess": "Post-processing of 100 queries",
    "growth": "Growth",
    "loading": "Data loading",
    "evaluation": "Evaluation",
}


@dataclass(frozen=True)
class Case:
    """One thing that is measured on all sides.

    Attributes:
        name: ``group/what``; unique.
        title: what the table says.
        kind: which builder makes the work: inference, training, attention, attention_backward, matching, postprocess,
            loading or evaluation.
        options: sizes and models, by the names that the builders read.
        quick: options that replace them in a trial run.
        axis: for a point of a curve: what grows ("pixels", "queries" or "targets").
        value: the place of the point on that axis.
        images: per run, where the result is a rate of images.
    """

    name: str
    title: str
    kind: str
    options: Mapping[str, Any]
    quick: Mapping[str, Any] = field(default_factory=dict)
    axis: str = ""
    value: int = 0
    images: int = 0

    @property
    def group(self) -> str:
        return self.name.split("/")[0]

    @property
    def curve(self) -> str:
        """Name that the points of one curve share."""
        return self.name.rsplit("/", 1)[0] if self.axis else ""

    def reduced(self) -> Case:
        """The same with the options of a trial run."""
        return replace(self, options={**self.options, **self.quick}, quick={})


def _model(config: str, family: str = "mask2former", **options: Any) -> dict[str, Any]:
    return {"family": family, "config": config, "queries": 100, "narrow": False, **options}


_SMALL = {"narrow": True, "queries": 12}


def _inference(name: str, title: str, size: tuple[int, int], model: Mapping[str, Any], **more: Any) -> Case:
    return Case(name, title, "inference", {**model, "size": size}, {**_SMALL, "size": (64, 96)}, **more)


def _training(
    name: str, title: str, side: int, batch: int, targets: int, model: Mapping[str, Any], **more: Any
) -> Case:
    options = {**model, "size": (side, side), "batch": batch, "targets": targets}
    return Case(name, title, "training", options, {**_SMALL, "size": (64, 64), "targets": min(targets, 6)}, **more)


def _inference_cases() -> list[Case]:
    maskformer = {"family": "maskformer"}
    return [
        _inference(
            "inference/mask2former-r50-coco",
            "Mask2Former R50, COCO panoptic + instance + semantic, 800x1066",
            (800, 1066),
            _model(COCO),
        ),
        _inference(
            "inference/mask2former-swin-t-ade20k",
            "Mask2Former Swin-T, ADE20K semantic, 512x512",
            (512, 512),
            _model(ADE_SWIN),
        ),
        _inference(
            "inference/mask2former-r50-cityscapes",
            "Mask2Former R50, Cityscapes panoptic + instance + semantic, 1024x2048",
            (1024, 2048),
            _model(CITYSCAPES),
        ),
        _inference(
            "inference/maskformer-r50-ade20k",
            "MaskFormer R50, ADE20K semantic, 512x512",
            (512, 512),
            _model(MASKFORMER_ADE, **maskformer),
        ),
        _inference(
            "inference/maskformer-r50-coco",
            "MaskFormer R50, COCO panoptic + semantic, 800x1066",
            (800, 1066),
            _model(MASKFORMER_COCO, **maskformer),
        ),
    ]


def _training_cases() -> list[Case]:
    maskformer = _model(MASKFORMER_ADE, "maskformer")
    return [
        _training(
            "training/mask2former-r50-512", "Mask2Former R50, 512x512, batch 2, 20 targets", 512, 2, 20, _model(COCO)
        ),
        _training(
            "training/mask2former-r50-1024",
            "Mask2Former R50, 1024x1024, batch 1, 20 targets",
            1024,
            1,
            20,
            _model(COCO),
        ),
        _training(
            "training/maskformer-r50-512", "MaskFormer R50, 512x512, batch 2, 20 targets", 512, 2, 20, maskformer
        ),
    ]


def _attention_cases() -> list[Case]:
    # the levels of an 800x1066 image at stride 32, 16 and 8: 17,600 tokens
    options = {"shapes": ((25, 34), (50, 67), (100, 134)), "heads": 8, "width": 32, "points": 4}
    quick = {"shapes": ((3, 4), (6, 8), (12, 16))}
    cases = []
    for kind, what in (("attention", "forward"), ("attention_backward", "forward-backward")):
        for logits, given in ((False, "locations and weights"), (True, "offsets and logits")):
            name = f"attention/{what}{'-from-logits' * logits}"
            title = f"{what.replace('-', ' + ')}, from {given}, 17.6k tokens, 8 heads of 32, 3 levels, 4 points"
            cases.append(Case(name, title, kind, {**options, "logits": logits}, quick))
    return cases


def _matching_cases() -> list[Case]:
    options = {"predictions": 10, "queries": 100, "classes": 133, "channels": 256, "size": (1024, 1024)}
    quick = {"queries": 12, "channels": 16, "size": (64, 64), "targets": 6}
    cases = []
    for product, what in ((False, ""), (True, ", with the product of embeddings and features")):
        for n in (10, 50, 200):
            name = f"matching/{n}-targets{'-with-product' * product}"
            title = f"100 queries, {n} targets of 1024x1024{what}"
            cases.append(Case(name, title, "matching", {**options, "targets": n, "product": product}, quick))
    return cases


def _postprocess_cases() -> list[Case]:
    # image sizes without padding and with the shape of the result
    sizes = (((768, 1152), (2000, 3000)), ((768, 960), (4000, 5000)))
    quick = {"queries": 12, "kept": 6, "image": (64, 96), "size": (100, 150)}
    cases = []
    for image, size in sizes:
        for task, light, what in (
            ("panoptic", False, "panoptic"),
            ("instances", False, "instances, dense masks"),
            ("instances", True, "instances, run lengths"),
            ("semantic", False, "semantic, scores"),
            ("semantic", True, "semantic, label map"),
        ):
            # scores of COCO's 133 classes at 4000x5000 would be 10.6 GB
            classes = 19 if task == "semantic" and size[0] > 2000 else 133
            options = {
                "queries": 100,
                "classes": classes,
                "kept": 25,
                "task": task,
                "light": light,
                "image": image,
                "size": size,
            }
            name = f"postprocess/{task}{'-light' * light}-{size[0]}x{size[1]}"
            cases.append(Case(name, f"{what}, {classes} classes, {size[0]}x{size[1]}", "postprocess", options, quick))
    return cases


def _growth_cases() -> list[Case]:
    model = _model(COCO)
    cases = []
    for side in (256, 512, 768, 1024):
        title = f"inference, {side}x{side}"
        cases.append(
            _inference(f"growth/inference-pixels/{side}", title, (side, side), model, axis="pixels", value=side**2)
        )
    for queries in (100, 200, 300):
        more = {"axis": "queries", "value": queries}
        wide = {**model, "queries": queries}
        cases.append(
            _inference(
                f"growth/inference-queries/{queries}",
                f"inference, {queries} queries, 512x512",
                (512, 512),
                wide,
                **more,
            )
        )
        cases.append(
            _training(
                f"growth/training-queries/{queries}",
                f"training step, {queries} queries, 512x512",
                512,
                1,
                20,
                wide,
                **more,
            )
        )
    for side in (256, 512, 768, 1024):
        title = f"training step, {side}x{side}, 20 targets"
        cases.append(
            _training(f"growth/training-pixels/{side}", title, side, 1, 20, model, axis="pixels", value=side**2)
        )
    for targets in (5, 20, 50, 100, 200):
        title = f"training step, {targets} targets, 512x512"
        cases.append(
            _training(
                f"growth/training-targets/{targets}", title, 512, 1, targets, model, axis="targets", value=targets
            )
        )
    return sorted(cases, key=lambda case: case.curve)


def _data_cases() -> list[Case]:
    return [
        Case(
            "loading/coco-panoptic-lsj",
            "LSJ mapper, panoptic, images of 480x640 to 1024x1024",
            "loading",
            {"family": "mask2former", "config": COCO, "image": (480, 640), "side": 1024},
            {"image": (60, 80), "side": 128},
            images=8,
        ),
        Case(
            "evaluation/panoptic",
            "panoptic evaluator, images of 480x640",
            "evaluation",
            {"task": "panoptic", "image": (480, 640)},
            {"image": (60, 80)},
            images=16,
        ),
        Case(
            "evaluation/semantic",
            "semantic evaluator, images of 480x640",
            "evaluation",
            {"task": "semantic", "image": (480, 640)},
            {"image": (60, 80)},
            images=16,
        ),
    ]


CASES = {
    case.name: case
    for case in (
        *_inference_cases(),
        *_training_cases(),
        *_attention_cases(),
        *_matching_cases(),
        *_postprocess_cases(),
        *_growth_cases(),
        *_data_cases(),
    )
}


def choose_cases(patterns: Sequence[str]) -> list[Case]:
    """The cases that any of the names or globs means, in the order of the table; a group's name means all of it.

    Raises:
        KeyError: a pattern fits no case; the message names the nearest one.
    """
    chosen = set()
    for pattern in patterns:
        found = [name for name in CASES if fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}/")]
        if not found:
            near = difflib.get_close_matches(pattern, [*CASES, *GROUPS], n=1, cutoff=0.0)
            raise KeyError(f"unknown case {pattern!r}, did you mean {near[0]!r}? --list shows all cases")
        chosen.update(found)
    return [case for name, case in CASES.items() if name in chosen]
