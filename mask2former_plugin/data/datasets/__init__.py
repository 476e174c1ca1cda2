"""Datasets: the user's own (``custom``), and the published ones that Detectron2 lacks, registered by importing this."""

from mask2former_plugin.data.datasets.published import register_published_datasets

register_published_datasets()
