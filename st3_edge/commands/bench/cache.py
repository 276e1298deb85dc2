"""Files of random weights, written once and kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...errors import ModelError, one_line
from ...files.output import replacing
from .shapes import CLIP_L_336, SEED, SHAPES

Tell = Callable[[str, float], None]  # what is being done, and the share of it that is done


def random_text(shape: str, file_type: str, folder: Path, tell: Tell | None = None) -> Path:
    """The text model of that shape and type. Raises ModelError where it is not there and cannot be written."""
    path = folder / f"{shape}-{file_type}-seed{SEED}.gguf"
    if not path.is_file():
        from .random_model import write_text  # needs an optional package

        _write(path, tell, lambda part, share: write_text(part, SHAPES[shape], file_type, SEED, progress=share))
    return path


def random_vision(width: int, folder: Path, tell: Tell | None = None) -> Path:
    """A CLIP-L/336 for a text model that is `width` wide; else as `random_text`."""
    path = folder / f"mmproj-clip-l-336-{width}-seed{SEED}.gguf"
    if not path.is_file():
        from .random_model import write_vision

        _write(path, tell, lambda part, share: write_vision(part, CLIP_L_336, width, SEED, share))
    return path


def _write(path: Path, tell: Tell | None, write: Callable[[Path, Callable[[float], None]], None]) -> None:
    def share_done(share: float) -> None:
        if tell:
            tell(f"writing {path.name}", share)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            write(Path(file.name), share_done)
    except OSError as e:
        raise ModelError(f"{str(path)!r} cannot be written: {one_line(e.strerror or e)}") from e
