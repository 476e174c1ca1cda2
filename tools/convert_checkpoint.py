#!/usr/bin/env python
"""Convert checkpoints between this package and Hugging Face, with their configs.

  python tools/convert_checkpoint.py --from-huggingface facebook_model/ converted/
  python tools/convert_checkpoint.py --to-huggingface output/model_final.pth hf_model/ --config-file output/config.yaml

The first form writes model.pth and config.yaml; neither is needed, as every tool reads a Hugging Face folder as
--config-file and as MODEL.WEIGHTS. The second reads every checkpoint that training and evaluation read, the published
files of both projects included.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import mask2former_plugin  # noqa: F401  (first: makes detectron2 importable)
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from mask2former_plugin.checkpoint import Checkpointer
from mask2former_plugin.checkpoint.huggingface import FILES, load_hf_config, save_pretrained
from mask2former_plugin.config import load_config
from mask2former_plugin.data.datasets.custom import register_custom_datasets
from mask2former_plugin.engine import user_errors


def load_model(cfg: CfgNode, weights: str) -> torch.nn.Module:
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    checkpointer = Checkpointer(model)
    checkpointer.load(weights)
    checkpointer.require_weights(classifier=True)
    return model


def from_huggingface(source: str, target: Path) -> list[Path]:
    cfg = load_hf_config(source)
    model = load_model(cfg, source)
    target.mkdir(parents=True, exist_ok=True)
    weights, config = target / "model.pth", target / "config.yaml"
    torch.save({"model": model.state_dict()}, weights)
    cfg.MODEL.WEIGHTS = str(weights)
    config.write_text(cfg.dump(), encoding="utf-8")
    return [weights, config]


def to_huggingface(source: str, target: Path, config_file: str, opts: list[str]) -> list[Path]:
    cfg = load_config(config_file, opts)
    register_custom_datasets(cfg)
    save_pretrained(load_model(cfg, source), cfg, target)
    return [target / name for name in FILES]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--from-huggingface", action="store_true")
    direction.add_argument("--to-huggingface", action="store_true")
    parser.add_argument("source", help="the Hugging Face folder, or the checkpoint")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--config-file", help="config of the checkpoint, with --to-huggingface")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="config overrides: KEY VALUE …")
    args = parser.parse_args(arguments)
    if args.to_huggingface and not args.config_file:
        parser.error("--to-huggingface needs the --config-file of the checkpoint")
    with user_errors():
        if args.from_huggingface:
            written = from_huggingface(args.source, args.target)
        else:
            written = to_huggingface(args.source, args.target, args.config_file, args.opts)
    for path in written:
        print(path)


if __name__ == "__main__":
    main()
