"""From a configuration to the objects of a run: mesh, LM, dialogues, rows, the first trainable tree."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from spt_jax.config import Config
from spt_jax.data.buckets import MULTIPLE
from spt_jax.data.chat_template import ChatTemplate
from spt_jax.data.dialogue import Dialogue, DialogueSet, draw_fraction, split_by_persona
from spt_jax.data.few_shot import FewShot, draw_demonstrations
from spt_jax.data.kept_rows import kept_rows
from spt_jax.data.loader import DialogueLoader
from spt_jax.data.official import official_rows, official_turns
from spt_jax.data.packing import PackedRows, Row, pack
from spt_jax.data.persona_task import PersonaTemplate
from spt_jax.data.similarity import pair_texts
from spt_jax.data.sources import read_dialogues
from spt_jax.data.template import PlainTemplate, Template
from spt_jax.errors import UserError
from spt_jax.models.loading import LanguageModel, OpenedLM, open_lm
from spt_jax.models.tokenization.tokenizer import Tokenizer
from spt_jax.models.weights import Progress
from spt_jax.parallel.distributed import is_lead
from spt_jax.parallel.mesh import make_mesh
from spt_jax.parallel.rules import parameter_sharding, row_devices, rows_here
from spt_jax.progress import ProgressBar
from spt_jax.prompting.selective_lm import SelectiveLM
from spt_jax.training.description import describe, front_length, remat_of

SPLIT_SEED = 0
"""The development split belongs to the data: it stays the same whatever the run's seed."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What training and evaluation share.

    Attributes:
        config: The validated configuration.
        mesh: The device mesh.
        lm: The frozen LM with its tokenizer and identity.
        model: The static description of what is learned before that LM.
    """

    config: Config
    mesh: Mesh
    lm: LanguageModel
    model: SelectiveLM


@dataclasses.dataclass(frozen=True)
class OpenedExperiment:
    """An experiment before the weights of its LM are read, which may take minutes.

    Attributes:
        config: The validated configuration.
        mesh: The device mesh.
        lm: All of the frozen LM but its weights' values.
        model: The static description of what is learned before that LM.
    """

    config: Config
    mesh: Mesh
    lm: OpenedLM
    model: SelectiveLM

    def load(self) -> Experiment:
        """Loads the weights onto the mesh.

        Raises:
            UserError: They cannot be used.
        """
        with _loading_bar() as progress:
            lm = self.lm.load(sharding_for=partial(parameter_sharding, self.mesh), progress=progress)
        return Experiment(self.config, self.mesh, lm, self.model)


def open_experiment(config: Config) -> OpenedExperiment:
    """Makes the mesh and opens the frozen LM.

    Raises:
        UserError: The mesh does not fit the devices, the LM cannot be opened, soft prompt and row together are longer
            than its context, or what shall be learned does not fit it.
    """
    mesh = make_mesh(**config.mesh.to_dict())
    lm = open_lm(**_lm_options(config))
    check_room(config, lm)
    model = describe(config, lm.config, mesh)
    jax.eval_shape(lambda: model.init(jax.random.key(0)))  # names of projections, for one, are those of the LM
    return OpenedExperiment(config, mesh, lm, model)


def open_lm_of(config: Config) -> OpenedLM:
    """The LM of a configuration, of which no weight is read, nor asked of a hub.

    Raises:
        UserError: See `spt_jax.models.loading.open_lm`.
    """
    return open_lm(**_lm_options(config), weights=False)


def _lm_options(config: Config) -> dict[str, Any]:
    """Which LM a configuration names, and how it is to be, as `open_lm` takes it."""
    options = ("source", "dtype", "revision", "context_length", "quantization")
    return {name: config.model[name] for name in options} | {"remat": remat_of(config)}


def check_room(config: Config, lm: OpenedLM) -> None:
    """Checks that the longest row and the reply behind it fit into the LM's context.

    Raises:
        UserError: Soft prompt, row and reply together are longer.
    """
    # Rows are padded to such multiples; a context as long as a row must leave room for its reply.
    padded = -(-config.data.max_length // MULTIPLE) * MULTIPLE
    longest = front_length(config) + padded + config.evaluation.max_new_tokens
    if longest > lm.config.longest_row:
        raise UserError(
            f"bank.prompt_length + data.max_length + evaluation.max_new_tokens takes {longest} tokens, but the context "
            f"of {lm.source.name} is {lm.config.longest_row}; lower data.max_length or evaluation.max_new_tokens"
        )


@contextlib.contextmanager
def _loading_bar() -> Iterator[Progress]:
    """Shows how much of the weights is loaded, in millions of parameters; nothing before the first of them."""
    shown = 0
    with contextlib.ExitStack() as stack:
        bar: ProgressBar | None = None

        def progress(what: str, done: int, total: int) -> None:
            nonlocal bar, shown
            if bar is None:
                bar = ProgressBar(f"{what}, millions", -(-total // 1_000_000), shown=is_lead())
                stack.enter_context(bar)
            now = -(-done // 1_000_000)
            bar.advance(now - shown)
            shown = now

        yield progress


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
    train = draw_fraction(train[: d.limit] if d.limit else train, d.fraction, config.seed)
    return Splits(train, development, test, skipped)


def template_of(config: Config, tokenizer: Tokenizer, demonstrations: Sequence[Dialogue] = ()) -> Template:
    """How the rows of a run are written.

    Args:
        config: The configuration.
        tokenizer: The LM's, which may carry a chat template.
        demonstrations: The training dialogues, from which few-shot prompting draws; needed for that alone.

    Raises:
        UserError: The LM has no chat template, or there are too few dialogues to draw from.
    """
    if config.data.task == "persona":
        return PersonaTemplate()
    if config.data.template == "chat":
        return ChatTemplate.of(tokenizer)
    if config.method.kind == "few_shot":
        shots = config.method.shots
        return FewShot(PlainTemplate(), draw_demonstrations(demonstrations, shots, config.seed), shots)
    return PlainTemplate()


def pad_id_of(config: Config, tokenizer: Tokenizer) -> int:
    """What fills rows: any id, since it is masked; in the official mode, where it is averaged, the authors' choice.

    Raises:
        UserError: In the official mode the tokenizer names a padding that the LM has no embedding of.
    """
    if config.retriever.context != "official":
        return tokenizer.pad_id
    own, vocabulary = tokenizer.own_pad_id, tokenizer.lm_vocab_size
    if own is not None:
        if vocabulary is not None and not 0 <= own < vocabulary:
            raise UserError(
                f"{config.model.source}: the tokenizer's pad token is {own}; allowed with retriever.context = "
                f"official, which reads the padding: 0 to {vocabulary - 1}, the LM's vocabulary, or none of its own"
            )
        return own
    if config.data.official_pad == "bos" and tokenizer.bos_id is not None:
        return tokenizer.bos_id
    return tokenizer.eos_id


def pack_dialogues(
    config: Config,
    dialogues: Sequence[Dialogue],
    tokenizer: Tokenizer,
    template: Template | None = None,
    layout: str = "",
    learning: bool = False,
) -> PackedRows:
    """Rows of tokens with the limits of the section ``data``; from the cache folder where they were packed before.

    `layout` overrides its layout; no `template` means the paper's.

    ``data.last_turn_only`` concerns the rows that are learned from alone; every turn is evaluated.

    Raises:
        UserError: A dialogue does not fit, or the official mode is asked for packed dialogues.
    """
    d = config.data
    layout = layout or d.layout
    limits: dict[str, Any] = {"max_length": d.max_length, "max_turns": d.max_turns}
    limits["last_turn_only"] = d.last_turn_only and learning
    if config.retriever.context == "official":
        if layout != "turn":
            raise UserError(
                f"--layout={layout} does not go with retriever.context = official: there a score depends on the rows "
                "beside it, one row a turn, in file order; allowed: --layout=turn"
            )
        limits |= {"freeze_persona": d.freeze_persona, "freeze_context": d.freeze_context}
        limits |= {"pad_id": pad_id_of(config, tokenizer)}
        make = partial(_official, dialogues, tokenizer, **limits)
    else:
        limits |= {"layout": layout, "template": template}
        make = partial(pack, dialogues, tokenizer, **limits)
    ours = template is None or type(template).__module__.startswith("spt_jax.data.")
    if not ours or not isinstance(tokenizer, Tokenizer):
        return make()  # nothing tells an encoder or a template of somebody else from another
    versions = [importlib.metadata.version(name) for name in ("tokenizers", "transformers", "jinja2")]
    return kept_rows(make, dialogues, [tokenizer.content_digest, *versions, repr(limits)])


def rows_remark(config: Config, what: str, packed: PackedRows) -> str:
    """A sentence on the rows of `what` that could not be packed as asked; empty where all could."""
    return f"rows {what}: {packed.remark} (data.max_length = {config.data.max_length})" if packed.remark else ""


def _official(dialogues: Sequence[Dialogue], tokenizer: Tokenizer, **limits: Any) -> PackedRows:
    return PackedRows(official_rows(dialogues, tokenizer, **limits), 0, 0)


def contrastive_texts(config: Config, rows: Sequence[Row], dialogues: Sequence[Dialogue]) -> list[list[str]] | None:
    """The texts whose BLEU makes the contrastive pairs; None where that loss is off."""
    o = config.objective
    if config.method.kind != "spt" or not o.contrastive_weight:
        return None
    if config.retriever.context == "official" and o.pair_text == "persona":
        persona = {
            (d, turn.turn): " ".join(turn.persona)
            for d, dialogue in enumerate(dialogues)
            for turn in official_turns(dialogue, last_turn_only=config.data.last_turn_only)
        }
        return [[persona[row.dialogue, int(turn)] for turn in row.turns] for row in rows]
    return pair_texts(rows, dialogues, o.pair_text)


def check_rows(config: Config, mesh: Mesh) -> None:
    """Refuses a batch whose rows the devices cannot share.

    Raises:
        UserError: ``data.batch`` is no multiple of the devices that share the rows of a micro-batch.
    """
    share = row_devices(mesh) * config.optimizer.micro_batches
    if config.data.batch % share:
        raise UserError(
            f"data.batch is {config.data.batch}; allowed: a multiple of {share} (mesh.data × mesh.fsdp = "
            f"{row_devices(mesh)} devices share the rows of each of {config.optimizer.micro_batches} micro-batches)"
        )


def make_loader(
    config: Config, rows: PackedRows, dialogues: Sequence[Dialogue], mesh: Mesh, pad_id: int
) -> DialogueLoader:
    """The training batches.

    Raises:
        UserError: As `check_rows`.
    """
    d = config.data
    check_rows(config, mesh)
    return DialogueLoader(
        rows.rows,
        batch_size=d.batch,
        pad_id=pad_id,
        seed=config.seed,
        max_buckets=d.max_buckets,
        pair_texts=contrastive_texts(config, rows.rows, dialogues),
        bleu_threshold=config.objective.bleu_threshold,
        rows_here=rows_here(mesh, d.batch),
        prefetch=d.prefetch,
        retriever_width=d.max_length if config.retriever.context == "official" else 0,
    )
