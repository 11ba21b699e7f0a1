"""Working directories as evaluation leaves them, with replies whose quality is chosen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_TEXT = "i you we like love have a the my dog cat bread sea red blue old , . ? ! and to go run sing play chess"
WORDS = tuple(_TEXT.split())


def references(dialogues: int, seed: int = 0) -> list[tuple[int, int, str]]:
    """Two to four turns a dialogue: (dialogue, turn, response)."""
    rng = np.random.default_rng(seed)
    return [
        (d, t, " ".join(rng.choice(WORDS, rng.integers(4, 9))))
        for d in range(dialogues)
        for t in range(rng.integers(2, 5))
    ]


def replies(turns: list[tuple[int, int, str]], quality: float, seed: int) -> list[str]:
    """A reply a turn that takes each word of the response with probability `quality`, else any word."""
    rng = np.random.default_rng(seed)
    return [
        " ".join(word if rng.random() < quality else str(rng.choice(WORDS)) for word in response.split())
        for _, _, response in turns
    ]


def write_run(
    folder: Path,
    turns: list[tuple[int, int, str]],
    texts: list[str],
    *,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    nll: list[float] | None = None,
    bert_score: list[tuple[float, float, float]] | None = None,
    definitions: Mapping[str, str] | None = None,
    total_turns: int | None = None,
    more: Mapping[str, list[Any]] | None = None,
    evaluated_with: Mapping[str, Any] | None = None,
    checkpoint: str = "",
) -> Path:
    """Writes ``config.json``, ``results.json`` and ``predictions.jsonl``; perplexity in the results is 20.

    `more` holds further fields of the predictions, a value a turn; `evaluated_with` options as the evaluation had them;
    an empty `checkpoint` is not told, as by older evaluations.
    """
    folder.mkdir(parents=True)
    config = {"seed": seed, "method": {"kind": "spt"}, "evaluation": {"max_new_tokens": 32}, **(settings or {})}
    record = {"spt_jax": "0", "lm": {"name": "lm", "sha256": "0"}, "tokenizer": "t", "config": config}
    results = {
        "columns": {"no soft prompt": {"perplexity": 30.0}, "after training": {"perplexity": 20.0}},
        "turns": total_turns or len(turns),
        "replies": len(turns),
        "data": "valid.txt",
        "definitions": {"perplexity": "exp of nats a token", **(definitions or {})},
        "settings": dict(evaluated_with or {}),
        **({"checkpoint": checkpoint} if checkpoint else {}),
    }
    lines = []
    for i, ((dialogue, turn, response), text) in enumerate(zip(turns, texts, strict=True)):
        line: dict[str, Any] = {"dialogue": dialogue, "turn": turn, "reference": response, "prediction": text}
        if nll is not None:
            line |= {"selected": 1, "nll": [99.0, nll[i]], "target_tokens": len(response.split()) + 1}
        if bert_score is not None:
            line["bert_score"] = list(bert_score[i])
        line |= {name: values[i] for name, values in (more or {}).items()}
        lines.append(json.dumps(line) + "\n")
    (folder / "config.json").write_text(json.dumps(record))
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "predictions.jsonl").write_text("".join(lines))
    return folder
