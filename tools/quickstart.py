#!/usr/bin/env python
"""Generate a small dataset, train Mask2Former (or MaskFormer) on it, evaluate, and draw what it found.

  python tools/quickstart.py                      # Mask2Former, a few minutes on two CPU cores
  python tools/quickstart.py --arch maskformer
  python tools/quickstart.py --resume             # go on with an interrupted run
  python tools/quickstart.py --fresh              # throw the earlier run away and start again
"""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOT_COMPARED = ("OUTPUT_DIR", "SOLVER.MAX_ITER", "MODEL.DEVICE", "DATALOADER.NUM_WORKERS", "SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_PERIOD")


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=("mask2former", "maskformer"), default="mask2former")
    parser.add_argument("--data", type=Path, help="folder of the datasets, default $DETECTRON2_DATASETS or ./datasets")
    parser.add_argument("--output", type=Path, help="folder of the run, default output/quickstart/<arch>")
    parser.add_argument("--images", type=int, default=400, help="number of generated training images (default 400)")
    parser.add_argument("--pictures", type=int, default=12, help="number of validation images to draw (default 12)")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with the run in the output folder")
    again.add_argument("--fresh", action="store_true", help="delete the run in the output folder first")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides: KEY VALUE …, e.g. SOLVER.MAX_ITER 300")
    return parser.parse_args(argv)


def prepare_output(folder: Path, args, cfg, dataset: str) -> None:
    """Keep runs apart: an existing one is resumed or deleted on request only, and resumed only with the same config and dataset.

    Args:
        dataset: says what the training images are; a copy of it marks the folder as a quickstart run.
    """
    from mask2former_plugin.config import differing_keys, load_config
    from mask2former_plugin.data.synthetic import MANIFEST

    if not folder.is_dir() or not any(folder.iterdir()):
        if args.resume:
            sys.exit(f"error: nothing to resume in {folder}")
    elif not (folder / MANIFEST).is_file():
        sys.exit(f"error: {folder} holds files that are no quickstart run; choose another --output")
    elif args.fresh:
        shutil.rmtree(folder)
    elif not args.resume:
        sys.exit(f"error: {folder} holds an earlier run; add --resume to go on with it, or --fresh to delete it and start again")
    elif (folder / MANIFEST).read_text() != dataset:
        sys.exit(f"error: the run in {folder} has other images, {(folder / MANIFEST).read_text()}; give the same --images, or --fresh")
    elif (folder / "config.yaml").is_file():
        changed = [key for key in differing_keys(load_config(folder / "config.yaml"), cfg) if key not in NOT_COMPARED]
        if changed:
            sys.exit(f"error: the run in {folder} has another config ({', '.join(changed[:5])}); use --fresh, or the same settings")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).write_text(dataset)


def draw(cfg, folder: Path, count: int) -> list[Path]:
    """Predictions beside ground truth for ``count`` validation images."""
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.detection_utils import read_image

    from mask2former_plugin.engine import Predictor
    from mask2former_plugin.visualization import compare, save_picture, stack

    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    predictor = Predictor(cfg)
    records = DatasetCatalog.get(cfg.DATASETS.TEST[0])
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    folder.mkdir(exist_ok=True)
    paths, rows = [], []
    for record in records[:count]:
        # the predictor takes BGR, whatever INPUT.FORMAT says
        picture = compare(record, predictor(read_image(record["file_name"], "BGR")), metadata, scale=2.0)
        rows.append(picture)
        paths.append(folder / f"{Path(record['file_name']).stem}.png")
        save_picture(paths[-1], picture)
    if rows:
        paths.append(folder / "overview.png")
        save_picture(paths[-1], stack(rows[:4]))
    return paths


def main(argv=None):
    args = parse_args(argv)
    start = time.perf_counter()
    data = (args.data or Path(os.environ.get("DETECTRON2_DATASETS", "datasets"))).expanduser()
    os.environ["DETECTRON2_DATASETS"] = str(data)  # before Detectron2 registers its datasets
    output = args.output or Path("output/quickstart") / args.arch
    config_file = ROOT / "configs" / "quickstart" / f"{args.arch}.yaml"

    import train_net  # beside this file: the very code path of a real training
    from detectron2.engine import default_argument_parser

    from mask2former_plugin.config import load_config
    from mask2former_plugin.data.synthetic import SyntheticOptions, generate, manifest
    from mask2former_plugin.engine import user_errors

    opts = ["OUTPUT_DIR", str(output), *args.opts]
    options = SyntheticOptions(train_images=args.images)
    with user_errors(KeyError, ValueError, OSError):
        cfg = load_config(config_file, opts)
        prepare_output(output, args, cfg, manifest(options))
        dataset = generate(data / "quickstart", options)
    train_args = default_argument_parser().parse_args(["--config-file", str(config_file), *(["--resume"] if args.resume else []), *opts])
    results = train_net.main(train_args) or {}
    pictures = draw(cfg, output / "pictures", args.pictures)

    print(f"\n{args.arch}, {time.perf_counter() - start:.0f} s in all")
    for task, metric in (("panoptic_seg", "PQ"), ("segm", "AP"), ("sem_seg", "mIoU")):
        if task in results:
            print(f"  {metric:5s} {results[task][metric]:5.1f}")
    print(f"  dataset      {dataset}")
    print(f"  log, metrics {output / 'log.txt'}, {output / 'metrics.json'}")
    print(f"  checkpoint   {output / 'model_final.pth'}")
    print(f"  predictions  {output / 'inference'}")
    print(f"  pictures     {pictures[-1] if pictures else '-'} and {max(len(pictures) - 1, 0)} more beside it")


if __name__ == "__main__":
    main()
