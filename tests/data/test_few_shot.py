from __future__ import annotations

import pytest
from chat_tokenizers import CHATML
from hypothesis import given
from hypothesis import strategies as st
from toy_encoders import CharacterEncoder, NoBosEncoder, WordEncoder

from spt_jax.data import Dialogue, DialogueSet, Turn, context_text, encode_context, pack, persona_key
from spt_jax.data.chat_template import ChatTemplate
from spt_jax.data.few_shot import FewShot, demonstration_text, draw_demonstrations
from spt_jax.data.template import PlainTemplate, turn_history
from spt_jax.errors import UserError
from spt_jax.models.loading import load_tokenizer

POOL = tuple(
    Dialogue((f"i am {i} .",), tuple(Turn(f"q{i}{t}", f"r{i}{t}") for t in range(1 + i % 3)), source=f"f:{i}")
    for i in range(30)
)
TARGET = Dialogue(("i run .",), (Turn("hi", "hello ."), Turn("you ?", "fine .")))


def few_shot(shots: int, seed: int = 0, pool: tuple[Dialogue, ...] = POOL) -> FewShot:
    return FewShot(PlainTemplate(), draw_demonstrations(pool, shots, seed), shots)


class Spelled(CharacterEncoder):
    def spell(self, ids: list[int]) -> str:
        return "".join(chr(i - 3) for i in ids if i >= 3)


def test_demonstrations_stand_before_the_context_parted_by_blank_lines():
    template, encoder = few_shot(2), Spelled()
    first, second = template.dialogues[:2]
    tokens = encode_context(encoder, TARGET.persona, ["hi"], max_length=999, template=template)
    assert tokens[0] == encoder.bos_id
    assert encoder.spell(tokens) == (
        f"{demonstration_text(first)}\n\n{demonstration_text(second)}\n\ngiven persona: i run .; context: Q: hi R:"
    )
    assert demonstration_text(POOL[1]) == "given persona: i am 1 .; context: Q: q10 R: r10 Q: q11 R: r11"


@given(st.integers(1, 6), st.integers(0, 20))
def test_the_draw_is_a_function_of_its_seed_and_takes_short_dialogues_of_distinct_personas(shots, seed):
    drawn = draw_demonstrations(POOL, shots, seed)
    assert drawn == draw_demonstrations(list(POOL), shots, seed) and len(drawn) == shots + 1
    assert len({persona_key(dialogue.persona) for dialogue in drawn}) == shots + 1
    allowed = sorted(len(demonstration_text(dialogue)) for dialogue in POOL)[: 4 * (shots + 1)]
    assert max(len(demonstration_text(dialogue)) for dialogue in drawn) <= allowed[-1]


def test_every_short_dialogue_can_be_drawn_and_of_one_persona_the_shortest():
    assert len({draw_demonstrations(POOL, 1, seed)[0].source for seed in range(60)}) == 8
    longer = Dialogue(("I am 0 .",), (*POOL[0].turns, Turn("a", "b")))
    nobody = Dialogue(("",), (Turn("a", "b"),))
    for seed in range(20):
        assert draw_demonstrations([longer, nobody, *POOL], 3, seed) == draw_demonstrations(POOL, 3, seed)


@given(st.integers(0, 29), st.integers(1, 3), st.integers(0, 5))
def test_no_turn_sees_a_demonstration_of_its_own_persona_and_each_sees_all_its_shots(own, shots, seed):
    template, encoder = few_shot(shots, seed), Spelled()
    persona = (f"I  am {own} .",)  # the same persona in another spelling
    text = encoder.spell(encode_context(encoder, persona, ["hi"], max_length=9999, template=template))
    *shown, context = text.split("\n\n")
    assert context == context_text(persona, ["hi"]) and len(shown) == shots
    assert not any(f"i am {own} ." in demonstration for demonstration in shown)


