"""What a chat draws in a terminal: answers whose words are not broken at the edge, and pictures where it can."""

from __future__ import annotations

import base64
import io
import os
import shutil
import unicodedata
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

_PICTURE_CELLS = 24  # wide
_CHUNK = 4096  # bytes of kitty's protocol in one piece


class Wrap:
    """Text that comes piece by piece, broken between words where it would pass the edge. write: takes what is ready;
    width: columns, asked for with every piece, as people resize windows."""

    def __init__(self, write: Callable[[str], None], width: Callable[[], int] | None = None) -> None:
        self._write = write
        self._width = width or (lambda: shutil.get_terminal_size().columns)
        self._column, self._word, self._space = 0, "", ""

    def push(self, text: str) -> None:
        """Takes a piece; its last word waits for its end."""
        for character in text:
            if character == "\n":
                self._flush()
                self._write("\n")
                self._column, self._space = 0, ""
            elif character.isspace():
                self._flush()
                self._space += character
            else:
                wide = cells(character) == 2  # there are no spaces between these
                if wide or cells(self._word + character) >= self._width():
                    self._flush()
                self._word += character
                if wide:
                    self._flush()

    def finish(self) -> None:
        """No more comes."""
        self._flush()
        self._column, self._space = 0, ""

    def _flush(self) -> None:
        if not self._word:
            return
        if self._column + cells(self._space + self._word) >= self._width():
            self._write(("\n" if self._column else "") + self._word)
            self._column = cells(self._word)
        else:
            self._write(self._space + self._word)
            self._column += cells(self._space + self._word)
        self._word, self._space = "", ""


def cells(text: str) -> int:
    """How many columns a text takes."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def picture(png: bytes) -> str | None:
    """The characters that show a PNG picture small in this terminal; None where it cannot (kitty's and iTerm2's
    protocols are known, and not through tmux or screen)."""
    program, term = os.environ.get("TERM_PROGRAM", ""), os.environ.get("TERM", "")
    if os.environ.get("TMUX") or term.startswith(("screen", "tmux")):
        return None
    data = base64.standard_b64encode(png).decode()
    if program in ("iTerm.app", "WezTerm", "mintty"):
        return f"\x1b]1337;File=inline=1;width={_PICTURE_CELLS};preserveAspectRatio=1:{data}\a\n"
    if os.environ.get("KITTY_WINDOW_ID") or "kitty" in term or "ghostty" in (program.lower(), term.lower()[6:]):
        chunks = [data[i : i + _CHUNK] for i in range(0, len(data), _CHUNK)]
        out = []
        for i, chunk in enumerate(chunks):
            head = f"a=T,f=100,c={_PICTURE_CELLS}," if i == 0 else ""
            out.append(f"\x1b_G{head}m={int(i < len(chunks) - 1)};{chunk}\x1b\\")
        return "".join(out) + "\n"
    return None


def thumbnail(source: str) -> bytes:
    """A small PNG of a picture that `images.load` takes. Raises ImageError."""
    from PIL import Image

    from ...prompts import images

    rgb = images.load(source)
    small = Image.frombytes("RGB", (rgb.width, rgb.height), rgb.data)
    small.thumbnail((480, 480))
    out = io.BytesIO()
    small.save(out, "PNG")
    return out.getvalue()


def shaded(shares: npt.NDArray[np.float64], shades: str, width: int) -> list[str]:
    """Lines of at most `width` columns that show numbers of 0 to 1, float64 [rows][columns]: the larger, the brighter.
    Two characters are a patch, or a square of several where the lines would be too long. shades: characters, the
    brightest last."""
    side = max(1, -(-2 * shares.shape[1] // width))
    wide = np.pad(shares, [(0, -n % side) for n in shares.shape], constant_values=np.nan)
    squares = wide.reshape(len(wide) // side, side, -1, side)
    levels = np.rint(np.nanmean(squares, axis=(1, 3)) * (len(shades) - 1)).astype(int)
    return ["".join(shades[level] * 2 for level in row) for row in levels]  # a character is twice as high as wide
