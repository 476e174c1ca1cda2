#!/usr/bin/env python
"""PQ and mIoU of semantic predictions, every class of an image taken as one stuff segment.

  python tools/evaluate_pq_for_semantic_segmentation.py --dataset-name ade20k_sem_seg_val \
      --json-file output/inference/sem_seg_predictions.json
  python tools/evaluate_pq_for_semantic_segmentation.py --dataset-name street_val --config-file street.yaml \
      --json-file …
"""

import mask2former_plugin  # noqa: F401  (first: makes detectron2 importable)
from tqdm import tqdm

from mask2former_plugin.command_line import (
    add_dataset_argument,
    add_dilation_argument,
    check_dataset,
    new_parser,
    print_results,
)
from mask2former_plugin.engine import user_errors
from mask2former_plugin.evaluation.semantic_pq import evaluate_file


def main(arguments=None):
    parser = new_parser(__doc__)
    add_dataset_argument(parser)
    parser.add_argument("--json-file", required=True, metavar="FILE", help="sem_seg_predictions.json of an evaluation")
    add_dilation_argument(parser, default=None)
    parser.add_argument("--per-class", action="store_true", help="print PQ and IoU of every class too")
    args = parser.parse_args(arguments)
    with user_errors():
        results = evaluate_file(
            check_dataset(args), args.json_file, dilation_ratio=args.dilation_ratio, progress=tqdm
        )
    headline = {name: value for name, value in results.items() if args.per_class or "-" not in name}
    print_results("boundary PQ" if args.dilation_ratio else "PQ", headline)
    return results


if __name__ == "__main__":
    main()
