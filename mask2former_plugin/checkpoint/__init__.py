"""Checkpoints of both projects, of Hugging Face and of ImageNet backbones, read safely; wrong ones are refused."""

from mask2former_plugin.checkpoint.checkpointer import Checkpointer, CheckpointMismatchError

__all__ = ["CheckpointMismatchError", "Checkpointer"]
