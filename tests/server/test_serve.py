"""`st3-edge serve` as a person starts it: what it prints, serves, refuses, and how it ends."""

import json
import signal
import subprocess
import sys

import gguf
import numpy as np
import pytest
from serving import Server, Start, free_port, message, text

from st3_edge import demo


def test_a_question_about_a_picture_is_answered(server: Server, scenes):
    # broken if the model, its template or ST3 were not there
    answer = server.chat(message(scenes[0].questions[0][0], scenes[0].picture), cache_prompt=False)
    assert text(answer) == scenes[0].questions[0][1]
    st3 = answer["st3"]
    assert st3["mode"] == "pruned-prefill", st3["reason"]
    assert st3["preset"] == "st3"
    assert answer["timings"]["prompt_n"] > st3["given"] == 576


def test_what_st3_did_is_the_same_in_every_form(server: Server, scenes):
    # broken if a kind of answer were left out, or told of another slot's picture
    picture, (question, _) = scenes[0].picture, scenes[0].questions[0]
    whole = server.chat(message(question, picture))["st3"]
    assert [len(layers) for layers in whole["layers"]] == [576]
    for layer, held in enumerate(whole["per_layer"]):
        assert sum(n > layer for n in whole["layers"][0]) == held

    def told(path: str, body: dict) -> dict:
        status, _, data = server.raw("POST", path, json.dumps(body).encode())
        assert status == 200, data
        if not body.get("stream"):
            return json.loads(data)["st3"]
        lines = [line[6:] for line in data.decode().splitlines() if line.startswith("data: ")]
        found = [e["st3"] for e in map(json.loads, (x for x in lines if x != "[DONE]")) if "st3" in e]
        assert len(found) == 1
        return found[0]

    chat = {"messages": [message(question, picture)], "temperature": 0, "max_tokens": 32}
    source = {
        "type": "base64",
        "media_type": "image/png",
        "data": message("", picture)["content"][0]["image_url"]["url"].partition(",")[2],
    }
    anthropic = {
        "max_tokens": 32,
        "temperature": 0,
        "messages": [
            {"role": "user", "content": [{"type": "image", "source": source}, {"type": "text", "text": question}]}
        ],
    }
    responses = {
        "temperature": 0,
        "max_output_tokens": 32,
        "input": [
            {
                "role": "user",
                "content": [
                    {"type": "input_image", "image_url": "data:image/png;base64," + source["data"]},
                    {"type": "input_text", "text": question},
                ],
            }
        ],
    }
    for path, body in (("/v1/chat/completions", chat), ("/v1/messages", anthropic), ("/v1/responses", responses)):
        for stream in (False, True):
            st3 = told(path, {**body, "stream": stream})
            for key in ("mode", "given", "per_layer", "layers", "images"):
                assert st3[key] == whole[key], (path, stream, key)


def test_text_alone_has_no_report(server: Server):
    # broken if every answer carried one
    assert "st3" not in server.chat({"role": "user", "content": "Hello"}, max_tokens=4)


def test_layers_of_every_turn_are_what_the_layers_read(server: Server, scenes):
    # broken if what was kept of one prompt's pictures were told of another's
    talk = []
    turns = (message("What is this?", scenes[0].picture), message("Where?"), message("And this?", scenes[1].picture))
    for turn in turns:
        talk.append(turn)
        answer = server.chat(*talk, max_tokens=4)
        talk.append({"role": "assistant", "content": text(answer)})
        st3 = answer["st3"]
        told = [layers for layers in st3["layers"] if layers is not None]
        for layer, n in enumerate(st3["per_layer"]):
            read = sum(last > layer for layers in told for last in layers)
            assert read == n if len(told) == len(st3["images"]) else read < n
        if turn is not turns[1]:
            assert st3["layers"][-1] is not None


