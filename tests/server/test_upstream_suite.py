"""What llama.cpp's own tests of llama-server say of ours (scripts/server_suite.py)."""

import re
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


def test_the_list_is_whole():
    # broken if a recording on a server that failed emptied it, with which the other test would pass
    told = re.search(r"(\d+) of llama-server's", (ROOT / "docs" / "internals.md").read_text())
    assert told
    assert len(set(server_suite.PASSING.read_text().splitlines())) == int(told[1])


@pytest.mark.parametrize("side", ["off", "st3"])
def test_what_passes_on_stock_passes_on_ours(suite, side):
    # broken if a front end of stock's lost anything on our server, or by pruning
    assert server_suite.lost(suite, command.find("llama-server"), side) == []
