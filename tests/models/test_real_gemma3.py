"""The real Gemma 3 270M from its Q4_K_M file: sensible, and the same as transformers reads it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spt_jax.data.buckets import BucketShape
from spt_jax.data.collate import collate
from spt_jax.data.packing import pack
from spt_jax.data.sources import read_dialogues
from spt_jax.generation.engine import GenerationEngine
from spt_jax.models.decoder import decode, embed, vocabulary_logits
from spt_jax.models.loading import LanguageModel, load_lm
from spt_jax.parallel.mesh import make_mesh
from spt_jax.prompting.adapters import SoftPrompts
from spt_jax.prompting.objective import Objective
from spt_jax.prompting.retriever import RetrieverConfig
from spt_jax.prompting.selective_lm import SelectiveLM
from spt_jax.training.step import init_state, make_train_step

pytestmark = pytest.mark.real_models
NEW_TOKENS = 16
FRANCE = "The capital of France is"


@pytest.fixture(scope="module")
def lm(gemma3_source: str) -> LanguageModel:
    return load_lm(gemma3_source)


@pytest.fixture(scope="module")
def engine(lm: LanguageModel) -> GenerationEngine:
    stops = lm.tokenizer.stop_ids
    return GenerationEngine(lm.config, lm.params, eos_ids=stops, pad_id=lm.tokenizer.pad_id, max_batch=4)


@pytest.fixture(scope="module")
def dialogues(shared_dir: Path) -> list[Any]:
    path = shared_dir / "data/convai2/valid_self_original_no_cands.txt"
    return list(read_dialogues(str(path)).dialogues[:20])


@pytest.fixture(scope="module")
def texts(dialogues: list[Any]) -> list[str]:
    """Whole dialogues in METHOD's template."""
    return [
        f"given persona: {' '.join(dialogue.persona)}; context: "
        + " ".join(f"Q: {turn.query} R: {turn.response}" for turn in dialogue.turns)
        for dialogue in dialogues
    ]


@pytest.fixture(scope="module")
def reference(gemma3_source: str) -> Any:
    torch = pytest.importorskip("torch")
    pytest.importorskip("accelerate", reason="transformers reads GGUF weights with accelerate alone")
    from transformers import AutoModelForCausalLM

    path = Path(gemma3_source)
    return AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32).eval()


def with_bos(lm: LanguageModel, texts: list[str]) -> list[list[int]]:
    assert lm.tokenizer.bos_id is not None
    return [[lm.tokenizer.bos_id, *row] for row in lm.tokenizer.encode(texts)]


def continued(lm: LanguageModel, engine: GenerationEngine, prompts: list[str], bank: Any = None) -> list[str]:
    bank = jnp.zeros((1, 0, lm.config.hidden_size)) if bank is None else bank
    rows = engine.generate(bank, with_bos(lm, prompts), [0] * len(prompts), max_new_tokens=NEW_TOKENS)
    return [lm.tokenizer.decode(row) for row in rows]


@functools.partial(jax.jit, static_argnums=0)
def token_nll(config: Any, params: Any, tokens: jax.Array) -> jax.Array:
    """Of one row ``[T]`` without padding."""
    positions = jnp.arange(tokens.shape[0])[None]
    hidden, _ = decode(config, params, embed(config, params, tokens[None]), positions, positions >= 0)
    log_probabilities = jax.nn.log_softmax(vocabulary_logits(config, params, hidden[0, :-1]))
    return -jnp.take_along_axis(log_probabilities, tokens[1:, None], -1)[:, 0]


def test_configuration_is_the_published_one(lm: LanguageModel) -> None:
    c = lm.config
    assert (c.num_layers, c.hidden_size, c.num_attention_heads, c.num_key_value_heads) == (18, 640, 4, 1)
    assert (c.head_dim, c.intermediate_size, c.vocab_size, c.max_position_embeddings) == (256, 2048, 262_144, 32_768)
    kinds = [c.layer_kinds[kind] for kind in c.layer_pattern]
    assert [kind.window for kind in kinds] == ([512] * 5 + [None]) * 3
    assert [kind.rope.theta for kind in kinds if kind.rope] == ([1e4] * 5 + [1e6]) * 3
    assert c.tie_word_embeddings and c.attention_scale == 256**-0.5 and c.embedding_scale == 640**0.5
    assert (lm.tokenizer.bos_id, lm.tokenizer.eos_id, lm.tokenizer.pad_id) == (2, 1, 0)


def test_it_speaks_in_words(lm: LanguageModel, engine: GenerationEngine) -> None:
    replies = continued(lm, engine, [FRANCE, "Water boils at a temperature of", "Once upon a time, there was a little"])
    print(replies)
    assert "100" in replies[1] or "212" in replies[1]
    for reply in replies:
        words = reply.split()
        assert len(words) >= 5 and len(set(words)) >= len(words) / 2, reply
        assert sum(word.strip(".,!?:;'\"()").isalpha() for word in words) >= len(words) / 2, reply


def test_it_knows_which_capital_is_whose(lm: LanguageModel) -> None:
    capitals = {"France": "Paris", "Japan": "Tokyo", "Italy": "Rome", "Russia": "Moscow"}
    for country in capitals:
        rows = with_bos(lm, [f"The capital of {country} is {city}" for city in capitals.values()])
        assert len({len(row) for row in rows}) == 1, "a city is one token"
        nll = [float(token_nll(lm.config, lm.params, jnp.asarray(row))[-1]) for row in rows]
        print(country, [round(value, 2) for value in nll])
        assert list(capitals.values())[int(np.argmin(nll))] == capitals[country]


