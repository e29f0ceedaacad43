"""Read the lists of integers in a serialized tf.train.Example, without TensorFlow.

    Example { Features features = 1; }
    Features { map<string, Feature> feature = 1; }
    Feature { oneof { BytesList bytes_list = 1; FloatList float_list = 2; Int64List int64_list = 3; } }
    Int64List { repeated int64 value = 1 [packed = true]; }

Source: tensorflow/core/example/{example,feature}.proto, and protobuf's encoding.
"""

from collections.abc import Iterator

import numpy as np

_VARINT, _LENGTH_DELIMITED = 0, 2  # wire types
_INT64_LIST = 3  # number of a field of Feature


def example_features(record: bytes) -> dict[str, memoryview | None] | None:
    """The features of an Example by name: the serialized Int64List, or None for lists of another kind.

    Returns:
        None if the record is not an Example, or has no features.
    """
    features: dict[str, memoryview | None] = {}
    try:
        for number, content in _fields(memoryview(record)):
            if number != 1:
                return None
            for _, entry in _fields(content):
                parts = dict(_fields(entry))
                values = dict(_fields(parts.get(2, memoryview(b""))))
                if not parts.keys() <= {1, 2} or not values.keys() <= {1, 2, 3}:
                    return None
                features[bytes(parts.get(1, b"")).decode()] = values.get(_INT64_LIST)
    except ValueError:
        return None
    return features or None


def int64_values(int64_list: memoryview) -> np.ndarray:
    """The values of a serialized Int64List, packed or not: [values] int64. Raises ValueError if damaged.

    >>> int64_values(memoryview(bytes.fromhex("0a038e0207")))
    array([270,   7])
    """
    return np.concatenate(
        [np.empty(0, np.int64), *(_varints(part) for _, part in _fields(int64_list))]
    )


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and content of each field; of a varint its bytes. Raises ValueError if it is no message."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        start = place
        if tag & 7 == _VARINT:
            _, place = _varint(message, place)
        elif tag & 7 == _LENGTH_DELIMITED:
            length, start = _varint(message, place)
            place = start + length
        else:
            raise ValueError("another wire type")
        if place > len(message) or not tag >> 3:
            raise ValueError("truncated")
        yield tag >> 3, message[start:place]


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    """A number, and the place after it."""
    value, shift = 0, 0
    while place < len(message) and shift < 70:
        byte = message[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
    raise ValueError("truncated")


def _varints(packed: memoryview) -> np.ndarray:
    """All numbers of a packed field: [values] int64."""
    data = np.frombuffer(packed, np.uint8)
    (ends,) = np.nonzero(data < 0x80)
    if len(data) and (not len(ends) or ends[-1] != len(data) - 1):
        raise ValueError("truncated")
    begins = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else ends
    positions = np.arange(len(data)) - np.repeat(begins, ends + 1 - begins)
    if len(data) and positions.max() > 9:
        raise ValueError("too long")
    bits = (data & 0x7F).astype(np.uint64) << (7 * positions).astype(np.uint64)
    # the parts do not overlap, so their sum has the bits of all
    sums = np.add.reduceat(bits, begins) if len(begins) else bits
    return sums.view(np.int64)
