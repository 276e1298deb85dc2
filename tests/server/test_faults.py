"""Bad input and faults: a clear error, the server lives, other slots' answers are unchanged."""

import contextlib
import io
import json
import random
import re
import socket
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving import LONG, Server, Start, alive, data_url, growth, message, text

from st3_edge import demo

SEED = 20241220
TIE = 0.25  # nats
FLAT = 0.03  # growth of resident memory
# What grows by design is kept small, so that what is in use can be seen: earlier prompts, of which llama-server keeps
# up to 8 GiB, and glibc's heaps, one for each thread, which keep what is freed.
SMALL = ("-np", "4", "-c", "8192", "--cache-ram", "4"), {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}


def png(width: int, height: int) -> bytes:
    """A PNG of one color that says it is that large; its rows are there, compressed."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    squeeze = zlib.compressobj(9)
    rows = b"".join(squeeze.compress(bytes(1 + width)) for _ in range(height)) + squeeze.flush()
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
        + chunk(b"IDAT", rows)
        + chunk(b"IEND", b"")
    )


def refused(server: Server, url: str) -> str:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    status, answer = server.request(
        "POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": content}], "max_tokens": 4}
    )
    assert status == 400, (status, answer)
    return str(answer["error"]["message"])


def test_a_picture_larger_than_memory_is_refused(server: Server, scenes):
    # broken if 20,000 × 20,000 pixels were decoded: more than a gigabyte for a file of some kilobytes
    before = server.resident(peak=True)
    refused(server, data_url(png(20_000, 20_000)))
    assert server.resident(peak=True) - before < 200e6
    alive(server, scenes)


def test_pictures_that_are_large_together_are_refused(start_server: Start, scenes):
    # broken if each picture of a request could be as large as one alone may be: 150 MB of pixels for 50 kB
    server = start_server("-np", "1")
    body = {"messages": [message("What is it?", *[png(7_000, 7_000)] * 40)], "max_tokens": 4}
    status, answer = server.request("POST", "/v1/chat/completions", body)
    assert status == 400, answer
    assert "200 million" in answer["error"]["message"]
    assert server.resident(peak=True) < 1.5e9  # all 40: 6 GB
    alive(server, scenes)


def test_what_the_model_does_not_take_is_the_clients_fault(start_server: Start, server: Server, scenes):
    # broken by HTTP 500
    model, _ = demo.model_paths()
    blind = start_server("--model", str(model), "-np", "1", program="llama-server")
    sound = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
    picture = message("What is it?", scenes[0].picture)
    for asked, turn in ((blind, picture), (server, {"role": "user", "content": [sound]})):
        status, answer = asked.request("POST", "/v1/chat/completions", {"messages": [turn]})
        assert (status, "is not supported" in answer["error"]["message"]) == (400, True), answer
    prompt = {"prompt_string": "no place for it", "multimodal_data": ["AAAA"]}
    assert blind.request("POST", "/completion", {"prompt": prompt})[0] == 400
    prompt["multimodal_data"] = [data_url(scenes[0].picture).split(",")[1]]
    assert server.request("POST", "/completion", {"prompt": prompt})[0] == 400


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,",
        "data:image/png;base64,AAAA",
        "data:text/plain;base64,AAAA",
        "data:image/png,x",
        "",
        "x",
        data_url(b"\x89PNG\r\n\x1a\n"),
        data_url(png(8, 8)[:-30]),
        "file:///etc/passwd",
        "file://../../etc/passwd",
    ],
)
def test_what_is_no_picture_is_the_clients_fault(server: Server, scenes, url):
    # broken by HTTP 500, a crash, or a local file that is read
    assert refused(server, url)
    alive(server, scenes)


def test_no_url_is_fetched(server: Server, scenes):
    # broken if a request could make the server connect to anywhere
    with socket.socket() as ear:
        ear.bind(("127.0.0.1", 0))
        ear.listen()
        ear.settimeout(1)
        assert "--media-urls" in refused(server, f"http://127.0.0.1:{ear.getsockname()[1]}/a.png")
        with pytest.raises(TimeoutError):
            ear.accept()
    alive(server, scenes)


def test_private_addresses_are_never_fetched(start_server: Start):
    # broken if --media-urls let a request reach this machine, its network, or a cloud's metadata
    server = start_server("-np", "1", "--media-urls")
    with socket.socket() as ear:
        ear.bind(("127.0.0.1", 0))
        ear.listen()
        ear.settimeout(1)
        port = ear.getsockname()[1]
        hosts = [
            "127.0.0.1",
            "localhost",
            "0.0.0.0",
            "[::1]",
            "[::ffff:127.0.0.1]",
            "2130706433",
            "0x7f000001",
            "127.1",
            "10.0.0.1",
            "192.168.0.1",
            "172.16.0.1",
            "169.254.169.254",
            "100.64.0.1",
            "[fe80::1]",
            "[fd00::1]",
            "[64:ff9b::7f00:1]",
            "[2002:7f00:1::]",
            "224.0.0.1",
            "255.255.255.255",
            "a@127.0.0.1",
        ]
        for host in hosts:
            said = refused(server, f"http://{host}:{port}/a.png")
            assert "not on the public internet" in said or "cannot be resolved" in said, (host, said)
        with pytest.raises(TimeoutError):
            ear.accept()
    assert "data: URL" in refused(server, "https://example.com/a.png")
    assert refused(server, "http://")
    assert refused(server, "http://[::1/a.png")
    assert refused(server, "http://a:99999999999/")


def test_a_client_that_hangs_up(server: Server, scenes):
    # broken if its slot stayed busy, or its picture's rows went into the next prompt
    body = json.dumps(
        {"messages": [message("Describe the picture.", scenes[1].picture)], "max_tokens": 200, "stream": True}
    ).encode()
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
    head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode()
    chance = random.Random(SEED)
    for _ in range(12):
        with socket.create_connection(("127.0.0.1", server.port)) as line:
            line.sendall(head + body)
            time.sleep(chance.uniform(0, 0.3))
    alive(server, scenes)
    end = time.monotonic() + 30
    while any(slot["is_processing"] for slot in server.request("GET", "/slots")[1]):
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_prompt_longer_than_the_context(server: Server, scenes):
    # broken by a crash, or a prompt that is silently cut
    body = {"messages": [message("star " * 20_000, scenes[0].picture)], "max_tokens": 4}
    status, answer = server.request("POST", "/v1/chat/completions", body)
    assert status == 400
    assert answer["error"]["type"] == "exceed_context_size_error"
    alive(server, scenes)


def test_a_prompt_longer_than_the_batch_is_not_pruned_and_says_so(start_server: Start, scenes):
    # broken if it failed, or were said to be pruned
    server = start_server("-np", "1", "-c", "2048", "-b", "160")
    question, answer = scenes[0].questions[0]
    asked = server.chat(message(question + " " + "Look well. " * 60 + question, scenes[0].picture))
    assert asked["st3"]["mode"] == "evict-only"
    assert "n_batch" in asked["st3"]["reason"]
    assert server.ask(question, scenes[0].picture) == answer


def test_too_little_room_for_all_slots(start_server: Start, scenes):
    # broken if one slot's need took down the server, or changed another's answer
    server = start_server("-np", "4", "-c", "1024", "--kv-unified")
    pairs = [(scenes[i % 5].picture, scenes[i % 5].questions[0][0]) for i in range(12)]

    def ask(pair):
        body = {"messages": [message(pair[1], pair[0])], "temperature": 0, "max_tokens": 16}
        return server.request("POST", "/v1/chat/completions", body)

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, pairs))
    for (status, answer), (picture, _) in zip(answers, pairs, strict=True):
        expected = next(s.questions[0][1] for s in scenes if s.picture == picture)
        assert (status == 200 and text(answer) == expected) or (status >= 400 and answer["error"]["message"])
    assert any(status == 200 for status, _ in answers)
    alive(server, scenes)


def test_memory_stays_flat_over_a_hundred_pictures(start_server: Start, scenes):
    # broken by a leak of pictures, embeddings or cells
    server = start_server(*SMALL[0], env=SMALL[1])
    sizes = []
    for i in range(125):
        server.ask(scenes[i % 5].questions[0][0], scenes[i % 5].picture, cache_prompt=False)
        sizes.append(server.resident())
    print(f"{sizes[25] / 1e6:.1f} MB, {growth(sizes):+.1%}")
    assert growth(sizes) < FLAT


def mixed(scenes, n: int):
    """Requests of mixed kind, by a fixed seed: (body, seconds after which the client hangs up, or None).

    Those of several turns read the whole conversation: one that goes on from the cache keeps what its first question
    chose of the picture.
    """
    chance = random.Random(SEED)
    for _ in range(n):
        scene = chance.choice(scenes)
        question = chance.choice(scene.questions)[0]
        kind = chance.random()
        if kind < 0.55:
            messages = [message(question, scene.picture)]
        elif kind < 0.7:
            messages = [message(question, scene.picture, chance.choice(scenes).picture)]
        elif kind < 0.85:
            messages = [
                message(question, scene.picture),
                {"role": "assistant", "content": dict(scene.questions)[question]},
                message(chance.choice(scene.questions)[0]),
            ]
        else:
            messages = [{"role": "user", "content": question}]
        hangs_up = chance.uniform(0, 0.4) if chance.random() < 0.15 else None
        options = {"temperature": 0, "max_tokens": chance.choice([1, 8, 24]), "cache_prompt": len(messages) == 1}
        yield {"messages": messages, **options}, hangs_up


def sure(answer) -> tuple[str, bool]:
    """An answer up to where its next word was nearly another, which rounding in a batch of other rows may turn; and
    whether that is all of it."""
    said = ""
    for token in answer["choices"][0]["logprobs"]["content"]:
        first, second = (other["logprob"] for other in token["top_logprobs"][:2])
        if first - second < TIE:
            return said.strip(), False
        said += token["token"]
    return said.strip(), True


def test_under_load_every_answer_is_the_one_alone(start_server: Start, scenes):
    # broken if slots mixed, or a request that was cancelled left something behind
    server = start_server(*SMALL[0], env=SMALL[1])
    sizes = []
    requests = list(mixed(scenes, 500 if LONG else 60))
    alone = [
        None if hangs_up else sure(server.chat(**{**body, "cache_prompt": False, "logprobs": True, "top_logprobs": 2}))
        for body, hangs_up in requests
    ]

    def send(item) -> str | None:
        body, hangs_up = item
        sizes.append(server.resident())
        if not hangs_up:
            return text(server.chat(**body))
        with contextlib.suppress(OSError):
            long = json.dumps({**body, "max_tokens": 400}).encode()
            server.raw("POST", "/v1/chat/completions", long, timeout=hangs_up + 0.01)
        return None

    with ThreadPoolExecutor(8) as pool:
        loaded = list(pool.map(send, requests))
    wrong = [
        (body["messages"], expected, got)
        for (body, _), expected, got in zip(requests, alone, loaded, strict=True)
        if expected and got != expected[0] and (expected[1] or not got.startswith(expected[0]))
    ]
    assert sum(bool(expected and expected[1]) for expected in alone) > 0.6 * len(alone)
    assert not [(str(messages)[-200:], *rest) for messages, *rest in wrong]
    print(f"{len(requests)} requests; {sizes[0] / 1e6:.1f} MB, {growth(sizes):+.1%}")
    assert not LONG or growth(sizes) < FLAT


def hostile(scenes, n: int):
    """Bodies that a fuzzer would send: bytes, broken JSON, and requests with one value exchanged; by a fixed seed."""
    chance = random.Random(SEED)
    base = {"messages": [message("What is it?", scenes[0].picture)], "temperature": 0, "max_tokens": 2}
    values = [
        None,
        True,
        -1,
        0,
        1e308,
        -(2**63),
        2**64,
        "",
        "x" * 5000,
        "\ud800",
        [],
        {},
        [[]],
        [None],
        {"a": {}},
        "<image>",
        "<__media__>",
        "\x00",
        {"type": "image_url"},
        [{"type": "text"}],
        {"url": "file:///dev/zero"},
    ]
    keys = [
        "messages",
        "temperature",
        "max_tokens",
        "stream",
        "stop",
        "n",
        "seed",
        "top_k",
        "top_p",
        "logit_bias",
        "grammar",
        "response_format",
        "tools",
        "tool_choice",
        "id_slot",
        "cache_prompt",
        "n_probs",
        "samplers",
        "json_schema",
        "model",
        "stream_options",
        "logprobs",
        "chat_template_kwargs",
        "reasoning_format",
        "n_keep",
        "min_p",
        "dry_multiplier",
        "penalty_last_n",
        "response_fields",
        "lora",
        "prompt",
        "input",
        "content",
        "add_generation_prompt",
    ]
    paths = [
        "/v1/chat/completions",
        "/completion",
        "/v1/completions",
        "/v1/messages",
        "/v1/responses",
        "/tokenize",
        "/detokenize",
        "/apply-template",
        "/infill",
        "/v1/embeddings",
        "/slots/0?action=save",
        "/slots/9?action=x",
        "/props",
        "/lora-adapters",
        "/v1/chat/completions/input_tokens",
        "/st3",
        "/nothing",
    ]
    for _ in range(n):
        kind = chance.random()
        if kind < 0.1:
            body = chance.randbytes(chance.randrange(400))
        else:
            asked = json.loads(json.dumps(base))
            if kind < 0.5:
                asked[chance.choice(keys)] = chance.choice(values)
            elif kind < 0.8:
                part = chance.choice([asked["messages"][0], *asked["messages"][0]["content"]])
                part[chance.choice([*part, "url", "text", "role", "content", "tool_calls"])] = chance.choice(values)
            else:
                data = bytearray(scenes[0].picture.read_bytes())
                for _ in range(chance.randrange(1, 30)):
                    data[chance.randrange(len(data))] = chance.randrange(256)
                asked["messages"] = [message("What is it?", bytes(data))]
            body = json.dumps(asked).encode()
            if kind > 0.78:
                body = body[: chance.randrange(len(body))]
        yield chance.choice(["POST", "POST", "POST", "POST", "GET", "PUT", "OPTIONS"]), chance.choice(paths), body


# What llama.cpp's server takes for a fault of its own and not of the client: JSON that is none or of other types, and
# tools.
UPSTREAMS = rb'"message":"(\[json\.exception\.|Failed to parse |Unknown reasoning format: )'


def test_hostile_requests_are_errors_and_nothing_more(start_server: Start, scenes, tmp_path):
    # broken by a crash or a hang, if the next request suffered, or by an HTTP 500 that is not one of upstream's
    server = start_server("-np", "2", "-c", "2048", "--slot-save-path", str(tmp_path))
    requests = list(hostile(scenes, 10_000 if LONG else 300))

    def send(item):
        method, path, body = item
        try:
            status, _, said = server.raw(method, path, body, timeout=60)
        except ConnectionError:
            return 0, b""  # the body was refused before it was read
        return status, said

    with ThreadPoolExecutor(6) as pool:
        codes, bodies = zip(*pool.map(send, requests), strict=True)
    assert server.process.poll() is None, server.log.read_text(errors="replace")[-3000:]
    assert set(codes) - {0} >= {200, 400, 404}
    faults = [
        (path, code, said)
        for (_, path, _), code, said in zip(requests, codes, bodies, strict=True)
        if code >= 500 and code != 501 and not re.search(UPSTREAMS, said)
    ]
    assert not faults
    alive(server, scenes)


def test_uploads_are_bounded(server: Server, scenes):
    # broken if a body of any size were taken into memory
    before = server.resident(peak=True)
    with contextlib.suppress(ConnectionError):  # it may hang up before it has read all
        assert server.raw("POST", "/v1/chat/completions", b" " * 300_000_000)[0] == 413
    assert server.resident(peak=True) - before < 250e6  # it reads 100 MB before it refuses the rest
    alive(server, scenes)


def test_pictures_of_every_format(server: Server, scenes):
    # broken if a usual format failed
    image = pytest.importorskip("PIL.Image")
    for kind in ("PNG", "JPEG", "BMP", "GIF", "PPM"):
        out = io.BytesIO()
        image.open(scenes[0].picture).convert("RGB").save(out, kind)
        assert server.ask(scenes[0].questions[0][0], out.getvalue())
