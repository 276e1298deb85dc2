"""What all tests need."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure() -> None:
    """Lets Ctrl-C reach tests and the programs they start: a shell's background jobs ignore it, and pass that on."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def upstream() -> Path:
    """Upstream's tree with our patches: its headers are the real ones."""
    folder = ROOT / "build" / "tests" / "upstream"
    subprocess.run([sys.executable, ROOT / "vendor" / "upstream.py", "--dest", folder], check=True)
    return folder
