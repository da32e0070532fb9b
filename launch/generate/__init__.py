"""What is behind `shardpage generate`: a language model served with continuous batching."""
