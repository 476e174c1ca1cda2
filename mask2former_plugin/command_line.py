"""What the command lines in ``tools/`` share: parser, registered datasets, printed numbers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping

from detectron2.data import DatasetCatalog

from mask2former_plugin.config import load_config
from mask2former_plugin.data.datasets.custom import register_custom_datasets
from mask2former_plugin.data.names import unknown_name


def new_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose help shows the description, examples and all, as it is written."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_dataset_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--dataset-name``, and ``--config-file`` for datasets that only a config knows."""
    parser.add_argument("--dataset-name", required=True, metavar="NAME", help="a registered dataset")
    parser.add_argument("--config-file", metavar="FILE", help="config whose DATASETS.CUSTOM registers the dataset")


def check_dataset(args: argparse.Namespace) -> str:
    """The dataset of :func:`add_dataset_argument`; a KeyError lists the known names if there is no such dataset."""
    if args.config_file:
        register_custom_datasets(load_config(args.config_file))
    if args.dataset_name not in DatasetCatalog:
        raise KeyError(unknown_name("dataset", args.dataset_name, DatasetCatalog.list()))
    return args.dataset_name


def add_dilation_argument(parser: argparse.ArgumentParser, default: float | None) -> None:
    """Add ``--dilation-ratio``."""
    said = f"default {default}" if default is not None else "default: no boundaries"
    parser.add_argument(
        "--dilation-ratio",
        type=float,
        default=default,
        metavar="R",
        help=f"width of the boundary region in parts of the image's diagonal ({said}; 0.005 for Cityscapes)",
    )


def print_results(title: str, results: Mapping[str, float]) -> None:
    """Numbers in two aligned columns."""
    width = max(map(len, results))
    sys.stdout.write(f"{title}\n" + "".join(f"  {name:<{width}}  {value:7.3f}\n" for name, value in results.items()))
