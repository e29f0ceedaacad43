"""Grouped-query attention: implementations, masks and the key/value cache."""
