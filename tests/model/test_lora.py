"""LoRA adapters by way of Llava and the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from st3_edge import Llava, demo
from st3_edge.errors import ConfigError, ModelError


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random one of two matrices."""
    model = gguf.GGUFReader(demo.model_paths()[0])
    path, rng = tmp_path_factory.mktemp("lora") / "a.gguf", np.random.default_rng(7)
    w = gguf.GGUFWriter(path, "llama")
    w.add_type("adapter")
    w.add_string("adapter.type", "lora")
    w.add_float32("adapter.lora.alpha", 4.0)
    for name in ("blk.0.attn_q.weight", "blk.2.ffn_down.weight"):
        columns, rows = next([int(n) for n in t.shape] for t in model.tensors if t.name == name)
        w.add_tensor(f"{name}.lora_a", rng.standard_normal((4, columns)).astype(np.float32))
        w.add_tensor(f"{name}.lora_b", rng.standard_normal((rows, 4)).astype(np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def test_an_adapter_changes_the_answer_and_none_does_not(
    load: Callable[..., Llava], adapter: Path, picture: str
) -> None:
    """Breaks if an adapter or its strength is not applied, or a strength of 0 changes anything."""
    answers = []
    for lora in ((), {adapter: 0.0}, adapter, [adapter], {adapter: 0.5}):
        with load(lora=lora) as llava:
            answers.append(llava.ask(picture, "Describe the picture.", max_tokens=30, temperature=0.0))
            assert llava.last_report is not None and llava.last_report.mode == "pruned-prefill"
    assert answers[0] == answers[1] != answers[2] == answers[3]


def test_a_file_that_is_no_adapter_is_refused(load: Callable[..., Llava], adapter: Path, tmp_path: Path) -> None:
    """Breaks if it is loaded, or ends the process."""
    for lora, kind, words in (
        (demo.model_paths()[0], ModelError, "no LoRA adapter"),
        (tmp_path / "none.gguf", ModelError, "cannot be read"),
        ({adapter: "much"}, ConfigError, "strength"),
        ({adapter: float("nan")}, ConfigError, "strength"),
    ):
        with pytest.raises(kind, match=words):
            load(lora=lora)
