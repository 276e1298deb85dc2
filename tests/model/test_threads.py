"""A `Llava` that several threads use, and one that nobody uses any more."""

import gc
import threading
import weakref

import pytest

from st3_edge import St3Error

QUESTION = "What color is the star?"


def asked(picture, text=QUESTION) -> list:
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]


@pytest.mark.parametrize("call", ["create_chat_completion", "pieces"])
def test_close_waits_for_a_picture_that_is_being_scaled(load, picture, monkeypatch, call):
    # broken if it freed the vision encoder under mtmd_tokenize, which takes long for a large picture: a crash
    llava = load()
    real, inside, alive = llava._vision.tokenize, threading.Event(), []

    def slow(*arguments):
        inside.set()
        closer.join(0.5)  # time enough to close
        alive.append(llava._vision.close.alive)
        return real(*arguments) if alive[0] else pytest.fail("closed under the call")

    monkeypatch.setattr(llava._vision, "tokenize", slow)

    def close():
        inside.wait()
        llava.close()

    closer = threading.Thread(target=close)
    closer.start()
    try:
        getattr(llava, call)(asked(picture))
    except St3Error as e:
        assert "closed" in str(e)
    closer.join()
    assert alive == [True]


def test_a_sampler_is_made_under_the_lock(load, picture, monkeypatch):
    # broken if a grammar read the vocabulary of a model that another thread frees
    from st3_edge.sampling import Sampling

    with load() as llava:
        real = Sampling.chain
        locked = []
        monkeypatch.setattr(Sampling, "chain", lambda *a: (locked.append(llava._lock.locked()), real(*a))[1])
        llava.ask(picture, QUESTION, max_tokens=1)
        assert locked == [True]


def test_a_token_is_read_under_the_lock(load, picture, monkeypatch):
    # broken if the vocabulary were read after another thread could have freed it
    with load() as llava:
        real, locked = llava._token_bytes, []
        monkeypatch.setattr(
            llava, "_token_bytes", lambda *a, **k: (locked.append(llava._lock.locked()), real(*a, **k))[1]
        )
        llava.ask(picture, QUESTION, temperature=0, max_tokens=2)
        assert locked and all(locked)


def test_a_stream_tells_of_its_own_answer(llava, picture, scenes):
    # broken if its last chunk carried the report of a call that began since
    stream = llava.create_chat_completion(asked(picture, "Describe the image."), stream=True, max_tokens=2)
    said = [next(stream)["choices"][0]["delta"].get("content", "") for _ in range(3)]
    other = llava.ask(str(scenes[1].picture), QUESTION, max_tokens=6)
    last = list(stream)[-1]
    assert last["st3"]["answer"] == "".join(said) != other
    assert last["st3"]["n_generated"] == 2 and last["choices"][0]["finish_reason"] == "length"
    assert llava.last_report.answer == other


def test_a_dropped_llava_frees_its_model(load):
    # broken if a cycle kept it until Python's collector came by: two large models at once do not fit
    gc.collect()
    gc.disable()
    try:
        llava = load()
        gone = weakref.ref(llava), weakref.ref(llava._llama)
        del llava
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()
