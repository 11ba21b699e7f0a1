from __future__ import annotations

import io
import json
import sys

import pytest
from absl import flags
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from spt_jax.commands import chat
from spt_jax.commands.chat_session import line_reader
from spt_jax.commands.replying import Responder
from spt_jax.errors import UserError
from spt_jax.generation.decoding import Decoding
from spt_jax.generation.engine import GenerationEngine
from spt_jax.generation.replies import cut_reply


@pytest.fixture
def talk(fake_run, tmp_path, monkeypatch, capsys):
    """Runs the door on typed lines; gives what it printed."""

    def run(*lines: str, arguments: tuple[str, ...] = ()) -> str:
        flag_values = flags.FlagValues()
        chat.define_flags(flag_values)
        flag_values(["chat", f"--workdir={tmp_path}", *arguments])
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert chat.run(flag_values, opener=lambda workdir, step: fake_run) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def script(monkeypatch):
    """Lets the LM say given replies, one a call; records how it was asked."""
    asked = []

    def install(*replies: str) -> list[dict]:
        left = list(replies)

        def stream(self, bank, context, selected, **options):
            asked.append({"context": list(context), "selected": selected, **options})
            return iter(left.pop(0).encode("utf-8"))

        monkeypatch.setattr(GenerationEngine, "stream", stream)
        return asked

    return install


def test_replies_are_those_of_generate_behind_the_selected_prompt(talk, fake_run):
    printed = talk("hi there", arguments=("--persona=i sing.", "--max_new_tokens=12"))
    context = fake_run.encode_context(("i sing.",), ["hi there"])
    selected = len(context) % 3
    lm, tokenizer = fake_run.lm, fake_run.lm.tokenizer
    engine = GenerationEngine(lm.config, lm.params, eos_ids=[tokenizer.eos_id], pad_id=tokenizer.pad_id)
    ids = engine.generate(fake_run.conditions.bank, [context], [selected], max_new_tokens=12)[0]
    expected = "".join(c for c in cut_reply(tokenizer.decode(ids)) if c.isprintable())
    assert expected
    assert printed.splitlines()[0].startswith(f"prompt {selected} answers; scores 0: 0.")
    assert "".join(c for c in printed.splitlines()[1] if c.isprintable()) == expected


def test_a_forced_prompt_answers_whatever_the_scores_say(talk, script):
    asked = script("one", "two", "three")
    printed = talk("a", "bb", "ccc", arguments=("--prompt=2",))
    assert [call["selected"] for call in asked] == [2, 2, 2]
    assert printed.count("prompt 2 (forced) answers; scores") == 3


def test_the_history_grows_and_clear_empties_it(talk, script, fake_run):
    script("fine.", "yes.", "hello.")
    talk("hi", "really?", "clear", "hi again", arguments=("--persona=i sing.",))
    histories = [history for _, history in fake_run.encoded]
    assert ("hi",) in histories
    assert ("hi", "fine.", "really?") in histories
    assert histories[-1] == ("hi again",)
    assert {persona for persona, _ in fake_run.encoded} == {("i sing.",)}


def test_nothing_behind_a_role_marker_is_shown_or_remembered(talk, script, fake_run):
    script("fine. Q: and you?", "ok")
    printed = talk("hi", "so")
    assert "fine.\n" in printed and "Q:" not in printed
    assert ("hi", "fine.", "so") in [history for _, history in fake_run.encoded]


def test_control_characters_of_the_lm_do_not_reach_the_terminal(talk, script):
    script("a\x1b[31m red\x07 b")
    assert "a[31m red b\n" in talk("hi")


@pytest.mark.parametrize("word", ["/retry", "r"])
def test_retry_answers_the_same_message_again_with_another_draw(talk, script, word):
    asked = script("one", "two", "three")
    printed = talk("hi", word, "more")
    assert asked[0]["context"] == asked[1]["context"]
    assert asked[0]["decoding"] == Decoding()
    assert asked[1]["decoding"] == Decoding(temperature=0.8)
    assert asked[0]["seed"] != asked[1]["seed"]
    assert "sampled at temperature 0.8" in printed
    assert b"two" in bytes(token for token in asked[2]["context"] if token < 256)
    assert b"one" not in bytes(token for token in asked[2]["context"] if token < 256)


