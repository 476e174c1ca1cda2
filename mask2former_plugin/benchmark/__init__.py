"""Measures time and memory of this package and of others side by side; ``tools/benchmark.py`` is its command line."""
