"""What all tests need."""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from st3_edge import St3Error, demo
from st3_edge.commands.serve import command as serve
from st3_edge.native import libraries

TALLY: dict[str, int] = {}  # what tests count against their oracles

# What the tests of a folder need; each raises St3Error where it is missing. CI has all of it ($ST3_TEST_ALL).
NEEDS = {
    "model": (demo.model_paths, libraries.check_present),
    "server": (demo.model_paths, lambda: serve.find("llama-server")),
}

# How the reasons begin for which CI may skip: what a machine need not have, what a run is not about. Any other fails.
MAY_BE_MISSING = (
    "no hipcc",
    "no nvcc",
    "no GPU for",
    "ST3_WINDOWS_DIR and Wine",
    "no Chromium",
    "this CPU has",
    "no kernels for this CPU",
    "ggml's AMX code needs",
    "only the CPU backend asks",  # on a device
    "the encoder's CPU kernels are",
    "no fork, or a device",
    "upstream asserts that nothing is copied twice",  # under the sanitizers
    "the sanitizers have an operator new",
    "a quantized V needs flash attention",  # two parameters that exclude each other
    "says that it failed by raising",
)


def pytest_configure() -> None:
    """Lets Ctrl-C reach tests and the programs they start: a shell's background jobs ignore it, and pass that on.

    Leaves out the settings of whoever runs the tests."""
    os.environ["ST3_CONFIG"] = os.devnull
    for name in ("ST3_MODEL", "ST3_MMPROJ", "NO_COLOR"):
        os.environ.pop(name, None)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests of a folder where what they need was not built (ST3_TOOLS=OFF, sanitizers); ends no long ones."""
    for item in items if os.environ.get("ST3_TEST_LONG") else []:
        item.add_marker(pytest.mark.timeout(0))
    for folder, checks in NEEDS.items():
        try:
            for check in checks:
                check()
        except St3Error as e:
            for item in items:
                if Path(__file__).parent / folder in item.path.parents:
                    item.add_marker(pytest.mark.skip(reason=str(e)))


def _fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    if os.environ.get("ST3_TEST_ALL") and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        stock = os.environ.get("ST3_STOCK_LIB_DIR") or not reason.startswith("ST3_STOCK_LIB_DIR is not set")
        long = "ST3_TEST_LONG" in reason  # for a script, not for CI
        if stock and not long and not reason.startswith(MAY_BE_MISSING):
            report.outcome, report.longrepr = "failed", f"skipped, and $ST3_TEST_ALL is set: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where all is to be tested, a test that is skipped for a reason of its own fails."""
    report = yield
    _fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same of a file."""
    report = yield
    _fail_if_skipped(report)
    return report


@pytest.fixture(scope="session")
def scenes() -> list[demo.Scene]:
    return demo.scenes()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of the tests' own: encoded pictures of another run would change what is measured."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def upstream() -> Path:
    """Upstream's tree with our patches: its headers are the real ones."""
    from emulator import build  # found by the folders that need it

    return build.upstream_tree()


@pytest.fixture(scope="session")
def to_preload(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Compiles a source into a library for LD_PRELOAD. That there is no compiler is a failure."""

    def compiled(source: Path) -> Path:
        variable, name = ("CC", "cc") if source.suffix == ".c" else ("CXX", "c++")
        compiler = os.environ.get(variable) or shutil.which(name)
        assert compiler, f"no {name}"
        library = tmp_path_factory.mktemp(source.stem) / f"{source.stem}.so"
        flags = ["-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
        subprocess.run([*compiler.split(), *flags, source, "-o", library, "-ldl"], check=True, timeout=120)
        return library

    return compiled


@pytest.fixture(scope="session")
def native_folder() -> Path:
    """Where the libraries lie. Their absence is a failure, not a reason to skip: who asks for it is about them."""
    from native_runtime import lib_dir  # found by the folders that need it

    folder = lib_dir()
    if folder is None:
        pytest.fail("no native libraries: build the package (pip install .) or set ST3_LIB_DIR", pytrace=False)
    return folder


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[dict[str, int]]:
    """Counters that the end of the run prints. Fails a test that leaves a conversation with the oracle unsettled."""
    failed = request.session.testsfailed
    yield TALLY
    left = TALLY.pop("conversations that were not closed", 0)
    assert not left or request.session.testsfailed > failed, "Conversation.close() was not called"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the counters and the seed."""
    if TALLY:
        from cases import SEED  # found by the folders that count

        words = ", ".join(f"{v} {k}" for k, v in TALLY.items())
        terminalreporter.write_line(f"against the oracle (seed {SEED}): {words}")
