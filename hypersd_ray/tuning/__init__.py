"""Sweeps: which numbers are tried, by which measure, and Ray Tune around whole training runs."""
