"""Conversations of one `Llava`: what the KV cache keeps between calls, and what failures leave of it."""

import numpy as np
import pytest
from PIL import Image

from st3_edge import ConfigError, Llava, PromptError, ST3Config, St3Error
from st3_edge.native import st3

FIRST = "What color is the star?"
SECOND = "How many shapes are there?"
THIRD = "Is there a blue ring?"
OFF = ST3Config(preset="off")
# Cuts alone: what is asked again is then what was kept.
# The budget is given: another one rounds the inputs of quantized weights otherwise, and bounds are of this one.
PVTP = ST3Config(preset="pvtp", budget=0.3)
CONFIGS = {"off": OFF, "pvtp": PVTP, "st3": ST3Config(budget=0.3)}


def user(text, *pictures) -> dict:
    return {
        "role": "user",
        "content": [*({"type": "image", "image": p} for p in pictures), {"type": "text", "text": text}],
    }


def said(text) -> dict:
    return {"role": "assistant", "content": text}


def ask(llava: Llava, messages, **options) -> dict:
    options = {"temperature": 0, "max_tokens": 8, "trace": True, **options}
    got = llava.create_chat_completion(messages, **options)["st3"]
    agrees(llava)
    return got


def agrees(llava: Llava) -> None:
    """The record is what the native cache holds."""
    assert st3.n_positions(llava._session.llama.ctx) == llava._session.conversation.n_positions


def logits(llava: Llava, messages, **options) -> np.ndarray:
    """Of the answer's first token: float32 [n_vocab]."""
    ask(llava, messages, max_tokens=1, **options)
    session = llava._session
    row = session.lib.llama_get_logits_ith(session.llama.ctx, -1)
    return np.ctypeslib.as_array(row, (session.llama.n_vocab,)).copy()


def nmse(got: np.ndarray, expected: np.ndarray) -> float:
    """Mean square error over the expected logits' variance."""
    return float(np.mean((got - expected) ** 2) / np.var(expected))


@pytest.fixture
def encoded(monkeypatch) -> list:
    """The images that the vision encoder has seen since the test began."""
    from st3_edge.runtime.vision import Tokenized

    seen = []
    real = Tokenized.encode
    monkeypatch.setattr(Tokenized, "encode", lambda self, image: (seen.append(image), real(self, image))[1])
    return seen


@pytest.fixture(scope="module")
def off(load) -> Llava:
    with load(OFF) as made:
        yield made


@pytest.fixture(scope="module")
def pvtp(load) -> Llava:
    with load(PVTP) as made:
        yield made


@pytest.fixture(autouse=True)
def begin_anew(off, pvtp) -> None:
    """Nothing is left of the test before: neither a conversation, nor pictures, nor compute buffers' contents."""
    from st3_edge.runtime.conversation import Embeddings

    for made in (off, pvtp):
        made.reset()
        made._session.embeddings = Embeddings(2**28)


def test_a_second_question_reads_no_picture_again(off, load, picture, encoded):
    # broken if the KV cache were emptied between calls, or the picture not recognised
    one = ask(off, [user(FIRST, picture)])
    assert one["reused"] == 0 and one["ms"]["encode"] > 0
    talk = [user(FIRST, picture), said(one["answer"]), user(SECOND)]
    two = ask(off, talk)
    # All of the first prompt, and the answer's one word: its end-of-sequence was sampled and not decoded.
    prompt = 576 + len(one["prompt_tokens"]) - 1
    assert two["reused"] == prompt + one["n_generated"]
    assert two["ms"]["encode"] == 0 and len(encoded) == 1
    assert two["flops"]["prefill"] < one["flops"]["prefill"] / 10
    with load(OFF) as fresh:
        expected = ask(fresh, talk)
        assert expected["reused"] == 0
        assert two["answer"] == expected["answer"]
        assert nmse(logits(off, talk), logits(fresh, talk)) < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_a_revisited_picture_is_pruned_as_if_there_were_no_call_before(name, load, picture, encoded):
    # broken if what the first question left of the picture reached the second
    talk = [user(FIRST, picture)]
    with load(CONFIGS[name], revisit="turn") as llava, load(CONFIGS[name]) as fresh:
        for question in (SECOND, THIRD):
            talk += [said(ask(llava, talk)["answer"]), user(question)]
        got = ask(llava, talk)
        assert got["ms"]["encode"] == 0 and len(encoded) == 1
        expected = ask(fresh, talk)
        assert got["answer"] == expected["answer"]
        if name != "off":
            assert got["reused"] == 4  # the beginning of the sequence, and "USER: "
            assert got["kept"] == expected["kept"] and got["kept"][0]
        fresh.reset()
        llava.reset()
        for turn in (talk[:1], talk[:3], talk):
            again = logits(llava, turn)
        assert nmse(again, logits(fresh, talk)) < 1e-5


