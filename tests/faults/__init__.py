"""Faults against the running system: `python -m tests.faults`, `make test-faults`, `make soak`."""
