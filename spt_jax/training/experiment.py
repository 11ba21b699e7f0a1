"""From a configuration to the objects of a run: mesh, LM, dialogues, rows, the first trainable tree."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from spt_jax.config import Config
from spt_jax.data.dialogue import Dialogue, DialogueSet, split_by_persona
from spt_jax.data.loader import DialogueLoader
from spt_jax.data.packing import PackedRows, pack
from spt_jax.data.similarity import pair_texts
from spt_jax.data.sources import read_dialogues
from spt_jax.errors import UserError
from spt_jax.models.decoder import FrozenTree, embed
from spt_jax.models.loading import LanguageModel, load_lm
from spt_jax.models.tokenization.tokenizer import Tokenizer
from spt_jax.models.weights import Progress
from spt_jax.parallel.mesh import make_mesh
from spt_jax.parallel.rules import parameter_sharding, row_devices, row_sharding
from spt_jax.progress import ProgressBar
from spt_jax.prompting.bank import from_file, from_normal, from_token_ids, from_vocabulary
from spt_jax.prompting.objective import Objective
from spt_jax.prompting.selective_lm import SelectiveLM, Trainable

SPLIT_SEED = 0
"""The development split belongs to the data: it stays the same whatever the run's seed."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What training and evaluation share.

    Attributes:
        config: The validated configuration.
        mesh: The device mesh.
        lm: The frozen LM with its tokenizer and identity.
        model: The static description of bank and retriever before that LM.
    """

    config: Config
    mesh: Mesh
    lm: LanguageModel
    model: SelectiveLM


def open_experiment(config: Config) -> Experiment:
    """Makes the mesh and loads the frozen LM onto it.

    Raises:
        UserError: The mesh does not fit the devices, the LM cannot be loaded, or soft prompt and row together are
            longer than the LM's context.
    """
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    with _loading_bar() as progress:
        lm = load_lm(
            config.model.source,
            dtype=config.model.dtype,
            remat=config.model.remat,
            revision=config.model.revision,
            context_length=config.model.context_length,
            quantization=config.model.quantization,
            sharding_for=partial(parameter_sharding, mesh),
            progress=progress,
        )
    # Rows are padded to multiples of 16; a context as long as a row must leave room for its reply.
    longest = config.bank.prompt_length + -(-config.data.max_length // 16) * 16 + config.evaluation.max_new_tokens
    if longest > lm.config.longest_row:
        raise UserError(
            f"bank.prompt_length + data.max_length + evaluation.max_new_tokens takes {longest} tokens, but the context "
            f"of {lm.identity.name} is {lm.config.longest_row}; lower data.max_length"
        )
    return Experiment(config, mesh, lm, describe(config, lm, mesh))


@contextlib.contextmanager
def _loading_bar() -> Iterator[Progress]:
    """Shows how much of the weights is loaded, in millions of parameters; nothing before the first of them."""
    shown = 0
    with contextlib.ExitStack() as stack:
        bar: ProgressBar | None = None

        def progress(what: str, done: int, total: int) -> None:
            nonlocal bar, shown
            if bar is None:
                bar = stack.enter_context(ProgressBar(f"{what}, millions", -(-total // 1_000_000)))
            now = -(-done // 1_000_000)
            bar.advance(now - shown)
            shown = now

        yield progress


def describe(config: Config, lm: LanguageModel, mesh: Mesh) -> SelectiveLM:
    """The static description of bank and retriever for an LM, with rows over the mesh's row axes."""
    return SelectiveLM(
        decoder=lm.config,
        num_prompts=config.bank.num_prompts,
        prompt_length=config.bank.prompt_length,
        share=config.retriever.share,
        activation=config.retriever.activation,
        max_logit_rows=config.model.max_logit_rows,
        row_sharding=row_sharding(mesh),
    )


def objective_of(config: Config) -> Objective:
    """Weights and temperatures from the section ``objective``."""
    o = config.objective
    return Objective(
        o.selection_weight, o.contrastive_weight, o.fusion_weight, o.gold_temperature, o.score_temperature, o.pairs
    )


