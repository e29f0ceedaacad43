"""Looking at a model: the tensors and costs of an `architecture`, and a `mask_picture` of its attention."""