def test_embeddings_of_a_text_as_a_soft_prompt_are_that_text(lm: LanguageModel, engine: GenerationEngine) -> None:
    [[bos, *rest]] = with_bos(lm, [FRANCE])
    bank = embed(lm.config, lm.params, jnp.asarray([[bos, *rest[:-1]]]))
    spread = float(jnp.asarray(lm.params["embed_tokens"])[jnp.asarray(rest)].std())
    assert float(bank.std()) == pytest.approx(spread * lm.config.hidden_size**0.5, rel=0.1)
    [row] = engine.generate(bank, [rest[-1:]], [0], max_new_tokens=NEW_TOKENS)
    [expected] = continued(lm, engine, [FRANCE])
    assert lm.tokenizer.decode(row) == expected
    [unscaled] = engine.generate(bank / lm.config.hidden_size**0.5, [rest[-1:]], [0], max_new_tokens=NEW_TOKENS)
    assert lm.tokenizer.decode(unscaled) != expected, "a prompt without the scale is another prompt"


@pytest.mark.torch
def test_token_ids_equal_transformers(gemma3_source: str, lm: LanguageModel, texts: list[str]) -> None:
    pytest.importorskip("torch")  # transformers' GGUF door imports it even for a tokenizer
    from transformers import AutoTokenizer

    path = Path(gemma3_source)
    theirs = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    hard = ["  two  spaces ", "naïve 東京 🙂\n\ttab", "1234 a1b2 don't", "<div> <end_of_turn>"]
    assert lm.tokenizer.encode(texts + hard[:-1]) == theirs(texts + hard[:-1], add_special_tokens=False).input_ids
    assert [lm.tokenizer.decode(row) for row in lm.tokenizer.encode(texts + hard)] == texts + hard


@pytest.mark.torch
def test_mean_nll_equals_transformers(lm: LanguageModel, reference: Any, texts: list[str]) -> None:
    import torch

    ours, theirs = [], []
    for row in with_bos(lm, texts):
        width = -(-len(row) // 32) * 32  # what follows changes nothing before it, and few shapes are compiled
        padded = np.array(row + [0] * (width - len(row)), np.int32)
        ours.append(np.asarray(token_nll(lm.config, lm.params, padded))[: len(row) - 1])
        ids = torch.tensor([row])
        with torch.no_grad():
            logits = reference(input_ids=ids, use_cache=False).logits[0, :-1]
            theirs.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").numpy())
    mine, other = np.concatenate(ours), np.concatenate(theirs)
    print(
        f"{len(texts)} dialogues, {mine.size} tokens: {mine.mean():.5f} nats, transformers {other.mean():.5f}, ", end=""
    )
    print(f"largest difference of a token {np.abs(mine - other).max():.1e}")
    assert abs(mine.mean() - other.mean()) <= 1e-3
    assert np.abs(mine - other).max() <= 1e-2
    assert 2.5 < mine.mean() < 4.5, "text of people is neither noise nor known by heart"


@pytest.mark.torch
def test_greedy_tokens_equal_transformers(
    lm: LanguageModel, engine: GenerationEngine, reference: Any, texts: list[str]
) -> None:
    import torch

    prompts = [FRANCE, *(text[: text.index(" R:") + 3] for text in texts[:5])]
    rows = with_bos(lm, prompts)
    bank = jnp.zeros((1, 0, lm.config.hidden_size))
    ours = engine.generate(bank, rows, [0] * len(rows), max_new_tokens=NEW_TOKENS)
    for row, mine in zip(rows, ours, strict=True):
        with torch.no_grad():
            full = reference.generate(
                torch.tensor([row]),
                attention_mask=torch.ones((1, len(row)), dtype=torch.long),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=lm.tokenizer.pad_id,
                eos_token_id=list(lm.tokenizer.stop_ids),
            )
        theirs = [token for token in full[0, len(row) :].tolist() if token not in lm.tokenizer.stop_ids]
        assert mine == theirs


def test_a_few_train_steps_lower_the_loss(lm: LanguageModel, dialogues: list[Any]) -> None:
    rows = pack(dialogues[:8], lm.tokenizer, max_length=160, layout="turn").rows
    rows = sorted(rows, key=len)[:2]
    longest, targets = max(map(len, rows)), max(len(row.target_ids) for row in rows)
    shape = BucketShape(-(-longest // 16) * 16, -(-targets // 16) * 16, max(len(row.turns) for row in rows))
    batch = {name: jnp.asarray(a) for name, a in collate(rows, np.arange(2), shape, lm.tokenizer.pad_id).items()}
    batch["similar"] = jnp.zeros((2 * shape.turns,) * 2, bool)
    model = SelectiveLM(lm.config, SoftPrompts(2, 4), RetrieverConfig(), max_logit_rows=64)
    mesh = make_mesh(devices=jax.devices()[:1])
    optimizer = optax.adam(0.1)
    state = init_state(model.init(jax.random.key(0), lm.params), optimizer, mesh)
    objective = Objective(0.4, 0.4, 1.0)
    step = make_train_step(model, objective, optimizer, mesh)
    losses = []
    for _ in range(5):
        state, metrics = step(state, lm.params, batch)
        losses.append(float(metrics["loss/lm"]))
    print(losses)
    assert int(state.skipped) == 0
    assert losses[-1] < losses[0] - 0.05
