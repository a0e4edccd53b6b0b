"""Train and rank on real data: `python -m experiments`."""
