"""Measurements of decode steps, writes and splits; the kept reports are under `results/`."""
