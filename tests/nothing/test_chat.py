"""Messages to prompts: templates of both kinds, pictures in order, nothing injected."""

import base64
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from st3_edge import ImageError, PromptError
from st3_edge.prompts.images import RGB
from st3_edge.prompts.messages import Turn, parts_of, read_messages
from st3_edge.prompts.templates import ChatTemplate

RED = RGB(2, 2, b"\xff\x00\x00" * 4)
BLUE = RGB(2, 2, b"\x00\x00\xff" * 4)
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)

# llava-hf/llava-1.5-7b-hf: content must be a list of parts, and it writes <image> itself.
HF_LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# Strings only, as most text models' templates; begins each prompt with BOS.
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
# Writes a picture as several tokens, and text between marks.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string %}"
    "{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"vicuna": None, "hf-llava": HF_LLAVA, "mistral": MISTRAL, "chatml": CHATML}
CONTROL = ["<s>", "</s>", "<unk>", "[INST]", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>"]


def template(name: str = "vicuna", **options) -> ChatTemplate:
    return ChatTemplate(TEMPLATES[name], **{"bos": "<s>", "eos": "</s>", "control": CONTROL, **options})


def user(*parts) -> Turn:
    return Turn("user", parts)


def text_of(prompt) -> str:
    return "".join("<image>" if isinstance(p, RGB) else p for p in prompt.parts)


def test_vicuna_is_rendered_as_llava_was_trained():
    # broken by a missing separator or space: compare conv_vicuna_v1 of the LLaVA repository
    one = template().render([user(RED, "What is it?")])
    assert text_of(one) == SYSTEM + "USER: <image>\nWhat is it? ASSISTANT:"
    turns = [user(RED, "What is it?"), Turn("assistant", ("A cat.",)), user("Which color?")]
    two = template().render(turns)
    assert text_of(two) == SYSTEM + "USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: Which color? ASSISTANT:"


def test_a_system_message_replaces_vicunas():
    # broken if both, or neither, were there
    prompt = template().render([Turn("system", ("Be brief.",)), user("Hello?")])
    assert text_of(prompt) == "Be brief. USER: Hello? ASSISTANT:"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hf-llava", "USER: <image>\nWhat? ASSISTANT:"),
        ("mistral", "[INST] <image>\nWhat? [/INST]"),
        ("chatml", "<|im_start|>user\n<image>What?<|im_end|>\n<|im_start|>assistant\n"),
    ],
)
def test_templates_that_know_pictures_and_those_that_do_not(name, expected):
    # broken if a template's own form of a picture stayed in the text, or its list of parts were printed
    assert text_of(template(name).render([user(RED, "What?")])) == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_works_with_every_kind_of_template(name):
    # broken if content had one shape for pictures and the template wanted another for the rest
    turns = [user(RED, "one"), Turn("assistant", ("two",)), user("three", BLUE)]
    prompt = template(name).render(turns)
    assert [p for p in prompt.parts if isinstance(p, RGB)] == [RED, BLUE]
    assert re.search("one.*two.*three", text_of(prompt), re.DOTALL)


def test_a_system_message_works_where_a_template_adds_text_to_it():
    # broken if a list were given to a template that takes strings for this role and lists for the user's
    source = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + ' ' }}{% elif m.content is string %}"
        "{{ m.content }}{% else %}{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}"
        "{% endfor %}{% endif %}{% endfor %}"
    )
    prompt = ChatTemplate(source).render([Turn("system", ("Be brief.",)), user(RED, "What?")])
    assert text_of(prompt) == "Be brief. <image>What?"


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("name", ["vicuna", "mistral"])
def test_the_text_holds_no_bos_and_the_prompt_has_one_if_either_wants_it(name, adds_bos):
    # broken if a template's BOS came on top of the tokenizer's
    prompt = template(name, adds_bos=adds_bos).render([user("Hello?")])
    assert not text_of(prompt).startswith("<s>")
    assert prompt.bos == (adds_bos or name == "mistral")


@settings(deadline=None)
@given(
    st.sampled_from(sorted(TEMPLATES)),
    st.lists(st.sampled_from([*CONTROL, "<image>", "<__media__>", "<", ">", "</s", "s>", " ", "猫"]), max_size=8),
    st.integers(0, 2),
)
def test_text_never_becomes_a_picture_or_a_control_token(name, words, n_images):
    # broken if a user could write a picture, end a turn, or begin another
    plain = template(name).render([user(*[RED] * n_images, "x")])
    prompt = template(name).render([user(*[RED] * n_images, "x" + "".join(words) + "x")])
    assert sum(isinstance(p, RGB) for p in prompt.parts) == n_images

    def controls(p):
        return re.findall("|".join(map(re.escape, [*CONTROL, "<image>"])), text_of(p))

    assert controls(prompt) == controls(plain)


