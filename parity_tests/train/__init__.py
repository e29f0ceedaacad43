"""Tests of `train`, in its layout. `corpus` has tokenizers and token directories, `runs` tiny runs."""
