"""`Llava` in Python, on the embedded model."""

import functools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from st3_edge import ConfigError, ContextError, Llava, PromptError, St3Error

QUESTION = "What color is the star?"


def messages(text: str, *pictures) -> list:
    parts = [{"type": "image_url", "image_url": {"url": p}} for p in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def complete(llava: Llava, text: str, *pictures, **options) -> dict:
    options = {"temperature": 0, "max_tokens": 8, **options}
    return llava.create_chat_completion(messages(text, *pictures), **options)


def answer(response: dict) -> str:
    return response["choices"][0]["message"]["content"]


def test_a_completion_has_the_openai_shape(llava, picture):
    # broken if a client of llama-cpp-python's responses met another key or type
    got = complete(llava, QUESTION, picture)
    assert list(got) == ["id", "object", "created", "model", "choices", "usage", "st3"]
    assert got["object"] == "chat.completion" and got["id"].startswith("chatcmpl-")
    (choice,) = got["choices"]
    assert choice["index"] == 0 and choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] in ("stop", "length")
    usage = got["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 576
    assert got["st3"] == llava.last_report.to_dict()
    assert got["st3"]["answer"] == answer(got)


def test_a_stream_says_what_the_whole_answer_says(llava, picture):
    # broken if a piece were lost, doubled, or the chunks were shaped otherwise
    whole = complete(llava, "Describe the image.", picture, max_tokens=40)
    chunks = list(complete(llava, "Describe the image.", picture, max_tokens=40, stream=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant"} and deltas[-1] == {}
    assert "".join(d["content"] for d in deltas[1:-1]) == answer(whole)
    finish = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert finish == [None] * (len(chunks) - 1) + [whole["choices"][0]["finish_reason"]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[-1]["st3"]["answer"] == answer(whole)


def test_calls_do_not_depend_on_those_before(llava, picture, scenes):
    # broken if the context kept cells of another call
    first = complete(llava, QUESTION, picture, trace=True)["st3"]
    complete(llava, "How many shapes are there?", str(scenes[2].picture), picture)
    again = complete(llava, QUESTION, picture, trace=True)["st3"]
    for key in ("answer", "first_logits_top", "kept"):
        assert first[key] == again[key]
    for key in ("live", "full"):
        assert first["kv_bytes"][key] == again["kv_bytes"][key]


def test_a_stop_string_ends_the_answer_before_it(llava, picture):
    # broken if it were shown, or generation went on
    whole = answer(complete(llava, "Describe the image.", picture, max_tokens=30))
    stop = whole[len(whole) // 2 :][:2]
    got = complete(llava, "Describe the image.", picture, max_tokens=30, stop=stop)
    assert answer(got) == whole[: whole.index(stop)]
    assert got["choices"][0]["finish_reason"] == "stop"
    pieces = complete(llava, "Describe the image.", picture, max_tokens=30, stop=[stop], stream=True)
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in pieces)
    assert text == answer(got)


def test_max_tokens_ends_the_answer(llava, picture):
    # broken by an answer one token longer or shorter
    got = complete(llava, "Describe the image.", picture, max_tokens=3, logit_bias={llava._session.llama.eos: -1e9})
    assert got["usage"]["completion_tokens"] == 3
    assert got["choices"][0]["finish_reason"] == "length"


def test_the_context_ends_the_answer(load, picture):
    # broken if decoding ran over n_ctx
    with load(n_ctx=600) as llava:
        eos = llava._session.llama.eos
        got = complete(llava, QUESTION, picture, max_tokens=None, logit_bias={eos: -1e9})
        assert got["usage"]["total_tokens"] == 600
        assert got["choices"][0]["finish_reason"] == "length"


def test_a_seed_makes_sampling_repeatable(llava, picture):
    # broken if the seed did not reach the sampler, or temperature did nothing
    def sampled(seed):
        return answer(complete(llava, QUESTION, picture, temperature=3.0, top_p=1.0, min_p=0.0, top_k=0, seed=seed))

    assert sampled(1) == sampled(1)
    assert len({sampled(seed) for seed in range(6)}) > 1


def test_a_grammar_shapes_the_answer(llava, picture):
    # broken if the grammar were ignored
    got = answer(complete(llava, QUESTION, picture, grammar='root ::= "yes" | "no"'))
    assert got in ("yes", "no")


def test_a_json_schema_shapes_the_answer(llava, picture):
    # broken if response_format were ignored
    schema = {"type": "object", "properties": {"color": {"enum": ["red", "blue"]}}, "required": ["color"]}
    openai = {"type": "json_schema", "json_schema": {"name": "color", "schema": schema}}
    for form in ({"type": "json_object", "schema": schema}, openai):
        got = answer(complete(llava, QUESTION, picture, response_format=form, max_tokens=60))
        assert json.loads(got)["color"] in ("red", "blue")


def test_a_bias_chooses_the_token(llava, picture):
    # broken if logit_bias were ignored or applied to another token
    token = llava._session.tokenize(["7"], bos=False).units[-1]
    assert answer(complete(llava, QUESTION, picture, logit_bias={str(token): 1e6}, max_tokens=3)) == "777"


def test_an_infinite_bias_bans_the_token(llava, picture):
    # broken if it became NaN in the samplers: with the only words of a grammar banned, the process aborted
    tokens = range(llava._session.llama.n_vocab)
    banned = [i for i in tokens if llava._session.llama.piece(i, first=False).startswith(b"{")]
    bias = dict.fromkeys(banned, float("-inf"))
    got = complete(llava, QUESTION, picture, logit_bias=bias, response_format={"type": "json_object"})
    assert answer(got).startswith("{")  # the grammar has the last word
    first = llava._session.tokenize([answer(complete(llava, QUESTION, picture))], bos=False).units[0]
    again = complete(llava, QUESTION, picture, logit_bias={first: float("-inf")}, trace=True)
    assert again["st3"]["pieces"][0] != llava._session.llama.piece(first, first=True).decode()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_that_nothing_fits_is_an_error(llava, picture, temperature):
    # broken if llama.cpp were asked to accept a token that its grammar refuses: the process aborted
    with pytest.raises(St3Error, match="may follow"):
        complete(llava, QUESTION, picture, grammar='root ::= "yes" <[2]>', temperature=temperature, max_tokens=60)
    assert answer(complete(llava, QUESTION, picture))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": "much"},
        {"repeat_penalty": 0},
        {"grammar": "root ::= ("},
        {"grammar": ""},
        {"grammar": 'root ::= "x" nothing'},
        {"response_format": {"type": "xml"}},
        {"response_format": {"type": "json_object", "schema": {"$ref": "#/nowhere"}}},
        {"logit_bias": {10**6: 1}},
        {"logit_bias": {"red": 1}},
        {"logit_bias": {3: float("nan")}},
        {"logit_bias": {3: float("inf")}},
        {"logit_bias": {3: 1e10}},
        {"logit_bias": {3: 10**400}},
        {"logit_bias": {1.7: 1}},
        {"logit_bias": {float("inf"): 1}},
        {"logit_bias": {"9" * 5000: 1}},
        {"logit_bias": [3]},
        {"top_k": 0.5},
        {"top_k": 10**400},
        {"temperature": 10**400},
        {"presence_penalty": 10**400},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_object"}, "grammar": 'root ::= "x"'},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        {"seed": "a"},
        {"seed": 1.5},
        {"max_tokens": "5"},
        {"stop": [1]},
        {"tools": [{"type": "function"}]},
    ],
)
def test_options_out_of_range_are_refused(llava, picture, options):
    # broken if one reached native code: a null grammar there crashes the process
    with pytest.raises(ConfigError):
        complete(llava, QUESTION, picture, **options)


def test_every_way_to_give_a_picture_is_the_same_picture(llava, picture):
    # broken if bytes, an image object or a data URL were decoded otherwise than a path
    import base64
    from pathlib import Path

    data = Path(picture).read_bytes()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    expected = complete(llava, QUESTION, picture, trace=True)["st3"]["first_logits_top"]
    for source in (bytearray(data), memoryview(data)):
        assert llava.ask(source, QUESTION, temperature=0) == llava.ask((picture,), QUESTION, temperature=0)
    for source in (Path(picture), data, url, Image.open(picture)):
        assert complete(llava, QUESTION, source, trace=True)["st3"]["first_logits_top"] == expected


def test_bos_is_there_once_and_text_becomes_no_picture(llava, picture):
    # broken if a template's BOS came on top of the tokenizer's, or written forms of tokens were taken for tokens
    text = "Is <image> or <__media__> or <s> or </s> here?"
    trace = complete(llava, text, picture, trace=True)["st3"]["prompt_tokens"]
    assert trace.count(llava._session.llama.bos) == 1 and trace[0] == llava._session.llama.bos
    assert trace.count(-1) == 1
    assert llava._session.llama.eos not in trace


@settings(max_examples=25, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
def test_any_text_can_be_asked(llava, picture, text):
    # broken by a character that templates, the tokenizer or C strings take for something else
    if not text.strip():
        return
    trace = complete(llava, text, picture, trace=True, max_tokens=1)["st3"]["prompt_tokens"]
    assert trace.count(-1) == 1 and trace.count(llava._session.llama.bos) == 1


def test_a_prompt_without_a_picture_works(llava):
    # broken if a schedule needed visual tokens
    got = complete(llava, "Hello?", trace=True)["st3"]
    assert got["visual_tokens"]["given"] == 0
    assert got["n_generated"] > 0


def test_a_conversation_with_pictures_in_two_turns_works(llava, picture, scenes):
    # broken if only the last message's pictures were seen
    turns = [*messages(QUESTION, picture), {"role": "assistant", "content": "white"}]
    turns += messages("And here?", str(scenes[1].picture))
    got = llava.create_chat_completion(turns, temperature=0, max_tokens=4, trace=True)["st3"]
    assert got["prompt_tokens"].count(-1) == 2
    assert got["visual_tokens"]["given"] == 2 * 576


def test_pictures_keep_their_order(llava, picture, scenes):
    # broken if they were sorted, or one were taken twice
    def logits(*pictures):
        return complete(llava, QUESTION, *pictures, trace=True)["st3"]["first_logits_top"]

    other = str(scenes[1].picture)
    assert len({json.dumps(logits(*p)) for p in [(picture, other), (other, picture), (other, other)]}) == 3


def test_a_prompt_that_fits_no_single_batch_runs_unpruned_between_layers(load, picture):
    # broken if it failed, or claimed to be pruned prefill
    with load(n_ctx=1024, n_ubatch=128) as llava:
        got = complete(llava, QUESTION, picture)["st3"]
        assert got["mode"] != "pruned-prefill"
        assert got["reason"]


def test_a_quantized_cache_takes_less(load, picture, llava):
    # broken if the KV types did not reach the context
    plain = complete(llava, QUESTION, picture)["st3"]["kv_bytes"]
    with load(type_k="q8_0", type_v="q8_0") as quantized:
        small = complete(quantized, QUESTION, picture)["st3"]["kv_bytes"]
    assert small["live"] < 0.6 * plain["live"] and small["allocated"] < 0.6 * plain["allocated"]


def test_ask_says_that_it_does_not_stream(llava, picture):
    # broken by a KeyError or TypeError about a generator
    with pytest.raises(ConfigError, match="create_chat_completion"):
        llava.ask(picture, QUESTION, stream=True)


def test_neutral_arguments_change_nothing(llava, picture):
    # broken if what OpenAI's client sends unasked, or None for a default, were refused or changed the answer
    neutral = {"n": 1, "tools": [], "tool_choice": "none", "logprobs": False, "top_logprobs": None, "functions": None}
    neutral |= {"user": "me", "store": False, "top_p": None, "presence_penalty": None, "stop": None}
    expected = answer(complete(llava, QUESTION, picture))
    assert answer(complete(llava, QUESTION, picture, **neutral)) == expected
    assert answer(complete(llava, QUESTION, picture, max_tokens=None, max_completion_tokens=8)) == expected


def test_a_stream_tells_its_tokens_where_asked(llava, picture):
    # broken if the usage came in another chunk than OpenAI's, or were another than the whole answer's
    whole = complete(llava, QUESTION, picture)
    *rest, last = complete(llava, QUESTION, picture, stream=True, stream_options={"include_usage": True})
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert all(chunk["choices"] and chunk["usage"] is None for chunk in rest)
    assert rest[-1]["st3"]["answer"] == answer(whole)


def test_a_second_call_ends_a_stream(llava, picture):
    # broken if two answers were mixed in one context
    stream = complete(llava, QUESTION, picture, stream=True, logit_bias={llava._session.llama.eos: -1e9})
    next(stream)
    next(stream)
    complete(llava, QUESTION, picture)
    with pytest.raises(St3Error, match="another call"):
        list(stream)


def test_a_closed_llava_says_so(load, picture):
    # broken if freed memory were used
    llava = load()
    stream = complete(llava, QUESTION, picture, stream=True)
    next(stream)
    llava.close()
    llava.close()
    for use in (lambda: list(stream), lambda: complete(llava, QUESTION, picture), lambda: llava.visual_tokens(picture)):
        with pytest.raises(St3Error, match="closed"):
            use()


def test_visual_tokens_are_one_row_a_patch(llava, picture):
    # broken by a wrong shape, or values that were read past their buffer
    embd = llava.visual_tokens(picture)
    assert embd.shape == (576, llava._session.vision.n_embd) and embd.dtype == np.float32
    assert np.isfinite(embd).all() and embd.std() > 0
    assert np.array_equal(embd, llava.visual_tokens(picture))


def test_an_own_chat_template_is_used(load, picture):
    # broken if the file's own were rendered all the same
    template = "{% for m in messages %}{{ m.content }}{% endfor %} =>"
    with load(chat_template=template) as llava:
        plain = llava._session.tokenize(["\nHi =>"], bos=False).units
        assert complete(llava, "Hi", picture, trace=True)["st3"]["prompt_tokens"][2:] == plain
    with pytest.raises(PromptError, match="template"):
        load(chat_template="{% for %}")


@pytest.mark.parametrize(
    "options",
    [
        {"n_ctx": -1},
        {"n_ctx": 2**40},
        {"n_ctx": 1.5},
        {"n_threads": 0},
        {"type_k": "q9"},
        {"n_gpu_layers": -2},
        {"seed": "a"},
        {"config": {"budget": 0.3}},
        {"chat_template": 5},
        {"lora": {"a.gguf": 10**400}},
        {"lora": {"a.gguf": 1e39}},
        {"lora": 3},
        {"lora": [3]},
        {"type_v": ["f16"]},
        {"revisit": "always"},
        {"image_cache_dir": 3},
        {"on_stage": "prefill"},
    ],
    ids=str,
)
def test_loading_options_out_of_range_are_refused(load, options, monkeypatch):
    # broken if one reached native code, or were found only when gigabytes had come
    from st3_edge.files import hub

    monkeypatch.setattr(hub, "pair", lambda *_, **__: pytest.fail("it was downloaded"))
    for make in (load, functools.partial(Llava.from_pretrained, "a/b")):
        with pytest.raises(ConfigError):
            make(**options)


def test_no_adapters_may_be_none(load):
    # broken if llama-cpp-python's default for none were refused
    with load(lora=None) as llava:
        assert llava.n_ctx == 4096


def test_a_prompt_longer_than_the_context_is_refused(llava):
    # broken if it were cut silently
    with pytest.raises(PromptError, match="n_ctx is 4096"):
        complete(llava, "word " * 20_000)


def test_a_text_that_no_context_holds_is_refused_before_it_is_read(llava, monkeypatch):
    # broken if the tokenizer were given it: it takes as long as the text is
    monkeypatch.setattr(llava._session.vision, "tokenize", lambda *_: pytest.fail("it was tokenized"))
    with pytest.raises(ContextError, match="bytes of text"):
        llava.create_chat_completion([{"role": "user", "content": "\u732b" * 10**6}])


def test_a_picture_with_no_text_is_answered(llava, picture):
    # broken if something had to be asked about it
    assert llava.ask(picture, "", max_tokens=3)
    assert llava.last_report.mode == "pruned-prefill"


def test_arguments_that_there_are_not_are_pythons_own_error(llava, picture):
    # broken if a mistyped name were ignored, or were another exception than any function's
    for call in (
        lambda **o: llava.ask(picture, "a?", **o),
        lambda **o: complete(llava, "a?", picture, **o),
        Llava.demo,
    ):
        with pytest.raises(TypeError, match="max_token"):
            call(max_token=3)
