"""Files and directories.

`staging` writes them beside their final name and renames them when complete, `json_object` reads JSON, and
`foreign_weights` says what a directory holds that is not a checkpoint this library reads.
"""
