"""Protobuf messages counted on the wire, before they are parsed.

A part of two bytes in a file takes hundreds in memory, so that a small file could fill any machine; here the parts
are counted at next to no cost, by the schema that the parser itself uses.
"""

from google.protobuf.message import Message

from kcrprune.errors import CheckpointError

# Ours: our export of a Swin-T has 7 thousand messages in 20 thousand fields.
MOST_MESSAGES, MOST_FIELDS = 100_000, 1_000_000
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def check(data: bytes, kind: type[Message]) -> None:
    """CheckpointError where `data` is no whole message of a kind, or one of more parts than a network has."""
    try:
        _walk(data, kind)
    except IndexError as error:
        raise CheckpointError("this is no ONNX graph, or it is damaged or cut short; fetch it again") from error


def _walk(data: bytes, kind: type[Message]) -> None:
    """Visits every field of every message; IndexError where one does not end where it must."""
    waiting, messages, fields = [(0, len(data), kind.DESCRIPTOR)], 0, 0
    while waiting:
        at, end, message = waiting.pop()
        messages += 1
        while at < end:
            fields += 1
            if messages + len(waiting) > MOST_MESSAGES or fields > MOST_FIELDS:
                raise CheckpointError(f"its graph has more than {MOST_MESSAGES} parts, which no network needs")
            key, at = _varint(data, at)
            start, at = _value(data, at, key & 7)
            field = message.fields_by_number.get(key >> 3)
            if key & 7 == BYTES and field is not None and field.message_type is not None:
                waiting.append((start, at, field.message_type))
        if at != end:
            raise IndexError(f"a message overruns its end at byte {end}")


def _value(data: bytes, at: int, kind: int) -> tuple[int, int]:
    """Where the value at `at` begins, behind its length if it has one, and where it ends."""
    if kind == VARINT:
        return at, _varint(data, at)[1]
    if kind == BYTES:
        length, at = _varint(data, at)
        return at, at + length
    if kind in {FIXED64, FIXED32}:
        return at, at + (8 if kind == FIXED64 else 4)
    raise IndexError(f"no value of ONNX has the wire type {kind}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that starts at `at`, and where it ends."""
    byte = data[at]
    if byte < 128:
        return byte, at + 1
    value, shift = 0, 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise IndexError(f"the number before byte {at} has no end")
