"""What users pass to a model: checks of `ids`, `labels`, `positions` and `keys`; padded `lengths`."""
