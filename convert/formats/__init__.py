"""The formats, one module or package each."""
