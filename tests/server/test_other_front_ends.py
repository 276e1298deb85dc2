"""Programs that know nothing of us, on our libraries: llama-cpp-python scripts, and llama-mtmd-cli by hand."""

import json
import os
import subprocess
import sys

import pytest
from serving import Server, Start, message, text

from st3_edge import demo
from st3_edge.commands.serve import command
from st3_edge.native import libraries

SCRIPT = """
import base64, ctypes, json, sys
import llama_cpp
from llama_cpp import Llama
from llama_cpp.llama_chat_format import Llava15ChatHandler

model, mmproj, picture, question, overrides = sys.argv[1:]
handler = Llava15ChatHandler(clip_model_path=mmproj, verbose=False)
options = {"n_ctx": 2048, "n_batch": 2048, "n_threads": 1, "kv_overrides": json.loads(overrides), "verbose": False}
llama = Llama(model, chat_handler=handler, **options)
url = "data:image/png;base64," + base64.b64encode(open(picture, "rb").read()).decode()
content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
answer = llama.create_chat_completion([{"role": "user", "content": content}], temperature=0, max_tokens=8)
report = llama_cpp.llama_cpp._lib.st3_report
report.argtypes, report.restype = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p, ctypes.c_size_t], ctypes.c_size_t
buffer = ctypes.create_string_buffer(65536)
report(llama.ctx, -1, buffer, len(buffer))
print(json.dumps({"answer": answer["choices"][0]["message"]["content"], "st3": json.loads(buffer.value)}))
"""


@pytest.mark.parametrize(("overrides", "mode"), [({"st3.preset": "st3"}, "pruned-prefill"), ({}, "off")])
def test_an_unchanged_llama_cpp_python_script(scenes, overrides, mode):
    # broken if pruning in the compute needed anything but the override, and a batch that holds the prompt
    folder = str(libraries.folder())
    env = {**os.environ, "LLAMA_CPP_LIB_PATH": folder, "MTMD_CPP_LIB": folder}
    question = scenes[0].questions[0][0]
    words = [*map(str, demo.model_paths()), str(scenes[0].picture), question, json.dumps(overrides)]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *words], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["st3"]["mode"] == mode
    assert told["answer"].strip()


def mtmd_cli(scenes, *options: str) -> str:
    model, mmproj = map(str, demo.model_paths())
    words = [str(command.find("llama-mtmd-cli")), "-m", model, "--mmproj", mmproj, "--image", str(scenes[0].picture)]
    words += ["-p", "Describe the picture.", "--temp", "0", "-n", "24", "-t", "1", *options]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_llama_mtmd_cli_by_hand(scenes):
    # broken if the override did not reach its context: a picture that is gone after layer 1 is described otherwise
    off = mtmd_cli(scenes)
    assert off == mtmd_cli(scenes, "--override-kv", "st3.preset=str:off")
    assert off == mtmd_cli(scenes, "--override-kv", "st3.preset=str:pvtp,st3.budget=float:1.0,st3.vision_type=str:file")
    assert off != mtmd_cli(scenes, "--override-kv", "st3.preset=str:vtw,st3.start=int:1")


def test_llama_server_by_hand(start_server: Start, scenes):
    # broken if only `st3-edge serve` could switch it on
    model, mmproj = map(str, demo.model_paths())
    options = ["-m", model, "--mmproj", mmproj, "-np", "1", "-c", "2048"]
    on: Server = start_server(
        *options, "--override-kv", "st3.preset=str:st3,st3.budget=float:0.2", program="llama-server"
    )
    question, answer = scenes[0].questions[0]
    told = on.chat(message(question, scenes[0].picture))
    assert told["st3"]["mode"] == "pruned-prefill"  # with llama-server's own batch sizes
    assert told["st3"]["budget"] == pytest.approx(0.2, abs=0.01)
    off: Server = start_server(*options, program="llama-server")
    told = off.chat(message(question, scenes[0].picture))
    assert text(told) == answer
    assert "st3" not in told
    assert off.request("GET", "/props")[1]["st3"] is None


def test_a_router_serves_pruned_models(start_server: Start, scenes, tmp_path):
    # broken if a model that the router starts did not get the schedule
    model, mmproj = demo.model_paths()
    preset = tmp_path / "models.ini"
    preset.write_text(
        f"[llava]\nmodel = {model}\nmmproj = {mmproj}\nc = 2048\nthreads = 1\noverride-kv = st3.preset=str:st3\n"
    )
    router = start_server("--models-preset", str(preset), program="llama-server")
    told = router.chat(message(scenes[0].questions[0][0], scenes[0].picture), model="llava")
    assert told["st3"]["mode"] == "pruned-prefill", told["st3"]["reason"]
    assert text(told) == scenes[0].questions[0][1]
