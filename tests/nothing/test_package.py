"""What the package tells a type checker and a person about itself."""

import importlib.metadata
import inspect
from pathlib import Path

import st3_edge


def test_its_types_are_for_others_to_use():
    # broken if a type checker took everything for Any
    assert (Path(st3_edge.__file__).parent / "py.typed").is_file()


def test_it_knows_its_version():
    # broken if it were another than pip's
    assert st3_edge.__version__ == importlib.metadata.version("st3-edge")


def test_stream_decides_the_type_of_an_answer():
    # broken if every caller had to narrow the type of what it gets
    source = inspect.getsource(st3_edge.Llava)
    for stream, result in (("Literal[False] | None = False", "Response"), ("Literal[True]", "Iterator[Response]")):
        assert f"stream: {stream}, **options: Any\n    ) -> {result}: ..." in source
