#!/usr/bin/env python
"""Draw predictions from files beside image and ground truth.

The file may be coco_instances_results.json, panoptic predictions.json or sem_seg_predictions.json of an evaluation.

  python tools/visualize_json_results.py --dataset-name coco_2017_val --output-dir pictures \
      --input output/inference/coco_instances_results.json --conf-threshold 0.5
  python tools/visualize_json_results.py --dataset-name quickstart_val --output-dir pictures \
      --config-file configs/quickstart/mask2former.yaml --input output/quickstart/mask2former/inference/predictions.json
"""

from itertools import islice
from pathlib import Path

import cv2
import mask2former_plugin  # noqa: F401  (first: makes detectron2 importable)
from detectron2.data import MetadataCatalog
from tqdm import tqdm

from mask2former_plugin.command_line import add_dataset_argument, check_dataset, new_parser
from mask2former_plugin.engine import user_errors
from mask2former_plugin.evaluation.predicted_outputs import predicted_outputs
from mask2former_plugin.visualization import compare


def main(arguments=None):
    parser = new_parser(__doc__)
    parser.add_argument("--input", required=True, metavar="FILE", help="file of predictions")
    parser.add_argument("--pred-folder", metavar="DIR", help="panoptic PNGs, default: the file's path without .json")
    add_dataset_argument(parser)
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--conf-threshold", type=float, default=0.5, help="least score of an instance (default 0.5)")
    parser.add_argument("--num-images", type=int, help="number of pictures, default all")
    parser.add_argument("--scale", type=float, default=1.0, help="enlarges the pictures")
    args = parser.parse_args(arguments)
    paths = []
    with user_errors():
        name = check_dataset(args)
        metadata = MetadataCatalog.get(name)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        for record, output in tqdm(islice(predicted_outputs(name, args.input, args.pred_folder), args.num_images)):
            picture = compare(record, output, metadata, scale=args.scale, min_score=args.conf_threshold)
            paths.append(args.output_dir / f"{Path(record['file_name']).stem}.png")
            cv2.imwrite(str(paths[-1]), picture[:, :, ::-1])
    return paths


if __name__ == "__main__":
    main()
