"""Token files that other programs wrote, read where they are.

Each format is a module with two functions, see `Format` in `registry`: one that finds its files, one that
memory-maps them as `train.data.tokens.Tokens`. `files` lists files and tells splits apart by name;
`source` makes a `Source` of any of them.
"""