def test_without_revisit_the_picture_stays_as_the_first_question_left_it(pvtp, picture, encoded):
    # broken if the picture were prefilled again, or its counts were lost
    one = ask(pvtp, [user(FIRST, picture)], revisit="never")
    talk = [user(FIRST, picture), said(one["answer"]), user(SECOND)]
    two = ask(pvtp, talk, revisit="never")
    assert two["reused"] == 576 + len(one["prompt_tokens"]) - 1 + one["n_generated"]
    assert two["visual_tokens"]["per_layer"] == one["visual_tokens"]["per_layer"]
    assert two["visual_tokens"]["given"] == 576 and two["schedule"]["counts"] == one["schedule"]["counts"]
    assert two["mode"] == "pruned-prefill" and two["ms"]["encode"] == 0
    assert ask(pvtp, talk, revisit="turn")["reused"] == 4
    assert len(encoded) == 1


@pytest.mark.parametrize("revisit", ["never", "turn"])
def test_another_first_question_prunes_for_itself(pvtp, load, picture, encoded, revisit):
    # broken if a question were shown what a question of another conversation had left of the picture
    ask(pvtp, [user(FIRST, picture)])
    got = ask(pvtp, [user(SECOND, picture)], revisit=revisit)
    assert got["reused"] == 4 and len(encoded) == 1
    with load(PVTP) as fresh:
        expected = ask(fresh, [user(SECOND, picture)])
    assert got["kept"] == expected["kept"] and got["answer"] == expected["answer"]


def test_the_same_question_again_computes_its_last_token(off, picture):
    # broken if nothing were decoded, and the logits were of the last answer, or the picture were read again
    first = ask(off, [user(FIRST, picture)])
    again = ask(off, [user(FIRST, picture)])
    assert again["reused"] == 576 + len(first["prompt_tokens"]) - 2
    assert again["answer"] == first["answer"]
    expected, got = (top["first_logits_top"][0] for top in (first, again))
    # Alone, a token is computed by other kernels than in the batch of a prompt.
    assert got[0] == expected[0] and got[1] == pytest.approx(expected[1], abs=0.1)


@pytest.mark.parametrize(
    ("then", "revisit"), [(FIRST, "never"), (SECOND, "never"), (SECOND, "turn")], ids=["", "another", "revisit"]
)
def test_a_question_asked_again_leaves_no_picture_to_others(pvtp, load, picture, encoded, then, revisit):
    # broken if it were forgotten that this question had pruned the picture: the next would be asked of what it left
    first = ask(pvtp, [user(FIRST, picture)])
    again = ask(pvtp, [user(FIRST, picture)])
    assert again["reused"] == 4 and len(encoded) == 1
    assert again["kept"] == first["kept"] and again["answer"] == first["answer"]
    talk = [user(then, picture)]
    if revisit == "turn":
        talk = [user(FIRST, picture), said(again["answer"]), user(then)]
    got = ask(pvtp, talk, revisit=revisit)
    with load(PVTP) as fresh:
        expected = ask(fresh, talk)
    assert got["reused"] == 4 and got["kept"] == expected["kept"] and got["answer"] == expected["answer"]


def test_an_answer_asked_for_again_sees_what_annealing_took(load, picture):
    # broken if the second try were given the picture as the first one's answer left it
    with load(ST3Config(anneal="linear", anneal_tokens=8, anneal_floor=0.1)) as llava:
        talk = [user("Describe the image.", picture)]
        first = ask(llava, talk, max_tokens=40)
        assert first["visual_tokens"]["held"][0] < 0.2 * 576
        again = ask(llava, talk, max_tokens=40)
        assert again["visual_tokens"] == first["visual_tokens"] and again["kept"] == first["kept"]
        assert again["answer"] == first["answer"]


