"""`st3-edge chat`: what its lines do, with a stand-in for the model."""

import io
import itertools
import os
import signal
from types import SimpleNamespace

import pytest
from chatting import Console, Model
from PIL import Image

from st3_edge import ContextError, PromptError, ST3Config
from st3_edge.commands.chat.command import Chat
from st3_edge.prompts import images
from st3_edge.runtime.state import MAGIC


def test_questions_and_answers_follow_each_other(talk):
    # broken if an answer were left out of the conversation, or notes were mixed into the answers
    model = Model()
    console = talk(model, "a?", "", "b?")
    assert console.out == "one two\none two\n"
    roles = [[m["role"] for m in messages] for messages in model.asked]
    assert roles == [["user"], ["user", "assistant", "user"]]
    assert model.asked[1][1]["content"] == "one two"


def test_a_picture_is_shown_with_one_question_and_stays_in_the_conversation(talk, tmp_path):
    # broken if it were sent again with each question, forgotten, or kept as a path that can change
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4), "red").save(path)
    model = Model()
    console = talk(model, f"/image {path}", "a?", "b?", pictures=[images.data_url(str(path))])
    kinds = [[part["type"] for part in message["content"]] for message in model.asked[1][::2]]
    assert kinds == [["image", "image", "text"], ["text"]]
    assert images.load(model.asked[0][0]["content"][1]["image"]) == images.load(path)
    assert "error" not in console.err


def test_reset_forgets_pictures_too(talk, tmp_path):
    # broken if a picture of the conversation before were shown with the first question of the next
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4), "red").save(path)
    model = Model()
    talk(model, f"/image {path}", "/reset", "a?")
    assert [part["type"] for part in model.asked[0][0]["content"]] == ["text"]


def test_an_error_is_told_and_the_conversation_goes_on(talk, tmp_path):
    # broken if it ended the program, or the question that failed stayed in the conversation
    def fails():
        raise PromptError("too long")
        yield

    model = Model(fails)
    console = talk(model, "a?", f"/image {tmp_path}/none.png", "/load bad", "b?")
    assert console.err.count("st3-edge: error: ") == 4
    assert [len(messages) for messages in model.asked] == [1, 1]


def test_ctrl_c_stops_the_answer_and_not_the_program(talk):
    # broken if the program ended, the answer went on, or what was said of it were lost
    def endless():
        for i in itertools.count():
            if i == 3:
                os.kill(os.getpid(), signal.SIGINT)
            yield "x"

    model = Model(endless)
    console = talk(model, "a?", terminal=True)
    assert model.closed
    assert "xxx" in console.out

    model.words = ("fine",)
    chat = Chat(Console(), model, [], {"max_tokens": 9})
    chat._do("b?")
    assert chat._messages[-1]["content"] == "fine"


def test_an_answer_that_was_stopped_stays_as_far_as_it_came(talk):
    # broken if the conversation held a question without an answer
    def stopped():
        yield "x"
        os.kill(os.getpid(), signal.SIGINT)
        yield "y"

    model = Model(stopped)
    talk(model, "a?", "/save f", terminal=True)
    assert [message["role"] for message in model.kept] == ["user", "assistant"]
    assert model.kept[1]["content"] == "x"
    model.words = lambda: os.kill(os.getpid(), signal.SIGINT) or ("x",)
    console = talk(model, "a?", "/save f", "b?", terminal=True)
    assert model.kept == [] and "quit leaves" not in console.err


def test_commands_reach_the_model(talk):
    # broken if one were taken for a question, or a path lost a part
    model = Model()
    console = talk(model, "a?", "/save my file", "/reset", "/load my file", "b?", "/rep", "/what", "/quit", "c?")
    assert model.calls == [("save", "my file"), "reset", ("load", "my file")]
    assert [len(messages) for messages in model.asked] == [1, 3]
    assert "1 question so far" in console.err and "no answer yet" in console.err and "no command" in console.err


