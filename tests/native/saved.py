"""Saved states of st3_memory taken apart and put together, as st3-snapshot.cpp writes them."""

from __future__ import annotations

import struct

import numpy as np

MAGIC, VERSION = struct.pack("<I", 0x53335453), 5


def checksum(body: bytes) -> int:
    """FNV-1a over 64-bit words, the last one padded with zeros, and the length."""
    out, whole = 0xCBF29CE484222325, body + bytes(-len(body) % 8)
    for word in np.frombuffer(whole, "<u8").tolist():
        out = (out ^ word) * 0x100000001B3 % 2**64
    return out ^ len(body)


def take_apart(raw: bytes) -> tuple[bytes, bytes]:
    """What llama.cpp wrote ahead of our section, and the section's body."""
    start = raw.index(MAGIC)
    version, length = struct.unpack_from("<IQ", raw, start + 4)
    body = raw[start + 16 :][:length]
    assert version == VERSION
    assert raw[start + 16 + length :] == struct.pack("<Q", checksum(body) ^ VERSION)
    return raw[:start], body


def put_together(head: bytes, body: bytes, version: int = VERSION) -> bytes:
    """A state with a right checksum, whatever is in it."""
    total = struct.pack("<Q", checksum(body) ^ version)
    return head + MAGIC + struct.pack("<IQ", version, len(body)) + body + total
