#!/usr/bin/env python
"""Draw what training gets: the augmented images of the mapper with their targets, or the dataset as it is on disk.

  python tools/visualize_data.py --config-file configs/quickstart/mask2former.yaml --output-dir pictures
  python tools/visualize_data.py --source annotation --config-file … --output-dir pictures --num-images 50
  python tools/visualize_data.py --config-file … --output-dir pictures INPUT.DATASET_MAPPER_NAME coco_panoptic_lsj
"""

from itertools import islice
from pathlib import Path

import cv2
import mask2former_plugin  # noqa: F401  (first: makes detectron2 importable)
from detectron2.data import DatasetCatalog, MetadataCatalog
from tqdm import tqdm

from mask2former_plugin.command_line import new_parser
from mask2former_plugin.config import load_config
from mask2former_plugin.data.datasets.custom import register_custom_datasets
from mask2former_plugin.engine import Trainer, check_config, user_errors
from mask2former_plugin.visualization import draw_ground_truth, draw_sample


def samples(cfg, scale):
    """Names and pictures of the samples of the training loader, endless."""
    metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
    for batch in Trainer.build_train_loader(cfg):
        for sample in batch:
            yield Path(sample["file_name"]).stem, draw_sample(sample, metadata, cfg.INPUT.FORMAT, scale=scale)


def records(cfg, scale):
    """Names and pictures of the records of the training datasets."""
    for name in cfg.DATASETS.TRAIN:
        metadata = MetadataCatalog.get(name)
        for record in DatasetCatalog.get(name):
            yield Path(record["file_name"]).stem, draw_ground_truth(record, metadata, scale=scale)


def main(arguments=None):
    parser = new_parser(__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE")
    sources = ("dataloader", "annotation")
    parser.add_argument("--source", choices=sources, default=sources[0], help=f"default {sources[0]}")
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--num-images", type=int, default=20, help="number of pictures (default 20)")
    parser.add_argument("--scale", type=float, default=1.0, help="enlarges the pictures")
    parser.add_argument("opts", nargs="*", default=[], help="config overrides: KEY VALUE …")
    args = parser.parse_intermixed_args(arguments)
    paths = []
    with user_errors():
        cfg = load_config(args.config_file, ["DATALOADER.NUM_WORKERS", "0", *args.opts, "MODEL.WEIGHTS", ""])
        register_custom_datasets(cfg)
        check_config(cfg, training=True)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        pictures = (samples if args.source == "dataloader" else records)(cfg, args.scale)
        for index, (name, picture) in enumerate(tqdm(islice(pictures, args.num_images), total=args.num_images)):
            paths.append(args.output_dir / f"{index:04d}_{name}.png")
            cv2.imwrite(str(paths[-1]), picture[:, :, ::-1])
    return paths


if __name__ == "__main__":
    main()
