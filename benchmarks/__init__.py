"""Benchmarks: `python -m benchmarks --help`, figures in RESULTS.md."""
