"""A run so small that every door can be walked through: a random Llama of bytes, dialogues of a few words."""

from __future__ import annotations

from pathlib import Path

from llama_files import random_llama

from spt_jax.commands.main import main

TALK = (
    ("i have two cats.", (("hi", "hello, a cat sits here"), ("how many?", "two of them"))),
    ("i bake bread.", (("what do you do?", "i bake"), ("when?", "at four"), ("tired?", "always"))),
    ("i sail alone.", (("where are you?", "at sea"),)),
    ("i mend clocks.", (("hello", "time to talk"), ("wow", "tick tock"))),
    ("i play chess.", (("your move", "knight takes"), ("ouch", "check"))),
    ("i teach maths.", (("hi", "two and two?"), ("four", "well done"), ("bye", "see you"))),
    ("i grow roses.", (("red?", "and white ones"),)),
    ("i ride horses.", (("fast?", "like wind"), ("scared?", "never"))),
    ("i paint walls.", (("which colour?", "blue today"),)),
    ("i run far.", (("how far?", "ten miles"), ("why?", "it is quiet"))),
    ("i read a lot.", (("what now?", "a long book"),)),
    ("i fix bikes.", (("mine broke", "bring it"), ("thanks", "any time"))),
)


def write_dialogues(path: Path, dialogues=TALK) -> Path:
    """A file in ParlAI's format."""
    lines = []
    for persona, turns in dialogues:
        lines.append(f"1 your persona: {persona}")
        lines += [f"{number} {query}\t{response}" for number, (query, response) in enumerate(turns, start=2)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_llama(folder: Path, **changes) -> Path:
    """A folder with one layer of width 16 over bytes; its context is 1,024 tokens."""
    small = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 1024,
    }
    return random_llama(**small, **changes).write_folder(folder)


def write_config(path: Path, model: Path, data: Path, test: Path) -> Path:
    """A config file for `write_llama`'s folder; eight devices share its rows. The best step is the second of four."""
    path.write_text(
        f'''"""A run of seconds."""

from spt_jax.config import default_config


def get_config(prompts: str = "3"):
    c = default_config()
    c.model.source = {str(model)!r}
    c.bank.num_prompts = int(prompts)
    c.bank.prompt_length = 4
    c.data.train = {str(data)!r}
    c.data.test = {str(test)!r}
    c.data.development_dialogues = 3
    c.data.batch = 8
    c.data.max_length = 700
    c.data.max_buckets = 1
    c.optimizer.learning_rate = 1.0
    c.train.steps = 4
    c.train.evaluate_every = 2
    c.train.save_every = 2
    c.train.keep_latest = 3
    c.evaluation.batch = 8
    c.evaluation.max_new_tokens = 4
    c.evaluation.replies = 5
    c.evaluation.samples = 2
    return c
''',
        encoding="utf-8",
    )
    return path


def train_arguments(folder: Path, *, workdir: Path, prompts: int = 3) -> list[str]:
    """Writes LM, dialogues and config into `folder`; the arguments that train there."""
    model = write_llama(folder / "lm")
    data, test = write_dialogues(folder / "train.txt"), write_dialogues(folder / "test.txt", TALK[:4])
    config = write_config(folder / "tiny.py", model, data, test)
    return ["train", f"--config={config}:{prompts}", f"--workdir={workdir}"]


def walk(*arguments: str | Path) -> None:
    """One door, which must succeed."""
    assert main([str(argument) for argument in arguments]) == 0
