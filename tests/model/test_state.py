"""Conversations in files, on the embedded model: one that is kept goes on, a bad one changes nothing."""

import hashlib
import random
import struct

import numpy as np
import pytest

from st3_edge import Llava, ST3Config, StateError
from st3_edge.native import st3

FIRST = "Describe the image."
SECOND = "What color is the star?"
CONFIGS = {"off": ST3Config(preset="off"), "st3": ST3Config(anneal="linear", anneal_tokens=16, anneal_floor=0.3)}
SEED = 11


def first(picture) -> list:
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": FIRST}]}]


def second(picture, answer) -> list:
    return [*first(picture), {"role": "assistant", "content": answer}, {"role": "user", "content": SECOND}]


def ask(llava: Llava, messages, **options) -> dict:
    options = {"temperature": 0, "max_tokens": 12, "revisit": "never", **options}
    return llava.create_chat_completion(messages, **options)["st3"]


def logits(llava: Llava, messages, **options) -> np.ndarray:
    """Of the answer's first token: float32 [n_vocab]."""
    ask(llava, messages, max_tokens=1, **options)
    session = llava._session
    row = session.lib.llama_get_logits_ith(session.llama.ctx, -1)
    return np.ctypeslib.as_array(row, (session.llama.n_vocab,)).copy()


@pytest.fixture(scope="module", params=CONFIGS)
def llava(load, request) -> Llava:
    with load(CONFIGS[request.param]) as made:
        yield made


@pytest.fixture
def kept(llava, picture, tmp_path):
    """A file of a conversation after its first answer; the conversation goes on in `llava`."""
    llava.reset()
    answer = ask(llava, first(picture))["answer"]
    path = tmp_path / "kept.st3"
    llava.save_state(path, second(picture, answer))
    return path


@pytest.mark.parametrize("revisit", ["never", "turn"])
def test_another_process_goes_on_with_a_kept_conversation(llava, load, kept, monkeypatch, revisit):
    # broken if cells, their order, annealed tokens or the record were lost, or the picture had to be encoded again
    from st3_edge.runtime.vision import Tokenized

    with load(llava.config) as other:
        ask(other, [{"role": "user", "content": "Hi"}])
        messages = other.load_state(kept)
        assert other._session.conversation.record == llava._session.conversation.record
        monkeypatch.delattr(Tokenized, "encode")
        got = logits(other, messages, revisit=revisit)
        report = other.last_report
        assert report.ms.encode == 0 and (report.reused > 576 or revisit == "turn")
    expected = logits(llava, messages, revisit=revisit)
    # Cells are in another order where some were freed and taken again, and F16 sums depend on it.
    assert np.mean((got - expected) ** 2) < 1e-3 * np.var(expected)
    assert llava.last_report.visual_tokens == report.visual_tokens


def test_a_conversation_can_be_taken_up_where_it_was(llava, kept, picture):
    # broken if loading in the process that saved left something of the conversation between
    record, messages = llava._session.conversation.record, llava.load_state(kept)
    expected = logits(llava, messages)
    ask(llava, [{"role": "user", "content": "Something else"}])
    assert llava.load_state(kept) == messages
    assert llava._session.conversation.record == record
    assert np.array_equal(logits(llava, messages), expected)


def test_messages_that_are_refused_leave_the_conversation(llava, kept, picture):
    # broken if the cache were already the file's when a caller finds that it cannot use the messages
    ask(llava, first(picture))
    record, seen = llava._session.conversation.record, []

    def check(messages):
        seen.append(messages)
        raise ValueError("not these")

    with pytest.raises(ValueError, match="not these"):
        llava.load_state(kept, check)
    assert llava._session.conversation.record == record
    assert seen == [llava.load_state(kept, lambda _: None)]


def test_nothing_can_be_kept_too(llava, picture, tmp_path):
    # broken if an empty conversation could not be written, or loading it left what was there
    llava.reset()
    llava.save_state(tmp_path / "empty")
    ask(llava, first(picture))
    assert llava.load_state(tmp_path / "empty") is None
    assert st3.n_positions(llava._session.llama.ctx) == llava._session.conversation.n_positions == 0
    assert ask(llava, first(picture))["reused"] == 0


def test_bad_files_change_nothing(llava, kept):
    # broken if anything were touched before the whole file had been checked. Cut at every byte of the fixed header, at
    # 100 places of the other one and 300 anywhere;
    # 2,000 bits flipped one by one (200 of stock's larger file); fixed seed
    from st3_edge.runtime.state import _FIXED

    messages = llava.load_state(kept)
    expected = logits(llava, messages)
    llava.load_state(kept)
    record, data = llava._session.conversation.record, kept.read_bytes()
    rng = random.Random(SEED)
    (length,) = struct.unpack_from("<I", data, _FIXED.size - 4)
    bad = kept.with_name("bad.st3")
    bad.write_bytes(data)
    with bad.open("r+b", buffering=0) as file:
        for i in range(200 if llava.config.preset == "off" else 2000):
            at = rng.randrange(_FIXED.size + length if i % 4 == 0 else len(data))
            for value in (data[at] ^ 1 << rng.randrange(8), data[at]):
                file.seek(at)
                file.write(bytes([value]))
                if value != data[at]:
                    with pytest.raises(StateError):
                        llava.load_state(bad)
        cuts = [*range(_FIXED.size), *(_FIXED.size + rng.randrange(length) for _ in range(100))]
        cuts += [rng.randrange(len(data)) for _ in range(300)]
        for n in sorted(cuts, reverse=True):
            file.truncate(n)
            with pytest.raises(StateError):
                llava.load_state(bad)
    assert llava._session.conversation.record == record
    assert st3.n_positions(llava._session.llama.ctx) == record.n_positions
    assert np.array_equal(logits(llava, messages), expected)


