"""Text to shards, and shards to batches: sources, tokenizer, data set directory, order, stream."""
