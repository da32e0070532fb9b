"""Several processes as one job: how they start, find each other, and end together."""
