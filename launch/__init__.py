"""Everything one starts from a shell: `shardpage JOB ...`, also as `python -m launch`.

Importing this package touches no device.
"""
