"""Benchmarks: `python -m tests.benchmarks.first` for a first look, `python -m tests.benchmarks` for everything."""
