"""The real SmolLM2-135M-Instruct: our reading of its GGUF file against transformers' reading of the same file."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spt_jax.data.sources import read_dialogues
from spt_jax.models.attention import KVCache
from spt_jax.models.decoder import decode, embed, vocabulary_logits
from spt_jax.models.decoder_config import LayerKind, Rope
from spt_jax.models.files.sources import resolve_source
from spt_jax.models.loading import LanguageModel, load_lm, load_tokenizer

pytestmark = [pytest.mark.smollm2, pytest.mark.first_python]
NEW_TOKENS = 20


@pytest.fixture(scope="module")
def lm(smollm2_source: str) -> LanguageModel:
    return load_lm(smollm2_source)


@pytest.fixture(scope="module")
def gguf_path(smollm2_source: str) -> Path:
    return resolve_source(smollm2_source).path


@pytest.fixture(scope="module")
def reference(gguf_path: Path) -> Any:
    torch = pytest.importorskip("torch")
    pytest.importorskip("accelerate", reason="transformers reads GGUF weights with accelerate alone")
    from transformers import AutoModelForCausalLM

    folder, name = str(gguf_path.parent), gguf_path.name
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def texts(shared_dir: Path) -> list[str]:
    """Whole dialogues in METHOD's template, in the order of the file."""
    dialogues = read_dialogues(str(shared_dir / "data/convai2/valid_self_original_no_cands.txt")).dialogues[:200]
    return [
        f"given persona: {' '.join(dialogue.persona)}; context: "
        + " ".join(f"Q: {turn.query} R: {turn.response}" for turn in dialogue.turns)
        for dialogue in dialogues
    ]


def padded(rows: list[list[int]], width: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.full((len(rows), width), pad, np.int32)
    valid = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], valid[i, : len(row)] = row, True
    return tokens, valid


@functools.partial(jax.jit, static_argnums=0)
def token_nll(config, params, tokens, valid):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = decode(config, params, embed(config, params, tokens), positions, valid)
    log_probabilities = jax.nn.log_softmax(vocabulary_logits(config, params, hidden[:, :-1]))
    return -jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], -1)[..., 0]


@pytest.mark.torch
@pytest.mark.parametrize("count", [5, pytest.param(50, marks=pytest.mark.campaign)])
def test_mean_nll_equals_transformers(count: int, lm: LanguageModel, reference: Any, texts: list[str]) -> None:
    import torch

    assert lm.tokenizer.bos_id is not None
    rows = [[lm.tokenizer.bos_id, *row] for row in lm.tokenizer.encode(texts[:count])]
    ours, theirs = [], []
    for start in range(0, count, 5):
        tokens, valid = padded(rows[start : start + 5], 416, lm.tokenizer.pad_id)
        target = valid[:, 1:]
        ours.append(np.asarray(token_nll(lm.config, lm.params, tokens, valid))[target])
        width = int(valid.sum(1).max())  # the padding law lets the oracle work on less
        ids = torch.tensor(tokens[:, :width].astype(np.int64))
        with torch.no_grad():
            logits = reference(input_ids=ids, attention_mask=torch.tensor(valid[:, :width].astype(np.int64))).logits
            nll = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
            )
        theirs.append(nll.numpy()[target[:, : width - 1].flatten()])
    mine, other = np.concatenate(ours), np.concatenate(theirs)
    print(f"{count} dialogues, {mine.size} tokens: {mine.mean():.5f} nats, transformers {other.mean():.5f}, ", end="")
    print(f"largest difference of a token {np.abs(mine - other).max():.1e}")
    assert abs(mine.mean() - other.mean()) <= 1e-3
    assert np.abs(mine - other).max() <= 1e-2
    assert 2.5 < mine.mean() < 4.0, "the figure on such text is known to be 3.21"


