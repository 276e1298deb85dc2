"""What llama.cpp's own tests of llama-server say of ours (scripts/server_suite.py)."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import ROOT

sys.path.append(str(ROOT / "scripts"))

import server_suite

from st3_edge.commands.serve import command


@pytest.fixture(scope="module")
def suite() -> Iterator[Path]:
    for module in ("aiohttp", "filelock", "openai", "prometheus_client", "pytest_timeout", "requests"):
        pytest.importorskip(module, reason='the extra "server" is not installed')
    with server_suite.unpacked() as folder:
        yield folder


@pytest.mark.parametrize("side", ["off", "st3"])
def test_what_passes_on_stock_passes_on_ours(suite, side):
    # broken if a front end of stock's lost anything on our server, or by pruning
    assert server_suite.lost(suite, command.find("llama-server"), side) == []
