"""Results of a run: JSON with everything, a page of tables, plots."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from mask2former_plugin.benchmark import plots
from mask2former_plugin.benchmark.cases import GROUPS
from mask2former_plugin.benchmark.measure import total_memory
from mask2former_plugin.benchmark.rates import operation_rate
from mask2former_plugin.benchmark.runner import Settings
from mask2former_plugin.benchmark.workload import SIDES

FORMAT = 1
_PACKAGES = ("torch", "numpy", "scipy", "transformers", "mask2former_plugin")
_RIVALS = ("transformers", "original", "reference")  # ratios are given against these


def new_results(settings: Settings) -> dict[str, Any]:
    """The JSON of a run without its cases: machine, versions, date, settings."""
    return {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": _machine(settings.device),
        "versions": {"python": platform.python_version(), **_versions()},
        "settings": {
            "sides": list(settings.sides),
            "rounds": settings.rounds,
            "seconds": settings.seconds,
            "threads": settings.threads,
            "device": settings.device,
            "keep_freed_memory": settings.keep_freed_memory,
            "quick": settings.quick,
        },
        "rates": {},
        "cases": [],
    }


def _machine(device: str) -> dict[str, Any]:
    found = {"cpu": _cpu_name(), "cores": os.cpu_count(), "memory": total_memory(), "system": platform.platform()}
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = {"name": properties.name, "memory": properties.total_memory}
    return found


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", path.read_text(), re.MULTILINE) if path.exists() else []
    return names[0] if names else platform.processor()


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # optional, or run from a checkout
    found["torch"] = torch.__version__  # names the build, which the metadata may not
    return found


def kept_cases(file: Path, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The cases of an earlier run on the same machine with the same settings.

    Raises:
        ValueError: the earlier run was another; the text says in what.
    """
    try:
        earlier = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"--resume: {file} is no JSON: {error}; remove it or choose another --output") from error
    if not isinstance(earlier, dict):
        raise ValueError(f"--resume: {file} holds no results; remove it or choose another --output")
    for key in ("format", "machine", "versions", "settings"):
        if earlier.get(key) != results[key]:
            raise ValueError(f"--resume: {file} is of another run ({key} differs); choose another --output")
    return earlier["cases"]


def save(results: Mapping[str, Any], file: Path) -> None:
    """Write the JSON; an interrupted run leaves the old one or the new one."""
    incomplete = file.with_suffix(".incomplete")
    incomplete.write_text(json.dumps(results, indent=1) + "\n")
    incomplete.replace(file)


def write(results: Mapping[str, Any], folder: Path) -> None:
    """Write ``results.json``, ``table.md`` and the plots."""
    save(results, folder / "results.json")
    (folder / "table.md").write_text(tables(results))
    plots.write(results, folder)


def tables(results: Mapping[str, Any]) -> str:
    """The page of tables in Markdown."""
    parts = [_heading(results)]
    for group, title in GROUPS.items():
        cases = [case for case in results["cases"] if case["group"] == group]
        if cases:
            parts += [f"## {title}", _table(cases, results["rates"])]
    problems = _problems(results["cases"])
    if problems:
        parts += ["## What was not measured", problems]
    return "\n\n".join(parts) + "\n"


def _heading(results: Mapping[str, Any]) -> str:
    machine, settings, rates = results["machine"], results["settings"], results["rates"]
    place = machine["gpu"]["name"] if "gpu" in machine else f"{machine['cpu']}, {machine['cores']} cores"
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    memory = f"{machine['memory'] / 2**30:.0f} GiB"
    lines = [f"{results['date'][:10]}, {place}, {memory}, {settings['threads']} threads, {versions}."]
    if settings["device"] == "cpu":
        lines[0] += f" Freed memory is kept by: {settings['keep_freed_memory']}."
    if settings["quick"]:
        lines.append("**Trial run with small models and sizes: these numbers say nothing.**")
    if rates:
        speeds = [f"{precision} {operation_rate(rates, precision) / 1e9:.0f}" for precision in ("float32", "bfloat16")]
        lines.append(
            f"The machine reaches in plain products {' and '.join(speeds)} GFLOP/s, "
            f"in a copy {rates['copy'] / 1e9:.0f} GB/s."
        )
    lines.append(
        'Times are medians. Memory is the peak on top of weights and inputs. "against": how many times as fast as the '
        'other, and how many times its memory. "limit": what our float32 side\'s operations and the bytes of inputs, '
        'weights and results take at these rates; "× limit": the time in parts of it.'
    )
    return "\n\n".join(lines)


