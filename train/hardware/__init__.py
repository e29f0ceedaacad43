"""Data sheets, topologies, and what a compiled program asks of them."""