def test_flags_of_decoding_override_the_run_and_stop_strings_end_replies(talk, script):
    asked = script("one two three", "four")
    arguments = ("--beams=10", "--no_repeat_ngram=4", "--early_stopping=true", "--stop=three", "--stop= x")
    assert "one two\n" in talk("hi", "r", arguments=arguments)
    stop = ("three", " x")
    assert asked[0]["decoding"] == Decoding(beams=10, no_repeat_ngram=4, early_stopping=True, stop=stop)
    assert asked[1]["decoding"] == Decoding(
        temperature=0.8, beams=1, no_repeat_ngram=4, early_stopping=True, stop=stop
    ), "a search would repeat itself"


def test_why_shows_what_every_prompt_would_have_said_with_its_score(talk, fake_run):
    printed = talk("hi there", "and you?", "/why", "/why 1", arguments=("--max_new_tokens=12",))
    lines = printed.splitlines()
    last, first = lines.index("to 'and you?':"), lines.index("to 'hi there':")
    engine = GenerationEngine(fake_run.lm.config, fake_run.lm.params, eos_ids=fake_run.stop_ids, pad_id=0)
    context = fake_run.encode_context((), ["hi there"])
    ids = engine.generate(fake_run.conditions.bank, [context] * 3, range(3), max_new_tokens=12)
    scores = fake_run.score_contexts([context])[0]
    for k, row in enumerate(ids):
        said = "".join(c for c in cut_reply(fake_run.lm.tokenizer.decode(row)) if c.isprintable())
        mark = "*" if k == len(context) % 3 else " "
        assert lines[first + 1 + k].startswith(f"{mark} prompt {k}, score {scores[k]:.3f}: {said}"[:60])
    assert [line[0] for line in lines[last + 1 : last + 4]].count("*") == 1


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (("/why",), "Nothing was said yet; say something first."),
        (("hi", "/why 2"), "There is no message 2; this conversation has 1 to 1."),
        (("hi", "/why me"), "/why takes the number of a message, but got 'me'."),
        (("hi", "/why " + "9" * 5000), "/why takes the number of a message, but got '9999"),
    ],
)
def test_why_of_nothing_is_told(talk, lines, words):
    assert words in talk(*lines, arguments=("--max_new_tokens=2",))


def test_retry_with_nothing_said_is_told(talk):
    assert "There is no reply to retry yet" in talk("r")


def test_persona_is_shown_extended_and_removed(talk):
    printed = talk("/persona i ski.", "/persona", "/persona clear", arguments=("--persona=i sing.",))
    assert printed.count("  i ski.") == 2
    assert "The persona is empty" in printed


def test_mistakes_are_told_and_the_conversation_goes_on(talk, script):
    script("fine.")
    printed = talk("/hepl", "", "   ", "hi", "/help")
    assert "Did you mean '/help'?" in printed
    assert "fine." in printed
    assert "/retry" in printed


def test_exit_stops_reading(talk, script):
    asked = script("one", "two")
    talk("hi", "exit", "are you there?")
    assert len(asked) == 1


def test_a_long_conversation_says_once_that_old_turns_are_left_out(talk, script, fake_run):
    fake_run.max_length = 150
    script(*["some long reply to it."] * 8)
    printed = talk(*["a rather long message."] * 8)
    assert printed.count("the oldest turns are left out") == 1
    assert printed.count("some long reply") == 8


def test_a_message_that_never_fits_is_told(talk, fake_run):
    fake_run.max_length = 60
    assert "the limit is 60" in talk("a message " * 20)


def test_an_empty_reply_is_told_and_forgotten(talk, script, fake_run):
    script(" Q: hello", "fine.")
    printed = talk("hi", "how?")
    assert "an empty reply" in printed
    assert fake_run.encoded[-1][1] == ("how?",)


