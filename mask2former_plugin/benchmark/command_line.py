"""The command line of ``tools/benchmark.py``."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from mask2former_plugin.benchmark import report
from mask2former_plugin.benchmark.cases import CASES, GROUPS, choose_cases
from mask2former_plugin.benchmark.original import family_of
from mask2former_plugin.benchmark.runner import KEEPERS, Runner, Settings, WorkerError
from mask2former_plugin.benchmark.workload import SIDES
from mask2former_plugin.command_line import new_parser
from mask2former_plugin.engine import user_errors

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
_PROBLEMS = ("failed", "crashed", "disagrees")


def _parser(description: str) -> argparse.ArgumentParser:
    parser = new_parser(description)
    parser.add_argument(
        "--cases",
        nargs="+",
        default=list(GROUPS),
        metavar="NAME",
        help="names, groups or globs (default: all; see --list)",
    )
    parser.add_argument(
        "--sides",
        nargs="+",
        metavar="SIDE",
        help=f"of {', '.join(SIDES)} (default: all that can run here, without the compiled ones)",
    )
    parser.add_argument(
        "--original",
        action="append",
        default=[],
        metavar="PATH",
        help="checkout of Mask2Former or MaskFormer; may be given for each",
    )
    parser.add_argument("--list", action="store_true", help="list the cases and stop")
    parser.add_argument(
        "--quick", action="store_true", help="small models and sizes: tries the tool, measures nothing of interest"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="most timings of each side (default 5)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=30.0,
        metavar="S",
        help="what the rounds of a case should take at most; at least two are made, of curves one (default 30)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads of each side (default: PyTorch's choice)")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:<number>")
    parser.add_argument(
        "--configs",
        type=Path,
        default=CONFIGS,
        metavar="DIR",
        help="folder of the published configs (default: this repository's)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("benchmark_output"),
        metavar="DIR",
        help="folder for the results (default benchmark_output)",
    )
    parser.add_argument(
        "--keep-freed-memory",
        choices=KEEPERS,
        default="ours",
        help="which sides keep freed memory on a CPU (MODEL.KEEP_FREED_MEMORY): ours (its default), all, or none",
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep the cases that results.json in the output folder has"
    )
    return parser


def _choose_sides(names: Sequence[str] | None, originals: dict[str, Path]) -> list[str]:
    has_transformers = importlib.util.find_spec("transformers") is not None
    if names is None:
        chosen = ["ours", "ours-bf16", "ours-checkpoint", "reference"]  # compiling takes minutes: on demand only
        return chosen + ["transformers"] * has_transformers + ["original"] * bool(originals)
    for name in names:
        if name not in SIDES:
            near = difflib.get_close_matches(name, SIDES, n=1, cutoff=0.0)[0]
            raise KeyError(f"unknown side {name!r}, did you mean {near!r}? There are {', '.join(SIDES)}")
        if SIDES[name].implementation == "transformers" and not has_transformers:
            raise ValueError(
                f"--sides {name}: transformers is not installed; pip install 'transformers>=5' or leave the side out"
            )
        if SIDES[name].implementation == "original" and not originals:
            raise ValueError(f"--sides {name}: say with --original where a checkout of Mask2Former or MaskFormer is")
    return list(dict.fromkeys(names))


def _check_device(name: str) -> None:
    chosen = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if chosen is None:
        raise ValueError(f"--device {name}: take cpu, cuda or cuda:<number>")
    if name != "cpu" and int(chosen[1] or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices, counted from 0")


def main(description: str, arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if a side failed, crashed or disagrees."""
    parser = _parser(description)
    args = parser.parse_args(arguments)
    if args.rounds < 1 or not args.seconds >= 0 or args.threads is not None and args.threads < 1:
        parser.error("--rounds and --threads must be at least 1, --seconds at least 0")
    with user_errors():
        cases = choose_cases(args.cases)
        originals = {family_of(path): path for path in (Path(p).resolve() for p in args.original)}
        sides = _choose_sides(args.sides, originals)
        if not args.configs.is_dir():
            raise FileNotFoundError(
                f"--configs {args.configs} is no folder; the published configs are in the repository"
            )
        _check_device(args.device)
    if args.list:
        sys.stdout.write("".join(f"{case.name:40} {case.title}\n" for case in cases))
        return 0
    threads = args.threads or torch.get_num_threads()
    settings = Settings(
        sides,
        args.rounds,
        args.seconds,
        threads,
        args.device,
        args.quick,
        args.configs.resolve(),
        originals,
        args.keep_freed_memory,
    )
    results = report.new_results(settings)
    file = args.output / "results.json"
    with user_errors():
        args.output.mkdir(parents=True, exist_ok=True)
        if args.resume and file.is_file():
            results["cases"] = report.kept_cases(file, results)
    done = {case["name"] for case in results["cases"]}
    try:
        with Runner(settings, tqdm.write) as runner:
            results["rates"] = runner.rates()
            progress = tqdm([case for case in cases if case.name not in done])
            for case in progress:
                progress.set_description(case.name)
                results["cases"].append(runner.run(case))
                report.save(results, file)
    except WorkerError as error:  # those of single cases are results
        sys.exit(f"error: the rates of this machine can't be measured: {error}")
    except KeyboardInterrupt:
        sys.exit(f"interrupted; --resume goes on with {file}")
    finally:
        order = list(CASES)
        results["cases"].sort(key=lambda case: order.index(case["name"]))
        report.write(results, args.output)
    sys.stdout.write(f"{args.output / 'table.md'}\n")
    return int(any(side["status"] in _PROBLEMS for case in results["cases"] for side in case["sides"]))
