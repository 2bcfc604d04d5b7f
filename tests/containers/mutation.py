"""Ways to damage a file."""

import io
import random
import struct
import zipfile
from collections.abc import Callable, Sequence

EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
TEXTS = (
    b"<!DOCTYPE html><html><head><title>404</title></head></html>",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n",
    b"[" * 50_000,
    b'{"a":' * 20_000,
    b"((((" * 20_000 + b".",
    b"\x80\x02" + b"]" * 50_000 + b".",
    b"",
    b"\0" * 4096,
)

Damage = Callable[[random.Random, bytes, Sequence[bytes]], bytes]


def mutate(draw: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """A damaged file: in half of the cases its outside, in half what a valid outside holds."""
    if draw.random() < 0.5 and data.startswith(b"PK"):
        return _inside_zip(draw, data, others)
    if draw.random() < 0.5 and data[8:9] == b"{":
        return _inside_safetensors(draw, data, others)
    return _damage(draw, data, others)


def _inside_zip(draw: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """One entry is damaged, the one with the pickle most of the time; checksums and lengths are right."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    pickled = [name for name in entries if name.endswith(".pkl")]
    name = draw.choice(pickled if pickled and draw.random() < 0.8 else sorted(entries))
    entries[name] = _damage(draw, entries[name], others)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)
    return buffer.getvalue()


def _inside_safetensors(draw: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """The header is damaged, its length is right."""
    (length,) = struct.unpack("<Q", data[:8])
    header = _damage(draw, data[8 : 8 + length], others)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def _damage(draw: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """One to four kinds of damage, one after the other."""
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        data = draw.choice(DAMAGES)(draw, data, others)
    return data[: 2**22]


def _opcodes(draw: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """An instruction of a pickle becomes another, or comes again; in a text, a sign."""
    if not data:
        return data
    place = draw.randrange(len(data))
    code = draw.choice(
        (b"(", b")", b"2", b"0", b"1", b"R", b"b", b"\x81", b"\x85", b"\x86", b"s", b"u", b"e", b"Q", b"}", b"]")
    )
    return data[:place] + code * draw.choice((1, 1, 2, 1000)) + data[place + draw.choice((0, 1)) :]


def _flip_bits(draw: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8, 64)) if changed else 0):
        changed[_position(draw, changed)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _truncate(draw: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    return data[: draw.randrange(len(data) + 1)]


def _set_number(draw: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """A length or an offset becomes an extreme one."""
    changed = bytearray(data)
    width = draw.choice((1, 2, 4, 8))
    if len(changed) > width:
        place = min(_position(draw, changed), len(changed) - width)
        value = draw.choice((*EXTREMES, draw.randrange(2**16))) % 2 ** (8 * width)
        changed[place : place + width] = value.to_bytes(width, draw.choice(("little", "big")))
    return bytes(changed)


def _swap_parts(draw: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    size = draw.choice((4, 8, 64))
    if len(data) < 4 * size:
        return data
    first, second = sorted(draw.sample(range(0, len(data) - size, size), 2))
    middle = data[first + size : second]
    return data[:first] + data[second : second + size] + middle + data[first : first + size] + data[second + size :]


def _repeat_part(draw: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    start = draw.randrange(len(data) + 1)
    part = data[start : start + draw.choice((1, 16, 256))]
    return data[:start] + part * draw.choice((2, 16, 1024)) + data[start:]


def _splice(draw: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    other = draw.choice(others)
    cut = draw.randrange(len(other) + 1)
    return data[: draw.randrange(len(data) + 1)] + other[cut : cut + draw.choice((16, 1024, 2**20))]


def _replace_text(draw: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """A name, a digit or a bracket of a text becomes another."""
    old, new = draw.choice((
        (b"F32", b"F64"), (b"blocks.0", b"blocks.9"), (b"weight", b"weight\0"), (b"1", b"9999999"), (b"[", b"[["),
        (b"}", b""), (b":", b"::"), (b"num_heads", b"embed_dim"), (b"2", b"-2"), (b"8", b"1e308"), (b"2", b"NaN"),
        (b"vit_tiny_patch16_224", b"resnet50"), (b'"depth":2', b'"depth":999999999'), (b"torch", b"posix"),
    ))  # fmt: skip
    return data.replace(old, new, draw.choice((1, 1, 4, 1000)))


def _other_text(draw: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    text = draw.choice(TEXTS)
    return draw.choice((text, text + data, data + text))


def _long_length(draw: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """The first eight bytes, a safetensors header's length, become another."""
    return struct.pack("<Q", draw.choice((*EXTREMES, len(data), max(len(data) - 8, 0)))) + data[8:]


def _position(draw: random.Random, data: bytearray) -> int:
    """Anywhere, the beginning and the end more often: headers and directories lie there."""
    end = len(data)
    near = min(end, 512)
    return draw.choice((draw.randrange(end), draw.randrange(near), end - 1 - draw.randrange(near)))


DAMAGES: tuple[Damage, ...] = (
    _flip_bits, _flip_bits, _truncate, _set_number, _set_number, _swap_parts, _repeat_part, _splice, _replace_text,
    _other_text, _long_length, _opcodes, _opcodes,
)  # fmt: skip
