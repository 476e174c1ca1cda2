"""Datasets: the published registrations that Detectron2 lacks, and the user's own."""
