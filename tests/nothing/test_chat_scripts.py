"""`st3-edge chat`: scripts in place of a person, what is typed wrongly, and words that mean the same."""

import os
import signal
from types import SimpleNamespace

import pytest
from chatting import Console, Model

from st3_edge import ST3Config
from st3_edge.commands.chat import command as chat_command
from st3_edge.commands.chat import lines
from st3_edge.commands.chat.command import Chat


def test_ctrl_c_ends_a_script(talk):
    # broken if the lines behind it were asked all the same: nobody is there to stop each of them
    model = Model(lambda: os.kill(os.getpid(), signal.SIGINT) or ("x",))
    with pytest.raises(KeyboardInterrupt):
        talk(model, "a?", "b?")
    assert len(model.asked) == 1


def test_a_script_whose_lines_failed_says_so_and_a_terminal_does_not(talk):
    # broken if a program took an error for an answer; talk compares the exit code
    for terminal in (False, True):
        assert "error: " in talk(Model(), "/image none.png", "a?", terminal=terminal).err


def test_an_open_block_at_the_end_of_a_script_is_a_question(talk):
    # broken if it were dropped in silence
    model = Model()
    talk(model, '"""one', "two")
    assert model.asked[0][0]["content"][-1]["text"] == "one\ntwo"


def test_ctrl_c_while_a_budget_is_loaded_keeps_the_conversation():
    # broken if the chat ended, or went on without a model
    console, model = Console(), Model()
    model.close = lambda: None

    def load(config):
        if config.budget == 0.3:
            raise KeyboardInterrupt
        return model

    chat = Chat(console, model, [], {"max_tokens": 9}, ST3Config(budget=0.2), load)
    for line in ("a?", "/budget 0.3", "/budget", "b?"):
        chat.do(line)
    assert "the budget stays" in console.err and "the budget is 0.2)" in console.err
    assert [len(messages) for messages in model.asked] == [1, 3]


@pytest.mark.parametrize("typed", ["0,3", "abc", "0.3 please"])
def test_a_budget_that_is_no_number_is_an_error(talk, typed):
    # broken if it were answered as if nothing had been asked for
    assert f"error: /budget takes a number above 0 to 1, as 0.3, not {typed!r}" in talk(Model(), f"/budget {typed}").err


def test_the_budget_in_use_is_told_where_nobody_chose_one(talk):
    # broken if a person had to look for the number elsewhere
    model = Model()
    model.last_report = SimpleNamespace(mode="pruned-prefill", schedule=SimpleNamespace(budget=0.502))
    assert "(the budget is 0.5, by the last answer)" in talk(model, "/budget").err
    assert "after an answer" in talk(Model(), "/budget").err


@pytest.mark.parametrize("written", ["'my file'", '"my file"', "my\\ file", "my file"])
def test_names_behind_save_and_load_are_as_behind_image(talk, written):
    # broken if quotes became a part of the name
    model = Model()
    talk(model, f"/save {written}", f"/load {written}")
    assert model.calls == [("save", "my file"), ("load", "my file")]


@pytest.mark.parametrize("word", ["/q", "/qui", "/quit", "/exi", "/bye"])
def test_the_beginning_of_the_word_that_leaves_is_enough(talk, word):
    # broken if it alone had to be typed to its end
    model = Model()
    if word == "/exi":  # the beginning of another name of it
        assert "error" in talk(model, word).err
    else:
        assert talk(model, word, "a?").err == "" and model.asked == []


def test_every_command_is_in_the_help():
    # broken if one could not be found, or /help showed one that there is not
    does = Chat(Console(), Model(), [], {})._does()
    assert {*chat_command._COMMANDS, "/help"} == {*does, "/quit"}
    assert set(chat_command._ALIASES.values()) <= {*does, "/quit"}


def test_a_history_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    # broken by prompt_toolkit's traceback for every line, where the disk is full
    history_module = pytest.importorskip("prompt_toolkit.history")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("ST3_NO_HISTORY", raising=False)
    history = lines._history()
    assert isinstance(history, history_module.FileHistory)
    history.filename = str(tmp_path)  # a folder: neither read nor written
    history.store_string("a?")
    history.filename = str(tmp_path / "history")
    history.store_string("caf\udce9.png")  # a name that is no text
    history.filename = str(tmp_path)
    assert list(history.load_history_strings()) == []
