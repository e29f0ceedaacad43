"""`python -m train coordinates`: does the size of activations depend on the width, in the first steps?

`measure` trains and measures, `outcome` shows it.
"""
