"""Layers over several machines: rpc-servers on loopback, stock ones too."""

import os
import socket
import time
from pathlib import Path

import pytest
from serving import Server, Start, message, text


def wait_for(port: int) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.1)


def answers(server: Server, scenes) -> list:
    told = []
    for scene in scenes[:3]:
        answer = server.chat(message("Describe the picture.", scene.picture), max_tokens=40)
        assert answer["st3"]["mode"] == "pruned-prefill", answer["st3"]["reason"]
        told.append((text(answer), answer["st3"]["layers"], answer["st3"]["held"]))
    return told


def test_two_machines_keep_what_one_does(start_server: Start, scenes):
    # broken if scores, cuts or the removal of cells did not reach the layers that lie elsewhere
    far = [start_server(program="rpc-server", wait=False) for _ in range(2)]
    for rpc in far:
        wait_for(rpc.port)
    before = [rpc.resident() for rpc in far]
    places = ",".join(f"127.0.0.1:{rpc.port}" for rpc in far)
    plain = ("-np", "1", "-c", "2048", "--vision-type", "file")  # the vision half lies elsewhere too, where ours is not
    local = start_server(*plain, "-ngl", "0", env={"ST3_STOCK_OPS": "1"})
    spread = start_server(*plain, "-ngl", "99", "--rpc", places)
    assert answers(spread, scenes) == answers(local, scenes)
    assert all(rpc.process.poll() is None for rpc in far)
    assert all(rpc.resident() - n > 2e6 for rpc, n in zip(far, before, strict=True))  # layers lie there


@pytest.mark.skipif("ST3_STOCK_LIB_DIR" not in os.environ, reason="no stock build: sh scripts/test.sh makes one")
def test_a_stock_rpc_server_serves_too(start_server: Start, scenes):
    # broken if an op of ours were sent to it: it dies of it after a good handshake
    stock = Path(os.environ["ST3_STOCK_LIB_DIR"]).parent / "bin" / "rpc-server"
    if not stock.is_file():
        pytest.skip(f"no {stock}")
    rpc = start_server(program=str(stock), wait=False)
    wait_for(rpc.port)
    server = start_server("-np", "1", "-c", "2048", "-ngl", "99", "--rpc", f"127.0.0.1:{rpc.port}")
    assert all(said for said, _, _ in answers(server, scenes))
    assert rpc.process.poll() is None
