"""What people's programs send: the openai client's calls, conversations, several slots; and the answers of `ask`."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from serving import LONG, Server, Start, data_url, message, text

from st3_edge import Llava, ST3Config, demo


@pytest.fixture(scope="module")
def client(server: Server):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def questions(scenes, n):
    """n pairs of a picture and a question, the shipped ones first, then the same questions about other pictures."""
    asked = [q for scene in scenes for q, _ in scene.questions]
    pairs = [(scene.picture, q) for scene in scenes for q, _ in scene.questions]
    pairs += [(scene.picture, q) for scene in scenes for q in asked if (scene.picture, q) not in pairs]
    return pairs[:n]


@pytest.mark.parametrize("preset", ["st3", "off"])
def test_it_answers_as_ask_does(start_server: Start, scenes, preset):
    # broken if prompt, schedule, picture or sampling differed between the server and Python
    running = start_server("-np", "1", "-c", "4096", "--preset", preset)
    pairs = questions(scenes, 100 if LONG else 12)
    wrong = []
    with Llava(*demo.model_paths(), ST3Config(preset=preset), n_threads=1) as llava:
        for picture, question in pairs:
            ours = llava.ask(picture, question, max_tokens=32, temperature=0)
            theirs = running.ask(question, picture)
            llava.reset()
            if ours.strip() != theirs.strip():
                wrong.append((picture.name, question, ours, theirs))
    assert not wrong


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_openai_client_shows_pictures(client, scenes, n):
    # broken if a picture were lost, or one were pruned as a part of another
    parts = [{"type": "image_url", "image_url": {"url": data_url(s.picture)}} for s in scenes[:n]]
    content = [{"type": "text", "text": scenes[0].questions[0][0]}, *parts]  # in Open WebUI's order
    done = client.chat.completions.create(
        model="any", messages=[{"role": "user", "content": content}], temperature=0, max_tokens=16
    )
    st3 = done.model_extra["st3"]
    assert st3["mode"] == "pruned-prefill", st3["reason"]
    assert [image["n"] for image in st3["images"]] == [576] * n
    assert [len(layers) for layers in st3["layers"]] == [576] * n
    assert done.choices[0].message.content
    assert done.usage.prompt_tokens > 576 * n


def test_a_streamed_answer_is_the_whole_one(client, scenes):
    # broken if a piece were lost, or the report not the last to come
    asked = {
        "model": "any",
        "messages": [message("Describe the picture.", scenes[0].picture)],
        "temperature": 0,
        "max_tokens": 48,
    }
    whole = client.chat.completions.create(**asked).choices[0].message.content
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
    told = [c for c in chunks if (c.model_extra or {}).get("st3")]
    assert told == chunks[-1:]
    assert told[0].model_extra["st3"]["given"] == 576


def test_six_turns_reuse_what_was_read(client, scenes):
    # broken if a later turn encoded or read the picture again, or lost it
    messages, cached = [], []
    for i, (question, _) in enumerate([*scenes[0].questions, *scenes[1].questions, *scenes[2].questions][:6]):
        messages.append(message(question, *([scenes[0].picture] if i == 0 else [])))
        done = client.chat.completions.create(
            model="any", messages=messages, temperature=0, max_tokens=16, extra_body={"id_slot": 0}
        )
        cached.append(done.usage.prompt_tokens_details.cached_tokens)
        assert done.model_extra["st3"]["given"] == 576
        messages.append({"role": "assistant", "content": done.choices[0].message.content})
    assert all(n > 576 for n in cached[1:]), cached


def test_the_same_question_again_gets_the_same_answer(server: Server, scenes):
    # broken if "regenerate" answered from what annealing, or another question, had left of the picture
    picture = scenes[0].picture
    first, other = "Describe the picture.", scenes[0].questions[0][0]
    options = {"id_slot": 1, "max_tokens": 64}
    whole = server.chat(message(first, picture), **options)
    again = server.chat(message(first, picture), **options)
    server.chat(message(other, picture), **options)
    after = server.chat(message(first, picture), **options)
    for answer in (again, after):
        assert text(answer) == text(whole)
        assert answer["st3"]["layers"] == whole["st3"]["layers"]


def test_four_slots_answer_as_one(server: Server, scenes):
    # broken if slots saw each other's pictures, or a shared batch pruned the wrong rows
    pairs = questions(scenes, 16)
    alone = [server.ask(question, picture, cache_prompt=False) for picture, question in pairs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda pair: server.ask(pair[1], pair[0], cache_prompt=False), pairs))
    assert together == alone


def test_two_pictures_then_the_first_alone(server: Server, scenes):
    # broken by upstream's keep_first: HTTP 500, "Chunk not found"
    options = {"id_slot": 2}
    server.ask("What is this?", scenes[0].picture, scenes[1].picture, **options)
    question, answer = scenes[0].questions[0]
    assert server.ask(question, scenes[0].picture, **options) == answer
