"""The LM's own chat template, against transformers' `apply_chat_template` and against the laws of packing."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_tokenizers import CHATML, GEMMA, KINDS, SPECIALS, TEMPLATES, TURN_ENDS, chat_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_encoders import CharacterEncoder

from spt_jax.data import Dialogue, DialogueSet, Row, Turn, encode_context, pack
from spt_jax.data.chat_template import OPENING, SYSTEM, ChatTemplate
from spt_jax.data.template import turn_history
from spt_jax.errors import UserError
from spt_jax.models.loading import load_tokenizer
from spt_jax.models.tokenization.folder_tokenizer import tokenizer_of_folder
from spt_jax.models.tokenization.tokenizer import Tokenizer

pytest.importorskip("jinja2", minversion="3.1.6", reason="chat templates are rendered with jinja2")

PERSONA = ("i have two dogs .", "i run at the beach .")
WORDS = st.text("ab ?", min_size=1, max_size=8).map(str.strip).filter(bool)
NASTY = st.lists(st.sampled_from([*SPECIALS, "<", "s>", " ", "a", "[INST]", "{{ x }}", "é"]), min_size=1).map("".join)
DIALOGUES = st.lists(
    st.builds(
        Dialogue,
        st.lists(WORDS | NASTY, max_size=2).map(tuple),
        st.lists(st.builds(Turn, WORDS | NASTY, WORDS | NASTY), min_size=1, max_size=4).map(tuple),
    ),
    min_size=1,
    max_size=3,
)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The folder of a tokenizer kind with the template of a family."""

    @cache
    def made(kind: str, family: str) -> Path:
        return chat_folder(tmp_path_factory.mktemp("chat") / f"{kind}-{family}", kind, TEMPLATES[family])

    return made


@pytest.fixture(scope="module")
def chat_of(folder_of: Callable[[str, str], Path]) -> Callable[[str, str], tuple[Tokenizer, ChatTemplate]]:
    """A tokenizer and its template."""

    @cache
    def made(kind: str, family: str) -> tuple[Tokenizer, ChatTemplate]:
        tokenizer = tokenizer_of_folder(folder_of(kind, family))
        return tokenizer, ChatTemplate.of(tokenizer)

    return made


Chats = Callable[[str, str], tuple[Tokenizer, ChatTemplate]]


def transformers_ids(folder: Path, messages: list[dict[str, str]], *, asks: bool = True) -> list[int]:
    from transformers import PreTrainedTokenizerFast

    oracle: Any = PreTrainedTokenizerFast.from_pretrained(str(folder))
    return oracle.apply_chat_template(messages, add_generation_prompt=asks, return_dict=False, enable_thinking=False)


def conversation(history: Sequence[str], system: bool, opening: bool) -> list[dict[str, str]]:
    """What a user of transformers would write for the same persona and history."""
    text = SYSTEM.replace("{persona}", " ".join(PERSONA))
    if len(history) % 2 == 0 and opening:
        history = [OPENING, *history]
    roles = ["user", "assistant"] if len(history) % 2 else ["assistant", "user"]
    messages = [{"role": roles[i % 2], "content": said} for i, said in enumerate(history)]
    if system:
        return [{"role": "system", "content": text}, *messages]
    messages[0]["content"] = f"{text}\n\n{messages[0]['content']}"
    return messages


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("history", [["hi there"], ["hi ?", " fine , thanks . ", "naïve 🙂\nok"], ["hello .", "who ?"]])
def test_contexts_are_the_ids_of_transformers(
    folder_of: Any, chat_of: Chats, kind: str, family: str, history: list[str]
) -> None:
    tokenizer, template = chat_of(kind, family)
    messages = conversation(history, system=family != "gemma", opening=family in ("gemma", "llama2"))
    expected = transformers_ids(folder_of(kind, family), messages)
    assert encode_context(tokenizer, PERSONA, history, max_length=999, template=template) == expected
    # The template alone writes the bos: Llama 2's before every user, ChatML's never.
    users = sum(message["role"] == "user" for message in messages)
    assert expected.count(tokenizer.special_tokens["<s>"]) == {"llama3": 1, "gemma": 1, "llama2": users}.get(family, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["chatml", "llama3", "gemma", "llama2"])
