"""The meta architecture of both projects: Detectron2's dicts in, losses or results out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import configurable
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone, build_sem_seg_head
from detectron2.structures import BitMasks, ImageList, Instances, PolygonMasks
from torch import Tensor, nn

from mask2former_plugin.modeling.criterion import SetCriterion
from mask2former_plugin.modeling.inference import (
    ImageMasks,
    InstanceTask,
    PanopticTask,
    SemanticTask,
    Task,
    needed_queries,
    run_tasks,
)
from mask2former_plugin.modeling.inference.upsampling import Window
from mask2former_plugin.modeling.inference.window_results import (
    InstanceWindows,
    PanopticWindows,
    SemanticWindows,
    WindowResult,
    infer_in_windows,
)
from mask2former_plugin.modeling.inference.windows import WindowOptions, window_grid
from mask2former_plugin.modeling.mask_logits import MaskLogits, mask_logits_of
from mask2former_plugin.modeling.matcher import HungarianMatcher
from mask2former_plugin.modeling.recomputation import recompute_activations, train_leanly
from mask2former_plugin.modeling.target_masks import Masks, RunLengthMasks


@META_ARCH_REGISTRY.register()
class MaskFormer(nn.Module):
    """Mask classification for semantic, instance and panoptic segmentation (MaskFormer and Mask2Former).

    Args:
        backbone: Detectron2 backbone.
        sem_seg_head: from backbone features to ``pred_logits``, ``mask_logits`` (or ``pred_masks``) and
            ``aux_outputs``.
        criterion: losses; its ``weight_dict`` says which count and how much.
        num_queries: number of queries of the head.
        object_mask_threshold: panoptic: least class score of a segment.
        overlap_threshold: panoptic: least visible part of a segment.
        metadata: of the training dataset; ``thing_dataset_id_to_contiguous_id`` tells things from stuff.
        size_divisibility: padded sizes are multiples of it; negative: of the backbone's.
        sem_seg_postprocess_before_inference: resize mask logits, not class scores, to the output size; always so for
            panoptic and instance.
        pixel_mean: per channel.
        pixel_std: per channel.
        semantic_on: give ``sem_seg``.
        panoptic_on: give ``panoptic_seg``.
        instance_on: give ``instances``.
        test_topk_per_image: most instances per image.
        panoptic_require_mask: see :class:`PanopticTask`.
        instance_things_first: see :class:`InstanceTask`; counts only with ``panoptic_on``, without it all classes may
            be instances.
        semantic_label_map: ``sem_seg`` is a :class:`LabelMap`; scores of the whole image never exist.
        instance_run_lengths: ``instances`` have ``pred_masks_rle`` instead of ``pred_masks``; dense masks never exist.
        windows: images that are larger are inferred in windows; None: as a whole.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: nn.Module,
        sem_seg_head: nn.Module,
        criterion: nn.Module,
        num_queries: int,
        object_mask_threshold: float,
        overlap_threshold: float,
        metadata: Any,
        size_divisibility: int,
        sem_seg_postprocess_before_inference: bool,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        semantic_on: bool = True,
        panoptic_on: bool = False,
        instance_on: bool = False,
        test_topk_per_image: int = 100,
        panoptic_require_mask: bool = True,
        instance_things_first: bool = False,
        semantic_label_map: bool = False,
        instance_run_lengths: bool = False,
        windows: WindowOptions | None = None,
    ) -> None:
        super().__init__()
        if not (semantic_on or panoptic_on or instance_on):
            raise ValueError(
                "no task is on: set one of MODEL.MASK_FORMER.TEST.SEMANTIC_ON, PANOPTIC_ON, INSTANCE_ON to True"
            )
        self.backbone = backbone
        self.sem_seg_head = sem_seg_head
        self.criterion = criterion
        self.num_queries = num_queries
        self.object_mask_threshold = object_mask_threshold
        self.overlap_threshold = overlap_threshold
        self.metadata = metadata
        self.size_divisibility = backbone.size_divisibility if size_divisibility < 0 else size_divisibility
        self.sem_seg_postprocess_before_inference = sem_seg_postprocess_before_inference or panoptic_on or instance_on
        self.register_buffer(
            "pixel_mean", torch.tensor(pixel_mean, dtype=torch.float32).view(-1, 1, 1), persistent=False
        )
        self.register_buffer("pixel_std", torch.tensor(pixel_std, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.semantic_on = semantic_on
        self.panoptic_on = panoptic_on
        self.instance_on = instance_on
        self.test_topk_per_image = test_topk_per_image
        self.panoptic_require_mask = panoptic_require_mask
        self.instance_things_first = instance_things_first
        self.semantic_label_map = semantic_label_map
        self.instance_run_lengths = instance_run_lengths
        self.windows = windows

    @classmethod
    def from_config(cls, cfg: Any) -> dict[str, Any]:
        """Arguments of the constructor from a config."""
        backbone = build_backbone(cfg)
        sem_seg_head = build_sem_seg_head(cfg, backbone.output_shape())
        if cfg.MODEL.LEAN_TRAINING:
            train_leanly(backbone, sem_seg_head)
        if cfg.MODEL.BACKBONE.USE_CHECKPOINT:
            recompute_activations(backbone, "MODEL.BACKBONE.USE_CHECKPOINT")
        options = cfg.MODEL.MASK_FORMER
        datasets = cfg.DATASETS.TRAIN or cfg.DATASETS.TEST
        return {
            "backbone": backbone,
            "sem_seg_head": sem_seg_head,
            "criterion": build_criterion(cfg, sem_seg_head.num_classes),
            "num_queries": options.NUM_OBJECT_QUERIES,
            "object_mask_threshold": options.TEST.OBJECT_MASK_THRESHOLD,
            "overlap_threshold": options.TEST.OVERLAP_THRESHOLD,
            "metadata": MetadataCatalog.get(datasets[0] if datasets else "__unused"),
            "size_divisibility": options.SIZE_DIVISIBILITY,
            "sem_seg_postprocess_before_inference": options.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "semantic_on": options.TEST.SEMANTIC_ON,
            "panoptic_on": options.TEST.PANOPTIC_ON,
            "instance_on": options.TEST.INSTANCE_ON,
            "test_topk_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "panoptic_require_mask": options.TEST.PANOPTIC_REQUIRE_MASK,
            "instance_things_first": options.TEST.INSTANCE_THINGS_FIRST,
            "semantic_label_map": options.TEST.SEMANTIC_LABEL_MAP,
            "instance_run_lengths": options.TEST.INSTANCE_RUN_LENGTHS,
            "windows": WindowOptions.from_config(cfg),
        }

    @property
    def device(self) -> torch.device:
        """Where the model is and where inputs go."""
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict[str, Any]]:
        """Losses in training, results otherwise.

        Args:
            batched_inputs: one dict per image: ``image`` ``[C, h, w]`` in the value range of ``pixel_mean``; in
                training ``instances`` with ``gt_classes`` ``[n]`` and ``gt_masks`` (``[n, h, w]`` bool or uint8,
                BitMasks, PolygonMasks or :class:`RunLengthMasks`); otherwise ``height`` and ``width`` of the output (by
                default the image's).

        Returns:
            In training: weighted losses by name. Otherwise one dict per image: ``sem_seg`` ``[K, H, W]`` scores;
            ``panoptic_seg``: ids ``[H, W]`` int32 (0 = void) and a list of ``id``, ``isthing``, ``category_id``;
            ``instances``: Instances with ``pred_masks`` bool ``[N, H, W]``, ``pred_boxes``, ``scores``,
            ``pred_classes``. With ``semantic_label_map`` ``sem_seg`` is classes int64 ``[H, W]``, with
            ``instance_run_lengths`` the field ``pred_masks_rle``, a list of COCO's run lengths, stands for
            ``pred_masks``.

        Raises:
            ValueError: no or inconsistent ground truth in training; the file is named.
        """
        if not self.training and self.windows is not None:
            return [self._infer_large(x) for x in batched_inputs]
        targets = self.prepare_targets(batched_inputs) if self.training else None
        images = self.preprocess(batched_inputs)
        padded_size = tuple(images.tensor.shape[-2:])
        outputs = self.sem_seg_head(self.backbone(images.tensor))
        if self.training:
            losses = self.criterion(outputs, targets, padded_size)
            weights = self.criterion.weight_dict
            return {name: loss * weights[name] for name, loss in losses.items() if name in weights}
        with torch.no_grad():
            masks = mask_logits_of(outputs)
            return [
                self._infer(
                    i, outputs["pred_logits"][i], masks, padded_size, image_size, (x.get("height"), x.get("width"))
                )
                for i, (x, image_size) in enumerate(zip(batched_inputs, images.image_sizes))
            ]

    def preprocess(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """The normalised images on the device of the model, padded to one size."""
        normalised = [(x["image"].to(self.device) - self.pixel_mean) / self.pixel_std for x in batched_inputs]
        images = ImageList.from_tensors(normalised, self.size_divisibility)
        if self.device.type == "cpu":
            # the layout in which oneDNN convolves fastest; convolutions and norms hand it on
            images.tensor = images.tensor.contiguous(memory_format=torch.channels_last)
        return images

    def prepare_targets(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Masks]]:
        """``labels`` ``[n]`` int64 and ``masks`` ``[n, h, w]`` of each image, on the device of the model, checked."""
        return [
            {
                name: value.to(self.device, non_blocking=True)
                for name, value in _read_target(x, i, self.sem_seg_head.num_classes).items()
            }
            for i, x in enumerate(batched_inputs)
        ]

    def _infer(
        self,
        index: int,
        class_logits: Tensor,
        masks: MaskLogits,
        padded_size: tuple[int, int],
        image_size: tuple[int, int],
        wanted: tuple[int | None, int | None],
    ) -> dict[str, Any]:
        """Results of one image of the batch."""
        output_size = (wanted[0] or image_size[0], wanted[1] or image_size[1])
        resize_masks = self.sem_seg_postprocess_before_inference
        tasks = self.inference_tasks(class_logits, output_size)
        queries = needed_queries(tasks)
        logits = masks.select(torch.full(queries.shape, index), queries)
        image_masks = ImageMasks(logits, padded_size, image_size, output_size if resize_masks else image_size)
        return run_tasks(tasks, queries, image_masks)

    @torch.no_grad()
    def _infer_large(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Results of one image, in windows if it is larger than one."""
        image = inputs["image"]
        image_size = tuple(image.shape[-2:])
        output_size = (inputs.get("height") or image_size[0], inputs.get("width") or image_size[1])
        grid = window_grid(image_size, output_size, self.windows)
        if len(grid) == len(grid[0]) == 1:
            class_logits, masks, padded_size = self._predict(image)
            return self._infer(0, class_logits, masks, padded_size, image_size, output_size)

        def predict(window: Window) -> tuple[list[Task], Tensor, ImageMasks]:
            part = image[:, slice(*window.rows), slice(*window.columns)]
            class_logits, masks, padded_size = self._predict(part)
            corner = window.output_rows[0], window.output_columns[0]
            tasks = self.inference_tasks(class_logits, window.output_size, canvas=(output_size, corner))
            queries = needed_queries(tasks)
            logits = masks.select(torch.zeros(len(queries), dtype=torch.int64), queries)
            return tasks, queries, ImageMasks(logits, padded_size, image_size, output_size, window)

        results: list[WindowResult] = []
        if self.semantic_on:
            results.append(SemanticWindows(output_size, label_map=self.semantic_label_map))
        if self.panoptic_on:
            results.append(PanopticWindows(output_size, self.device))
        if self.instance_on:
            encoded, top_k = self.instance_run_lengths, self.test_topk_per_image
            results.append(InstanceWindows(output_size, top_k=top_k, encoded=encoded, device=self.device))
        return infer_in_windows(grid, predict, results)

    def _predict(self, image: Tensor) -> tuple[Tensor, MaskLogits, tuple[int, int]]:
        """Class logits ``[Q, K+1]``, mask logits and padded size of one image or window."""
        images = self.preprocess([{"image": image}])
        outputs = self.sem_seg_head(self.backbone(images.tensor))
        return outputs["pred_logits"][0], mask_logits_of(outputs), tuple(images.tensor.shape[-2:])

    def inference_tasks(
        self,
        class_logits: Tensor,
        size: tuple[int, int],
        canvas: tuple[tuple[int, int], tuple[int, int]] | None = None,
    ) -> list[Task]:
        """The tasks that are on, for one image: semantic, panoptic, instance.

        Args:
            class_logits: ``[Q, K+1]``.
            size: height and width of the results.
            canvas: of a window, height and width of the whole result and the corner of the window in it; instances
                are run lengths of that size.
        """
        tasks: list[Task] = []
        if self.semantic_on:
            tasks.append(SemanticTask(class_logits, size, label_map=self.semantic_label_map))
        things = self._thing_classes() if self.panoptic_on else None
        if self.panoptic_on:
            tasks.append(
                PanopticTask(
                    class_logits,
                    size,
                    thing_classes=things,
                    object_mask_threshold=self.object_mask_threshold,
                    overlap_threshold=self.overlap_threshold,
                    require_mask=self.panoptic_require_mask,
                )
            )
        if self.instance_on:
            tasks.append(
                InstanceTask(
                    class_logits,
                    size,
                    top_k=self.test_topk_per_image,
                    thing_classes=things,
                    things_first=self.instance_things_first,
                    encoded=self.instance_run_lengths or canvas is not None,
                    canvas=canvas,
                )
            )
        return tasks

    def _thing_classes(self) -> frozenset[int]:
        things = getattr(self.metadata, "thing_dataset_id_to_contiguous_id", None)
        if things is None:
            raise ValueError(
                "panoptic inference tells things from stuff by thing_dataset_id_to_contiguous_id, which the metadata "
                f"of dataset {getattr(self.metadata, 'name', '?')!r} (DATASETS.TRAIN) lacks: register a panoptic "
                "dataset or switch MODEL.MASK_FORMER.TEST.PANOPTIC_ON off"
            )
        return frozenset(things.values())


def build_criterion(cfg: Any, num_classes: int) -> SetCriterion:
    """Matcher and losses of a config, with the published weights by name."""
    options = cfg.MODEL.MASK_FORMER
    if options.MASK_LOSS not in ("point", "dense"):
        raise ValueError(f"MODEL.MASK_FORMER.MASK_LOSS must be 'point' or 'dense', got {options.MASK_LOSS!r}")
    num_points = options.TRAIN_NUM_POINTS if options.MASK_LOSS == "point" else 0
    weights = {"loss_ce": options.CLASS_WEIGHT, "loss_mask": options.MASK_WEIGHT, "loss_dice": options.DICE_WEIGHT}
    weight_dict = dict(weights)
    if options.DEEP_SUPERVISION:
        for i in range(options.DEC_LAYERS - 1):
            weight_dict.update({f"{name}_{i}": weight for name, weight in weights.items()})
    return SetCriterion(
        num_classes,
        HungarianMatcher(options.CLASS_WEIGHT, options.MASK_WEIGHT, options.DICE_WEIGHT, num_points),
        weight_dict,
        options.NO_OBJECT_WEIGHT,
        ("labels", "masks"),
        num_points,
        options.OVERSAMPLE_RATIO,
        options.IMPORTANCE_SAMPLE_RATIO,
    )


def _read_target(inputs: dict[str, Any], index: int, num_classes: int) -> dict[str, Masks]:
    """Labels and masks of one image as they come from the mapper; errors name the file."""
    name = inputs.get("file_name", f"image {index} of the batch")
    if "instances" not in inputs:
        raise ValueError(
            f"{name}: no 'instances' to train on; the dataset mapper (INPUT.DATASET_MAPPER_NAME) must give them"
        )
    instances: Instances = inputs["instances"]
    height, width = inputs["image"].shape[-2:]
    labels = torch.as_tensor(instances.gt_classes, dtype=torch.int64)
    if not len(labels):
        return {"labels": labels, "masks": torch.zeros((0, height, width), dtype=torch.bool)}
    if labels.min() < 0 or labels.max() >= num_classes:
        wrong = sorted({int(i) for i in labels if not 0 <= i < num_classes})
        raise ValueError(
            f"{name}: class ids {wrong} are outside 0..{num_classes - 1}; MODEL.SEM_SEG_HEAD.NUM_CLASSES is "
            f"{num_classes}, set it to the number of classes of the dataset or repair the labels"
        )
    if not instances.has("gt_masks"):
        raise ValueError(f"{name}: 'instances' without gt_masks; choose a dataset mapper that gives masks")
    masks = _as_masks(instances.gt_masks, instances.image_size)
    if masks.shape[-2:] != (height, width):
        raise ValueError(
            f"{name}: ground-truth masks of {masks.shape[-2]}x{masks.shape[-1]} (height x width) "
            f"for an image of {height}x{width}"
        )
    if len(masks) != len(labels):
        raise ValueError(f"{name}: {len(masks)} ground-truth masks for {len(labels)} classes")
    return {"labels": labels, "masks": masks}


def _as_masks(masks: Any, image_size: tuple[int, int]) -> Masks:
    if isinstance(masks, RunLengthMasks):
        return masks
    if isinstance(masks, PolygonMasks):
        return BitMasks.from_polygon_masks(masks, *image_size).tensor
    return masks.tensor if isinstance(masks, BitMasks) else torch.as_tensor(masks)
