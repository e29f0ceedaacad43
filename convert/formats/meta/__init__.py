"""Meta's params.json and consolidated.*.pth, read and written."""
