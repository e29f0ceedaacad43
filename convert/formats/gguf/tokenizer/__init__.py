"""Tokenizers in GGUF: metadata to files (`read`), files to metadata (`write`), the proof (`same_ids`)."""
