"""Several processes as one job: how they start, find each other, and end together."""

# Jobs of `shardpage` that run as several processes; anything else to run is a command of its own.
JOBS = ("generate", "verify", "doctor")
