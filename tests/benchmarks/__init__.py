"""Benchmarks: `python -m tests.benchmarks` for everything, `.editions` and `.sustained` beside the first edition."""
