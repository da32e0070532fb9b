"""What is behind `shardpage verify`: attention of whole problems, compared with an oracle."""
