"""Benchmarks: what merging costs beside other tools and beside the limits of the machine."""
