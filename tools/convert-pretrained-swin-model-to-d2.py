#!/usr/bin/env python
"""Turn a released Swin Transformer into Detectron2's format, for other projects: this package reads both as they are.

wget https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_tiny_patch4_window7_224.pth
python tools/convert-pretrained-swin-model-to-d2.py swin_tiny_patch4_window7_224.pth swin_tiny_patch4_window7_224.pkl
"""

from __future__ import annotations

import argparse
import pickle

import mask2former_plugin  # noqa: F401  (first: makes detectron2 importable)

from mask2former_plugin.checkpoint.layouts import is_swin_release, unwrap
from mask2former_plugin.engine import user_errors
from mask2former_plugin.serialization import load_checkpoint_file


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", metavar="IN.pth", help="file of the Swin releases")
    parser.add_argument("output", metavar="OUT.pkl", help="file to write")
    args = parser.parse_args(arguments)
    with user_errors():
        weights = unwrap(load_checkpoint_file(args.input))["model"]
    if not is_swin_release(weights):
        parser.error(f"{args.input} is no Swin release: it has no patch_embed.proj.weight")
    with user_errors(), open(args.output, "wb") as file:
        pickle.dump({"model": weights, "__author__": "third_party", "matching_heuristics": True}, file)


if __name__ == "__main__":
    main()
