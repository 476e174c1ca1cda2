#!/usr/bin/env python
"""PQ and boundary PQ of panoptic predictions in COCO's format.

  python tools/evaluate_panoptic.py --gt-json-file datasets/coco/annotations/panoptic_val2017.json \
      --gt-folder datasets/coco/panoptic_val2017 --pred-json-file output/inference/predictions.json
  python tools/evaluate_panoptic.py --gt-json-file … --pred-json-file … --iou-type segm
"""

import mask2former_plugin  # noqa: F401  (first: makes detectron2 importable)
from tqdm import tqdm

from mask2former_plugin.command_line import add_dilation_argument, new_parser, print_results
from mask2former_plugin.engine import user_errors
from mask2former_plugin.evaluation.boundary import DEFAULT_DILATION_RATIO
from mask2former_plugin.evaluation.panoptic_evaluation import evaluate_files


def main(arguments=None):
    parser = new_parser(__doc__)
    parser.add_argument("--gt-json-file", required=True, metavar="FILE")
    parser.add_argument("--gt-folder", metavar="DIR", help="PNGs, default: the JSON's path without .json")
    parser.add_argument("--pred-json-file", required=True, metavar="FILE", help="predictions.json of an evaluation")
    parser.add_argument("--pred-folder", metavar="DIR", help="PNGs, default: the JSON's path without .json")
    parser.add_argument(
        "--iou-type", choices=("boundary", "segm"), default="boundary", help="boundary (default): PQ and boundary PQ"
    )
    add_dilation_argument(parser, DEFAULT_DILATION_RATIO)
    parser.add_argument("--per-class", action="store_true", help="print the PQ of every class too")
    args = parser.parse_args(arguments)
    with user_errors():
        results = evaluate_files(
            args.gt_json_file,
            args.pred_json_file,
            gt_folder=args.gt_folder,
            pred_folder=args.pred_folder,
            dilation_ratio=args.dilation_ratio if args.iou_type == "boundary" else None,
            progress=tqdm,
        )
    for name, values in results.items():
        shown = {key: value for key, value in values.items() if args.per_class or "-" not in key}
        print_results({"panoptic_seg": "PQ"}.get(name, "boundary PQ"), shown)
    return results


if __name__ == "__main__":
    main()