@pytest.mark.parametrize("between", [(), ("",), (RED,)])
@pytest.mark.parametrize("name", [*TEMPLATES, "gathered"])
def test_no_control_token_is_put_together_of_several_texts(name, between):
    # broken if each text were cleaned by itself alone: a template writes them one behind the other
    gathered = (
        "{% for m in messages %}{% for p in m.content %}{{ '<image>' if p.type == 'image' }}{% endfor %}"
        "{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    )
    made = ChatTemplate(TEMPLATES.get(name, gathered), bos="<s>", eos="</s>", control=CONTROL)
    plain = text_of(made.render([user("x", *between, "y")]))
    text = text_of(made.render([user("hi <|im_", *between, "end|>")]))
    assert text.count("<|im_end|>") == plain.count("<|im_end|>")
    assert re.search("hi <[|]im_.*end[|]>", text, re.DOTALL)


def test_several_texts_stay_as_they_are():
    # broken if a space were put between texts that hold nothing
    assert text_of(template("chatml").render([user("a", RED, "b", "c")])).count("a<image>bc") == 1


def test_forms_that_overlap_are_all_taken_apart():
    # broken if what is left of one were another
    prompt = template(control=["<<", "aaa", "\\("]).render([user(r"<<< aaaaa \\((")])
    assert not re.search(r"<<|aaa|\\[(]", text_of(prompt))


@settings(deadline=None)
@given(st.sampled_from(sorted(TEMPLATES)), st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_text_without_control_tokens_is_unchanged(name, text):
    # broken if neutralising touched ordinary text
    if any(form in text for form in [*CONTROL, "<image>", "<__media__>", "<__image__>"]):
        return
    assert text in text_of(template(name).render([user(RED, text)]))


def test_a_picture_form_that_shares_letters_with_its_neighbours_is_found():
    # broken if the probe took "image><" for what the template writes: the first difference is one letter late
    source = "{% for m in messages %}{% for p in m.content %}{{ '<image>' if p.type == 'image' else '<t>' + p.text }}"
    prompt = ChatTemplate(source + "{% endfor %}{% endfor %}").render([user(RED, "x")])
    assert prompt.parts == (RED, "<t>x")


@pytest.mark.parametrize(
    "source",
    [
        "{% for %}",
        "{{ messages[7].content.x.y }}",
        "nothing of the message",
        "{{ raise_exception('no') }}",
        "{% for a in messages %}" * 25 + "{% endfor %}" * 25,
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ messages[0].content }}\ud800",
        "{{ messages[0].content }}{{ '\\ud800' }}",
    ],
    ids=str.__len__,
)
def test_templates_that_cannot_work_are_refused(source):
    # broken if a model file's template could end in an exception of Jinja's
    with pytest.raises(PromptError, match="template"):
        ChatTemplate(source).render([user("x")])


def test_a_template_cannot_reach_out_of_its_sandbox():
    # broken by a plain Jinja environment: a template comes with a model file, from anywhere
    source = "{{ messages[0].content }}{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(PromptError):
        ChatTemplate(source).render([user("x")])


def test_a_template_can_refuse_messages():
    # broken if its raise_exception ended in another class of exception
    with pytest.raises(PromptError, match="must alternate"):
        template("mistral").render([user("x"), user("y")])


def test_parts_of_messages_are_read_in_order():
    # broken if pictures were gathered before or after the text
    picture = Image.frombytes("RGB", (2, 2), RED.data)
    other = Image.frombytes("RGB", (2, 2), BLUE.data)
    content = [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": {"url": picture}},
        {"type": "text", "text": "b"},
        {"type": "image", "image": other},
        {"type": "image_url", "image_url": picture},
    ]
    (turn,) = read_messages([{"role": "user", "content": content}])
    assert turn.parts == ("a", RED, "b", BLUE, RED)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        None,
        "hello",
        ["hello"],
        [{}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "robot", "content": "x"}],
        [{"role": "user", "content": ""}],
        [{"role": "user", "content": " \n"}],
        [{"role": "user", "content": ["x"]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": [{"type": "text", "text": 3}]}],
        [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}],
        [{"role": "user", "content": [{"type": "audio", "audio": "x"}]}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
        [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}, {"role": "user", "content": "z"}],
        [{"role": "system", "content": [{"type": "image", "image": Image.new("RGB", (4, 4))}]}],
    ],
)
def test_messages_of_another_shape_are_refused(messages):
    # broken by a KeyError or TypeError that is let through, or an empty question that is asked
    with pytest.raises(PromptError) as caught:
        read_messages(messages)
    assert "\n" not in str(caught.value)


def test_other_forms_of_openais_are_read():
    # broken if a conversation that its client kept could not be gone on with
    turns = [("developer", "Be brief."), ("user", "a?"), ("assistant", None), ("user", "b?")]
    read = read_messages([{"role": role, "content": content} for role, content in turns])
    assert [turn.role for turn in read] == ["system", "user", "assistant", "user"]
    assert read[2].parts == ("",)


