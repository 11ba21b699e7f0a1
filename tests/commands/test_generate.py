from __future__ import annotations

import json
import subprocess
import sys

import pytest
from absl import flags

from spt_jax import atomic_file
from spt_jax.commands import generate
from spt_jax.errors import UserError
from spt_jax.generation.engine import GenerationEngine
from spt_jax.generation.replies import cut_reply

REQUESTS = [
    {"persona": ["i sing."], "history": ["hi"], "id": 7},
    {"persona": [], "history": ["hello", "hey. what's up?", "não muito 好"]},
    {"history": ["a much longer message than the others, so that it comes first in the batches"], "persona": ["x"]},
    {"persona": ["i ski.", "i sing."], "history": ["hi"], "nested": {"kept": [1, None, 2.5]}},
]


@pytest.fixture
def reply_to(fake_run, tmp_path):
    """Runs the door on the lines of a file; gives the objects it wrote."""

    def run(*lines: str | dict, arguments: tuple[str, ...] = (), out: str = "out.jsonl") -> list[dict]:
        texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
        (tmp_path / "in.jsonl").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
        flag_values = flags.FlagValues()
        generate.define_flags(flag_values)
        paths = (f"--workdir={tmp_path}", f"--input={tmp_path / 'in.jsonl'}", f"--out={tmp_path / out}")
        flag_values(["generate", *paths, "--max_new_tokens=10", *arguments])
        assert generate.run(flag_values, opener=lambda workdir, step: fake_run) == 0
        return [json.loads(line) for line in (tmp_path / out).read_text(encoding="utf-8").splitlines()]

    return run


def test_replies_keep_the_order_and_the_fields_of_the_input(reply_to, fake_run):
    written = reply_to(*REQUESTS)
    lm, tokenizer = fake_run.lm, fake_run.lm.tokenizer
    engine = GenerationEngine(lm.config, lm.params, eos_ids=[tokenizer.eos_id], pad_id=tokenizer.pad_id)
    for request, answer in zip(REQUESTS, written, strict=True):
        assert request.items() <= answer.items()
        context = fake_run.encode_context(request["persona"], request["history"])
        assert answer["selected"] == len(context) % 3
        assert answer["scores"] == fake_run.score_contexts([context])[0].tolist()
        bank = fake_run.conditions.bank
        ids = engine.generate(bank, [context], [answer["selected"]], max_new_tokens=10)[0]
        assert answer["reply"] == cut_reply(tokenizer.decode(ids))


def test_texts_are_stripped_as_everywhere_and_the_line_is_written_as_it_was(reply_to):
    stray = {"persona": [" i sing. "], "history": ["\thi\n"]}
    [plain, same] = reply_to({"persona": ["i sing."], "history": ["hi"]}, stray)
    assert {name: same[name] for name in stray} == stray
    assert (same["reply"], same["scores"]) == (plain["reply"], plain["scores"])


def test_batch_size_changes_nothing_and_a_forced_prompt_is_used(reply_to):
    assert reply_to(*REQUESTS, arguments=("--batch=1",)) == reply_to(*REQUESTS, arguments=("--batch=3",))
    assert [line["selected"] for line in reply_to(*REQUESTS, arguments=("--prompt=1",))] == [1] * 4


def test_sampling_is_a_function_of_the_seed(reply_to):
    def draw(seed: int) -> list[str]:
        return [line["reply"] for line in reply_to(*REQUESTS, arguments=("--temperature=2", f"--seed={seed}"))]

    assert draw(1) == draw(1) != draw(2)


def test_a_line_with_a_seed_draws_alike_wherever_it_stands(reply_to):
    def draw(*lines: dict, seed: int = 0) -> list[str]:
        return [line["reply"] for line in reply_to(*lines, arguments=("--temperature=2", f"--seed={seed}"))]

    own = {**REQUESTS[1], "seed": 11}
    first, _, second = draw(REQUESTS[0], own, REQUESTS[0])
    assert draw(own, seed=5) == draw(REQUESTS[3], own)[1:] == draw(REQUESTS[0], own, REQUESTS[0])[1:2]
    assert draw({**own, "seed": 12}) != draw(own)
    assert first != second  # without a seed the place decides,
    assert draw(*REQUESTS[:1] * 3) == [first, draw(*REQUESTS[:1] * 2)[1], second]  # and no neighbour's seed


def test_several_samples_stand_beside_the_first(reply_to):
    arguments = ("--temperature=2", "--seed=3")
    one = reply_to(*REQUESTS, arguments=arguments)
    several = reply_to(*REQUESTS, arguments=(*arguments, "--samples=3", "--top_k=100"))
    assert all(len(line["replies"]) == 3 and line["reply"] == line["replies"][0] for line in several)
    assert len({tuple(line["replies"]) for line in several}) == 4
    assert all("replies" not in line for line in one)