def test_pictures_are_known_by_their_pixels(off, picture, scenes, tmp_path, encoded):
    # broken if a path, a URL or a file's bytes stood for the picture
    path = tmp_path / "picture.png"
    path.write_bytes(scenes[0].picture.read_bytes())
    one = ask(off, [user(FIRST, path)])
    talk = [said(one["answer"]), user(SECOND)]
    for same in (Image.open(picture), path.read_bytes(), path):
        Image.open(picture).save(tmp_path / "other.bmp")
        assert ask(off, [user(FIRST, same), *talk])["reused"] > 576
    assert ask(off, [user(FIRST, tmp_path / "other.bmp"), *talk])["reused"] > 576
    assert len(encoded) == 1
    path.write_bytes(scenes[1].picture.read_bytes())
    assert ask(off, [user(FIRST, path), *talk])["reused"] == 4
    assert len(encoded) == 2


@pytest.mark.parametrize("name", CONFIGS)
def test_pictures_of_one_message_and_of_several_turns(name, load, scenes, encoded):
    # broken if a later picture replaced an earlier one, or the counts were of the last one alone
    a, b, c = (scene.picture for scene in scenes[:3])
    with load(CONFIGS[name], revisit="never") as llava:
        one = ask(llava, [user(FIRST, a, b)], max_tokens=1)
        assert one["visual_tokens"]["given"] == 2 * 576 and len(encoded) == 2
        talk = [user(FIRST, a, b), said(one["answer"]), user(SECOND, c)]
        two = ask(llava, talk, max_tokens=1)
        assert two["visual_tokens"]["given"] == 3 * 576 and len(encoded) == 3
        assert two["reused"] >= 2 * 576 and two["visual_tokens"]["per_layer"][0] == 3 * 576
        for counts in two["schedule"]["counts"]:
            assert len(counts) == 3 and len(set(counts)) == 1
        if name == "off":
            assert set(two["visual_tokens"]["per_layer"]) == set(two["visual_tokens"]["held"]) == {3 * 576}
        # The same picture twice is two pictures, encoded once.
        three = ask(llava, [*talk, said("x"), user(THIRD, c, c)], max_tokens=1)
        assert three["visual_tokens"]["given"] == 5 * 576 and three["prompt_tokens"].count(-1) == 5
        assert len(encoded) == 3
        four = ask(llava, [*talk, said("x"), user(THIRD, c, c)], max_tokens=1, revisit="turn")
        assert four["visual_tokens"]["given"] == 5 * 576 and len(encoded) == 3


def test_forgotten_pictures_are_encoded_again_and_are_the_same(load, picture, encoded):
    # broken if a bound of 0 failed, or what is encoded anew differed from what was kept
    results = []
    for n_bytes in (0, 2**28):
        encoded.clear()
        with load(PVTP, image_cache_bytes=n_bytes) as llava:
            ask(llava, [user(FIRST, picture)])
            results.append(logits(llava, [user(SECOND, picture)]))
            assert len(encoded) == (2 if n_bytes == 0 else 1)
            assert (llava.last_report.ms.encode > 0) == (n_bytes == 0)
    assert np.array_equal(*results)


def test_reset_begins_anew(off, picture):
    # broken if something of the conversation stayed
    expected = logits(off, [user(SECOND, picture)])
    ask(off, [user(FIRST, picture), said("red"), user(SECOND)])
    off.reset()
    agrees(off)
    assert off._session.conversation.n_positions == 0
    assert ask(off, [user(SECOND, picture)], max_tokens=1)["reused"] == 0
    off.reset()
    assert np.array_equal(logits(off, [user(SECOND, picture)]), expected)


def test_a_template_that_ends_answers_otherwise_still_reuses_the_picture(load, picture):
    # broken if what was generated had to come back token by token
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}assistant:"
    with load(OFF, chat_template=template) as llava:
        one = ask(llava, [user(FIRST, picture)])
        two = ask(llava, [user(FIRST, picture), said(" " + one["answer"] + "  !"), user(SECOND)])
        assert two["reused"] >= 576 + len(one["prompt_tokens"]) - 1


def failing(real, when):
    """`real`, and a KeyboardInterrupt before or after it: Ctrl-C is seen between two native calls."""

    def call(*arguments):
        if when == "before":
            raise KeyboardInterrupt
        result = real(*arguments)
        if when == "after":
            raise KeyboardInterrupt
        return -3 if when == "refused" else result

    return call


