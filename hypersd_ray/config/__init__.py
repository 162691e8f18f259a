"""Typed configuration: what a run is, checked before a cluster starts."""