def test_a_model_without_a_kv_cache_is_served(start_server: Start, tmp_path):
    # broken if a report of nothing ended the server: encoders have no memory to report of
    path, rng = tmp_path / "bert.gguf", np.random.default_rng(1)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"\u2581{c}" for c in "abcdefghijklmnopqrstuvwxyz")]
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_layer_norm_eps(1e-5)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 5 + [1] * 26)
    writer.add_token_type_count(2)
    for name, i in (("bos", 2), ("eos", 3), ("unknown", 1), ("seperator", 3), ("padding", 0), ("cls", 2), ("mask", 4)):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", i)
    shapes = {"token_embd": (len(tokens), 32), "token_types": (2, 32), "position_embd": (64, 32)}
    shapes |= {f"blk.0.attn_{n}": (32, 32) for n in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
    norms = ("token_embd_norm", "blk.0.attn_output_norm", "blk.0.layer_output_norm")
    tensors = {f"{name}.weight": shape for name, shape in shapes.items()}
    tensors |= {f"{name}.{part}": (32,) for name in norms for part in ("weight", "bias")}
    tensors |= {f"{name}.bias": (shape[0],) for name, shape in shapes.items() if name.startswith("blk")}
    for name, shape in tensors.items():
        writer.add_tensor(name, (rng.standard_normal(shape) / 20).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    server = start_server("-m", str(path), "--embeddings", program="llama-server")
    status, found = server.request("POST", "/v1/embeddings", {"input": "a b"})
    assert status == 200 and len(found["data"][0]["embedding"]) == 32
    assert server.request("GET", "/props")[1]["st3"] is None


def test_props_and_log_name_the_schedule(server: Server, scenes):
    # broken if a front end could not find out what is on
    status, props = server.request("GET", "/props")
    assert status == 200
    assert props["st3"]["preset"] == "st3"
    assert props["st3"]["cuts"]
    server.ask("What is this?", scenes[1].picture)
    assert "ST3 = pruned-prefill: 576 visual tokens" in server.log.read_text()


def test_the_log_says_that_st3_is_off(start_server: Start, scenes):
    # broken by "no picture" where there was one
    model, mmproj = demo.model_paths()
    files = ("--model", str(model), "--mmproj", str(mmproj))
    for more, said in (((), "off"), (("--override-kv", "st3.preset=str:st3"), "pruned-prefill")):
        stock = start_server(*files, *more, "-np", "1", "-b", "4096", program="llama-server")
        stock.ask("What is this?", scenes[1].picture)
        assert f"ST3 = {said}" in stock.log.read_text()


def test_pages_below_a_prefix_need_no_key(start_server: Start):
    # broken if the paths that are free of it were looked for without the prefix
    server = start_server("--api-key", "sesame", "--api-prefix", "/p", "-np", "1", wait=False).wait("/p/health")
    assert {path: server.raw("GET", path)[0] for path in ("/p/st3", "/p/st3.js", "/p/props")} == {
        "/p/st3": 200,
        "/p/st3.js": 200,
        "/p/props": 401,
    }


def test_pictures_come_first_with_a_new_line(server: Server, scenes):
    # broken if the layout that LLaVA was trained with were lost on the way: Open WebUI sends the text first
    question, answer = scenes[0].questions[0]
    swapped = message(question, scenes[0].picture)
    first = server.chat(swapped)
    swapped["content"].reverse()
    second = server.chat(swapped)
    assert text(first) == text(second) == answer
    assert first["usage"]["prompt_tokens"] == second["usage"]["prompt_tokens"]


def test_a_vision_half_older_than_the_key_of_its_type_is_llavas(start_server: Start, server: Server, scenes, tmp_path):
    # broken if llama.cpp took it for LLaVA's (patch 0020), and the layout did not
    model, mmproj = demo.model_paths()
    key = b"clip.projector_type"
    older = tmp_path / "mmproj.gguf"
    older.write_bytes(mmproj.read_bytes().replace(key, key[:-1] + b"_"))
    other = start_server("-m", str(model), "--mmproj", str(older), "-np", "1", "-c", "2048")
    asked = message(scenes[0].questions[0][0], scenes[0].picture)
    expected = server.chat(asked)
    asked["content"].reverse()
    answer = other.chat(asked)
    assert text(answer) == text(expected)
    assert answer["usage"]["prompt_tokens"] == expected["usage"]["prompt_tokens"]


def test_our_page_is_there_with_a_strict_policy(server: Server):
    # broken if a file were missing, or a script from elsewhere could run
    for path, kind in (("/st3", "text/html"), ("/st3.js", "text/javascript"), ("/st3.css", "text/css")):
        status, headers, body = server.raw("GET", path)
        assert status == 200
        assert headers["Content-Type"].startswith(kind)
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert body
    _, _, html = server.raw("GET", "/st3")
    assert b"style=" not in html
    assert b"<script>" not in html
    status, headers, _ = server.raw("GET", "/")  # llama.cpp's page, or ours where the build has none
    assert status in (200, 302, 415)


def test_other_origins_may_not_read_answers(server: Server):
    # broken if any page that the user visits could talk to the server
    for origin, allowed in (("http://evil.example", None), ("http://localhost:3000", "http://localhost:3000")):
        _, headers, _ = server.raw("GET", "/health", Origin=origin)
        assert headers["Access-Control-Allow-Origin"] == allowed


def test_api_keys_guard_answers_and_not_the_page(start_server: Start):
    # broken if our page needed a key to be seen, or answers none
    guarded = start_server("--api-key", "sesame", "-np", "1")
    assert guarded.raw("GET", "/st3")[0] == 200
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    assert guarded.request("POST", "/v1/chat/completions", body)[0] == 401
    assert guarded.request("POST", "/v1/chat/completions", body, Authorization="Bearer sesame")[0] == 200


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_cleanly(start_server: Start, name):
    # broken if a parent process stood between, or the exit code were another's
    running = start_server("-np", "1")
    running.process.send_signal(name)
    assert running.process.wait(30) == 0


def test_it_says_where_it_is(start_server: Start):
    # broken if a person had to guess the address or the clients' settings
    running = start_server("-np", "1")
    said = running.log.read_text()
    for part in (running.url, f"{running.url}/v1", "OPENAI_API_BASE_URL", "${PORT}", "/st3", "demo model"):
        assert part in said


def test_bad_input_is_one_line(tmp_path):
    # broken by a traceback, or a server that starts in spite of it
    port = str(free_port())
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(b"GGUF")
    for words, part in (
        (["--model", "none.gguf", "--mmproj", "none.gguf"], "none.gguf"),
        (["--model", str(wrong), "--mmproj", str(wrong)], "wrong.gguf"),
        (["--model", "only.gguf"], "No such file"),
        (["--budget", "7"], "budget"),
        (["--preset", "none"], "preset"),
        (["--host", "192.0.2.1"], "192.0.2.1"),
        (["--model", "a", "--mmproj", "b", "--hf", "a/b"], "exclude"),
        (["--models-dir", ".", "--model", "a", "--mmproj", "b"], "not both"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "st3_edge", "serve", "--port", port, *words],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode in (1, 2), words
        assert done.stderr.count("\n") == 1, done.stderr
        assert part in done.stderr


def test_a_port_in_use_is_named(server: Server):
    # broken if the server failed after it had loaded the model
    done = subprocess.run(
        [sys.executable, "-m", "st3_edge", "serve", "--port", str(server.port)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert str(server.port) in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_flag_that_llama_server_does_not_know(start_server: Start):
    # broken if its exit code or its message were lost
    running = start_server("--no-such-flag", wait=False)
    assert running.process.wait(60) == 1
    assert "no-such-flag" in running.log.read_text()
