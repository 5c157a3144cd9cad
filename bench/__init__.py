"""Benchmarks. Imported as ``cosup.bench``; each also runs as a file, ``python bench/linear_cross_entropy.py``."""
