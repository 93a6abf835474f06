"""Benchmarks: each `python -m bench.NAME` verifies outputs, then times peers in turn in one run."""
