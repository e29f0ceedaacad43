"""Who may attend to whom, as boolean data: True where a query sees a key."""

from jaxtyping import Array, Bool, Int


def attention_mask(
    query_slots: Int[Array, " q"],
    key_slots: Int[Array, " k"],
    key_is_token: Bool[Array, "batch k"] | None,
    query_segments: Int[Array, "batch q"] | None,
    key_segments: Int[Array, "batch k"] | None,
) -> Bool[Array, "b_or_1 1 q k"]:
    """Causal, and the key is a token (not padding), and both belong to one packed segment.

    Slots are places in the sequence (or cache), not positions: `position_ids` never change the mask.
    The result has a batch axis of 1 where nothing depends on the row.
    """
    mask = (key_slots[None, :] <= query_slots[:, None])[None, None]
    if key_is_token is not None:
        mask = mask & key_is_token[:, None, None, :]
    if query_segments is not None:
        assert key_segments is not None
        mask = mask & (query_segments[:, None, :, None] == key_segments[:, None, None, :])
    return mask
