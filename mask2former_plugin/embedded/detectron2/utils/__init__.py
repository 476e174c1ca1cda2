"""Helpers of the embedded Detectron2 slice: logging, events, files, processes."""
