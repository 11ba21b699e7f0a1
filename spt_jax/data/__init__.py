"""From files of dialogues to batches of tokens with known target positions."""

from spt_jax.data.buckets import Buckets, BucketShape, choose_buckets
from spt_jax.data.collate import Batch, collate
from spt_jax.data.dialogue import Dialogue, DialogueSet, Turn, persona_key, split_by_persona
from spt_jax.data.loader import DialogueLoader, sequential_batches
from spt_jax.data.packing import LAYOUTS, PackedRows, Row, pack
from spt_jax.data.similarity import PAIR_KINDS, BleuSimilarity, pair_texts
from spt_jax.data.sources import read_dialogues
from spt_jax.data.template import DialogueTooLongError, TextEncoder, context_text, encode_context

__all__ = [
    "LAYOUTS",
    "PAIR_KINDS",
    "Batch",
    "BleuSimilarity",
    "BucketShape",
    "Buckets",
    "Dialogue",
    "DialogueLoader",
    "DialogueSet",
    "DialogueTooLongError",
    "PackedRows",
    "Row",
    "TextEncoder",
    "Turn",
    "choose_buckets",
    "collate",
    "context_text",
    "encode_context",
    "pack",
    "pair_texts",
    "persona_key",
    "read_dialogues",
    "sequential_batches",
    "split_by_persona",
]
