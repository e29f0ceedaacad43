"""What other programs name a value for each id that says whether it is in the loss."""

from llama_jax.loss import IGNORE_INDEX

LABELS, PADDING = "labels", "attention_mask"

# the value of those that are not in the loss
MASKS = {
    LABELS: IGNORE_INDEX,
    "assistant_masks": 0,
    "completion_mask": 0,
    "loss_mask": 0,
    PADDING: 0,
}
