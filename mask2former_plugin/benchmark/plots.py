"""Curves of time and memory over image size, queries and targets, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator  # noqa: E402

_AXES = {"pixels": "image size [pixels]", "queries": "queries", "targets": "targets per image"}
_COLORS = {"ours": "tab:green", "transformers": "tab:orange", "original": "tab:blue"}


def write(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """One picture per curve that has at least two points; returns the files."""
    curves: dict[str, list[Mapping[str, Any]]] = {}
    for case in results["cases"]:
        if case["axis"]:
            curves.setdefault(case["curve"], []).append(case)
    files = []
    for name, cases in curves.items():
        if len(cases) > 1:
            files.append(folder / f"{name.replace('/', '-')}.png")
            _draw(sorted(cases, key=lambda case: case["value"]), results, files[-1])
    return files


def _draw(cases: Sequence[Mapping[str, Any]], results: Mapping[str, Any], file: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    _lines(axes[0], cases, "median", 1.0, "time [s]")
    _lines(axes[1], cases, "memory", 2**30, "memory on top of weights and inputs [GiB]")
    settings, machine = results["settings"], results["machine"]
    place = machine["gpu"]["name"] if "gpu" in machine else f"{machine['cpu']}, {settings['threads']} threads"
    trial = ", TRIAL RUN: small models and sizes" if settings["quick"] else ""
    kind = "Training step" if "training" in cases[0]["curve"] else "Inference"
    figure.suptitle(f"{kind}, Mask2Former R50, float32 ({place}{trial})")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _lines(axes: Axes, cases: Sequence[Mapping[str, Any]], key: str, unit: float, label: str) -> None:
    axis = cases[0]["axis"]
    by_side: dict[str, list[tuple[int, float]]] = {}
    for case in cases:
        for side in case["sides"]:
            if side["status"] == "measured" and side[key] is not None:
                by_side.setdefault(side["side"], []).append((case["value"], side[key] / unit))
    for name, points in by_side.items():
        axes.plot(*zip(*points), marker="o", label=name, color=_COLORS.get(name))
    values = [case["value"] for case in cases]
    if axis == "pixels":  # linear growth is a straight line of slope one
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        if by_side:
            (first, low), *_ = next(iter(by_side.values()))
            growth = [low * value / first for value in values]
            axes.plot(values, growth, ":", color="gray", label="linear in pixels", zorder=0)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value**0.5:.0f}²"))
    else:
        # the highest points are often flat: they stay below the frame and the legend
        highest = max((value for points in by_side.values() for _, value in points), default=1)
        axes.set_ylim(0, 1.2 * highest or 1)
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(_AXES[axis])
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    if by_side:
        axes.legend()
