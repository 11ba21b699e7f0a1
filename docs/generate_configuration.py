"""Writes docs/configuration.md from `spt_jax.config`: ``python docs/generate_configuration.py``."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

from spt_jax.config import RULES, default_config, flatten

PAGE = Path(__file__).with_name("configuration.md")

SECTIONS = {
    "": "The run",
    "model": "The frozen LM",
    "method": "What is learned",
    "lora": "Low-rank updates",
    "bank": "The bank of soft prompts",
    "retriever": "The retriever",
    "objective": "The losses",
    "data": "Dialogues, rows and batches",
    "optimizer": "The optimizer",
    "train": "The training loop",
    "generation": "Generation",
    "evaluation": "Evaluation",
    "mesh": "Devices",
    "tracking": "Where metrics go",
}

RELATIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "`optimizer.micro_batches` divides `data.batch`.",
        {"data.batch": 8, "optimizer.micro_batches": 3},
    ),
    (
        "`data.max_turns` above 0 needs `data.layout = turn`.",
        {"data.max_turns": 2},
    ),
    (
        "`bank.init = file` and `bank.init = peft` need `bank.init_file`.",
        {"bank.init": "peft"},
    ),
    (
        "`bank.init = text` needs `bank.init_text`.",
        {"bank.init": "text"},
    ),
    (
        "`nli` among `evaluation.metrics` needs `evaluation.nli`.",
        {"evaluation.metrics": ("nli",)},
    ),
    (
        "`generation.min_new_tokens` is at most `evaluation.max_new_tokens`.",
        {"generation.min_new_tokens": 33},
    ),
    (
        "`generation.top_k`, `generation.top_p`, `generation.min_p` and `generation.typical_p` cut a draw, so they "
        "need a `generation.temperature` above 0.",
        {"generation.top_k": 5, "generation.top_p": 0.9, "generation.min_p": 0.1, "generation.typical_p": 0.9},
    ),
    (
        "`generation.beams` above 1 needs a `generation.temperature` of 0.",
        {"generation.beams": 2, "generation.temperature": 1.0},
    ),
    (
        "`generation.samples` at a temperature of 0 are at most the beams.",
        {"generation.samples": 3},
    ),
    (
        "`data.task = persona` needs `data.template = plain`.",
        {"data.task": "persona", "data.template": "chat"},
    ),
    (
        "`data.task = persona` does not go with `method.kind = few_shot`.",
        {"data.task": "persona", "method.kind": "few_shot"},
    ),
    (
        "`method.kind = few_shot` needs `data.template = plain`.",
        {"method.kind": "few_shot", "data.template": "chat"},
    ),
    (
        "`method.kind = full` needs `model.quantization = none`.",
        {"method.kind": "full", "model.quantization": "int8"},
    ),
    (
        "`method.hidden_size` above 0 needs a `method.kind` of p_tuning or prefix_tuning.",
        {"method.hidden_size": 8},
    ),
    (
        "`model.dropout` is 0 with zero-shot and few-shot, which train nothing.",
        {"method.kind": "zero_shot", "model.dropout": 0.1},
    ),
    (
        "`bank.init` other than vocabulary and normal needs a `method.kind` of spt or prompt_tuning.",
        {"method.kind": "p_tuning", "bank.init": "clusters"},
    ),
    (
        "`bank.kind = prefixes` needs `method.kind = spt`.",
        {"method.kind": "prompt_tuning", "bank.kind": "prefixes"},
    ),
    (
        "`bank.kind = prefixes` needs `bank.init = normal` and `evaluation.selection = hard`.",
        {"bank.kind": "prefixes", "evaluation.selection": "soft"},
    ),
    (
        "`objective.annealing_min` is at most `objective.annealing_max` where there is annealing.",
        {"objective.annealing": 1.0, "objective.annealing_min": 2.0},
    ),
    (
        "`objective.prompts_per_step` is 0, or 2 to `bank.num_prompts`.",
        {"objective.prompts_per_step": 1},
    ),
    (
        "`objective.prompts_per_step` of fewer than K needs a `retriever.activation` of softplus or relu.",
        {"objective.prompts_per_step": 2, "retriever.activation": "leaky_relu"},
    ),
    (
        "`retriever.context = official` needs `method.kind = spt`, `bank.kind = prompts`, `data.layout = turn`, "
        "`data.template = plain`, `data.task = response`, `retriever.share = true`, `evaluation.selection = hard` and "
        "`objective.prompts_per_step = 0`.",
        {
            "retriever.context": "official",
            "method.kind": "lora",
            "bank.kind": "prefixes",
            "data.template": "chat",
            "data.task": "persona",
            "retriever.share": False,
            "evaluation.selection": "soft",
            "objective.prompts_per_step": 2,
        },
    ),
    (
        "`data.freeze_persona`, `data.freeze_context` and `data.official_pad` keep their defaults unless "
        "`retriever.context` is official.",
        {"data.freeze_persona": False, "data.freeze_context": False, "data.official_pad": "bos"},
    ),
)
"""Rules that tie options together, each with values that break it."""

_OPTION = re.compile(r"^    c\.([\w.]+) = .*?  # (.+)$", re.MULTILINE)
_TYPES = {bool: "true or false", str: "any text", tuple: "texts", int: "a whole number", float: "a number"}

_INTRODUCTION = """\
# Configuration

