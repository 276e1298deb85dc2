"""Ctrl-C, and other signals: they reach the caller, and the next answer is right."""

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from st3_edge import St3Error

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

QUESTION = "What color is the star?"
SEED = 20241127
LONGEST = 120.0  # seconds until a test that hangs has failed


def asked(*pictures, text=QUESTION) -> list:
    content = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


@pytest.fixture
def ignored(monkeypatch) -> list:
    """What Python drops because there is nobody to raise it to."""
    found = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: found.append(repr(what.exc_value)))
    return found


def test_interrupts_at_random_moments(tmp_path, ignored):
    # broken if one were lost in a callback, left something of a call behind, or an answer that differs
    from soak_interrupts import Soak

    from st3_edge import ST3Config

    print(f"seed {SEED}")
    soak = Soak(SEED, tmp_path, ST3Config(anneal="linear", anneal_tokens=8))
    for _ in range(1000):
        if sum(soak.counts.values()) >= 24:
            break
        soak.interrupt()
    soak.close()
    assert sum(soak.counts.values()) >= 24
    assert (soak.lost, soak.wrong, ignored) == ([], [], [])
    assert set(soak.counts) == {"load", "prefill", "decode", "save"}


@pytest.mark.parametrize("stage", ["encode", "prefill"])
def test_the_work_ends_and_does_not_only_end_its_caller(load, scenes, monkeypatch, stage):
    # broken if native code ran to its end first: a large model reads a prompt for minutes
    from st3_edge.native import st3
    from st3_edge.runtime.vision import Vision

    pictures = [str(scene.picture) for scene in scenes]
    codes, begun = [], threading.Event()
    with load(n_ctx=8192, n_ubatch=8192) as llava:
        owner, name = {"encode": (Vision, "encode"), "prefill": (st3, "prefill")}[stage]
        real = getattr(owner, name)

        def watched(*a):
            begun.set()
            try:
                codes.append(real(*a))
            except St3Error as e:
                codes.append(str(e))
                raise
            return codes[-1]

        monkeypatch.setattr(owner, name, watched)
        if stage == "prefill":
            llava.pieces(asked(*pictures))

        def kill():
            if begun.wait(LONGEST):
                time.sleep(0.005)
                os.kill(os.getpid(), signal.SIGINT)

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        with pytest.raises(KeyboardInterrupt):
            llava.create_chat_completion(asked(*pictures), max_tokens=1)
        killer.join(LONGEST)
        assert codes == ([2] if stage == "prefill" else ["the encoding of a picture was interrupted"])


def test_what_a_handler_raises_reaches_the_caller(load, picture):
    # broken if KeyboardInterrupt alone did, or a handler that raises nothing ended the call
    class Late(Exception):
        pass

    calls = []

    def handler(*_):
        calls.append(threading.current_thread())
        if len(calls) == 2:
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise Late

    before = signal.signal(signal.SIGALRM, handler)
    try:
        with load() as llava:
            expected = llava.ask(picture, QUESTION, temperature=0)
            signal.setitimer(signal.ITIMER_REAL, 0.02, 0.05)
            with pytest.raises(Late):
                for _ in range(10_000):
                    if len(calls) == 2:  # Python lets nothing out of a destructor that was at work: once more
                        del calls[1]
                        signal.setitimer(signal.ITIMER_REAL, 0.02)
                    llava.reset()
                    llava.ask(picture, QUESTION, temperature=0)
            assert calls == [threading.main_thread()] * 2
            assert llava.ask(picture, QUESTION, temperature=0) == expected
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_handler_may_use_the_llava_that_it_interrupts(load, picture):
    # broken by a lock that the interrupted call of the same thread has: a hang
    handled = []
    before = signal.signal(signal.SIGALRM, lambda *_: handled.append(llava.reset()))
    try:
        with load() as llava:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with contextlib.suppress(St3Error):  # another call began
                llava.ask(picture, "Describe the image.", max_tokens=64)
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert len(handled) == 1, "the answer was there before the signal"
            assert llava.ask(picture, QUESTION, temperature=0, max_tokens=4)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_with_a_llava_in_another_thread_ctrl_c_is_the_main_ones(load, picture):
    # broken if the other thread's call were ended, or waiting for it hung
    results = []
    with load() as llava:
        other = threading.Thread(
            target=lambda: results.append(llava.ask(picture, "Describe the image.", temperature=0, max_tokens=48)),
            daemon=True,
        )
        other.start()
        threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            for _ in range(6000):
                time.sleep(0.01)
        other.join(LONGEST)
        assert len(results) == 1
        assert results[0] == llava.ask(picture, "Describe the image.", temperature=0, max_tokens=48)
