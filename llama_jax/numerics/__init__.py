"""Arithmetic that knows no model: matmuls, activations, rotary embeddings, remat, the backend."""
