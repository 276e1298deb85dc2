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


ROW = {0: (1, 4), 1: (1, 2), 8: (32, 34)}  # of a cache's type (F32, F16, Q8_0): numbers of a block, and its bytes


class Body:
    """What a body holds, read once from end to end.

    fields: of each of its numbers or lists, by name, where it lies and its struct format. images: of each, seq, pos,
    flags, scores and weights [stage][n]. values: of each stage, the rows of V at each position.
    """

    def __init__(self, raw: bytes) -> None:
        self.raw, self.at = raw, 0
        self.fields: dict[str, tuple[int, str]] = {}
        n_layer, n_stage, type_k, type_v = (self._one(f"shape {what}") for what in ("layers", "stages", "K", "V"))
        cuts = self._take("shape cuts", f"{n_stage - 1}i")
        widths = self._take("shape widths", f"{2 * n_layer}I")
        self._take("shape schedule", "Q")
        self._one("sequence", "i")
        self.images = [self._image(f"image {i}") for i in range(self._one("images"))]
        for i in range(self._one("prompts")):
            self._prompt(f"prompt {i}")
        size_k, size_v = ([w // ROW[t][0] * ROW[t][1] for w in widths[k::2]] for k, t in ((0, type_k), (1, type_v)))
        self.values: list[dict[int, bytes]] = []
        for stage, first in enumerate([0, *(cut + 1 for cut in cuts)]):
            end = [*(cut + 1 for cut in cuts), n_layer][stage]
            self.values.append(self._stage(f"stage {stage}", size_k[first:end], size_v[first:end]))
        assert self.at == len(raw)

    def _take(self, name: str, form: str) -> tuple:
        self.fields[name] = self.at, "<" + form
        out = struct.unpack_from("<" + form, self.raw, self.at)
        self.at += struct.calcsize("<" + form)
        return out

    def _one(self, name: str, form: str = "I") -> int:
        return self._take(name, form)[0]

    def _image(self, name: str) -> dict:
        out: dict = {"seq": self._one(f"{name} sequence", "i")}
        n, *_, out["flags"] = (self._one(f"{name} {what}") for what in ("n", "nx", "ny", "number", "flags"))
        self._one(f"{name} steps", "Q")
        self._one(f"{name} records", "Q")
        out["pos"] = self._take(f"{name} places", f"{3 * n}i")[::3]
        self._take(f"{name} n0", f"{self._one(f'{name} counts')}I")
        for what in ("scores", "weights"):
            n_stage = self._one(f"{name} stages of {what}")
            out[what] = np.array(self._take(f"{name} {what}", f"{n_stage * n}f")).reshape(n_stage, n)
        return out

    def _prompt(self, name: str) -> None:
        self._one(f"{name} sequence", "i")
        self._one(f"{name} waits")
        n = self._one(f"{name} rows")
        self._take(f"{name} places", f"{4 * n}i")
        self._take(f"{name} tokens", f"{n}i")
        self._take(f"{name} embeddings", f"{self._one(f'{name} floats', 'Q')}f")
        for i in range(self._one(f"{name} images")):
            self._take(f"{name} image {i}", "5I")  # row, n, nx, ny, whether it is causal

    def _stage(self, name: str, size_k: list[int], size_v: list[int]) -> dict[int, bytes]:
        positions = []
        for i in range(self._one(f"{name} cells")):
            cell = f"{name} cell {i}"
            positions.append(self._one(f"{cell} position", "i"))
            self._one(f"{cell} shift", "i")
            self._take(f"{cell} place", "3i")
            self._take(f"{cell} sequences", f"{self._one(f'{cell} owners')}i")
        values = [b""] * len(positions)
        for k, v in zip(size_k, size_v, strict=True):
            self.at += k * len(positions)
            for i in range(len(positions)):
                values[i] += self.raw[self.at : self.at + v]
                self.at += v
        return dict(zip(positions, values, strict=True))

    def changed(self, name: str, *values: float) -> bytes:
        """The body with another value of a field (of a list: at its beginning)."""
        at, form = self.fields[name]
        new = bytearray(self.raw)
        struct.pack_into(f"<{len(values)}{form[-1]}", new, at, *values)
        return bytes(new)
