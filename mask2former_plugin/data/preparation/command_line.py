"""Command line that all preparation scripts share."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import BrokenExecutor
from pathlib import Path

from mask2former_plugin.data.datasets.paths import datasets_root
from mask2former_plugin.data.preparation.jobs import Options, default_workers


def main(
    description: str,
    prepare: Callable[[Path, Sequence[str], Options], None],
    splits: Iterable[str],
    arguments: Sequence[str] | None = None,
) -> None:
    """Parse the arguments and call ``prepare(root, splits, options)``; its errors become one line.

    Args:
        description: text of ``--help``.
        splits: names from which ``--splits`` chooses; default all.
        arguments: default ``sys.argv[1:]``.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    splits = list(splits)
    parser.add_argument(
        "--root",
        type=Path,
        default=datasets_root(),
        help="folder of the datasets, default $DETECTRON2_DATASETS or ./datasets",
    )
    parser.add_argument("--splits", nargs="+", choices=splits, default=splits, help="default: all")
    parser.add_argument("--workers", type=int, default=default_workers(), help="processes, default %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="write finished files again instead of skipping them")
    args = parser.parse_args(arguments)
    if args.workers < 1:
        parser.error(f"--workers must be at least 1, got {args.workers}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        prepare(args.root.expanduser(), args.splits, Options(workers=args.workers, overwrite=args.overwrite))
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
    except BrokenExecutor:
        sys.exit("error: a process was killed, most likely for want of memory; go on with fewer --workers")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on where this one stopped")