def test_a_turn_is_what_transformers_writes_up_to_its_end(
    folder_of: Any, chat_of: Chats, kind: str, family: str
) -> None:
    tokenizer, template = chat_of(kind, family)
    dialogue = Dialogue(PERSONA, (Turn("hi", " hello .  "), Turn("you ?", "i run .")))
    rows = pack([dialogue], tokenizer, layout="turn", max_length=999, template=template).rows
    for t, row in enumerate(rows):
        messages = conversation(turn_history(dialogue, t), system=family != "gemma", opening=False)
        messages.append({"role": "assistant", "content": dialogue.turns[t].response})
        whole = transformers_ids(folder_of(kind, family), messages, asks=False)
        ours = [*row.tokens.tolist(), int(row.target_ids[-1])]
        assert whole[: len(ours)] == ours
        assert tokenizer.backend.id_to_token(ours[-1]) == TURN_ENDS[family]
        assert not set(whole[len(ours) :]) & set(tokenizer.special_tokens.values())
    assert template.end_id(tokenizer) == tokenizer.special_tokens[TURN_ENDS[family]]


def learned(rows: Sequence[Row]) -> dict[tuple[int, int], list[int]]:
    """Target ids by (dialogue, turn); fails where a position does not predict its target."""
    result: dict[tuple[int, int], list[int]] = {}
    for row in rows:
        for n, turn in enumerate(row.turns):
            mine = row.target_turns == n
            positions, ids = row.target_positions[mine], row.target_ids[mine]
            assert positions[0] == row.context_lengths[n] - 1
            assert np.array_equal(row.tokens[positions[:-1] + 1], ids[:-1])
            result[row.dialogue, int(turn)] = ids.tolist()
    return result


@settings(max_examples=25)
@given(dialogues=DIALOGUES, kind=st.sampled_from(KINDS), family=st.sampled_from(sorted(TEMPLATES)))
def test_both_layouts_learn_the_responses_behind_the_contexts_of_inference(
    chat_of: Chats, dialogues: list[Dialogue], kind: str, family: str
) -> None:
    tokenizer, template = chat_of(kind, family)
    packed, turns = (
        pack(dialogues, tokenizer, layout=layout, max_length=9999, template=template) for layout in ("dialogue", "turn")
    )
    targets = learned(turns.rows)
    assert learned(packed.rows) == targets
    for rows in (packed.rows, turns.rows):
        for row in rows:
            for n, turn in enumerate(row.turns.tolist()):
                dialogue = dialogues[row.dialogue]
                history = turn_history(dialogue, turn)
                context = encode_context(tokenizer, dialogue.persona, history, max_length=9999, template=template)
                assert row.tokens[: row.context_lengths[n]].tolist() == context
    for (d, t), ids in targets.items():
        response = dialogues[d].turns[t].response
        assert tokenizer.decode(ids[:-1]).strip() == response.strip() and ids[-1] == template.end_id(tokenizer)


@settings(max_examples=60)
@given(persona=NASTY, said=NASTY, kind=st.sampled_from(KINDS), family=st.sampled_from(sorted(TEMPLATES)))
def test_what_people_say_adds_no_special_token(chat_of: Chats, persona: str, said: str, kind: str, family: str) -> None:
    tokenizer, template = chat_of(kind, family)
    specials = set(tokenizer.special_tokens.values())

    def ids(*texts: str) -> list[int]:
        return encode_context(tokenizer, [texts[0]], texts[1:], max_length=9999, template=template)

    plain, nasty = ids("x", "x", "x", "x"), ids(persona, said, said, said)
    assert [i for i in nasty if i in specials] == [i for i in plain if i in specials]
    shown = tokenizer.decode(nasty)
    assert persona.strip() in shown and shown.count(said.strip()) >= 3


def test_chatml_keeps_the_prefix_property_and_a_template_that_rewrites_answers_falls_back(chat_of: Chats) -> None:
    dialogues = [Dialogue(PERSONA, tuple(Turn(f"question {i} ?", f"answer {i} .") for i in range(4)))]
    rows = {}
    for family in TEMPLATES:
        tokenizer, template = chat_of("bytes", family)
        rows[family] = pack(dialogues, tokenizer, layout="dialogue", max_length=999, template=template)
    fallbacks = {family: (packed.fallbacks, len(packed.rows)) for family, packed in rows.items()}
    whole = (0, 1)
    assert fallbacks == {"chatml": whole, "llama3": whole, "gemma": whole, "llama2": whole, "thinking": (1, 4)}


def test_too_long_a_prompt_loses_its_oldest_pairs_but_neither_persona_nor_last_query(chat_of: Chats) -> None:
    tokenizer, template = chat_of("bytes", "chatml")
    history = ["hello , how are you today ?", "fine .", "do you like the beach ?"]
    whole = encode_context(tokenizer, PERSONA, history, max_length=999, template=template)
    short = encode_context(tokenizer, PERSONA, history, max_length=len(whole) - 1, template=template)
    assert short == encode_context(tokenizer, PERSONA, history[2:], max_length=999, template=template)
    assert "i run at the beach ." in tokenizer.decode(short)
    with pytest.raises(UserError, match=r"f:3: persona and last query need \d+ tokens"):
        encode_context(tokenizer, PERSONA, history, max_length=len(short) - 1, place="f:3", template=template)


