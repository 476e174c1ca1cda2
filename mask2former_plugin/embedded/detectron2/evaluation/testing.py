"""Printing, checking and flattening of result dicts."""

from __future__ import annotations

import logging
import math
import pprint
import sys
from collections.abc import Mapping
from numbers import Number

logger = logging.getLogger(__name__)


def print_csv_format(results: Mapping) -> None:
    """Log results in lines that paste well into a table: the task, its metric names, their values.

    Metrics with "-" in their name (per class) are left out.
    """
    if not isinstance(results, Mapping):
        raise TypeError(f"expected a dict of results, got {results!r}")
    if not results:
        logger.warning("The evaluation gave no results.")
    for task, metrics in results.items():
        if not isinstance(metrics, Mapping):
            logger.info(f"copypaste: {task}={metrics}")
            continue
        shown = {name: value for name, value in metrics.items() if "-" not in name}
        logger.info(f"copypaste: Task: {task}")
        logger.info("copypaste: " + ",".join(shown))
        logger.info("copypaste: " + ",".join(f"{value:.4f}" for value in shown.values()))


def verify_results(cfg, results: Mapping) -> bool:
    """Compare ``results`` with ``cfg.TEST.EXPECTED_RESULTS``, a list of ``[task, metric, value, tolerance]``.

    Returns:
        True if all of them hold (or there are none). Ends the process with status 1 otherwise.
    """
    expected = cfg.TEST.EXPECTED_RESULTS
    if not len(expected):
        return True
    failures = []
    for task, metric, value, tolerance in expected:
        actual = results.get(task, {}).get(metric)
        if actual is None or not math.isfinite(actual) or abs(actual - value) > tolerance:
            failures.append(f"{task}/{metric}: expected {value} ± {tolerance}, got {actual}")
    if failures:
        logger.error("Result verification failed!\n" + "\n".join(failures))
        logger.error("Actual results: " + pprint.pformat(dict(results)))
        sys.exit(1)
    logger.info("Results verification passed.")
    return True


def flatten_results_dict(results: Mapping) -> dict:
    """Nested dicts to one level: ``{"a": {"b": 1}}`` gives ``{"a/b": 1}``; numpy numbers become plain ones."""
    flat = {}
    for key, value in results.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}/{name}": inner for name, inner in flatten_results_dict(value).items()})
        elif isinstance(value, Number) and hasattr(value, "item"):
            flat[key] = value.item()
        else:
            flat[key] = value
    return flat
