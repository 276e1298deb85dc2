"""What a `Llava` leaves alone in its process, and what becomes of it in a forked one."""

import ctypes
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from st3_edge import ModelError, St3Error
from st3_edge.native import libraries

FOR_GOOD: list[object] = []  # the package's callback passes lines on to the one before it, after the test as well
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
HEAD = """
import os, sys, threading
from st3_edge import Llava, St3Error, demo
picture, question = str(demo.scenes()[0].picture), "What color is the star?"
def ask(llava, **options):
    return llava.ask(picture, question, temperature=0, **options)
"""


@pytest.fixture
def python(environment):
    """Runs a program in a process of its own: python(text) -> its output, standard error too."""

    def run(text: str) -> str:
        # OpenMP's threads would be in each other's way where a machine is busy.
        done = subprocess.run(
            [sys.executable, "-c", HEAD + textwrap.dedent(text)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200,
            env={**environment, "OMP_WAIT_POLICY": "passive"},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        return done.stdout

    return run


def test_a_forked_child_is_told_and_can_load_its_own(python):
    # broken by a hang: the threads of the parent do not exist in its child
    said = python("""
        llava = Llava.demo(n_threads=2)
        expected = ask(llava)
        child = os.fork()
        if child == 0:
            for call in (ask, Llava.reset, lambda llava: llava.save_state("/nowhere"), lambda llava: llava.pieces([])):
                try:
                    call(llava)
                except St3Error as e:
                    print(e)
            llava.close()
            with Llava.demo(n_threads=2) as own:
                print("own:", ask(own) == expected)
            del llava
            sys.exit(7)
        print("child:", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        print("parent:", ask(llava) == expected)
    """)
    assert said.count("loaded before the process was forked") == 3 and "spawn" in said
    assert "own: True" in said and "child: 7" in said and "parent: True" in said


def test_a_child_that_was_forked_in_the_middle_of_work_says_so(python):
    # broken by a hang: a lock that was taken when it was forked is never released
    said = python("""
        llava, inside, forked = Llava.demo(n_threads=1), threading.Event(), threading.Event()
        session = llava._session
        session.reset = lambda: (inside.set(), forked.wait())
        thread = threading.Thread(target=llava.reset)
        thread.start()
        inside.wait()
        child = os.fork()
        if child == 0:
            try:
                Llava.demo()
            except St3Error as e:
                print(e, flush=True)
            os._exit(0)
        os.waitpid(child, 0)
        forked.set()
        thread.join()
        print(ask(llava))
    """)
    assert "forked while a Llava was at work" in said and "spawn" in said


def test_a_forked_child_with_a_gpu_is_told(python):
    # broken by whatever a driver does that another process has set up
    said = python("""
        from st3_edge.native import libraries
        Llava.demo(n_threads=1).close()
        assert not libraries._has_gpu(libraries.load())
        libraries._has_gpu = lambda _: True
        Llava.demo(n_threads=1).close()
        if os.fork() == 0:
            try:
                Llava.demo(n_threads=1)
            except St3Error as e:
                print(e, flush=True)
            os._exit(0)
        os.wait()
    """)
    assert "a GPU works in the parent alone" in said and "spawn" in said


def test_spawned_processes_work(python):
    # broken if what the message recommends did not work
    said = python("""
        import concurrent.futures, multiprocessing
        llava = Llava.demo(n_threads=1)
        expected = ask(llava)
        if __name__ == "__main__":
            with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                print(pool.submit(eval, "__import__('st3_edge').Llava.demo(n_threads=1).ask("
                    f"{picture!r}, {question!r}, temperature=0)").result() == expected)
    """)
    assert said.strip() == "True"


def test_nothing_of_the_process_is_changed(python):
    # broken if standard streams were replaced while a model loads, for good with two at once, or a setting stayed
    said = python("""
        import locale, logging, signal, time, warnings
        def seen():
            streams = [(os.fstat(fd).st_dev, os.fstat(fd).st_ino) for fd in (0, 1, 2)] + [sys.stdout, sys.stderr]
            return streams
        def settings():
            handlers = [signal.getsignal(s) for s in signal.valid_signals()]
            hooks = [sys.excepthook, sys.unraisablehook, threading.excepthook]
            loggers = logging.getLogger().handlers, logging.getLogger().level
            return handlers, dict(os.environ), os.getcwd(), locale.setlocale(locale.LC_ALL), hooks, loggers, \\
                list(warnings.filters)
        streams, before, others = seen(), settings(), []
        def work():
            for _ in range(3):
                Llava.demo(n_threads=1).close()
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            if seen() != streams:
                others.append(seen())
            time.sleep(0.001)
        print(len(others), settings() == before, [t.name for t in threading.enumerate()])
    """)
    assert said == "0 True ['MainThread']\n"


def test_verbose_is_of_one_llava(python):
    # broken if it were of all that come after it, or of all at the same time
    said = python("""
        quiet = Llava.demo(n_threads=1)
        with Llava.demo(n_threads=1, verbose=True):
            print("--- loaded", flush=True)
            quiet.reset()
            ask(quiet)
            Llava.demo(n_threads=1).close()
            print("--- closing", flush=True)
        print("--- closed", flush=True)
        Llava.demo(n_threads=1).close()
        quiet.close()
    """)
    loaded, _, rest = said.partition("--- loaded\n")
    assert "llama_model_loader" in loaded and "clip" in loaded
    assert rest.partition("--- closing\n")[0] == "" and rest.partition("--- closed\n")[2] == ""


def test_what_another_part_of_the_program_logs_goes_where_it_went(load, files):
    # broken if the log callback of another user of llama.cpp were replaced, or got our lines
    lib = libraries.load().lib
    heard = []
    callback = lib.llama_log_callback(lambda level, text, _: heard.append((threading.current_thread().name, text)))
    FOR_GOOD.append(callback)
    before = lib.llama_log_callback(), ctypes.c_void_p()
    lib.llama_log_get(ctypes.byref(before[0]), ctypes.byref(before[1]))
    lib.llama_log_set(callback, ctypes.c_void_p(0))

    def other_user():
        params = lib.llama_model_default_params()
        params.vocab_only = True
        lib.llama_model_free(lib.llama_model_load_from_file(files[0].encode(), params))

    try:
        with load() as llava:
            llava.reset()
            thread = threading.Thread(target=other_user, name="other")
            thread.start()
            thread.join()
    finally:
        lib.llama_log_set(*before)
    assert heard and {name for name, _ in heard} == {"other"}


STEPS = [
    "libraries.load",
    "llama_model_load_from_file",
    "llama_init_from_model",
    "mtmd_init_from_file",
    "mtmd_support_vision",
]
STEPS += ["control_forms", "ChatTemplate", "read_header", "fingerprint", "Conversation"]


@pytest.mark.parametrize("how", ["fails", "raises", "is interrupted"])
@pytest.mark.parametrize("step", STEPS)
def test_what_a_failed_constructor_had_opened_is_closed(load, monkeypatch, step, how):
    # broken by a leak of a model, a context or an encoder, each time
    from st3_edge import llava
    from st3_edge.files import pair
    from st3_edge.runtime import session, state

    bindings = libraries.load()
    owners = {
        "libraries.load": (libraries, "load"),
        "control_forms": (session.Session, "control_forms"),
        "ChatTemplate": (llava, "ChatTemplate"),
        "read_header": (pair.gguf, "read_header"),
        "fingerprint": (state, "fingerprint"),
        "Conversation": (session, "Conversation"),
    }
    owner, name = owners.get(step, (bindings.mtmd if step.startswith("mtmd") else bindings.lib, step))
    if how == "fails" and step in owners:
        pytest.skip("says that it failed by raising")

    opened = []
    for lib, made, freed in (
        (bindings.lib, "llama_model_load_from_file", "llama_model_free"),
        (bindings.lib, "llama_init_from_model", "llama_free"),
        (bindings.mtmd, "mtmd_init_from_file", "mtmd_free"),
    ):
        real_made, real_freed = getattr(lib, made), getattr(lib, freed)
        monkeypatch.setattr(lib, made, lambda *a, r=real_made: (p := r(*a), opened.append(p))[0])
        monkeypatch.setattr(lib, freed, lambda p, r=real_freed: (opened.remove(p), r(p))[1])

    def broken(*a, **k):
        if how == "fails":
            return
        raise (KeyboardInterrupt if how == "is interrupted" else RuntimeError)("broken on purpose")

    monkeypatch.setattr(owner, name, broken)
    threads = threading.active_count()
    with pytest.raises((RuntimeError, KeyboardInterrupt, ModelError)):
        load()
    assert opened == []
    for _ in range(6000):  # by a moment
        if threading.active_count() <= threads:
            break
        time.sleep(0.01)
    assert threading.active_count() <= threads
    monkeypatch.undo()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and asks glibc for one arena")
def test_loads_leave_no_memory_behind(python, tmp_path):
    # broken if a model, or what a failed one had opened, stayed: those that fail do so at six different steps
    said = python(f"""
        sys.path.append({str(SCRIPTS)!r})
        from pathlib import Path
        from soak_interrupts import failing, flat
        fails = failing(Path({str(tmp_path)!r}))
        for work in (lambda _: Llava.demo(n_threads=1).close(), lambda i: fails[i % len(fails)]()):
            found = flat(work, 24)
            print("flat" if found["growth"] < 0.1 else found)  # one encoder each time would be 1.0
    """)
    assert said == "flat\nflat\n"


def test_after_close_every_call_says_so(load, picture):
    # broken by a crash, or a hang: there is nobody left to do the work
    llava = load()
    stream, begun = (llava.create_chat_completion([{"role": "user", "content": "Hi"}], stream=True) for _ in range(2))
    next(begun)
    next(begun)
    llava.close()
    llava.close()
    calls = [llava.reset, lambda: llava.ask(picture, "Hi"), lambda: llava.visual_tokens(picture), lambda: list(stream)]
    calls.append(lambda: list(begun))
    for call in calls:
        with pytest.raises(St3Error, match="this Llava is closed"):
            call()
    assert "closed" in repr(llava)
