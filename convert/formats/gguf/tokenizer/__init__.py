"""Tokenizers in GGUF: `read` and `write` their metadata; `same_ids` checks that the ids stay the same."""
