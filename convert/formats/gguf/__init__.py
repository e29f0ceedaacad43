"""GGUF, read and written."""
