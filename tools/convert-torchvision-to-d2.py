#!/usr/bin/env python
"""Turn a torchvision ResNet into Detectron2's format, for other projects: this package reads both as they are.

wget https://download.pytorch.org/models/resnet101-63fe2227.pth
python tools/convert-torchvision-to-d2.py resnet101-63fe2227.pth R-101.pkl
"""

from __future__ import annotations

import argparse
import pickle

import mask2former_plugin  # noqa: F401  (first: makes detectron2 importable)

from mask2former_plugin.checkpoint.layouts import is_torchvision, torchvision_name, unwrap
from mask2former_plugin.engine import user_errors
from mask2former_plugin.serialization import load_checkpoint_file


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", metavar="IN.pth", help="torchvision's file")
    parser.add_argument("output", metavar="OUT.pkl", help="file to write")
    args = parser.parse_args(arguments)
    with user_errors():
        weights = unwrap(load_checkpoint_file(args.input))["model"]
    if not is_torchvision(weights):
        parser.error(f"{args.input} is no torchvision ResNet: it has no layer1.0.conv1.weight")
    arrays = {torchvision_name(name): value.detach().numpy() for name, value in weights.items()}
    with user_errors(), open(args.output, "wb") as file:
        pickle.dump({"model": arrays, "__author__": "torchvision", "matching_heuristics": True}, file)


if __name__ == "__main__":
    main()
