"""`python -m train plan`: memory and time of a run before it is started."""
