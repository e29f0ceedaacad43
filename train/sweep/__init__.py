"""`python -m train sweep`: runs over a grid of options, one after the other, and what came of them.

`grid` makes the trials, `trials` runs them, `outcome` shows them.
"""
