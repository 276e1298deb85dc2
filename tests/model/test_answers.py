"""The embedded model answers what it was trained for. The large measurement is scripts/quality.py."""

import time

from st3_edge import ST3Config


def test_questions_about_the_shipped_pictures_are_answered_right(load, scenes):
    # broken if the vision encoder, the prompt's layout or the tokenizer differed from what the model was trained with,
    # or if pruning cost more than an answer
    wrong: dict[str, list] = {}
    for name, config in (("off", ST3Config(preset="off")), ("st3", ST3Config())):
        with load(config) as llava:
            asked = [(scene.picture, *asked) for scene in scenes for asked in scene.questions]
            answers = [(q, a, llava.ask(p, q, temperature=0, max_tokens=8)) for p, q, a in asked]
        wrong[name] = [answer for answer in answers if answer[1] != answer[2]]
    assert len(wrong["off"]) <= 0.1 * len(asked), wrong
    assert len(wrong["st3"]) <= len(wrong["off"]) + 1, wrong


def test_a_shipped_picture_is_described_right(load, scenes):
    # broken if long answers went astray where short ones do not: positions or the cache of later tokens
    with load(ST3Config(preset="off")) as llava:
        got = llava.ask(scenes[0].picture, "Describe the image.", temperature=0, max_tokens=160)
    words = set(got.split())
    expected = set(scenes[0].caption.split())
    assert len(words & expected) >= 0.7 * len(expected), got


def test_the_first_token_has_its_whole_time(llava, picture):
    # broken if a part were left out, or if time that the caller takes were counted
    llava.reset()
    llava.last_report = None
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is there?"}]
    chunks = llava.create_chat_completion([{"role": "user", "content": content}], stream=True, max_tokens=4)
    time.sleep(3)
    started = time.perf_counter()
    while not llava.last_report or not llava.last_report.ms.first_token:
        next(chunks)
    took = 1e3 * (time.perf_counter() - started)
    ms = llava.last_report.ms
    first = ms.first_token
    assert ms.encode + ms.prefill < first < took + 2900
    list(chunks)
    assert llava.last_report.ms.first_token == first
