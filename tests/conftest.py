"""What all tests need."""

import signal
from pathlib import Path

import pytest


def pytest_configure() -> None:
    """Lets Ctrl-C reach tests and the programs they start: a shell's background jobs ignore it, and pass that on."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def upstream() -> Path:
    """Upstream's tree with our patches: its headers are the real ones."""
    from emulator import build  # found by the folders that need it

    return build.upstream_tree()
