"""`Llava` on other families than LLaVA's: M-RoPE with deepstack, images whose tokens see each other, tiles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

for package in ("torch", "transformers", "safetensors"):
    pytest.importorskip(package, reason=f"{package} is not installed: no models to make")

from PIL import Image as Pictures  # noqa: E402

from families.files import MEDIA, check_same, top, write_pair  # noqa: E402
from st3_edge import ContextError, Llava, ModelError, ST3Config  # noqa: E402
from st3_edge.commands.inspect.patches import views  # noqa: E402
from st3_edge.files import gguf  # noqa: E402
from st3_edge.files.pair import projector  # noqa: E402
from st3_edge.native import st3  # noqa: E402
from st3_edge.native.st3 import Visual  # noqa: E402
from st3_edge.prompts.images import RGB, load  # noqa: E402

FAMILIES = [name for name in MEDIA if not name.startswith("llava-") or name == "llava-1.6"]
NOWHERE = ["minicpm-v-2.6"]  # visual tokens of no place in the picture
CONFIG = ST3Config(start=2, stride=2, keep=0.5, anneal="none")
GREEDY = {"temperature": 0, "max_tokens": 8}
families = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="module")
def files(converter, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Writes a family's two files once."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(name: str) -> tuple[Path, Path]:
        if name not in made:
            made[name] = write_pair(name, tmp_path_factory.mktemp(name), converter)
        return made[name]

    return make


def picture(name: str, number: int) -> Pictures.Image:
    """Wider than high, where the family does not make squares of pictures."""
    return Pictures.fromarray(MEDIA[name].picture(number))


def turn(role: str, *content: object) -> dict:
    parts = [{"type": "text", "text": c} if isinstance(c, str) else {"type": "image", "image": c} for c in content]
    return {"role": role, "content": parts if role == "user" else content[0]}


def answer(llava: Llava, *messages: dict) -> str:
    return str(llava.create_chat_completion(messages, **GREEDY)["choices"][0]["message"]["content"])


@families
def test_a_conversation_goes_on_where_it_was(files, name: str) -> None:
    """Breaks if an image is counted as other positions than it takes: what follows would lie elsewhere than in a prompt
    that is computed as a whole."""
    first = turn("user", picture(name, 0), "What?")
    with Llava(*files(name), ST3Config(preset="off"), n_ctx=1024, n_threads=1) as llava:
        said = answer(llava, first)
        assert llava.last_report is not None and llava.last_report.mode == "off"
        more = (first, turn("assistant", said), turn("user", "And here?", picture(name, 1), "Say it."))
        went_on = answer(llava, *more)
        assert llava.last_report.reused > llava.last_report.visual_tokens.given / 2
        ctx, held = llava._session.llama.ctx, llava._session.conversation
        assert st3.n_positions(ctx) == held.n_positions
        logits = top(llava, *more)
        llava.reset()
        assert answer(llava, *more) == went_on
        assert llava.last_report.reused == 0
        llava.reset()
        check_same(top(llava, *more), logits)


@families
def test_a_saved_conversation_goes_on_the_same(files, tmp_path: Path, name: str) -> None:
    """Breaks if a state loses the positions of an image, or is refused."""
    first = turn("user", picture(name, 0), "What?")
    with Llava(*files(name), CONFIG, n_ctx=1024, n_threads=1) as llava:
        said = answer(llava, first)
        report = llava.last_report
        assert report is not None and (report.mode, report.reason) == ("pruned-prefill", None)
        assert 0 < report.visual_tokens.held[-1] < report.visual_tokens.given
        llava.save_state(tmp_path / "kept.st3")
        more = (first, turn("assistant", said), turn("user", "Say it."))
        want = answer(llava, *more)
    with Llava(*files(name), CONFIG, n_ctx=1024, n_threads=1) as llava:
        llava.load_state(tmp_path / "kept.st3")
        assert answer(llava, *more) == want
        assert llava.last_report is not None and llava.last_report.reused > report.visual_tokens.given


@families
def test_the_context_holds_tokens_not_positions(files, name: str) -> None:
    """Breaks if a prompt that the cache has no cells for were begun."""
    with Llava(*files(name), CONFIG, n_ctx=1024, n_threads=1) as llava:
        n = len(llava.visual_tokens(picture(name, 0)))
    with Llava(*files(name), CONFIG, n_ctx=n, n_threads=1) as llava, pytest.raises(ContextError, match="n_ctx"):
        answer(llava, turn("user", picture(name, 0), "What?"))


@families
def test_patches_are_where_the_encoder_sees_them(files, name: str) -> None:
    """Breaks if `inspect` drew a family's visual tokens in another grid than the encoder's, or another picture."""
    given = load(picture(name, 0))
    with Llava(*files(name), CONFIG, n_ctx=1024, n_threads=1) as llava:
        tiles, kind = llava.tiles(given), projector(gguf.read_header(files(name)[1], "mmproj"))
        pieces = [p for p in llava.pieces([turn("user", given, "What?")]) if isinstance(p, Visual)]
        assert sum(tile.n for tile in tiles) == sum(len(p.embd) for p in pieces)
        if name in NOWHERE:
            with pytest.raises(ModelError, match="no place"):
                views(given, tiles, kind)
            return
        found = views(given, tiles, kind)
        for view in found:
            seen = view.tokens.shape
            assert (view.pixels.shape[0] // view.patch, view.pixels.shape[1] // view.patch) == seen
        if name.startswith("qwen"):
            assert found[0].tokens.shape == (pieces[0].ny, pieces[0].nx) == (5, 6)
            assert pieces[0].pos is not None and pieces[0].n_pos == 6
            again = RGB(found[0].pixels.shape[1], found[0].pixels.shape[0], found[0].pixels.tobytes())
            np.testing.assert_array_equal(llava.visual_tokens(again), llava.visual_tokens(given))
        assert {p.non_causal for p in pieces} == {name == "gemma3"}
        assert [view.name for view in found] == (["whole", "tiles"] if len(tiles) > 1 else [""])