@pytest.mark.parametrize(
    ("call", "when"),
    [(call, when) for call in ("prefill", "decode", "encode", "remove") for when in ("before", "after")]
    + [(call, "refused") for call in ("prefill", "decode")],
)
@pytest.mark.parametrize("revisit", ["never", "turn"])
def test_after_any_failure_the_conversation_goes_on(pvtp, picture, scenes, monkeypatch, call, when, revisit):
    # broken if the record and the cache parted: the next answer would come from a prompt that nobody gave
    other = scenes[1].picture
    talk = [user(FIRST, picture), said("red"), user(SECOND)]
    longer = [*talk, said("3"), user(THIRD, other)]

    def play():
        pvtp.reset()
        for turn in (talk[:1], talk):
            ask(pvtp, turn, max_tokens=2, revisit=revisit)

    play()
    expected = logits(pvtp, longer, revisit=revisit)
    pvtp._session.embeddings.__init__(2**28)
    play()
    target, name = {
        "prefill": (st3, "prefill"),
        "decode": (pvtp._session.lib, "llama_decode"),
        "encode": (pvtp._session.vision, "encode"),
        "remove": (st3, "remove"),
    }[call]
    monkeypatch.setattr(target, name, failing(getattr(target, name), when))
    with pytest.raises((KeyboardInterrupt, St3Error)):
        ask(pvtp, longer, revisit=revisit)
    monkeypatch.undo()
    if call != "remove":  # Ctrl-C in the clean-up itself: the next call cleans up
        agrees(pvtp)
    # After a failed decode the prompt is in the cache: its last token is computed alone, by other kernels.
    assert nmse(logits(pvtp, longer, revisit=revisit), expected) < (1e-3 if call == "decode" else 1e-5)
    assert pvtp.last_report.visual_tokens.given == 2 * 576


def test_a_prompt_that_cannot_fit_leaves_the_conversation(load, picture, encoded):
    # broken if room were made, or a picture looked at, before the prompt was measured
    with load(OFF, n_ctx=640) as llava:
        one = ask(llava, [user(FIRST, picture)])
        record = llava._session.conversation.record
        for bad in ([user("word " * 100, picture)], [user(FIRST, picture), said("x"), user(SECOND, picture)]):
            with pytest.raises(PromptError, match="n_ctx is 640"):
                ask(llava, bad)
            assert llava._session.conversation.record == record
        agrees(llava)
        two = ask(llava, [user(FIRST, picture), said(one["answer"]), user(SECOND)])
        assert two["reused"] > 576 and len(encoded) == 1


@pytest.mark.parametrize("name", CONFIGS)
def test_an_answer_dropped_in_its_middle_can_be_gone_on_from(name, load, picture):
    # broken if tokens that nobody read stayed unrecorded in the cache
    with load(CONFIGS[name], revisit="never") as llava:
        stream = llava.create_chat_completion([user("Describe the image.", picture)], stream=True, temperature=0)
        part = "".join(next(stream)["choices"][0]["delta"].get("content", "") for _ in range(12))
        del stream
        agrees(llava)
        prompt = llava._session.conversation.record.spans[0].end if name != "off" else 0
        got = ask(llava, [user("Describe the image.", picture), said(part), user(SECOND)])
        assert got["reused"] > 576 + prompt


def test_the_report_tells_of_prefill_and_of_the_end(load, picture):
    # broken if the two were mixed up
    with load(ST3Config(min_share=0.0, anneal="linear", anneal_tokens=16, anneal_floor=0.25)) as llava:
        got = ask(llava, [user("Describe the image.", picture)], max_tokens=40)
        per_layer, held = got["visual_tokens"]["per_layer"], got["visual_tokens"]["held"]
        assert got["n_generated"] > 17
        assert held == [max(1, int(0.25 * n + 0.5)) for n in per_layer]
        assert got["kv_bytes_end"]["live"] < got["kv_bytes"]["live"] < got["kv_bytes"]["full"]
        assert got["kv_bytes_end"]["full"] > got["kv_bytes"]["full"]


def test_a_revisit_of_another_name_is_refused(load, off):
    # broken if it silently meant one of the two
    with pytest.raises(ConfigError, match="revisit"):
        load(revisit="always")
    with pytest.raises(ConfigError, match="revisit"):
        ask(off, [user("Hi")], revisit="")
