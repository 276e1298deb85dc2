"""The thread that does a `Llava`'s work: interrupts, order, and its end. Nothing native is needed for that."""

import os
import signal
import threading
import time

import pytest

from st3_edge import St3Error
from st3_edge.native.worker import Worker

LONGEST = 60.0  # seconds until a test that hangs has failed


class Owner:
    pass


@pytest.fixture
def worker():
    owner = Owner()
    made = Worker(owner)
    yield made
    made.close()


def until_stopped(worker: Worker) -> None:
    """Works until it is to end."""
    for _ in range(60_000):
        if worker.stop.value:
            return
        time.sleep(0.001)
    raise AssertionError("nobody ended it")


def interrupt(times: int = 1) -> threading.Event:
    """Sends SIGINT to this process so many times, beginning soon; the event says that all were sent."""
    sent = threading.Event()

    def send() -> None:
        for _ in range(times):
            time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        sent.set()

    threading.Thread(target=send, daemon=True).start()
    return sent


def test_work_is_done_in_order_and_its_results_and_errors_come_back(worker):
    # broken if a call got another's result, or an error stayed in the thread
    assert [worker.run(lambda n=n: n * n) for n in range(100)] == [n * n for n in range(100)]
    with pytest.raises(ZeroDivisionError):
        worker.run(lambda: 1 // 0)
    assert worker.run(threading.get_ident) != threading.get_ident()


def test_an_interrupt_ends_the_work_and_waits_for_its_end(worker):
    # broken if the caller went on while the work did, also where it is impatient
    steps, sent = [], []

    def work():
        sent.append(interrupt(3))
        until_stopped(worker)
        assert sent[0].wait(LONGEST)
        steps.append("ended")

    with pytest.raises(KeyboardInterrupt):
        worker.run(work)
    assert steps == ["ended"]
    assert worker.run(lambda: worker.stop.value) is False


def test_an_interrupt_drops_work_that_waits_for_another_threads(worker):
    # broken if the caller had to wait for it, if it were done all the same, or the other's were ended
    begun, done, dropped = threading.Event(), threading.Event(), []

    def slow():
        begun.set()
        assert done.wait(LONGEST)
        return worker.stop.value

    stopped = []
    other = threading.Thread(target=lambda: stopped.append(worker.run(slow)), daemon=True)
    other.start()
    assert begun.wait(LONGEST)
    interrupt()
    with pytest.raises(KeyboardInterrupt):
        worker.run(lambda: dropped.append(1))
    done.set()
    other.join(LONGEST)
    worker.run(lambda: None)
    assert stopped == [False] and dropped == []


def test_a_call_back_comes_in_the_thread_that_waits(worker):
    # broken if a program's own function were called in a thread that it does not know, or its error were dropped
    called = []

    def work():
        for i in range(3):
            worker.call_back(lambda i=i: called.append((i, threading.current_thread())))

    worker.run(work)
    assert called == [(i, threading.main_thread()) for i in range(3)]

    def refuses():
        raise ValueError("no more")

    def waits():
        worker.call_back(refuses)
        until_stopped(worker)

    with pytest.raises(ValueError, match="no more"):
        worker.run(waits)


def test_a_call_back_may_ask_for_work(worker):
    # broken by a hang: the thread that waits would wait for itself
    results = []
    worker.run(lambda: worker.call_back(lambda: results.append(worker.run(lambda: "done"))))
    assert results == ["done"]


def test_close_ends_the_work_of_another_thread_and_frees(worker):
    # broken by a hang, or if something were freed while it was used
    begun, seen = threading.Event(), []
    worker.resources.callback(lambda: seen.append("freed"))

    def work():
        begun.set()
        until_stopped(worker)
        seen.append("ended")
        raise RuntimeError("what broke")

    def other():
        with pytest.raises(St3Error, match="this Llava is closed"):
            worker.run(work)
        seen.append("told")

    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    assert begun.wait(LONGEST)
    worker.close()
    thread.join(LONGEST)
    assert not thread.is_alive()
    assert seen[:2] == ["ended", "freed"] or seen == ["ended", "told", "freed"]
    with pytest.raises(St3Error, match="this Llava is closed"):
        worker.run(lambda: None)


def test_what_belongs_to_an_object_goes_with_it_in_the_thread(worker):
    # broken if it stayed, or went where an interrupt can break its end
    gone = []

    class Native:
        def __del__(self):
            gone.append(threading.current_thread().name)

    owner = Owner()
    worker.run(worker.keep, owner, Native())
    assert isinstance(worker.run(worker.kept, owner), Native)
    worker.run(lambda: None)
    assert gone == []
    del owner
    worker.run(lambda: None)
    assert gone == ["st3-edge"]


def test_without_an_owner_the_thread_ends_before_the_next_begins():
    # broken if a dropped Llava stayed in memory, or were still there while the next one loads
    freed, owner = [], Owner()
    Worker(owner).resources.callback(lambda: (time.sleep(0.2), freed.append(1)))
    del owner
    next_owner = Owner()
    following = Worker(next_owner)
    assert freed == [1]
    following.close()
    assert not following.is_open
