"""Compare the metrics of two training runs: where they part, and whether rounding explains it."""
