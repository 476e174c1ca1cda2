"""Building blocks that the networks share."""

from mask2former_plugin.modeling.layers.attention import MultiheadAttention
from mask2former_plugin.modeling.layers.deformable_attention import MSDeformAttn, reference_points
from mask2former_plugin.modeling.layers.mlp import MLP
from mask2former_plugin.modeling.layers.position_encoding import sine_position_encoding

__all__ = ["MLP", "MSDeformAttn", "MultiheadAttention", "reference_points", "sine_position_encoding"]
