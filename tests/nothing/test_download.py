"""`--hf` against a hub of our own on 127.0.0.1: what is fetched, what is shown, what a broken download costs."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("huggingface_hub")

ROOT = Path(__file__).parents[2]
COMMIT = "1" * 40
BROKEN_AT = 15_000_000
FILES = {
    "README.md": b"...",
    "m-Q4_K_M-00001-of-00002.gguf": bytes(range(256)) * 100_000,  # the library writes to the disk 10 MiB at a time
    "m-Q4_K_M-00002-of-00002.gguf": b"second" * 1000,
    "m-Q8_0.gguf": b"large" * 1000,
    "mmproj-m-f16.gguf": b"half" * 1000,
}
CODE = """
import json, sys
from st3_edge import St3Error
from st3_edge.files import hub
seen = []
try:
    found = hub.pair(sys.argv[1], progress=lambda done, total: seen.append((done, total)))
    print(json.dumps([found, seen]))
except St3Error as e:
    print(e)
"""


class Hub(BaseHTTPRequestHandler):
    """The repository a/b. `requests`: (method, path, range); `breaks`: connections that end in the middle of a file."""

    protocol_version = "HTTP/1.1"
    requests: ClassVar[list] = []
    breaks = 0

    def log_message(self, *_) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.requests.append((self.command, path, self.headers.get("Range")))
        if path.startswith("/api/models/a/b"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in FILES.items()]
            self._answer(json.dumps({"id": "a/b", "sha": COMMIT, "siblings": siblings}).encode())
            return
        found = re.fullmatch(r"/a/b/resolve/\w+/(.*)", path)
        if not found or found[1] not in FILES:
            self._answer(b"{}", 404, {"X-Error-Code": "RepoNotFound" if not found else "EntryNotFound"})
            return
        data = FILES[found[1]]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start = int(re.match(r"bytes=(\d+)-", self.headers["Range"])[1]) if self.headers.get("Range") else 0
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._answer(data[start:], 206 if start else 200, headers)

    def _answer(self, data: bytes, status: int = 200, headers: dict | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if len(data) > BROKEN_AT and Hub.breaks:
            Hub.breaks -= 1
            self.wfile.write(data[:BROKEN_AT])
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True
            return
        self.wfile.write(data)


@pytest.fixture
def server():
    Hub.requests, Hub.breaks = [], 0
    made = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def pair(server, tmp_path):
    """pair(name): what `hub.pair` returns and showed, in a process of its own; where it fails, its message."""

    def run(name: str):
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_CACHE": str(tmp_path),
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }
        command = [sys.executable, "-c", CODE, name]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
        assert "Traceback" not in done.stderr, done.stderr
        return json.loads(done.stdout) if done.stdout.startswith("[") else done.stdout

    return run


def test_all_parts_and_the_mmproj_come_once(pair):
    # broken if a part were missing, another quantization came, or the cache asked the hub again
    (model, mmproj, name), seen = pair("a/b")
    assert name == "a/b:Q4_K_M"
    folder = Path(model).parent
    wanted = {n for n in FILES if n.startswith(("m-Q4", "mmproj"))}
    assert {path.name for path in folder.iterdir()} == wanted
    assert all((folder / n).read_bytes() == FILES[n] for n in wanted)
    size = sum(len(FILES[n]) for n in wanted)
    assert seen[-1] == [size, size] and [done for done, _ in seen] == sorted(done for done, _ in seen)
    Hub.requests.clear()
    assert pair("a/b") == [[model, mmproj, name], []]
    assert pair("a/b:q4_k_m")[0] == [model, mmproj, name]
    assert Hub.requests == []


def test_a_download_that_breaks_goes_on_where_it_was(pair):
    # broken if gigabytes were fetched again
    Hub.breaks = 1
    (model, _, _), seen = pair("a/b")
    assert Path(model).read_bytes() == FILES[Path(model).name]
    ranges = [r for method, path, r in Hub.requests if path.endswith(Path(model).name) and method == "GET"]
    assert len(ranges) == 2 and ranges[1] and 10**7 < int(ranges[1][6:-1]) <= BROKEN_AT
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a/b:Q2_K", "a/b has no Q2_K: there are Q4_K_M, Q8_0"),
        ("c/d", "no such repository"),
        ("a", "is named as OWNER/REPO"),
    ],
)
def test_what_is_not_there_is_one_line(pair, name, says):
    # broken by a traceback, or by a message that leaves a person without the next step
    said = pair(name)
    assert says in said and said.count("\n") == 1


def test_a_full_disk_is_seen_before_the_download(monkeypatch):
    # broken if gigabytes came before the message
    from st3_edge import ModelError
    from st3_edge.files import hub

    with pytest.raises(ModelError, match=r"needs 999999\.0 GB, and the disk"):
        hub._check_room("a/b", {"m.gguf": 999999 * 10**9}, {"cache_dir": None})
