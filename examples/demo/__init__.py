"""`make demo`: first `convert_and_compare`, then `pretrain`."""
