"""Registry of transformer decoders."""

from detectron2.utils.registry import Registry

TRANSFORMER_DECODER_REGISTRY = Registry("TRANSFORMER_MODULE")
TRANSFORMER_DECODER_REGISTRY.__doc__ = """Transformer decoders, built with ``(cfg, in_channels, mask_classification)``.

``forward(x, mask_features, mask=None)`` returns a :class:`mask2former_plugin.modeling.mask_logits.MaskPrediction`. A
class whose ``x`` is a list of maps from coarse to fine says so with the attribute ``multi_scale_input = True``.
"""