def test_what_llama_cpp_refuses_changes_nothing(llava, kept):
    # broken if the conversation were given up for a file with a right checksum and a bad state in it
    from st3_edge.runtime.state import _FIXED

    messages = llava.load_state(kept)
    expected = logits(llava, messages)
    llava.load_state(kept)
    record, data = llava._session.conversation.record, kept.read_bytes()
    (length,) = struct.unpack_from("<I", data, _FIXED.size - 4)
    begin = _FIXED.size + length
    rng = random.Random(SEED)
    bad = kept.with_name("bad.st3")
    refused = 0
    for i in range(60):
        made = bytearray(data[:-32])
        # Counts and types, which stand at the front; and the magic of llama.cpp's state first of all.
        at = begin if i == 0 else begin + rng.randrange(64)
        made[at] ^= 1 << rng.randrange(8)
        bad.write_bytes(made + hashlib.sha256(made).digest())
        try:
            llava.load_state(bad)
        except StateError:
            refused += 1
        else:  # a bit that llama.cpp does not look at, such as the number of the sequence that it was saved from
            llava.load_state(kept)
        assert llava._session.conversation.record == record
        assert st3.n_positions(llava._session.llama.ctx) == record.n_positions
    assert refused
    assert np.array_equal(logits(llava, messages), expected)


@pytest.mark.parametrize(
    ("config", "options", "says"),
    [
        (ST3Config(budget=0.3), {}, "schedule"),
        (ST3Config(preset="pvtp"), {}, "schedule"),
        (None, {"type_k": "q8_0"}, "KV cache type"),
        (None, {"n_ctx": 580}, "n_ctx is 580"),
    ],
)
def test_another_context_refuses_it_by_name(llava, load, kept, config, options, says):
    # broken if cells of another layout were read, or more than the context holds
    with load(config or llava.config, **options) as other, pytest.raises(StateError, match=says):
        other.load_state(kept)


def test_a_conversation_belongs_to_the_files_that_were_loaded(files, picture, tmp_path):
    # broken if the file that has the model's name when it is saved were taken for the model
    import shutil

    model = tmp_path / "model.gguf"
    shutil.copy(files[0], model)
    with Llava(model, files[1], n_threads=1) as llava:
        model.unlink()
        model.write_bytes(b"another model")
        ask(llava, first(picture), max_tokens=1)
        llava.save_state(tmp_path / "kept")
    with Llava(*files, n_threads=1) as llava:
        llava.load_state(tmp_path / "kept")


def test_a_stream_ends_where_another_conversation_is_loaded(llava, kept, picture):
    # broken if it went on, token by token, in a conversation that is not its own
    from st3_edge import St3Error

    stream = llava.create_chat_completion(first(picture), stream=True, temperature=0)
    for _ in range(4):
        next(stream)
    llava.load_state(kept)
    record = llava._session.conversation.record
    with pytest.raises(St3Error, match="another call"):
        list(stream)
    assert llava._session.conversation.record == record


def test_a_stream_can_be_kept_in_its_middle(llava, load, picture, tmp_path):
    # broken if what is saved were ahead of, or behind, what is recorded, or the answer went on otherwise
    llava.reset()
    whole = ask(llava, first(picture), max_tokens=30)["answer"]
    llava.reset()
    stream = llava.create_chat_completion(first(picture), stream=True, temperature=0, max_tokens=30)
    begun = "".join(next(stream)["choices"][0]["delta"].get("content", "") for _ in range(6))
    llava.save_state(tmp_path / "middle")
    rest = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in stream)
    assert rest and begun + rest == whole
    with load(llava.config) as other:
        other.load_state(tmp_path / "middle")
        assert 576 < st3.n_positions(other._session.llama.ctx) == other._session.conversation.n_positions
        assert other._session.conversation.n_positions < llava._session.conversation.n_positions


def test_an_interrupted_load_changes_nothing(llava, kept, monkeypatch):
    # broken if Ctrl-C while llama.cpp reads the state lost the conversation
    messages = llava.load_state(kept)
    expected = logits(llava, messages)
    llava.load_state(kept)
    record, real, calls = llava._session.conversation.record, st3.set_state, []

    def interrupted(*arguments):
        calls.append(1)
        real(*arguments)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return True

    monkeypatch.setattr(st3, "set_state", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llava.load_state(kept)
    assert llava._session.conversation.record == record
    assert np.array_equal(logits(llava, messages), expected)