def test_a_conversation_that_is_fetched_begins_without_pictures(talk, tmp_path):
    # broken if a picture of the conversation before were shown with the next question of the other
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4), "red").save(path)
    model = Model()
    talk(model, "a?", "/save f", f"/image {path}", "/load f", "b?")
    assert [part["type"] for part in model.asked[1][-1]["content"]] == ["text"]


def test_save_replaces_conversations_and_nothing_else(talk, tmp_path):
    # broken if a picture, a folder or a device were replaced because its name was typed
    kept, photo, folder = tmp_path / "kept", tmp_path / "photo.jpg", tmp_path / "folder"
    kept.write_bytes(MAGIC + b"...")
    photo.write_bytes(b"a photo")
    folder.mkdir()
    os.mkfifo(tmp_path / "pipe")
    model = Model()
    console = talk(model, *(f"/save {tmp_path / name}" for name in ("photo.jpg", "folder", "pipe", "new", "kept")))
    assert model.calls == [("save", str(tmp_path / name)) for name in ("new", "kept")]
    assert console.err.count("is no saved conversation: give another name") == 3


def test_a_question_about_somebody_who_is_no_user_is_a_question(talk):
    # broken by a RuntimeError about a home directory
    model = Model()
    talk(model, "is ~nobodyatall here?", "/image ~nobodyatall/a.png", "b?")
    assert len(model.asked) == 2


def test_bytes_that_are_no_text_are_told(monkeypatch):
    # broken by a traceback of UnicodeDecodeError; a name of a file may be in another encoding
    console, model = Console(), Model()
    stdin = io.TextIOWrapper(io.BytesIO(b"/image caf\xe9.png\na?\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", stdin)
    assert Chat(console, model, [], {"max_tokens": 9}).loop() == 1
    assert "No such file" in console.err and len(model.asked) == 1


def test_an_answer_that_was_cut_is_said_to_be(talk):
    # broken if a person took a part of an answer for all of it
    model = Model()
    model.last_report = SimpleNamespace(finish_reason="length", n_generated=9)
    assert "(cut at --max-tokens 9)" in talk(model, "a?").err
    model.last_report.n_generated = 8
    assert "(the context of 100 tokens is full: raise --n-ctx)" in talk(model, "a?").err
    model.last_report.finish_reason = "stop"
    assert "cut" not in (err := talk(model, "a?").err) and "full" not in err


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_mark_at_the_head_of_a_script_is_no_part_of_it(monkeypatch, encoding):
    # broken if the first line were another: a command would be asked as a question
    console, model = Console(), Model()
    stdin = io.TextIOWrapper(io.BufferedReader(io.BytesIO("/report\na é?\n".encode(encoding))), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", stdin)
    assert Chat(console, model, [], {"max_tokens": 9}).loop() == 0
    assert "no answer yet" in console.err
    assert [message["content"][-1]["text"] for message in model.asked[0]] == ["a é?"]


class Narrow(Model):
    """Takes so many messages and pictures, all in all."""

    def __init__(self, size) -> None:
        super().__init__()
        self.size = size

    def create_chat_completion(self, messages, **options):
        parts = [part for m in messages if isinstance(m["content"], list) for part in m["content"]]
        if len(messages) + sum(part["type"] == "image" for part in parts) > self.size:
            raise ContextError("the prompt is too long")
        return super().create_chat_completion(messages, **options)


def test_a_conversation_that_is_full_goes_on(talk, tmp_path):
    # broken if each further question ended in an error, or the picture that all is about were forgotten first
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4), "red").save(path)
    model = Narrow(6)
    console = talk(model, f"/image {path}", *(f"{i}?" for i in range(8)))
    assert len(model.asked) == 8
    assert console.err.count("the context of 100 tokens is full") == 3
    assert "their pictures kept; /clear begins anew" in console.err
    for messages in model.asked:
        assert messages[0]["content"][0]["type"] == "image"
    assert [m["content"][-1]["text"] for m in model.asked[-1][::2]] == ["6?", "7?"]