def initial_trainable(config: Config, model: SelectiveLM, params: FrozenTree, tokenizer: Tokenizer) -> Trainable:
    """The trainable tree before the first step; a function of the configuration, its seed and the LM alone.

    Raises:
        UserError: ``bank.init_text`` or ``bank.init_file`` does not fit the bank.
    """
    bank_key, retriever_key = jax.random.split(jax.random.key(config.seed))
    shape = model.bank_shape

    def table() -> jax.Array:
        return embed(model.decoder, params, jnp.arange(model.decoder.vocab_size))

    match config.bank.init:
        case "vocabulary":
            prompts = from_vocabulary(bank_key, table(), shape)
        case "normal":
            prompts = from_normal(bank_key, shape, config.bank.init_stddev)
        case "text":
            prompts = from_token_ids(tokenizer.encode(list(config.bank.init_text)), table(), shape)
        case _:
            prompts = from_file(config.bank.init_file, shape)
    return jax.device_get({"bank": {"prompts": prompts}, "retriever": model.init_retriever(retriever_key)})


@dataclasses.dataclass(frozen=True)
class Splits:
    """The dialogues of a run; no persona is in two of them when they were cut from one file.

    Attributes:
        train: For learning.
        development: For early selection and tuning.
        test: For the final figures alone.
        skipped: One sentence for each malformed line that was skipped.
    """

    train: list[Dialogue]
    development: list[Dialogue]
    test: list[Dialogue]
    skipped: list[str]


def read_source(config: Config, source: str, split: str) -> DialogueSet:
    """Reads one source with the options of the section ``data``."""
    d = config.data
    if source.startswith("builtin:"):
        # The format and the columns are those of the user's own files.
        return read_dialogues(source, on_error=d.on_error)
    renamed = {name: column for name, column in d.columns.items() if column != name}
    return read_dialogues(source, format=d.format, on_error=d.on_error, columns=renamed or None, split=split)


def read_splits(config: Config) -> Splits:
    """Reads the training dialogues and, from their own sources or cut from them, the development and test dialogues.

    The test is cut first, so that it does not depend on the size of the development split.

    Raises:
        UserError: A source cannot be read, or too few personas remain.
    """
    d = config.data
    train_set = read_source(config, d.train, d.split)
    train, skipped = list(train_set.dialogues), list(train_set.skipped)
    if d.test:
        test_set = read_source(config, d.test, "test")
        test = list(test_set.dialogues)
        skipped += test_set.skipped
    else:
        train, test = split_by_persona(train, d.test_dialogues, SPLIT_SEED)
    if d.development:
        development_set = read_source(config, d.development, "validation")
        development = list(development_set.dialogues)
        skipped += development_set.skipped
    else:
        train, development = split_by_persona(train, d.development_dialogues, SPLIT_SEED)
    return Splits(train[: d.limit] if d.limit else train, development, test, skipped)


def pack_dialogues(config: Config, dialogues: Sequence[Dialogue], tokenizer: Tokenizer, layout: str = "") -> PackedRows:
    """Rows of tokens with the limits of the section ``data``; `layout` overrides its layout."""
    d = config.data
    return pack(dialogues, tokenizer, layout=layout or d.layout, max_length=d.max_length, max_turns=d.max_turns)


def make_loader(
    config: Config, rows: PackedRows, dialogues: Sequence[Dialogue], mesh: Mesh, pad_id: int
) -> DialogueLoader:
    """The training batches.

    Raises:
        UserError: The batch, or a micro-batch, is not a multiple of the devices that share its rows.
    """
    d, o = config.data, config.objective
    share = row_devices(mesh) * config.optimizer.micro_batches
    if d.batch % share:
        raise UserError(
            f"data.batch is {d.batch}; allowed: a multiple of {share} (mesh.data × mesh.fsdp = {row_devices(mesh)} "
            f"devices share the rows of each of {config.optimizer.micro_batches} micro-batches)"
        )
    return DialogueLoader(
        rows.rows,
        batch_size=d.batch,
        pad_id=pad_id,
        seed=config.seed,
        max_buckets=d.max_buckets,
        pair_texts=pair_texts(rows.rows, dialogues, o.pair_text) if o.contrastive_weight else None,
        bleu_threshold=o.bleu_threshold,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        prefetch=d.prefetch,
    )
