"""From text to batches: documents, tokens, shards, windows."""