This page is generated from `spt_jax/config.py` by `python docs/generate_configuration.py`; a test fails when the two
differ.

A run is described by a Python file whose `get_config()` returns an `ml_collections.ConfigDict`; start from
[`configs/common.py`](../configs/common.py). Every option can be overridden on the command line:

```bash
spt-jax train --config=configs/quickstart.py --workdir=runs/a --config.bank.num_prompts=8 --config.seed=1
```

An option that holds several names takes them with commas, `--config.lora.targets=q_proj,v_proj`. One that holds several
texts is written as in Python, `--config.generation.stop="('bye', 'the end')"`; a text that is no such list is its one
element, commas and all.

A name that does not exist, a value of another type and a value that is not allowed each end the command with exit code
2 and one sentence that says what is allowed. The configuration of a run is kept in its working directory, in
`config.json`; the other doors read it there.
"""

_BETWEEN = """\
## Between options

{relations}
- `data.batch` is a multiple of `mesh.data` × `mesh.fsdp` × `optimizer.micro_batches` (checked against the devices).
- `mesh.data` × `mesh.fsdp` × `mesh.tensor` is the number of devices.
- `bank.prompt_length` + `data.max_length`, rounded up to a multiple of 8, + `evaluation.max_new_tokens` fits the LM's
  context.
- `data.columns.*` differ from their defaults only where a table is read (see
  [data_and_models.md](data_and_models.md)).
"""


def descriptions() -> dict[str, str]:
    """The comment behind every default in `default_config`, by the option's name."""
    return dict(_OPTION.findall(inspect.getsource(default_config)))


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str):
        return f"`{value}`" if value else "empty"
    if isinstance(value, tuple):
        return ", ".join(_shown(item) for item in value)
    return f"`{value}`"


def _row(name: str, value: Any, meaning: str) -> str:
    allowed = RULES[name].allowed if name in RULES else _TYPES[type(value)]
    cells = (f"`{name}`", _shown(value), allowed, meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def page() -> str:
    """The whole page.

    Raises:
        ValueError: An option has no comment, or its section no title here.
    """
    options, meanings = flatten(default_config()), descriptions()
    if silent := sorted(set(options) - set(meanings)):
        raise ValueError(f"spt_jax/config.py: no comment on one line with the default of {', '.join(silent)}")
    parts = [_INTRODUCTION]
    by_section: dict[str, list[str]] = {}
    for name in meanings:
        by_section.setdefault(name.partition(".")[0] if "." in name else "", []).append(name)
    if untitled := sorted(set(by_section) - set(SECTIONS)):
        raise ValueError(f"docs/generate_configuration.py: no title for the section {', '.join(untitled)}")
    for section, title in SECTIONS.items():
        heading = f"## {title} (`{section}`)" if section else f"## {title}"
        rows = [_row(name, options[name], meanings[name]) for name in by_section[section]]
        head = ["| option | default | allowed | meaning |", "| --- | --- | --- | --- |"]
        parts.append("\n".join([heading, "", *head, *rows]) + "\n")
    parts.append(_BETWEEN.format(relations="\n".join(f"- {sentence}" for sentence, _ in RELATIONS)))
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE} written\n")
