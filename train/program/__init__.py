"""The compiled program of a run.

`build` puts it together: `step` is the training step, `optimizer` with `muon` and `per_layer` its update,
`schedules` the learning rate, `mesh` the devices.
"""
