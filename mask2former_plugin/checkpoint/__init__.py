"""Checkpoints: those of both projects, of Hugging Face and of ImageNet backbones, read safely; a refusal to go on with wrong ones."""

from mask2former_plugin.checkpoint.checkpointer import Checkpointer

__all__ = ["Checkpointer"]