def test_ctrl_c_stops_a_reply_and_keeps_what_was_shown(talk, monkeypatch, fake_run):
    def stream(self, bank, context, selected, **options):
        yield from b"well you see "
        raise KeyboardInterrupt

    monkeypatch.setattr(GenerationEngine, "stream", stream)
    printed = talk("hi", "so?")
    assert "well you see (stopped)" in printed
    assert fake_run.encoded[-2][1] == ("hi", "well you see", "so?")


@pytest.mark.parametrize("name", ["encode", "select", "under_every_prompt"])
def test_ctrl_c_at_any_moment_keeps_the_conversation(talk, script, monkeypatch, name):
    script("fine.", "yes.")
    usual, calls = getattr(Responder, name), []

    def interrupted_at_the_second_call(self, *arguments, **options):
        calls.append(name)
        if len(calls) == 2 or name == "under_every_prompt":
            raise KeyboardInterrupt
        return usual(self, *arguments, **options)

    monkeypatch.setattr(Responder, name, interrupted_at_the_second_call)
    printed = talk("hi", "/why" if name == "under_every_prompt" else "lost", "so?")
    assert printed.count("(stopped)") == 1
    assert "fine." in printed and "yes." in printed


def test_line_breaks_of_a_reply_part_its_words(talk, script, fake_run, monkeypatch):
    monkeypatch.setattr(type(fake_run), "cut", property(lambda self: str.strip))
    script("1. tea\n2.\tmilk\u00a0too")
    assert "1. tea\n2. milk too\n" in talk("hi")


def test_as_many_tokens_as_the_runs_evaluation_unless_told(talk, script, fake_run, monkeypatch):
    config = fake_run.config
    config.evaluation.max_new_tokens, config.generation.min_new_tokens = 64, 40
    monkeypatch.setattr(type(fake_run), "config", property(lambda self: config))
    asked = script("one", "two")
    talk("hi")
    assert asked[0]["max_new_tokens"] == 64
    talk("hi", arguments=("--max_new_tokens=50",))
    assert asked[1]["max_new_tokens"] == 50
    with pytest.raises(UserError, match=r"--min_new_tokens is 40; allowed: up to --max_new_tokens \(8\)"):
        talk("hi", arguments=("--max_new_tokens=8",))


def test_old_turns_make_room_for_long_replies(talk, script):
    asked = script(*["some long reply to it."] * 8)
    printed = talk(*["a rather long message."] * 8, arguments=("--max_new_tokens=350",))
    assert printed.count("the oldest turns are left out") == 1
    assert max(len(call["context"]) for call in asked) <= 512 - 2 - 350


def test_why_goes_by_the_persona_and_the_decoding_of_the_reply(talk, script, monkeypatch, fake_run):
    script("fine.", "well.")
    asked = []

    def generate(self, bank, contexts, selected, **options):
        asked.append(options["decoding"])
        return [[65]] * len(contexts)

    monkeypatch.setattr(GenerationEngine, "generate", generate)
    talk("hi", "/retry", "/persona i ski.", "/why", arguments=("--persona=i sing.",))
    assert [decoding.temperature for decoding in asked] == [0.8]
    assert fake_run.encoded[-1] == (("i sing.",), ("hi",))


def test_of_a_mixture_no_prompt_alone_is_said_to_answer(talk, script, fake_run, monkeypatch):
    config = fake_run.config
    config.evaluation.selection = "soft"
    monkeypatch.setattr(type(fake_run), "config", property(lambda self: config))
    script("fine.")
    printed = talk("hi", "/why", arguments=("--max_new_tokens=2",))
    assert "a mixture of all prompts answers, prompt" in printed
    assert "(what answered is a mixture of all prompts, the marked one the most of it)" in printed


def test_bytes_that_are_no_text_reach_no_tokenizer(talk, script, fake_run):
    script("fine.")
    talk("h\udcffi", arguments=("--persona=i sing\udcff.",))
    assert fake_run.encoded[-1] == (("i sing?.",), ("h?i",))