def test_smollm2_writes_chatml_with_one_special_token_where_the_template_has_one(
    smollm2_source: str, valid_set: DialogueSet
) -> None:
    tokenizer = load_tokenizer(smollm2_source)
    template = ChatTemplate.of(tokenizer)
    start, end = tokenizer.special_tokens["<|im_start|>"], tokenizer.special_tokens["<|im_end|>"]
    dialogues = [*valid_set.dialogues[:40], Dialogue(("i say <|im_end|> .",), (Turn("hi", "<|im_start|> ok"),))]
    packed, turns = (
        pack(dialogues, tokenizer, layout=layout, max_length=1024, template=template) for layout in ("dialogue", "turn")
    )
    assert (packed.fallbacks, packed.split_turns, turns.split_turns, len(packed.rows)) == (0, 0, 0, 41)
    assert learned(packed.rows) == learned(turns.rows)
    for row, dialogue in zip(packed.rows, dialogues, strict=True):
        ids = row.tokens.tolist()
        # system, then a user and an assistant a turn; the last end of turn is a target, no input.
        assert (ids.count(start), ids.count(end)) == (2 * len(dialogue.turns) + 1, 2 * len(dialogue.turns))
        assert ids[0] == start == tokenizer.bos_id and ids[1] != start
    text = tokenizer.backend.decode(packed.rows[-1].tokens.tolist(), skip_special_tokens=False)
    assert text == (
        f"<|im_start|>system\n{SYSTEM.replace('{persona}', 'i say <|im_end|> .')}<|im_end|>\n<|im_start|>user\nhi"
        "<|im_end|>\n<|im_start|>assistant\n<|im_start|> ok"
    )


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("{% for m in messages %}", "does not write this conversation"),
        ("{{ raise_exception('not today') }}", "does not write this conversation: not today"),
        ("{{ messages[0].content }}", "leaves out what the assistant says"),
    ],
)
def test_a_template_that_cannot_write_a_conversation_is_refused(source: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        ChatTemplate(source)


def test_what_is_no_chat_model_and_no_system_message_is_refused() -> None:
    with pytest.raises(UserError, match=r"the LM's tokenizer has no chat template; use data\.template = plain"):
        ChatTemplate.of(CharacterEncoder())
    with pytest.raises(UserError, match="no place for the persona"):
        ChatTemplate(CHATML, system="You are nobody.")
    with pytest.raises(UserError, match="history is empty"):
        ChatTemplate(GEMMA)._messages("p", [])
    with pytest.raises(UserError, match="needs a tokenizer that encodes special tokens"):
        ChatTemplate(CHATML).encode_contexts(CharacterEncoder(), [])


def test_the_date_is_fixed(chat_of: Chats) -> None:
    tokenizer, _ = chat_of("bytes", "chatml")
    dated = "{{ strftime_now('%d %B %Y') }}|{{ date_string }}" + CHATML
    template = ChatTemplate(dated)
    ids = encode_context(tokenizer, PERSONA, ["hi"], max_length=999, template=template)
    assert tokenizer.decode(ids).startswith("26 July 2024|26 Jul 2024system\n")


def test_a_turn_without_a_special_token_behind_it_ends_with_the_end_of_sequence(chat_of: Chats) -> None:
    tokenizer, _ = chat_of("bytes", "chatml")
    lines = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    template = ChatTemplate(lines + "{% if add_generation_prompt %}assistant:{% endif %}")
    [row] = pack(
        [Dialogue(PERSONA, (Turn("hi", "yes"),))], tokenizer, layout="turn", max_length=999, template=template
    ).rows
    assert template.end_id(tokenizer) == row.target_ids[-1] == tokenizer.eos_id
    assert tokenizer.decode(row.target_ids.tolist()) == " yes"


def test_a_folders_template_is_read_from_wherever_it_is_kept(tmp_path: Path) -> None:
    folder = chat_folder(tmp_path, "bytes", CHATML)
    settings_file = folder / "tokenizer_config.json"
    fields = json.loads(settings_file.read_text())

    def template_with(value: Any) -> str | None:
        settings_file.write_text(json.dumps({**fields, "chat_template": value}))
        return tokenizer_of_folder(folder).chat_template

    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": GEMMA}]
    assert (template_with(CHATML), template_with(named)) == (CHATML, GEMMA)
    assert (template_with(named[:1]), template_with(None)) == (None, None)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "from json"}))
    assert template_with(CHATML) == "from json"
    (folder / "chat_template.jinja").write_text("from jinja")
    assert template_with(CHATML) == "from jinja"
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not UTF-8"):
        template_with(CHATML)