def limit_seconds(case: Mapping[str, Any], precision: str, rates: Mapping[str, float]) -> float | None:
    """What a run takes at least: its operations at the rate of plain products, its bytes at that of a copy."""
    limit = case["limit"]
    if limit is None or not rates:
        return None
    return max(limit["flop"] / operation_rate(rates, precision), limit["bytes"] / rates["copy"])


def _table(cases: Sequence[Mapping[str, Any]], rates: Mapping[str, float]) -> str:
    measured = {name for case in cases for name in _by_name(case)}
    rivals = [name for name in _RIVALS if name in measured]
    by_images = any(case["images"] for case in cases)
    on_top = all(case["group"] == "postprocess" for case in cases)
    headers = ["case", "side", "time", "least … most"] + ["images/s"] * by_images
    headers += ["memory on top of the result" if on_top else "memory"]
    headers += [f"against {name}" for name in rivals]
    headers += ["limit", "× limit"] * (not by_images)
    rows = []
    for case in cases:
        title = case["title"]
        sides = _by_name(case)
        for side in case["sides"]:
            if side["status"] == "not offered":
                continue
            row = [title, side["side"]]
            title = ""
            if side["status"] != "measured":
                rows.append([*row, side["status"]])
                continue
            row += [seconds(side["median"]), f"{seconds(side['least'])} … {seconds(side['most'])}"]
            if by_images:
                row.append(f"{case['images'] / side['median']:.1f}")
            row.append(megabytes(_memory(side, on_top)))
            row += [_ratios(side, sides.get(name), on_top) for name in rivals]
            if not by_images:
                limit = limit_seconds(case, SIDES[side["side"]].precision, rates)
                row += [seconds(limit), "-" if not limit else f"{side['median'] / limit:.1f}"]
            rows.append(row)
    rows = [row + ["-"] * (len(headers) - len(row)) for row in rows]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _by_name(case: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {side["side"]: side for side in case["sides"] if side["status"] == "measured"}


def _memory(side: Mapping[str, Any], on_top_of_result: bool) -> float | None:
    if side["memory"] is None:
        return None
    return max(0, side["memory"] - (side["result"] if on_top_of_result else 0))


def _ratios(side: Mapping[str, Any], rival: Mapping[str, Any] | None, on_top: bool) -> str:
    """How many times as fast as a rival, and how many times its memory."""
    if rival is None or rival is side:
        return "-"
    speed = f"{rival['median'] / side['median']:.2f}×"
    own, other = _memory(side, on_top), _memory(rival, on_top)
    return speed if own is None or not other else f"{speed}, {own / other:.2f}×"


def seconds(value: float | None) -> str:
    """A time with its unit, three digits."""
    if value is None:
        return "-"
    if value < 1e-3:
        return f"{value * 1e6:.3g} µs"
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def megabytes(value: float | None) -> str:
    """A memory size with its unit."""
    if value is None:
        return "-"
    return f"{value / 2**20:.0f} MB" if value < 2**30 else f"{value / 2**30:.2f} GB"


def _problems(cases: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for case in cases:
        for side in case["sides"]:
            if side["status"] not in ("measured", "not offered"):
                lines.append(f"- {case['title']}, {side['side']}: {side['status']}: {side['reason'].splitlines()[0]}")
    return "\n".join(lines)
