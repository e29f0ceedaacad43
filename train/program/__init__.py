"""Everything a run compiles: the step, the optimizer, the mesh."""
