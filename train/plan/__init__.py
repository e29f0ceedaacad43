"""`python -m train plan`: memory and time of a run before it is started.

`command` is the program; `compiled` compiles a run's step for the planned devices, `estimate` needs only
shapes, `search` ranks meshes and recomputation, `advice` says what would help, `tables` shows plans.
"""
