"""The seed's own system, written from its description, to measure ours against."""
