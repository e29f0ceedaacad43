"""The pretraining program, `python -m train`.

`options`, `option_checks` and `options_toml` define what a run is; `run` runs it; `data` makes and reads
token files; `program` is what is compiled; `model` restores, evaluates, samples and exports trained models;
`checkpoints` saves them; `plan` estimates memory and time; `monitoring` shows and records metrics;
`hardware` knows chips and topologies.
"""
