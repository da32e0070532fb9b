"""The jobs of `shardpage`, one file each: a function whose parameters are its options."""