def test_where_pictures_alone_fill_the_context_the_oldest_goes(talk, tmp_path):
    # broken if pictures were kept until nothing could be asked
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4), "red").save(path)
    model = Narrow(4)
    console = talk(model, *[f"/image {path}"] * 3, "a?", f"/image {path}", "b?")
    assert "the oldest picture is forgotten" in console.err
    assert [len(m["content"]) for m in model.asked[-1]] == [4]


def test_a_question_that_is_too_long_by_itself_is_an_error_and_nothing_is_forgotten(talk, tmp_path):
    # broken if it were asked for ever, or the conversation were gone because of it
    console = talk(Narrow(0), "a?")
    assert console.err.count("st3-edge: error: the prompt is too long") == 1
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4), "red").save(path)
    model = Narrow(4)
    console = talk(model, f"/image {path}", "a?", f"/image {path}", f"{path} {path} {path} {path} b?", "/save f", "c?")
    assert len(model.kept) == 2 and model.kept[0]["content"][0]["type"] == "image"
    assert "forgotten" not in console.err.partition("error")[0]
    assert [part["type"] for part in model.asked[-1][-1]["content"]].count("image") == 2


def test_after_an_answer_that_filled_the_context_there_is_room_again(talk, tmp_path):
    # broken if the next answer were cut after a word
    model = Model()
    model.last_report = SimpleNamespace(finish_reason="length", n_generated=8)
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4), "red").save(path)
    console = talk(model, f"{path} a?", "b?", "c?")
    assert [len(messages) for messages in model.asked] == [1, 1, 1]
    assert console.err.count("their pictures kept") == 3
    for messages in model.asked:  # broken if the pictures went, though it was said that they were kept
        assert [part["type"] for part in messages[0]["content"]] == ["image", "text"]


@pytest.mark.parametrize("written", ["'{}'", '"{}"', "{}"])
def test_a_name_that_was_dropped_on_the_terminal(talk, tmp_path, written):
    # broken if quotes or backslashes became a part of the name
    path = tmp_path / "my picture.png"
    Image.new("RGB", (4, 4), "red").save(path)
    name = written.format(path) if written != "{}" else str(path).replace(" ", "\\ ")
    assert "shown with the next question" in talk(Model(), f"/image {name}").err


def test_a_picture_and_its_question_in_one_line(talk, tmp_path):
    # broken if a dropped picture were answered as text
    path = tmp_path / "a b.png"
    Image.new("RGB", (4, 4), "red").save(path)
    model = Model()
    console = talk(model, f"'{path}' What is it?", str(path), "And this?", f"{tmp_path}/none.png what?")
    kinds = [[part["type"] for part in messages[-1]["content"]] for messages in model.asked]
    assert kinds == [["image", "text"], ["image", "text"]]
    assert model.asked[0][0]["content"][1]["text"] == "What is it?"
    assert console.err.count("error: there is no picture") == 1


def test_the_pictures_of_a_line_that_failed_do_not_come_twice(talk, tmp_path):
    # broken if they stayed for the next question unsaid: the corrected line would show each of them twice
    paths = [tmp_path / name for name in ("a.png", "b.png", "broken.png")]
    for path in paths[:2]:
        Image.new("RGB", (4, 4), "red").save(path)
    paths[2].write_bytes(b"no picture")

    def fails():
        raise PromptError("too long")
        yield

    model = Model(fails)
    chat = Chat(Console(), model, [], {"max_tokens": 9})
    chat.do(f"compare {paths[0]} {paths[2]}")
    chat.do(f"/image {paths[1]}")
    chat.do(f"compare {paths[0]}")
    model.words = ("fine",)
    chat.do(f"compare {paths[0]}")
    assert "name its pictures again" in chat._console.err
    shown = [[p["image"] for p in messages[-1]["content"] if p["type"] == "image"] for messages in model.asked]
    assert shown == [[images.data_url(str(paths[1])), images.data_url(str(paths[0]))]] * 2
    assert chat.pictures == []


