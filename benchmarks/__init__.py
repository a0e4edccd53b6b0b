"""Benchmarks that anyone can run with public tools; `python -m benchmarks --help`."""
