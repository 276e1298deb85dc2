"""What --media-urls does with an address that is public: public_address.c makes one of this machine."""

import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from serving import LONG, Json, Server, Start, message

PUBLIC = "1.2.3.4"


class Host(BaseHTTPRequestHandler):
    """A host of pictures: what it sends depends on the path."""

    picture = b""
    elsewhere = ""
    asked: ClassVar[list[tuple[str, str | None]]] = []

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers["Host"]))
        kind = self.path.strip("/").split("?")[0]
        body = b" " * (11 << 20) if kind == "large" else self.picture
        self.send_response({"moved": 302, "none": 404}.get(kind, 200))
        if kind == "moved":
            self.send_header("Location", self.elsewhere)
        if kind != "large":  # which does not say how large
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try:
            for i in range(0, len(body), 1 << 16 if kind != "slow" else 1):
                self.wfile.write(body[i : i + (1 << 16 if kind != "slow" else 1)])
                time.sleep(1 if kind == "slow" else 0)
        except OSError:
            return  # it has hung up

    def log_message(self, *_) -> None:
        pass


@pytest.fixture(scope="module")
def ear() -> Iterator[socket.socket]:
    """Where the server must never connect to: 127.0.0.1, at the host's port."""
    with socket.socket() as ear:
        ear.bind(("127.0.0.1", 0))
        ear.listen()
        ear.settimeout(0.5)
        yield ear


@pytest.fixture(scope="module")
def port(ear: socket.socket, scenes) -> Iterator[int]:
    number = int(ear.getsockname()[1])
    Host.picture = Path(scenes[0].picture).read_bytes()
    Host.elsewhere = f"http://127.0.0.1:{number}/"
    try:
        host = ThreadingHTTPServer(("127.0.0.2", number), Host)
    except OSError:
        pytest.skip("this system has no 127.0.0.2")
    threading.Thread(target=host.serve_forever, daemon=True).start()
    yield number
    host.shutdown()


@pytest.fixture(scope="module")
def fetching(port: int, start_server: Start, to_preload: Callable[[Path], Path]) -> Server:
    if not shutil.which(os.environ.get("CC", "cc")) or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler")
    library = to_preload(Path(__file__).with_name("public_address.c"))
    return start_server("-np", "1", "--media-urls", env={"LD_PRELOAD": str(library)})


def about(question: str, url: str) -> Json:
    turn = message(question)
    turn["content"].insert(0, {"type": "image_url", "image_url": {"url": url}})
    return {"messages": [turn], "temperature": 0, "max_tokens": 32}


def refused(server: Server, url: str) -> str:
    status, answer = server.request("POST", "/v1/chat/completions", about("What is it?", url))
    assert status == 400, answer
    return str(answer["error"]["message"])


@pytest.mark.parametrize(
    "end", ["/a.png", "/logo@2x.png", "/a:b/c.png?to=http://x/", "?a=1", "/a.png#part", "#part", ""]
)
def test_a_picture_is_fetched(fetching: Server, port: int, scenes, end):
    # broken if a path, a query or a fragment were taken for a part of the host
    question, expected = scenes[0].questions[0]
    Host.asked.clear()
    status, answer = fetching.request("POST", "/v1/chat/completions", about(question, f"http://{PUBLIC}:{port}{end}"))
    assert status == 200, answer
    assert answer["choices"][0]["message"]["content"].strip() == expected
    path = end.split("#")[0]
    assert Host.asked == [(path if path.startswith("/") else f"/{path}", f"{PUBLIC}:{port}")]


def test_a_host_is_looked_up_once(fetching: Server, port: int, ear: socket.socket, scenes):
    # broken if the address that was checked were not the one that is connected to
    question, expected = scenes[0].questions[0]
    status, answer = fetching.request(
        "POST", "/v1/chat/completions", about(question, f"http://named.test:{port}/a.png")
    )
    assert status == 200, answer
    assert answer["choices"][0]["message"]["content"].strip() == expected
    with pytest.raises(TimeoutError):
        ear.accept()
    assert "not on the public internet" in refused(fetching, f"http://named.test:{port}/a.png")


@pytest.mark.parametrize("user", ["1.2.3.4@", "1.2.3.4:80@", "1.2.3.4#@", "1.2.3.4\\@", "a@1.2.3.4@"])
def test_a_user_is_no_host(fetching: Server, port: int, ear: socket.socket, user):
    # broken if what is checked and what is connected to were different parts of a URL
    refused(fetching, f"http://{user}127.0.0.1:{port}/none")
    with pytest.raises(TimeoutError):
        ear.accept()


def test_no_redirect_is_followed(fetching: Server, port: int, ear: socket.socket):
    # broken if a public host could send the server to a private one
    assert "302" in refused(fetching, f"http://{PUBLIC}:{port}/moved")
    with pytest.raises(TimeoutError):
        ear.accept()


def test_what_cannot_be_had_is_the_clients_fault(fetching: Server, port: int):
    # broken by a body of any size, or HTTP 500
    assert "404" in refused(fetching, f"http://{PUBLIC}:{port}/none")
    assert "10 MiB" in refused(fetching, f"http://{PUBLIC}:{port}/large")
    assert "cannot be fetched" in refused(fetching, f"http://{PUBLIC}:1/a.png")


@pytest.mark.skipif(not LONG, reason="ten seconds: ST3_TEST_LONG=1")
def test_a_slow_host_is_given_up(fetching: Server, port: int):
    # broken if a host could hold the request for ever, a byte a second
    began = time.monotonic()
    assert "cannot be fetched" in refused(fetching, f"http://{PUBLIC}:{port}/slow")
    assert 9 < time.monotonic() - began < 15
