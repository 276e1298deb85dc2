"""The config file: what a person would say with every command.

TOML, whose keys are the long options of `st3-edge ask` without their dashes: `hf = "owner/repo:Q4_K_M"`,
`budget = 0.3`, `n-ctx = 8192`. A command takes those that it has; its own words and the environment come first.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from ..config import ST3Config
from ..errors import ConfigError, one_line
from . import options
from .parser import suggestion

_KEPT = ("hf", "model", "mmproj", "lora")  # what is typed stands in their place, and so they are no defaults


def path() -> Path:
    """Where it is: $ST3_CONFIG, else in the user's folder for settings."""
    if named := os.environ.get("ST3_CONFIG"):
        return Path(named)
    import platformdirs

    return platformdirs.user_config_path("st3-edge", appauthor=False) / "config.toml"


def use(parser: argparse.ArgumentParser) -> bool:
    """Makes the file's values the defaults of a command's options, and its model and pruning those of
    `settings`, which `which.find` and `options.config` read. False: there is no file. Raises ConfigError."""
    where = path()
    try:
        text = where.read_text(encoding="utf-8")
    except FileNotFoundError as e:
        if os.environ.get("ST3_CONFIG"):
            raise ConfigError(f"config file {str(where)!r} is not there: ST3_CONFIG names it") from e
        return False
    except (OSError, ValueError) as e:
        raise ConfigError(f"config file {str(where)!r} cannot be read: {one_line(getattr(e, 'strerror', e))}") from e
    values = _parsed(where, text)
    shared = argparse.ArgumentParser(add_help=False)
    options.add_shared(shared)
    known, own = _actions(shared), _actions(parser)
    settings: dict[str, Any] = {}
    for key, value in values.items():
        action = known.get(key)
        if action is None:
            raise ConfigError(f"config file {str(where)!r}: there is no option {key!r}{suggestion(key, known)}")
        value = _converted(where, key, value, action)
        if action.dest in _KEPT or action.dest in ST3Config.__dataclass_fields__:
            settings[action.dest] = value
        elif key in own:
            parser.set_defaults(**{own[key].dest: value})
    parser.set_defaults(settings=settings)
    return True


def _parsed(where: Path, text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return dict(tomllib.loads(text))
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"config file {str(where)!r} is not TOML: {one_line(e)}") from e


def _actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Options by their long names, less those that say no."""
    return {
        name[2:]: a for a in parser._actions for name in a.option_strings if name[:2] == "--" and name[:5] != "--no-"
    }


def _converted(where: Path, key: str, value: Any, action: argparse.Action) -> Any:
    if isinstance(action, argparse._AppendAction):
        values = value if isinstance(value, list) else [value]
        good = all(isinstance(one, str) for one in values)
        value = values
    elif isinstance(action, argparse.BooleanOptionalAction):
        good = isinstance(value, bool)
    else:
        good = isinstance(value, (str, int, float)) and not isinstance(value, bool)
        kind = action.type if callable(action.type) else str
        try:
            value = kind(str(value))
        except (ValueError, argparse.ArgumentTypeError):
            good = False
    if not good:
        raise ConfigError(f"config file {str(where)!r}: {key} cannot be {value!r}")
    return value
