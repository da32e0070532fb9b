"""Measurements: each prints a table and keeps its figures as JSON under `results/`."""
