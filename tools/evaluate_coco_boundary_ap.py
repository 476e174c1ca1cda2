#!/usr/bin/env python
"""Boundary AP (or mask AP) of COCO results.

  python tools/evaluate_coco_boundary_ap.py --gt-json-file datasets/coco/annotations/instances_val2017.json \
      --dt-json-file output/inference/coco_instances_results.json
  python tools/evaluate_coco_boundary_ap.py --gt-json-file … --dt-json-file … --iou-type segm
"""

import mask2former_plugin  # noqa: F401  (first: makes detectron2 importable)

from mask2former_plugin.command_line import add_dilation_argument, new_parser, print_results
from mask2former_plugin.engine import user_errors
from mask2former_plugin.evaluation.boundary import DEFAULT_DILATION_RATIO
from mask2former_plugin.evaluation.boundary_ap import evaluate_files


def main(arguments=None):
    parser = new_parser(__doc__)
    parser.add_argument("--gt-json-file", required=True, metavar="FILE", help="COCO annotations with masks")
    parser.add_argument("--dt-json-file", required=True, metavar="FILE", help="COCO results with masks")
    parser.add_argument("--iou-type", choices=("boundary", "segm"), default="boundary", help="default boundary")
    add_dilation_argument(parser, DEFAULT_DILATION_RATIO)
    args = parser.parse_args(arguments)
    with user_errors():
        ratio = args.dilation_ratio if args.iou_type == "boundary" else None
        results = evaluate_files(args.gt_json_file, args.dt_json_file, ratio)
    print_results(f"{args.iou_type} AP", results)
    return results


if __name__ == "__main__":
    main()