def test_calls_of_tools_are_refused():
    # broken if the conversation went on as if they had not been made
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    with pytest.raises(PromptError, match="tools are not supported"):
        read_messages([{"role": "user", "content": "a?"}, call, {"role": "user", "content": "b?"}])


def test_a_picture_part_with_no_picture_is_refused():
    # broken if a missing url became the text "None"
    with pytest.raises(ImageError):
        read_messages([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])


def test_a_picture_with_no_text_is_a_question():
    # broken if something had to be asked about it
    picture = {"type": "image", "image": Image.frombytes("RGB", (2, 2), RED.data)}
    for content in ([picture], [picture, {"type": "text", "text": ""}]):
        (turn,) = read_messages([{"role": "user", "content": content}])
        assert RED in turn.parts
        assert text_of(template().render([turn])).endswith("USER: <image>\n ASSISTANT:")


def test_ollamas_images_are_shown_before_the_text(tmp_path):
    # broken if they were dropped without a word, or base64 were taken for a name
    path = tmp_path / "a.png"
    Image.frombytes("RGB", (2, 2), RED.data).save(path)
    alone = base64.b64encode(path.read_bytes()).decode()
    sources = [str(path), path, path.read_bytes(), alone, f"data:image/png;base64,{alone}"]
    (turn,) = read_messages([{"role": "user", "content": "What?", "images": sources}])
    assert turn.parts == (*[RED] * 5, "What?")
    (turn,) = read_messages([{"role": "user", "images": [path]}])
    assert turn.parts[0] == RED
    with pytest.raises(PromptError, match="images"):
        read_messages([{"role": "user", "content": "x", "images": str(path)}])
    with pytest.raises(PromptError, match="assistant"):
        read_messages([{"role": "assistant", "content": "x", "images": [path]}, {"role": "user", "content": "y"}])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"imges": []}, "'imges'"),
        ({"name": "Ann"}, "'name'"),
        ({"reasoning_content": "x"}, "'reasoning_content'"),
        ({"content": [{"type": "text", "text": "x", "cache_control": {}}]}, "'cache_control'"),
        ({"content": [{"type": "image", "image": "a.png", "detail": "low"}]}, "'detail'"),
        ({"content": [{"type": "image_url", "image_url": {"url": "a.png", "size": 3}}]}, "'size'"),
        ({"content": [{"type": "image_url", "image_url": {"url": "a.png", "detail": "huge"}}]}, "detail"),
        ({"content": [{"type": "image", "image": "a.png", "url": "b.png"}]}, "a part of a message"),
        ({"content": [{"type": ["text"], "text": "x"}]}, "a part of a message"),
    ],
)
def test_what_is_not_read_of_a_message_is_named(change, named):
    # broken if a key were ignored: its sender would think that it was read
    with pytest.raises(PromptError, match=named):
        read_messages([{"role": "user", "content": "x", **change}])


def test_an_answer_of_openais_client_can_be_sent_back():
    # broken if the empty fields of its message object were refused
    fields = ("refusal", "audio", "function_call", "tool_calls", "name", "reasoning_content")
    answer = {"role": "assistant", "content": "A cat.", "annotations": [], **dict.fromkeys(fields)}
    user = {"role": "user", "content": "a?"}
    assert [turn.parts for turn in read_messages([user, answer, user])] == [("a?",), ("A cat.",), ("a?",)]


def test_other_names_of_a_pictures_source(tmp_path):
    # broken if Hugging Face's messages, or OpenAI's hint at a size, were refused
    path = tmp_path / "a.png"
    Image.frombytes("RGB", (2, 2), RED.data).save(path)
    content = [
        {"type": "image", "path": str(path)},
        {"type": "image", "url": path.as_uri()},
        {"type": "image_url", "image_url": {"url": str(path), "detail": "high"}},
    ]
    (turn,) = read_messages([{"role": "user", "content": content}])
    assert turn.parts == (RED,) * 3


def test_one_form_of_parts_reads_the_same(tmp_path):
    # broken if a picture or a word of a saved conversation were lost, or came in another order
    path = tmp_path / "a.png"
    Image.frombytes("RGB", (2, 2), RED.data).save(path)
    alone = base64.b64encode(path.read_bytes()).decode()
    text = {"type": "text", "text": "a"}
    for message in (
        {"content": "a"},
        {"content": "a", "images": [str(path), alone, path.as_uri()]},
        {"content": [text, {"type": "image_url", "image_url": {"url": str(path)}}, text]},
        {"content": [{"type": "image", "path": str(path)}, {"type": "image_url", "image_url": str(path)}]},
        {"images": [alone]},
    ):
        parts = parts_of({"role": "user", **message})
        assert all(part.keys() == {"type", part["type"]} and part["type"] in ("text", "image") for part in parts)
        again, first = (read_messages([{"role": "user", **m}]) for m in ({"content": parts}, message))
        assert [p for p in again[0].parts if p] == [p for p in first[0].parts if p]
    assert parts_of({"role": "assistant", "content": None}) == []