def test_retry_gives_another_answer_in_the_place_of_the_last(talk):
    # broken if the question were asked as a new one, or an answer were lost where there is no other
    model = Model()
    console = talk(model, "/retry", "a?", "b?", "/retry", "/save f")
    assert "error: there is no question" in console.err and "temperature 0.8" in console.err
    assert [len(messages) for messages in model.asked] == [1, 3, 3]
    assert model.asked[1] == model.asked[2] and len(model.kept) == 4
    model.words = ()
    talk(model, "a?")
    chat = Chat(Console(), Model(), [], {"max_tokens": 9})
    chat.do("a?")
    chat._llava.words = ()
    chat.do("/retry")
    assert [message["role"] for message in chat._messages] == ["user", "assistant"]


def test_a_system_message_stands_before_all_and_is_kept(talk):
    # broken if it were asked as a question, or lost with the conversation
    model = Model()
    console = talk(model, "/system", "/system Be short.", "a?", "/save f", "/system -", "b?", "/load f", "c?")
    roles = [[m["role"] for m in messages] for messages in model.asked]
    assert roles[0] == ["system", "user"] and roles[1] == ["user", "assistant", "user"]
    assert roles[2][0] == "system" and model.asked[2][0]["content"] == "Be short."
    assert "no system message" in console.err


def test_a_budget_loads_the_model_anew_and_keeps_the_conversation():
    # broken if two models were in memory at once, the conversation were lost, or a bad number ended the chat
    loaded, first = [], Model()
    first.close = lambda: loaded.append("closed")

    def load(config):
        loaded.append(config)
        return Model()

    console = Console()
    chat = Chat(console, first, [], {"max_tokens": 9}, ST3Config(budget=0.2, start=3), load)
    for line in ("a?", "/budget", "/budget 7", "/budget 30%"):
        chat.do(line)
    assert loaded == ["closed", ST3Config(budget=0.3, start=3)]
    chat._llava.close = lambda: None
    chat.do("b?")
    assert [len(m) for m in chat._llava.asked] == [3]
    chat.do("/budget 1")
    assert loaded[-1] == ST3Config(preset="off")
    assert console.err.count("error: ") == 1


def test_words_that_leave(talk):
    # broken if the model were asked to quit
    for word in ("exit", "quit", "/exit", "/bye"):
        model = Model()
        talk(model, word, "a?")
        assert model.asked == []


USER, ANSWER = {"role": "user", "content": "a?"}, {"role": "assistant", "content": "one"}


@pytest.mark.parametrize("messages", [[USER], [USER, ANSWER, {"role": "user", "content": "and b?"}]])
def test_a_question_that_was_saved_without_an_answer_is_said(talk, messages):
    # broken if /retry took it for an answer, as of the example in docs/conversations.md, or it were lost silently
    model = Model()
    model.kept = messages
    console = talk(model, "/load f", "/retry", "c?")
    assert f"ask it again: {messages[-1]['content']}" in console.err
    n_errors = 0 if len(messages) > 1 else 1  # there is no answer to try again
    assert console.err.count("error: ") == n_errors
    lengths = [len(asked) for asked in model.asked]
    assert lengths == ([1] if n_errors else [1, 3])


@pytest.mark.parametrize(
    "messages",
    [
        None,
        {"a": 1},
        "hello",
        [1, 2],
        [{}],
        [USER, USER],
        [ANSWER],
        [USER, ANSWER, ANSWER, USER],
        [USER, {"role": "system", "content": "x"}],
        [{"role": "user", "content": [{"type": "image", "image": "gone.png"}]}, ANSWER],
        [{"role": "assistant", "content": "", "tool_calls": [1]}],
    ],
)
def test_messages_that_are_no_conversation_are_refused_and_this_one_goes_on(talk, messages):
    # broken by a traceback, or if the model's cache and the chat's messages were of two conversations
    model = Model()
    model.kept = messages
    console = talk(model, "/system Be short.", "a?", "/load f", "b?")
    assert console.err.count("error: the messages of the file are") + console.err.count("error: the file holds no") == 1
    assert model.calls == [] and [m["role"] for m in model.asked[-1]] == ["system", "user", "assistant", "user"]


