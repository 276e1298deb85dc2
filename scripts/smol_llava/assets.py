"""What scenes are made of: named pictures (emoji), typefaces, words and photographs.

Everything comes from Debian and PyPI packages (README.md lists them); `load` collects it once into
STATE/assets.npz. Nothing here is part of st3-edge.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

EMOJI_TEST = Path("/usr/share/unicode/emoji/emoji-test.txt")
EMOJI_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONTS = Path("/usr/share/fonts")
DICTIONARY = Path("/usr/share/dict/words")
STRIKE = 109  # the one size of Noto Color Emoji's bitmaps

# which of emoji-test.txt's subgroups are everyday things, and what of them is not drawn: scenes inside pictures,
# symbols without a plain name, and pictures that differ from another in a detail only
CHOICE = json.loads(Path(__file__).with_name("things.json").read_text(encoding="utf8"))

# name: (red, green, blue), each drawn with some spread
COLORS = {
    "red": (214, 40, 40),
    "orange": (244, 132, 28),
    "yellow": (246, 214, 48),
    "green": (52, 160, 72),
    "blue": (44, 96, 208),
    "purple": (132, 60, 172),
    "pink": (244, 150, 190),
    "brown": (124, 78, 44),
    "black": (24, 24, 26),
    "white": (246, 246, 244),
    "gray": (136, 138, 140),
}


@dataclass
class Assets:
    """What a scene is drawn from; tests build a small one of their own."""

    names: list[str]
    pictures: list[Image.Image]  # RGBA, one for each name
    fonts: list[str]  # files
    words: list[str]  # lowercase
    photos: list[Image.Image] = field(default_factory=list)  # RGB
    thin: tuple[str, ...] = ()  # names that may not be mirrored

    def __post_init__(self) -> None:
        self.side = functools.lru_cache(maxsize=None)(self._side)

    def _side(self, what: str, held_out: bool) -> list[str]:
        """The fonts or words of training, or those kept from it (a tenth of words and type families, by hash)."""
        return [x for x in getattr(self, what) if kept_out(re.split("[-_.]", Path(x).name)[0]) == held_out]

    @functools.cached_property
    def index(self) -> dict[str, int]:
        """Class number of each name, from 1."""
        return {n: i for i, n in enumerate(self.names, 1)}


@functools.cache
def kept_out(key: str) -> bool:
    """Whether a font, a word or a combination belongs to the tenth that is never drawn for training."""
    return hashlib.sha256(key.encode()).digest()[0] < 26


def catalogue(lines: list[str]) -> list[tuple[str, str]]:
    """(name, emoji) of every thing, from the lines of Unicode's emoji-test.txt."""
    found, subgroup = [], ""
    for line in lines:
        if line.startswith("# subgroup:"):
            subgroup = line.removeprefix("# subgroup:").strip()
        match = re.match(r"([0-9A-F ]+); fully-qualified +# \S+ E[\d.]+ (.+)", line)
        if not match:
            continue
        name = match[2].strip()
        emoji = "".join(chr(int(c, 16)) for c in match[1].split())
        if subgroup == "country-flag":
            country = name.removeprefix("flag: ")
            if country in CHOICE["countries"]:
                found.append((f"flag of {country}", emoji))
        elif name in CHOICE["faces"]:
            found.append((name, emoji))
        elif subgroup in CHOICE["subgroups"] and name not in CHOICE["dropped"]:
            plain = CHOICE["renamed"].get(name, name)
            if "o’clock" not in plain and "thirty" not in plain and len(plain.split()) < 4:
                found.append((plain.replace("’", "'"), emoji))
    return found


def render_emoji(emoji: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """The emoji alone, RGBA, cropped; None if the font has no picture for it (it then draws several, or nothing)."""
    image = Image.new("RGBA", (420, 200))
    ImageDraw.Draw(image).text((20, 20), emoji, font=font, embedded_color=True)
    box = image.getbbox()
    return image.crop(box) if box and box[2] - box[0] <= 140 else None


def fonts_of(folder: Path) -> list[str]:
    """Text faces: every TrueType and OpenType file that draws a few characters as different, inked shapes."""
    good = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".ttf", ".otf")):
        if re.search(
            r"emoji|symbol|dingbat|math|initials|[Ss]tandard|OsF|D050000L|ExtraLight|Thin|Hairline|Glagol|RLO|KB",
            path.name,
        ):
            continue
        try:
            face = ImageFont.truetype(str(path), 24)
            masks = [bytes(face.getmask(c)) for c in "Aag8$.€"[:6]]
        except OSError:
            continue
        if len(set(masks)) == len(masks) and all(any(m) for m in masks) and face.getlength("Hamburg") > 60:
            good.append(str(path))
    return good


def photos_of(wheels: Path) -> list[Image.Image]:
    """Photographs that scikit-image's and scikit-learn's wheels carry, at 480 pixels."""
    out = []
    wanted = "astronaut|brick|cell|chelsea|coffee|grass|gravel|hubble_deep_field|rocket|china|flower|motorcycle_left"
    for wheel in sorted(wheels.glob("scikit_*.whl")):
        with zipfile.ZipFile(wheel) as z:
            for name in sorted(n for n in z.namelist() if re.search(rf"({wanted})\.(png|jpg)$", n)):
                image = Image.open(io.BytesIO(z.read(name))).convert("RGB")
                image.thumbnail((640, 480))
                out.append(image)
    return out


def common_words(vocabulary: list[str], count: int) -> list[str]:
    """The `count` most frequent plain words of a BPE vocabulary (its order is that of its merges)."""
    known = set(DICTIONARY.read_text().split())
    words = [t[1:] for t in vocabulary if re.fullmatch("Ġ[a-z]{3,9}", t)]
    return [w for w in words if w in known][:count]


def load(state: Path, vocabulary: list[str] | None = None) -> Assets:
    """The assets, from STATE/assets.npz; made first where that is missing (`vocabulary` is needed then)."""
    file = state / "assets.npz"
    if not file.exists():
        font = ImageFont.truetype(str(EMOJI_FONT), STRIKE)
        drawn = [(n, render_emoji(e, font)) for n, e in catalogue(EMOJI_TEST.read_text(encoding="utf8").splitlines())]
        drawn = [(n, p) for n, p in drawn if p is not None]
        arrays: dict[str, np.ndarray] = {f"picture{i}": np.asarray(p) for i, (_, p) in enumerate(drawn)}
        photos = photos_of(state / "pkgs")
        arrays |= {f"photo{i}": np.asarray(p) for i, p in enumerate(photos)}
        arrays["names"] = np.array([n for n, _ in drawn])
        arrays["fonts"] = np.array(fonts_of(FONTS))
        arrays["words"] = np.array(common_words(vocabulary or [], 3000))
        new = file.with_name("assets.new.npz")
        np.savez_compressed(new, **arrays)
        new.replace(file)
    with np.load(file) as z:
        names = [str(n) for n in z["names"]]
        return Assets(
            names=names,
            pictures=[Image.fromarray(z[f"picture{i}"]) for i in range(len(names))],
            fonts=[str(f) for f in z["fonts"]],
            words=[str(w) for w in z["words"]],
            photos=[Image.fromarray(z[k]) for k in sorted(z.files) if k.startswith("photo")],
            thin=tuple(n for n in names if n.startswith("flag of")),
        )