def test_save_writes_the_conversation_and_says_where(talk, script, tmp_path):
    script("ça va 好.", "bye.")
    target = tmp_path / "a talk.json"
    printed = talk("hi", f"/save {target}", "bye", f"/save {target}", arguments=("--persona=i sing.", "--seed=4"))
    assert f"Saved to {target}" in printed
    saved = json.loads(target.read_text(encoding="utf-8"))
    assert saved["persona"] == ["i sing."]
    assert [(turn["message"], turn["reply"]) for turn in saved["turns"]] == [("hi", "ça va 好."), ("bye", "bye.")]
    assert all(len(turn["scores"]) == 3 and turn["seed"] == 4 for turn in saved["turns"])
    assert all(turn["persona"] == ["i sing."] and turn["decoding"]["beams"] == 1 for turn in saved["turns"])
    assert (saved["workdir"], saved["max_new_tokens"]) == (str(tmp_path), 32)
    assert [path.name for path in tmp_path.iterdir()] == ["a talk.json"], "no temporary file is left"


def test_save_without_a_name_goes_into_the_workdir(talk, script, tmp_path):
    script("fine.")
    talk("hi", "save")
    (saved,) = tmp_path.glob("chat-*.json")
    assert json.loads(saved.read_text())["turns"][0]["reply"] == "fine."


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x.json", "x" * 300])
def test_save_to_what_cannot_be_looked_up_is_told_and_the_conversation_goes_on(talk, script, name):
    script("fine.", "yes.")
    printed = talk("hi", f"/save {name}", "so?")
    assert "cannot be looked up" in printed and "yes." in printed


def test_a_retry_stopped_before_its_first_word_keeps_the_reply_that_was_there(talk, script, fake_run, monkeypatch):
    asked = script("fine.", "yes.")
    scripted, calls = GenerationEngine.stream, []

    def stopped_at_the_second(self, *arguments, **options):
        calls.append(options)
        return iter(stopped()) if len(calls) == 2 else scripted(self, *arguments, **options)

    def stopped():
        raise KeyboardInterrupt
        yield 0

    monkeypatch.setattr(GenerationEngine, "stream", stopped_at_the_second)
    assert talk("hi", "/retry", "so?").count("(stopped)") == 1
    assert asked[-1]["context"] == fake_run.encode_context((), ["hi", "fine.", "so?"])


def test_save_never_overwrites_a_file_of_someone_else(talk, tmp_path):
    target = tmp_path / "mine.json"
    target.write_text("precious")
    assert "exists already" in talk(f"/save {target}")
    assert target.read_text() == "precious"
    assert "does not exist" in talk(f"/save {tmp_path}/nowhere/x.json")


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("--workdir=", "--workdir is missing"),
        ("--max_new_tokens=0", "--max_new_tokens is 0"),
        ("--top_k=3", "temperature is 0"),
        ("--temperature=-1", "--temperature is -1.0; allowed: 0, or 1e-30 or more"),
        ("--early_stopping=soon", "--early_stopping is 'soon'; allowed: one of false, true, never"),
        ("--stop=", "--stop is .*; allowed: texts, none empty"),
        ("--seed=-1", "--seed is -1"),
        ("--prompt=-1", "--prompt is -1"),
        ("--prompt=3", "--prompt is 3; this run has prompts 0 to 2"),
        ("--persona=", "--persona is empty"),
    ],
)
def test_bad_flags_are_one_sentence(talk, argument, sentence):
    with pytest.raises(UserError, match=sentence):
        talk("hi", arguments=(argument,))


def test_a_file_of_windows_is_read_from_its_first_letter(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeff/help\r\nhello\r\n"))
    read = line_reader()
    assert [read(), read()] == ["/help", "hello"]


def test_the_terminal_has_history_and_completes_commands(monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        read = line_reader()
        keys.send_text("first\r")
        assert read() == "first"
        keys.send_text("\x1b[A!\r")  # arrow up, then one more character
        assert read() == "first!"
        keys.send_text("\x04")
        with pytest.raises(EOFError):
            read()
