"""Drawing of predictions and annotations over images."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from enum import Enum, unique
from typing import Union

import cv2
import matplotlib.colors as mplc
import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Polygon, Rectangle
from PIL import Image

from detectron2.data.catalog import Metadata
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, PolygonMasks
from detectron2.utils.colormap import colormap, random_color
from detectron2.utils.file_io import PathManager
from detectron2.utils.generic_mask import GenericMask
from detectron2.utils.missing import needs_upstream
from detectron2.utils.vis_image import VisImage

__all__ = ["ColorMode", "GenericMask", "VisImage", "Visualizer"]

Color = Union[str, Sequence[float]]  # evaluated at import, where Python 3.9 has no |

SMALL_OBJECT_AREA = 1000  # pixels of the output; below it, the label goes beside the object
LARGE_PART_AREA = 120_000  # pixels of the output; above it, a further part of a mask gets a label of its own
OFF_WHITE = (1.0, 1.0, 240 / 255)


@unique
class ColorMode(Enum):
    """How instances are coloured."""

    IMAGE = 0  # every instance its own colour
    SEGMENTATION = 1  # instances of a class have similar colours, those of the metadata
    IMAGE_BW = 2  # as IMAGE, and everything that isn't an instance is grey


def _create_text_labels(
    classes: Sequence[int] | None,
    scores: Sequence[float] | None,
    class_names: Sequence[str] | None,
    is_crowd: Sequence[bool] | None = None,
) -> list[str] | None:
    """Texts like "person 95%" or "person|crowd"; class numbers where names are missing; None if nothing is known."""
    labels = None
    if classes is not None:
        known = class_names or []
        labels = [known[k] if k < len(known) else str(k) for k in map(int, classes)]
    if scores is not None:
        percent = [f"{100 * float(score):.0f}%" for score in scores]
        labels = percent if labels is None else [f"{label} {text}" for label, text in zip(labels, percent)]
    if labels is not None and is_crowd is not None:
        labels = [f"{label}|crowd" if crowd else label for label, crowd in zip(labels, is_crowd)]
    return labels


class Visualizer:
    """Draws on one image; the drawing methods return the :class:`VisImage` that holds the result so far.

    Class names and colours come from the metadata (``thing_classes``, ``thing_colors``, ``stuff_classes``,
    ``stuff_colors``); what is missing is replaced by numbers and a palette.
    """

    def __init__(
        self,
        img_rgb: np.ndarray,
        metadata: Metadata | None = None,
        scale: float = 1.0,
        instance_mode: ColorMode = ColorMode.IMAGE,
        font_size_scale: float = 1.0,
    ) -> None:
        """
        Args:
            img_rgb: (H, W, 3), 0..255.
            metadata: of the dataset whose classes are drawn.
            scale: size of the output over the size of the image.
            instance_mode: how instances are coloured.
            font_size_scale: factor on the size of texts.
        """
        self.img = np.asarray(img_rgb).clip(0, 255).astype(np.uint8)
        self.metadata = metadata if metadata is not None else Metadata(name="")
        self.output = VisImage(self.img, scale=scale)
        self.cpu_device = torch.device("cpu")
        font_size = max(np.sqrt(self.output.height * self.output.width) // 90, 10 // scale)
        self._default_font_size = font_size * font_size_scale
        self._instance_mode = instance_mode

    def get_output(self) -> VisImage:
        return self.output

    # ---- whole results -------------------------------------------------------------------------------------------

    def draw_instance_predictions(self, predictions: Instances, jittering: bool = True) -> VisImage:
        """Draw masks, or boxes where there are no masks, with class and score.

        Args:
            predictions: with any of ``pred_boxes``, ``pred_classes``, ``scores``, ``pred_masks`` (N, H, W).
            jittering: in the mode SEGMENTATION, vary the colours of instances of one class.
        """
        boxes = predictions.pred_boxes if predictions.has("pred_boxes") else None
        scores = predictions.scores.tolist() if predictions.has("scores") else None
        classes = predictions.pred_classes.tolist() if predictions.has("pred_classes") else None
        labels = _create_text_labels(classes, scores, self.metadata.get("thing_classes"))
        masks = self._convert_masks(predictions.pred_masks) if predictions.has("pred_masks") else None

        colors, alpha = None, 0.5
        if self._instance_mode == ColorMode.SEGMENTATION and classes is not None and self.metadata.get("thing_colors"):
            colors, alpha = [self._thing_color(k, jittering) for k in classes], 0.8
        if self._instance_mode == ColorMode.IMAGE_BW:
            covered = np.any([mask.mask for mask in masks], axis=0) if masks else None
            self.output.reset_image(self._create_grayscale_image(covered))
            alpha = 0.3
        if masks is not None and boxes is not None and not np.any(self._convert_boxes(boxes)):
            boxes = None  # some models predict masks only and give boxes of zeros
        return self.overlay_instances(boxes=boxes, masks=masks, labels=labels, assigned_colors=colors, alpha=alpha)

    def draw_sem_seg(
        self,
        sem_seg: torch.Tensor | np.ndarray,
        area_threshold: int | None = None,
        alpha: float = 0.8,
        draw_text: bool = True,
        edge_color: Color = OFF_WHITE,
    ) -> VisImage:
        """Draw a label map.

        Args:
            sem_seg: (H, W) integers; labels beyond ``stuff_classes`` (such as 255) are left out.
            area_threshold: parts of a mask with fewer pixels are not drawn.
            draw_text: write the class names.
        """
        sem_seg = _to_numpy(sem_seg)
        names = self.metadata.get("stuff_classes")
        labels, areas = np.unique(sem_seg, return_counts=True)
        for label in labels[np.argsort(-areas)].tolist():
            if label < 0 or (names is not None and label >= len(names)):
                continue
            self.draw_binary_mask(
                sem_seg == label,
                color=self._stuff_color(label),
                edge_color=edge_color,
                text=_create_text_labels([label], None, names)[0] if draw_text else None,
                alpha=alpha,
                area_threshold=area_threshold,
            )
        return self.output

    def draw_panoptic_seg(
        self,
        panoptic_seg: torch.Tensor | np.ndarray,
        segments_info: Sequence[dict] | None,
        area_threshold: int | None = None,
        alpha: float = 0.7,
    ) -> VisImage:
        """Draw stuff, and things above it.

        Args:
            panoptic_seg: (H, W) segment ids.
            segments_info: dicts with ``id``, contiguous ``category_id``, ``isthing`` and possibly ``score`` and
                ``iscrowd``; None if the ids are ``category_id * label_divisor + instance`` (-1: nothing).
        """
        panoptic_seg = _to_numpy(panoptic_seg)
        if segments_info is None:
            segments_info = self._segments_of_labels(panoptic_seg)
        segments = [(info, panoptic_seg == info["id"]) for info in segments_info]
        segments = [(info, mask) for info, mask in segments if mask.any()]
        if self._instance_mode == ColorMode.IMAGE_BW:
            covered = np.any([mask for _, mask in segments], axis=0) if segments else None
            self.output.reset_image(self._create_grayscale_image(covered))
        stuff = [(info, mask) for info, mask in segments if not info["isthing"]]
        for info, mask in sorted(stuff, key=lambda segment: -np.count_nonzero(segment[1])):
            self.draw_binary_mask(
                mask,
                color=self._stuff_color(info["category_id"]),
                edge_color=OFF_WHITE,
                text=_create_text_labels([info["category_id"]], None, self.metadata.get("stuff_classes"))[0],
                alpha=alpha,
                area_threshold=area_threshold,
            )
        things = [(info, mask) for info, mask in segments if info["isthing"]]
        if not things:
            return self.output
        infos, masks = zip(*things)
        classes = [info["category_id"] for info in infos]
        scores = [info["score"] for info in infos] if all("score" in info for info in infos) else None
        crowd = [info.get("iscrowd", 0) for info in infos]
        labels = _create_text_labels(classes, scores, self.metadata.get("thing_classes"), crowd)
        colors = [self._thing_color(k) for k in classes] if self.metadata.get("thing_colors") else None
        return self.overlay_instances(masks=list(masks), labels=labels, assigned_colors=colors, alpha=alpha)

    draw_panoptic_seg_predictions = draw_panoptic_seg

    def draw_dataset_dict(self, dic: dict) -> VisImage:
        """Draw the annotations of a record in Detectron2's dataset format: instances, label file and panoptic file."""
        annotations = dic.get("annotations")
        if annotations:
            masks = None
            if all("segmentation" in annotation for annotation in annotations):
                masks = [annotation["segmentation"] for annotation in annotations]
            if any(len(annotation["bbox"]) != 4 for annotation in annotations):
                needs_upstream("Drawing of rotated boxes")
            boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
            classes = [annotation["category_id"] for annotation in annotations]
            colors = None
            if self._instance_mode == ColorMode.SEGMENTATION and self.metadata.get("thing_colors"):
                colors = [self._thing_color(k) for k in classes]
            crowd = [annotation.get("iscrowd", 0) for annotation in annotations]
            labels = _create_text_labels(classes, None, self.metadata.get("thing_classes"), crowd)
            self.overlay_instances(boxes=np.array(boxes), masks=masks, labels=labels, assigned_colors=colors)
        sem_seg = dic.get("sem_seg")
        if sem_seg is None and "sem_seg_file_name" in dic:
            sem_seg = _read_array(dic["sem_seg_file_name"])
        if sem_seg is not None:
            self.draw_sem_seg(sem_seg, area_threshold=0, alpha=0.5)
        pan_seg = dic.get("pan_seg")
        if pan_seg is None and "pan_seg_file_name" in dic:
            colors = _read_array(dic["pan_seg_file_name"]).astype(np.int32)
            pan_seg = colors[..., 0] + 256 * colors[..., 1] + 65536 * colors[..., 2]
        if pan_seg is not None:
            self.draw_panoptic_seg(pan_seg, dic["segments_info"], area_threshold=0, alpha=0.5)
        return self.output

    def overlay_instances(
        self,
        *,
        boxes: Boxes | torch.Tensor | np.ndarray | None = None,
        labels: Sequence[str] | None = None,
        masks: BitMasks | PolygonMasks | torch.Tensor | np.ndarray | Sequence | None = None,
        keypoints: None = None,
        assigned_colors: Sequence[Color] | None = None,
        alpha: float = 0.5,
    ) -> VisImage:
        """Draw instances, the largest first so that small ones stay visible.

        Args:
            boxes: (N, 4) XYXY.
            labels: N texts, put at a corner of the box, or inside the mask if there are no boxes.
            masks: (N, H, W), or a list of N masks as :class:`GenericMask` takes them.
            keypoints: need upstream Detectron2.
            assigned_colors: N colours; by default the palette's in turn.
        """
        if keypoints is not None:
            needs_upstream("Drawing of keypoints")
        if boxes is not None:
            boxes = self._convert_boxes(boxes)
        if masks is not None:
            masks = self._convert_masks(masks)
        counts = {len(given) for given in (boxes, masks, labels, assigned_colors) if given is not None}
        if len(counts) > 1:
            raise ValueError(f"boxes, masks, labels and assigned_colors are of different numbers: {sorted(counts)}")
        count = counts.pop() if counts else 0
        if count == 0:
            return self.output
        if boxes is None and masks is None:
            raise ValueError("instances need boxes or masks to be drawn")
        if assigned_colors is None:
            assigned_colors = [self._palette_color(index) for index in range(count)]
        if boxes is not None:
            areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
        else:
            areas = np.array([mask.area() for mask in masks])
        for index in np.argsort(-areas, kind="stable"):
            color = assigned_colors[index]
            if boxes is not None:
                self.draw_box(boxes[index], edge_color=color)
            if masks is not None:
                self._draw_mask(masks[index], color, None, alpha)
            if labels is None:
                continue
            if boxes is not None:
                self._draw_text_at_box(boxes[index], labels[index], color)
            else:
                self._draw_text_in_mask(masks[index].mask, labels[index], self._change_color_brightness(color, 0.7))
        return self.output

    # ---- single shapes -------------------------------------------------------------------------------------------

    def draw_text(
        self,
        text: str,
        position: Sequence[float],
        *,
        font_size: float | None = None,
        color: Color = "g",
        horizontal_alignment: str = "center",
        rotation: float = 0,
    ) -> VisImage:
        """Write ``text`` on a dark ground, its upper edge at ``position`` (x, y)."""
        color = np.maximum(mplc.to_rgb(color), 0.2)
        color[color.argmax()] = max(0.8, color.max())  # bright enough for the dark ground
        self.output.ax.text(
            *position,
            text,
            size=(font_size or self._default_font_size) * self.output.scale,
            family="sans-serif",
            bbox={"facecolor": "black", "alpha": 0.8, "pad": 0.7, "edgecolor": "none"},
            verticalalignment="top",
            horizontalalignment=horizontal_alignment,
            color=tuple(color),
            zorder=10,
            rotation=rotation,
        )
        return self.output

    def draw_box(
        self, box_coord: Sequence[float], alpha: float = 0.5, edge_color: Color = "g", line_style: str = "-"
    ) -> VisImage:
        """Draw the outline of a box, XYXY."""
        x0, y0, x1, y1 = box_coord
        rectangle = Rectangle(
            (x0, y0),
            x1 - x0,
            y1 - y0,
            fill=False,
            edgecolor=edge_color,
            linewidth=max(self._default_font_size / 4, 1) * self.output.scale,
            alpha=alpha,
            linestyle=line_style,
        )
        self._add(rectangle)
        return self.output

    def draw_circle(self, circle_coord: Sequence[float], color: Color, radius: float = 3) -> VisImage:
        """Draw a filled circle around (x, y)."""
        self._add(Circle(tuple(circle_coord), radius=radius, fill=True, color=color))
        return self.output

    def draw_line(
        self,
        x_data: Sequence[float],
        y_data: Sequence[float],
        color: Color,
        linestyle: str = "-",
        linewidth: float | None = None,
    ) -> VisImage:
        """Draw a line through points."""
        if linewidth is None:
            linewidth = self._default_font_size / 3
        width = max(linewidth, 1) * self.output.scale
        self._add(Line2D(x_data, y_data, linewidth=width, color=color, linestyle=linestyle))
        return self.output

    def draw_polygon(
        self, segment: np.ndarray, color: Color, edge_color: Color | None = None, alpha: float = 0.5
    ) -> VisImage:
        """Fill a polygon, (N, 2) points in image coordinates, and draw its outline."""
        polygon = Polygon(
            segment,
            fill=True,
            facecolor=(*mplc.to_rgb(color), alpha),
            edgecolor=(*mplc.to_rgb(color if edge_color is None else edge_color), 1),
            linewidth=max(self._default_font_size // 15 * self.output.scale, 1),
        )
        self._add(polygon)
        return self.output

    def draw_binary_mask(
        self,
        binary_mask: np.ndarray,
        color: Color | None = None,
        *,
        edge_color: Color | None = None,
        text: str | None = None,
        alpha: float = 0.5,
        area_threshold: int | None = 10,
    ) -> VisImage:
        """Fill a mask.

        Args:
            binary_mask: (H, W).
            color: by default one by chance.
            edge_color: of the outline; by default ``color``, and no outline where there are holes.
            text: written into the mask.
            area_threshold: connected parts with fewer pixels are not drawn.
        """
        if color is None:
            color = random_color(rgb=True, maximum=1)
        color = mplc.to_rgb(color)
        mask = GenericMask(np.asarray(binary_mask), self.output.height, self.output.width)
        if area_threshold:
            mask = GenericMask(_without_small_parts(mask.mask, area_threshold), self.output.height, self.output.width)
        if not mask.mask.any():
            return self.output
        self._draw_mask(mask, color, edge_color, alpha)
        if text is not None:
            self._draw_text_in_mask(mask.mask, text, self._change_color_brightness(color, 0.7))
        return self.output

    def draw_soft_mask(
        self, soft_mask: np.ndarray, color: Color | None = None, *, text: str | None = None, alpha: float = 0.5
    ) -> VisImage:
        """Lay a colour over the image as strongly as the mask (H, W) in 0..1 says; ``text`` goes where that is > .5."""
        if color is None:
            color = random_color(rgb=True, maximum=1)
        color = mplc.to_rgb(color)
        self._overlay(np.asarray(soft_mask) * alpha, color)
        if text is not None:
            binary = (np.asarray(soft_mask) > 0.5).astype(np.uint8)
            self._draw_text_in_mask(binary, text, self._change_color_brightness(color, 0.7))
        return self.output

    # ---- helpers, some of which subclasses replace -----------------------------------------------------------------

    def _draw_mask(self, mask: GenericMask, color: Color, edge_color: Color | None, alpha: float) -> None:
        """Polygons draw smooth outlines at any scale, but can't leave holes open; then the pixels are drawn."""
        if not mask.has_holes:
            for polygon in mask.polygons:
                self.draw_polygon(polygon.reshape(-1, 2), color, edge_color, alpha)
            return
        self._overlay(mask.mask * alpha, mplc.to_rgb(color))
        if edge_color is not None:
            width = max(self._default_font_size // 15 * self.output.scale, 1)
            for polygon in mask.polygons:
                points = polygon.reshape(-1, 2)
                outline = Polygon(points, fill=False, edgecolor=(*mplc.to_rgb(edge_color), 1), linewidth=width)
                self._add(outline)

    def _add(self, shape: Artist) -> None:
        """Add a shape; unlike add_patch and add_line this doesn't look for limits of the axes, which takes long."""
        self.output.ax.add_artist(shape)

    def _overlay(self, opacity: np.ndarray, color: tuple[float, float, float]) -> None:
        """Lay a colour over the image with an opacity (H, W) in 0..1; only the part where there is some is drawn."""
        columns, rows = (np.flatnonzero(opacity.any(axis=axis)) for axis in (0, 1))
        if not len(rows):
            return
        y0, y1, x0, x1 = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        rgba = np.empty((y1 - y0, x1 - x0, 4), dtype=np.float32)
        rgba[..., :3] = color
        rgba[..., 3] = opacity[y0:y1, x0:x1]
        # The layer of the polygons, so that what is drawn later lies above.
        self.output.ax.imshow(rgba, extent=(x0, x1, y1, y0), interpolation="nearest", aspect="auto", zorder=1)

    def _draw_text_at_box(self, box: np.ndarray, text: str, color: Color) -> None:
        x0, y0, x1, y1 = box
        position = (x0, y0)
        small = SMALL_OBJECT_AREA * self.output.scale
        if (x1 - x0) * (y1 - y0) < small or y1 - y0 < 40 * self.output.scale:
            # Beside a small object, so that the text doesn't hide it; the lower edge of the image leaves no room below.
            position = (x1, y0) if y1 >= self.output.height - 5 else (x0, y1)
        share = (y1 - y0) / np.sqrt(self.output.height * self.output.width)
        font_size = self._default_font_size * np.clip(0.35 + 2 * share, 0.55, 1.0)
        self.draw_text(
            text,
            position,
            color=self._change_color_brightness(color, 0.7),
            horizontal_alignment="left",
            font_size=font_size,
        )

    def _draw_text_in_mask(self, binary_mask: np.ndarray, text: str, color: Color) -> None:
        """Write into the largest connected part, and into every other large one, where it is widest."""
        binary_mask = np.asarray(binary_mask).astype(np.uint8)
        left, top, width, height = cv2.boundingRect(binary_mask)
        if not width:
            return
        binary_mask = binary_mask[top : top + height, left : left + width]
        count, parts, stats, _ = cv2.connectedComponentsWithStats(binary_mask, connectivity=8)
        areas = stats[1:, cv2.CC_STAT_AREA]
        for index in range(1, count):
            if index - 1 != areas.argmax() and areas[index - 1] * self.output.scale**2 <= LARGE_PART_AREA:
                continue
            x, y, width, height = stats[index, :4]
            part = np.pad(parts[y : y + height, x : x + width] == index, 1).astype(np.uint8)
            depth = cv2.distanceTransform(part, cv2.DIST_L2, 3)
            row, column = np.unravel_index(depth.argmax(), depth.shape)
            self.draw_text(text, (left + x + column - 0.5, top + y + row - 0.5), color=color)

    def _thing_color(self, category: int, jittering: bool = True) -> tuple[float, float, float]:
        color = [channel / 255 for channel in self.metadata.thing_colors[category]]
        return self._jitter(color) if jittering else tuple(color)

    def _stuff_color(self, category: int) -> Sequence[float]:
        colors = self.metadata.get("stuff_colors")
        return [channel / 255 for channel in colors[category]] if colors else self._palette_color(category)

    def _palette_color(self, index: int) -> tuple[float, float, float]:
        palette = colormap(rgb=True, maximum=1)
        return tuple(palette[index % len(palette)].tolist())

    def _segments_of_labels(self, panoptic_seg: np.ndarray) -> list[dict]:
        divisor = self.metadata.label_divisor
        things = self.metadata.thing_dataset_id_to_contiguous_id.values()
        return [
            {"id": label, "category_id": label // divisor, "isthing": label // divisor in things}
            for label in np.unique(panoptic_seg).tolist()
            if label >= 0
        ]

    def _jitter(self, color: Sequence[float]) -> tuple[float, float, float]:
        """A colour (0..1) at half a unit's distance at most in a random direction."""
        shift = np.random.uniform(-1, 1, size=3)
        shift *= 0.5 / max(np.linalg.norm(shift), 1e-6)
        return tuple(np.clip(np.add(mplc.to_rgb(color), shift), 0, 1).tolist())

    def _create_grayscale_image(self, mask: np.ndarray | None = None) -> np.ndarray:
        """The image in grey, (H, W, 3) uint8, in colour where ``mask`` (H, W) is set."""
        gray = self.img.mean(axis=2).round().astype(np.uint8)
        gray = np.stack([gray] * 3, axis=-1)
        if mask is not None:
            inside = np.asarray(mask).astype(bool)
            gray[inside] = self.img[inside]
        return gray

    def _change_color_brightness(self, color: Color, brightness_factor: float) -> tuple[float, float, float]:
        """Lighter (factor up to 1) or darker (down to -1)."""
        hue, lightness, saturation = colorsys.rgb_to_hls(*mplc.to_rgb(color))
        lightness = min(max(lightness * (1 + brightness_factor), 0.0), 1.0)
        return colorsys.hls_to_rgb(hue, lightness, saturation)

    def _convert_boxes(self, boxes: Boxes | torch.Tensor | np.ndarray) -> np.ndarray:
        """Boxes of any kind as an array (N, 4)."""
        boxes = _to_numpy(getattr(boxes, "tensor", boxes))
        if boxes.ndim == 2 and boxes.shape[1] == 5:
            needs_upstream("Drawing of rotated boxes")
        return boxes.reshape(-1, 4)

    def _convert_masks(self, masks_or_polygons) -> list[GenericMask]:
        """Masks of any kind as a list of :class:`GenericMask`."""
        if isinstance(masks_or_polygons, PolygonMasks):
            masks_or_polygons = masks_or_polygons.polygons
        elif isinstance(masks_or_polygons, BitMasks):
            masks_or_polygons = masks_or_polygons.tensor
        masks = [_to_numpy(mask) if isinstance(mask, torch.Tensor) else mask for mask in masks_or_polygons]
        size = self.output.height, self.output.width
        return [mask if isinstance(mask, GenericMask) else GenericMask(mask, *size) for mask in masks]


def _to_numpy(values: torch.Tensor | np.ndarray | Sequence) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _read_array(file_name: str) -> np.ndarray:
    with PathManager.open(file_name, "rb") as file:
        return np.array(Image.open(file))


def _without_small_parts(mask: np.ndarray, area_threshold: int) -> np.ndarray:
    _, parts, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= area_threshold
    keep[0] = False
    return keep[parts].astype(np.uint8)
