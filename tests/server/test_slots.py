"""Slots that are saved to a file: what comes back, what is refused, and a file is the old one or the new one."""

import contextlib
import os
import random
import signal
import threading
import time

import pytest
from serving import LONG, Server, Start, alive, message, text

SEED = 20241220


def slots(server: Server, action: str, filename: str, slot: int = 0):
    return server.request("POST", f"/slots/{slot}?action={action}", {"filename": filename})


def test_a_slot_comes_back_from_its_file(start_server: Start, scenes, tmp_path):
    # broken if a saved slot lost its picture, or its schedule's cells
    server = start_server("-np", "1", "--slot-save-path", str(tmp_path))
    first = message(scenes[0].questions[0][0], scenes[0].picture)
    said = text(server.chat(first))
    turn = [first, {"role": "assistant", "content": said}, message(scenes[0].questions[1][0])]
    assert slots(server, "save", "one")[0] == 200
    expected = server.chat(*turn)
    server.ask("What is it?", scenes[3].picture)
    status, answer = slots(server, "restore", "one")
    assert status == 200, answer
    again = server.chat(*turn)
    assert text(again) == text(expected)
    assert again["timings"]["cache_n"] == expected["timings"]["cache_n"]


def test_a_slot_of_another_schedule_is_refused(start_server: Start, scenes, tmp_path):
    # broken if cells that other cuts had left were taken in
    one = start_server("-np", "1", "--slot-save-path", str(tmp_path), "--budget", "0.3")
    one.ask(scenes[0].questions[0][0], scenes[0].picture)
    assert slots(one, "save", "one")[0] == 200
    other = start_server("-np", "1", "--slot-save-path", str(tmp_path), "--budget", "0.6")
    status, answer = slots(other, "restore", "one")
    assert status == 400, answer
    alive(other, scenes)


def test_a_slot_file_is_replaced_and_not_written_over(start_server: Start, scenes, tmp_path):
    # broken if a save that ended in its middle left half of the new state in the place of the old
    file = tmp_path / "one"
    server = start_server("-np", "1", "--slot-save-path", str(tmp_path))
    server.ask(scenes[0].questions[0][0], scenes[0].picture)
    assert slots(server, "save", "one")[0] == 200
    with file.open("rb") as old:
        whole, inode = file.read_bytes(), file.stat().st_ino
        server.ask(scenes[1].questions[0][0], scenes[1].picture, cache_prompt=False)
        assert slots(server, "save", "one")[0] == 200
        assert old.read() == whole != file.read_bytes()
        assert file.stat().st_ino != inode
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def save_and_be_killed(server: Server) -> None:
    with contextlib.suppress(OSError):
        slots(server, "save", "one")


@pytest.mark.skipif(not LONG, reason="hits the moment by luck: ST3_TEST_LONG=1")
def test_killed_while_a_slot_is_saved(start_server: Start, scenes, tmp_path):
    # broken if the file were half of the new one: what is there must be restored whole, or refused
    file = tmp_path / "one"
    server = start_server("-np", "1", "--slot-save-path", str(tmp_path))
    server.ask(scenes[0].questions[0][0], scenes[0].picture)
    assert slots(server, "save", "one")[0] == 200
    whole = file.read_bytes()
    chance = random.Random(SEED)
    for _ in range(6):
        saving = threading.Thread(target=save_and_be_killed, args=(server,))
        saving.start()
        time.sleep(chance.uniform(0, 0.01))
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
        saving.join()
        assert file.read_bytes() == whole
        server = start_server("-np", "1", "--slot-save-path", str(tmp_path))
        assert slots(server, "restore", "one")[0] == 200
        alive(server, scenes)
        server.ask(scenes[0].questions[0][0], scenes[0].picture)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"one"} or all(name.startswith("one") for name in left)
