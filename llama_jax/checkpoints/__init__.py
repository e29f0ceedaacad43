"""Read and write checkpoints.

`huggingface` loads and saves directories of safetensors, `orbax` loads Orbax directories and training runs.
Both compare what is stored with the model before they read it: `names` maps Hugging Face's names to
parameters, `weight_files` reads headers, `match` lists everything that does not fit. `safetensors_read` and
`safetensors_write` are the file format, `fingerprint` a checksum that does not depend on sharding.
"""