def test_a_stop_string_ends_every_reply(reply_to):
    free = [line["reply"] for line in reply_to(*REQUESTS)]
    stop = next(reply for reply in free if len(reply) > 2)[2]
    assert [line["reply"] for line in reply_to(*REQUESTS, arguments=(f"--stop={stop}",))] == [
        reply.split(stop)[0].strip() for reply in free
    ]


def test_blank_lines_and_windows_ends_are_no_requests(reply_to):
    assert len(reply_to("", '{"persona": [], "history": ["hi"]}\r', "  ")) == 1


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "not JSON at column"),
        ("[1]", "expected an object with persona and history, got list"),
        (
            '{"persona": [], "history": ["hi"], "more": 1e999}',
            "a number that is not finite",
        ),
        ({"history": ["hi"]}, "the field 'persona' is missing"),
        ({"persona": [], "histroy": ["hi"]}, "'history' is missing .there is 'histroy': a typo"),
        ({"persona": "i sing.", "history": ["hi"]}, "persona must be a list of strings"),
        ({"persona": [], "history": [3]}, "history must be a list of strings"),
        ({"persona": [], "history": []}, "history is empty"),
        ({"persona": [], "history": ["hi", " "]}, "entry 2 of history is empty"),
        ({"persona": [], "history": ["hi"], "reply": "x"}, "field 'reply' would be overwritten"),
        ({"persona": [], "history": ["hi"], "seed": -1}, "seed must be a whole number from 0 to 2147483647"),
        ({"persona": [], "history": ["hi"], "seed": "3"}, "seed must be a whole number"),
        ('{"persona": [], "history": ["\\ud83d"]}', "surrogate"),
        ({"persona": [], "history": ["hi " * 200]}, "the limit is 300"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(reply_to, tmp_path, line, sentence):
    with pytest.raises(UserError, match=rf"in\.jsonl:2: .*{sentence}"):
        reply_to(REQUESTS[0], line, REQUESTS[1])
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_all_bad_lines_are_named_up_to_a_point(reply_to):
    with pytest.raises(UserError) as caught:
        reply_to(*["[]"] * 14)
    assert len(str(caught.value).splitlines()) == 11
    assert "4 more lines" in str(caught.value)


def test_bad_lines_are_told_before_the_run_is_opened(tmp_path):
    (tmp_path / "in.jsonl").write_text("nonsense\n")
    flag_values = flags.FlagValues()
    generate.define_flags(flag_values)
    flag_values(["generate", f"--workdir={tmp_path}", f"--input={tmp_path}/in.jsonl", f"--out={tmp_path}/o"])
    with pytest.raises(UserError, match=r"in\.jsonl:1: not JSON"):
        generate.run(flag_values, opener=lambda workdir, step: pytest.fail("the run was opened"))


def test_a_line_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b'{"persona": [], "history": ["hi"]}\n"\xff"\n')
    with pytest.raises(UserError, match=r"in\.jsonl:2: byte 2 of the line is not UTF-8"):
        generate.read_requests(tmp_path / "in.jsonl")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--input=",), "--input is missing"),
        (("--out=",), "--out is missing"),
        (("--input=absent.jsonl",), "absent.jsonl cannot be read: No such file"),
        (("--batch=0",), "--batch is 0"),
        (("--workdir=",), "--workdir is missing"),
    ],
)
def test_bad_flags_are_one_sentence(reply_to, arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        reply_to(*REQUESTS, arguments=arguments)


def test_an_output_that_cannot_be_written_is_told_before_the_work(reply_to, tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        reply_to(*REQUESTS, out="nowhere/out.jsonl")
    with pytest.raises(UserError, match="is a folder"):
        reply_to(*REQUESTS, out="")
    with pytest.raises(UserError, match=r"--out is the file of --input, .*, itself"):
        reply_to(*REQUESTS, out="in.jsonl")
    with pytest.raises(UserError, match="holds no request"):
        reply_to("")


def test_a_refusing_disk_leaves_the_old_file_and_no_temporary_one(tmp_path, monkeypatch):
    target = tmp_path / "out.jsonl"
    target.write_text("old")

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic_file.os, "fsync", refuse)
    with pytest.raises(UserError, match=r"out\.jsonl cannot be written: No space left on device"):
        atomic_file.write_atomically(target, "new")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_standard_streams_serve_as_files(trained, tmp_path):
    lines = "".join(json.dumps(request) + "\n" for request in REQUESTS)
    (tmp_path / "in.jsonl").write_text(lines)
    command = [sys.executable, "-m", "spt_jax", "generate", f"--workdir={trained / 'run'}"]
    subprocess.run([*command, "--input=in.jsonl", "--out=out.jsonl"], cwd=tmp_path, check=True)
    piped = subprocess.run(
        [*command, "--input=-", "--out=-"], cwd=tmp_path, input=lines, stdout=subprocess.PIPE, text=True, check=True
    )
    assert piped.stdout == (tmp_path / "out.jsonl").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