def test_messages_of_any_form_go_on_with_their_pictures(talk, tmp_path):
    # broken if a list were shown for instructions, or pictures of another form were forgotten with their questions
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4), "red").save(path)
    url = images.data_url(str(path))
    text = {"type": "text", "text": "a?"}
    questions = [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, text]},
        {"role": "user", "content": [{"type": "image_url", "image_url": str(path)}, text]},
        {"role": "user", "content": [{"type": "image", "path": str(path)}, text]},
        {"role": "user", "content": "a?", "images": [url.partition(",")[2]]},
    ]
    system = {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "short."}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "one"}]}
    model = Narrow(8)
    model.kept = [system, *(message for question in questions for message in (question, answer)), questions[0]]
    console = talk(model, "/load f", "/system", "b?")
    assert "(system: Be short.)" in console.err and "error" not in console.err
    shown = [
        part["image"]
        for m in model.asked[-1]
        for part in m["content"]
        if isinstance(part, dict) and part["type"] == "image"
    ]
    assert len(shown) == 5 and len({images.load(source) for source in shown}) == 1


def test_a_budget_keeps_what_else_was_chosen():
    # broken if /budget 1, which drops nothing, forgot the rest for the budgets after it
    loaded = []
    chosen = ST3Config(preset="fastv", anneal="cosine", vision_type="file", keep=0.5)
    console, model = Console(), Model()
    model.close = lambda: None

    def load(config):
        loaded.append(config)
        return model

    chat = Chat(console, model, [], {"max_tokens": 9}, chosen, load)
    for line in ("/budget 1", "/budget", "/budget 0.5"):
        chat.do(line)
    assert loaded == [
        ST3Config(preset="off"),
        ST3Config(preset="fastv", anneal="cosine", vision_type="file", budget=0.5),
    ]
    assert "the budget is 1)" in console.err


@pytest.mark.parametrize("command", ["/image", "/save", "/load", "/lo"])
def test_a_command_that_needs_a_file_says_so(talk, command):
    # broken if it were said to be none of the commands, above a list that has it
    model = Model()
    console = talk(model, command)
    assert console.err.startswith(f"st3-edge: error: {command}") and console.err.endswith(" needs a file\n")
    assert model.calls == []


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/foo", "there is no command '/foo' (/help"),
        ("/retri again", "did you mean '/retry'?"),
        ("/tmp what is this?", "'/tmp' is a folder"),
    ],
)
def test_what_is_no_command_is_one_line(talk, line, says):
    # broken if the whole of /help came each time, or a folder were called a command
    model = Model()
    err = talk(model, line).err
    assert says in err and err.startswith("st3-edge: error: ") and err.count("\n") == 1
    assert model.calls == [] and model.asked == []


@pytest.mark.parametrize("line", ["nope/missing.jpg what is it?", "missing.jpg", "missing.jpg 'no such.png'"])
def test_a_picture_that_is_not_there_is_an_error_and_no_question(talk, line):
    # broken if the model answered from the letters of its name
    model = Model()
    assert talk(model, line).err.count("error: there is no picture") == 1 and model.asked == []


def test_a_picture_of_the_network_is_an_error_and_no_question(talk):
    # broken if the model answered from the letters of its address
    for line in ("https://example.org/a.png what is it?", "/image HTTP://example.org/a.png"):
        model = Model()
        assert "error: pictures are not fetched" in talk(model, line).err and model.asked == []
