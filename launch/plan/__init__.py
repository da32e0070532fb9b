"""What is behind `shardpage plan`: compile a decode step's attention, read, bound, report."""
