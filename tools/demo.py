#!/usr/bin/env python
"""Segment photos, a video or a webcam with a trained model and show or save the overlays.

  python tools/demo.py --config-file configs/quickstart/mask2former.yaml --input photos/*.jpg --output overlays \
      --opts MODEL.WEIGHTS output/quickstart/mask2former/model_final.pth
  python tools/demo.py --config-file … --video-input clip.mp4 --output clip_segmented.mp4 --opts …
  python tools/demo.py --config-file … --webcam --opts …
  python tools/demo.py --config-file folder/of/a/huggingface/model --input photo.jpg
"""

import argparse
import glob
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import mask2former_plugin  # noqa: F401  (first: makes detectron2 importable)
import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.utils.video_visualizer import VideoVisualizer
from tqdm import tqdm

from mask2former_plugin.command_line import new_parser
from mask2former_plugin.config import load_config
from mask2former_plugin.data.datasets.custom import register_custom_datasets
from mask2former_plugin.engine import Predictor, check_config, user_errors
from mask2former_plugin.visualization import draw_prediction, indexed_by_contiguous_id, save_picture

ESCAPE = 27
WINDOW = "mask2former_plugin"


def parse_args(argv):
    parser = new_parser(__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", help="images, or one quoted glob pattern")
    source.add_argument("--video-input", metavar="FILE")
    source.add_argument("--webcam", action="store_true")
    parser.add_argument("--output", type=Path, help="file (one input) or folder; without it a window is opened")
    parser.add_argument("--confidence-threshold", type=float, default=0.5, help="instances with a lower score are not drawn (default 0.5)")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="config overrides: KEY VALUE …, MODEL.WEIGHTS first of all")
    return parser.parse_args(argv)


def build_predictor(args):
    with user_errors():
        cfg = load_config(args.config_file, args.opts)
        register_custom_datasets(cfg)
        check_config(cfg, training=False)
        if not cfg.MODEL.WEIGHTS and not cfg.MODEL.ALLOW_RANDOM_WEIGHTS:
            raise ValueError("no weights: add --opts MODEL.WEIGHTS path/to/model_final.pth")
        cfg.freeze()
        return Predictor(cfg), MetadataCatalog.get(cfg.DATASETS.TEST[0])


def run_on_images(args, predictor, metadata) -> None:
    # a name may hold the very characters that mean something in patterns
    paths = sorted(glob.glob(args.input[0])) if len(args.input) == 1 and not Path(args.input[0]).exists() else args.input
    if not paths:
        sys.exit(f"error: no image matches {args.input[0]}")
    to_folder = args.output is not None and (args.output.is_dir() or len(paths) > 1 or not args.output.suffix)
    targets = dict(zip(paths, picture_names(paths)))
    for path in tqdm(paths, disable=args.output is None):
        with user_errors(OSError):
            image = read_image(path, "BGR")
        picture = draw_prediction(image[:, :, ::-1], predictor(image), metadata, min_score=args.confidence_threshold)
        if args.output is None:
            if not show(picture):
                break
        else:
            with user_errors(OSError):
                save_picture(args.output / targets[path] if to_folder else args.output, picture)


def picture_names(paths: list[str]) -> list[str]:
    """A file name for the overlay of each image, all different: images of several folders may have the same name."""
    names, taken = [], set()
    for path in map(Path, paths):
        name, number = f"{path.stem}.png", 1
        while name in taken:
            number += 1
            name = f"{path.stem}_{number}.png"
        taken.add(name)
        names.append(name)
    return names


def show(picture: np.ndarray, wait: int = 0) -> bool:
    """False when the user pressed Escape."""
    try:
        cv2.imshow(WINDOW, picture[:, :, ::-1])
    except cv2.error as error:
        raise SystemExit("error: this OpenCV has no windows; give --output, or install opencv-python in place of opencv-python-headless") from error
    return cv2.waitKey(wait) != ESCAPE


def frames(capture: cv2.VideoCapture) -> Iterator[np.ndarray]:
    while True:
        success, frame = capture.read()
        if not success:
            return
        yield frame


def run_on_video(args, predictor, metadata) -> None:
    name = 0 if args.webcam else args.video_input
    capture = cv2.VideoCapture(name)
    if not capture.isOpened():
        sys.exit(f"error: {'the webcam' if args.webcam else name} can't be opened")
    visualizer = VideoVisualizer(indexed_by_contiguous_id(metadata))
    writer = None
    total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if not args.webcam else 0
    for frame in tqdm(frames(capture), total=max(total, 0) or None):
        picture = draw_frame(frame, predictor(frame), visualizer, args.confidence_threshold)
        if args.output is None:
            if not show(picture, wait=1):
                break
            continue
        if writer is None:
            size = (picture.shape[1], picture.shape[0])
            rate = capture.get(cv2.CAP_PROP_FPS) or 25.0
            writer = cv2.VideoWriter(str(args.output), cv2.VideoWriter_fourcc(*"mp4v"), rate, size)
            if not writer.isOpened():
                sys.exit(f"error: the video {args.output} can't be written; give --output a file in an existing folder, such as out.mp4")
        writer.write(np.ascontiguousarray(picture[:, :, ::-1]))
    capture.release()
    if writer is not None:
        writer.release()


def draw_frame(frame: np.ndarray, output: dict, visualizer: VideoVisualizer, min_score: float) -> np.ndarray:
    image = frame[:, :, ::-1]
    if "panoptic_seg" in output:
        segments, info = output["panoptic_seg"]
        return visualizer.draw_panoptic_seg_predictions(image, segments.cpu(), info).get_image()
    if "instances" in output:
        instances = output["instances"].to("cpu")
        return visualizer.draw_instance_predictions(image, instances[instances.scores >= min_score]).get_image()
    return visualizer.draw_sem_seg(image, output["sem_seg"].argmax(0).cpu()).get_image()


def main(argv=None):
    args = parse_args(argv)
    predictor, metadata = build_predictor(args)
    if args.input:
        run_on_images(args, predictor, metadata)
    else:
        run_on_video(args, predictor, metadata)


if __name__ == "__main__":
    main()
