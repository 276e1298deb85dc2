"""llama.h and mtmd.h in ctypes, on our libraries: the modules `llama_cpp` and `mtmd_cpp` of llama-cpp-python, which the
build takes from the pinned upstream and puts beside the libraries that they describe.

Importing one of them loads its library, so only `libraries.load()` does that.
"""

from __future__ import annotations

import ctypes

from .. import libraries

__path__ = [str(libraries.own_folder() / "bindings")]


def open_library(name: str) -> ctypes.CDLL:
    """The library "llama" or "mtmd", for the modules above."""
    return ctypes.CDLL(str(libraries.path_of(name)))
