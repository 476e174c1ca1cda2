#!/usr/bin/env python
"""Operations, activations, parameters and structure of a model, module by module.

  python tools/analyze_model.py --tasks parameter structure --config-file configs/quickstart/mask2former.yaml
  python tools/analyze_model.py --tasks flop activation --use-fixed-input-size --config-file configs/…
  python tools/analyze_model.py --tasks flop -n 100 --config-file configs/…    # mean over 100 images of DATASETS.TEST

A multiply-add counts as one operation. Counted is what runs: from the image to class and mask logits at stride 4.
--use-fixed-input-size takes a square of INPUT.CROP.SIZE[0] pixels (published: for semantic ADE20K only) and reads no
data.
"""

import itertools
import sys

import mask2former_plugin  # noqa: F401  (first: makes detectron2 importable)
from detectron2.data import build_detection_test_loader
from detectron2.modeling import build_model
from tqdm import tqdm

from mask2former_plugin.analysis import UNITS, input_size, mean_counts, table
from mask2former_plugin.command_line import new_parser
from mask2former_plugin.config import load_config
from mask2former_plugin.data.datasets.custom import register_custom_datasets
from mask2former_plugin.engine import check_config, user_errors

FIXED_SIZE = (512, 512)  # where INPUT.CROP.SIZE is not in pixels


def input_sizes(cfg, model, args):
    """Padded height and width of the inputs to count for."""
    if args.use_fixed_input_size:
        side = cfg.INPUT.CROP.SIZE[0]
        return [input_size(model, int(side), int(side)) if side > 1 else FIXED_SIZE]
    loader = build_detection_test_loader(cfg, cfg.DATASETS.TEST[0])
    batches = itertools.islice(loader, args.num_inputs)
    shapes = [batch[0]["image"].shape[-2:] for batch in tqdm(batches, total=min(args.num_inputs, len(loader)))]
    return [input_size(model, *shape) for shape in shapes]


def main(arguments=None):
    parser = new_parser(__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--tasks", choices=(*UNITS, "structure"), nargs="+", required=True)
    parser.add_argument("-n", "--num-inputs", type=int, default=100, help="images to average over (default 100)")
    parser.add_argument("--use-fixed-input-size", action="store_true", help="one empty square instead of images")
    parser.add_argument("--depth", type=int, default=3, help="depth of the modules in the table (default 3)")
    parser.add_argument("opts", nargs="*", default=[], help="config overrides: KEY VALUE …")
    args = parser.parse_intermixed_args(arguments)
    if args.num_inputs < 1:
        parser.error(f"--num-inputs must be at least 1, got {args.num_inputs}")
    with user_errors():
        cfg = load_config(args.config_file, [*args.opts, "MODEL.WEIGHTS", ""])
        needs_data = not args.use_fixed_input_size and {"flop", "activation"} & set(args.tasks)
        if needs_data:
            register_custom_datasets(cfg)
            check_config(cfg, training=False)
        model = build_model(cfg).eval()
    counts = {}
    tasks = [task for task in UNITS if task in args.tasks]
    sizes = input_sizes(cfg, model, args) if tasks and tasks != ["parameter"] else [None]
    for task in tasks:
        counts[task], deviation = mean_counts(model, task, sizes if task != "parameter" else [None])
        unit, factor = UNITS[task]
        spread = f" ± {deviation / factor:.3f}" if task != "parameter" else ""
        sys.stdout.write(f"{task}: {counts[task][''] / factor:.3f}{spread} {unit}\n")
    if "structure" in args.tasks:
        sys.stdout.write(f"{model}\n")
    if counts:
        sys.stdout.write(table(model, counts, args.depth) + "\n")
    return counts


if __name__ == "__main__":
    main()
