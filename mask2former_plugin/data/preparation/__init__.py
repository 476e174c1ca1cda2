"""Preparation of published datasets: from the files as they are downloaded to the files that the registered names load.

One module per dataset; ``datasets/prepare_*.py`` are their command lines.
"""
