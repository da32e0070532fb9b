"""The pod planner behind `shardpage plan`: compile one decode step's attention, read the result."""