@pytest.mark.parametrize("encoder", [CharacterEncoder(), NoBosEncoder(), WordEncoder()])
@pytest.mark.parametrize("limit", [60, 150, 9999])
def test_both_layouts_learn_the_targets_of_the_plain_template(encoder, limit):
    dialogues = [TARGET, POOL[2], POOL[5]]
    template = few_shot(2)
    plain = [int(i) for row in pack(dialogues, encoder, layout="turn", max_length=999).rows for i in row.target_ids]
    for layout in ("dialogue", "turn"):
        packed = pack(dialogues, encoder, layout=layout, max_length=limit, template=template)
        assert all(len(row) <= limit for row in packed.rows)
        assert [int(i) for row in packed.rows for i in row.target_ids] == plain
        if limit < 9999:
            continue
        assert packed.undemonstrated_turns == packed.fallbacks == 0
        for row in packed.rows:
            dialogue = dialogues[row.dialogue]
            for n, turn in enumerate(row.turns.tolist()):
                history = turn_history(dialogue, turn)
                context = encode_context(encoder, dialogue.persona, history, max_length=9999, template=template)
                assert row.tokens[: row.context_lengths[n]].tolist() == context


def test_demonstrations_go_before_history_and_the_persona_never():
    template, encoder = few_shot(2), WordEncoder()
    history = [f"utterance {i}" for i in range(5)]
    plain = [
        encode_context(encoder, TARGET.persona, history[start:], max_length=999) for start in range(0, len(history), 2)
    ]
    levels = [
        encode_context(encoder, TARGET.persona, history, max_length=limit, template=template)
        for limit in range(len(plain[-1]), 120)
    ]
    distinct = [tokens for i, tokens in enumerate(levels) if i == 0 or tokens != levels[i - 1]]
    both, one = distinct[-1], distinct[-2]
    assert distinct[:3] == plain[::-1] and len(distinct) == 5
    # "given" hangs on the blank line before it in this encoder, the rest is as it was.
    behind = len(plain[0]) - 2
    assert encoder.bos_id == one[0] and both[-behind:] == one[-behind:] == plain[0][2:]
    # Of two demonstrations the one next to the context stays.
    second = encoder.encode([demonstration_text(template.dialogues[1])])[0]
    assert one[1 : len(second)] == second[:-1]
    whole = pack([TARGET], encoder, layout="turn", max_length=999, template=template)
    least = min(len(row) for row in whole.rows)
    rows = pack([TARGET], encoder, layout="turn", max_length=least - 1, template=template)
    assert (whole.undemonstrated_turns, rows.undemonstrated_turns, rows.truncated_turns) == (0, 2, 0)


def test_what_cannot_be_drawn_or_written_is_refused():
    with pytest.raises(UserError, match=r"method\.shots is 3, which needs training dialogues of 4 distinct personas"):
        draw_demonstrations(POOL[:3], 3, 0)
    with pytest.raises(UserError, match="0 or more"):
        draw_demonstrations(POOL, 1, -1)
    with pytest.raises(UserError, match="2 shots need at least 3 dialogues of distinct personas"):
        FewShot(PlainTemplate(), POOL[:2], 2)
    with pytest.raises(UserError, match="distinct personas"):
        FewShot(PlainTemplate(), (POOL[0], POOL[0]), 1)
    with pytest.raises(UserError, match="f:1 has no turns"):
        demonstration_text(Dialogue(("p",), (), source="f:1"))


def test_demonstrations_in_a_chat_template_are_refused():
    pytest.importorskip("jinja2", minversion="3.1.6")
    with pytest.raises(UserError, match="written in the plain template"):
        FewShot(ChatTemplate(CHATML), POOL[:2], 1)


def test_two_shots_of_the_real_training_file_fit_beside_real_dialogues(
    smollm2_source: str, train_set: DialogueSet, valid_set: DialogueSet
) -> None:
    tokenizer = load_tokenizer(smollm2_source)
    template = few_shot(2, pool=train_set.dialogues)
    packed = pack(valid_set.dialogues[:60], tokenizer, layout="turn", max_length=1024, template=template)
    print(f"demonstrations of {[len(demonstration_text(d)) for d in template.dialogues]} characters")
    assert (packed.truncated_turns, packed.undemonstrated_turns, packed.split_turns) == (0, 0, 0)
    text = tokenizer.decode(packed.rows[0].tokens.tolist())
    assert text.count("given persona:") == 3 and text.count("\n\n") == 2
