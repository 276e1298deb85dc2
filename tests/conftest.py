"""What all tests need."""

import signal


def pytest_configure() -> None:
    """Lets Ctrl-C reach tests and the programs they start: a shell's background jobs ignore it, and pass that on."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
