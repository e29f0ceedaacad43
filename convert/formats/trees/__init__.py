"""Orbax checkpoints of other programs: any tree of arrays, read through a map of its names.

A map is a small TOML file; `name_map` says what is in one, and `convert/formats/maxtext/maxtext.toml` is an
example.
"""