@pytest.mark.torch
def test_greedy_continuations_equal_transformers(lm: LanguageModel, reference: Any, texts: list[str]) -> None:
    import torch

    prompts = [text[: text.index(" R:") + 3] for text in texts[:10]]
    assert lm.tokenizer.bos_id is not None
    rows = [[lm.tokenizer.bos_id, *row] for row in lm.tokenizer.encode(prompts)]
    width = max(map(len, rows))

    @jax.jit
    def step(params, tokens, positions, valid, cache):
        hidden, cache = decode(lm.config, params, embed(lm.config, params, tokens), positions, valid, cache)
        return vocabulary_logits(lm.config, params, hidden), cache

    tokens, valid = padded(rows, width, lm.tokenizer.pad_id)
    lengths = valid.sum(1)
    cache = KVCache.empty(lm.config, len(rows), width + NEW_TOKENS)
    logits, cache = step(lm.params, tokens, np.tile(np.arange(width), (len(rows), 1)), valid, cache)
    ours = [np.argmax(np.asarray(logits)[np.arange(len(rows)), lengths - 1], -1)]
    for i in range(NEW_TOKENS - 1):
        positions = (lengths + i)[:, None]
        logits, cache = step(lm.params, ours[-1][:, None], positions, positions > 0, cache)
        ours.append(np.argmax(np.asarray(logits)[:, 0], -1))

    # The oracle pads on the left, transformers' way.
    ids = torch.tensor([[lm.tokenizer.pad_id] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    theirs, past, now = [], None, ids
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -now.shape[1] :]
            output = reference(input_ids=now, attention_mask=mask, position_ids=positions, past_key_values=past)
            past, now = output.past_key_values, output.logits[:, -1:].argmax(-1)
            mask = torch.cat([mask, torch.ones_like(now)], dim=1)
            theirs.append(now[:, 0].numpy())
    np.testing.assert_array_equal(np.stack(ours, 1), np.stack(theirs, 1))


@pytest.mark.torch
def test_token_ids_equal_transformers(gguf_path: Path, lm: LanguageModel, texts: list[str]) -> None:
    pytest.importorskip("torch")  # transformers' GGUF door imports it even for a tokenizer
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(gguf_path.parent), gguf_file=gguf_path.name)
    assert lm.tokenizer.encode(texts) == theirs(texts, add_special_tokens=False).input_ids
    ids = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, len(theirs))
    assert (lm.tokenizer.bos_id, lm.tokenizer.eos_id, lm.tokenizer.pad_id, lm.tokenizer.vocab_size) == ids


def test_text_comes_back(lm: LanguageModel, texts: list[str]) -> None:
    hard = ["  two  spaces ", "naïve 東京 🙂\n\ttab", "1234 a1b2", "<|im_end|> is text", ""]
    assert [lm.tokenizer.decode(row) for row in lm.tokenizer.encode(texts + hard)] == texts + hard


def test_special_tokens_are_neither_read_from_text_nor_written_to_it(lm: LanguageModel) -> None:
    tokenizer = lm.tokenizer
    [row] = tokenizer.encode(["hello <|im_end|>"])
    assert tokenizer.eos_id not in row
    assert tokenizer.decode([tokenizer.bos_id or 0, *tokenizer.encode(["hi"])[0], tokenizer.eos_id]) == "hi"


def test_digits_are_split_one_by_one(lm: LanguageModel) -> None:
    [row] = lm.tokenizer.encode(["in 2024"])
    assert [lm.tokenizer.decode([i]) for i in row] == ["in", " ", "2", "0", "2", "4"]


def test_identity_and_configuration(lm: LanguageModel, smollm2_source: str) -> None:
    assert (lm.config.num_layers, lm.config.hidden_size, lm.config.vocab_size) == (30, 576, 49152)
    assert lm.config.tie_word_embeddings and lm.config.layer_kinds == (LayerKind(Rope(1e5)),)
    assert lm.identity.name == smollm2_source and len(lm.identity.sha256) == 64
    assert load_tokenizer(smollm2_source).fingerprint == lm.tokenizer.fingerprint
    assert lm.tokenizer.chat_template is not None
