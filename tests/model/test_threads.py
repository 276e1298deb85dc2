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
    vision = llava._session.vision
    real, inside, alive = vision.tokenize, threading.Event(), []

    def slow(*arguments):
        inside.set()
        closer.join(0.5)  # time enough to close
        alive.append(vision._context is not None)
        return real(*arguments) if alive[0] else pytest.fail("closed under the call")

    monkeypatch.setattr(vision, "tokenize", slow)

    def close():
        inside.wait()
        llava.close()

    closer = threading.Thread(target=close)
    closer.start()
    with pytest.raises(St3Error, match="closed"):
        getattr(llava, call)(asked(picture))
    closer.join()
    assert alive == [True] and vision._context is None


def test_samplers_and_tokens_are_native_work(load, picture, monkeypatch):
    # broken if the vocabulary were read where another thread could free it at the same time
    from st3_edge.runtime.sampling import Sampling

    with load() as llava:
        threads = set()

        def watch(owner, name):
            real = getattr(owner, name)

            def watched(*a, **k):
                threads.add((name, threading.current_thread().name))
                return real(*a, **k)

            monkeypatch.setattr(owner, name, watched)

        watch(Sampling, "chain")
        watch(llava._session.llama, "piece")
        llava.ask(picture, QUESTION, max_tokens=1)
        assert threads == {("chain", "st3-edge"), ("piece", "st3-edge")}


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
    # broken if a cycle kept it until Python's collector came by, or the next one were loaded before: two large models
    # at once do not fit
    gc.collect()
    gc.disable()
    try:
        llava = load()
        gone = [weakref.ref(x) for x in (llava, llava._session, llava._session.llama, llava._session.vision)]
        del llava
        with load():
            assert [ref() for ref in gone] == [None] * 4
    finally:
        gc.enable()
