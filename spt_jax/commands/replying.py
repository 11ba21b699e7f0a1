"""How a restored run answers: the flags of replies, the choice of a prompt, the reply behind it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from absl import flags

from spt_jax.commands.decoding_flags import define_decoding_flags, given_decoding
from spt_jax.commands.requests import SEEDS
from spt_jax.errors import UserError

if TYPE_CHECKING:  # whatever needs jax is imported late: --help and a wrong flag do not wait for it
    from spt_jax.generation.decoding import Decoding
    from spt_jax.generation.streaming import ReplyStream


class RestoredRun(Protocol):
    """What the doors that reply need of a run that was opened from its working directory."""

    @property
    def config(self) -> Any:
        """The run's configuration, an `ml_collections.ConfigDict`."""
        ...

    @property
    def lm(self) -> Any:
        """The frozen LM: `config`, `params` and `tokenizer`."""
        ...

    @property
    def conditions(self) -> Any:
        """The LM under what was learned, a `spt_jax.prompting.adapters.Conditions`."""
        ...

    @property
    def cut(self) -> Callable[[str], str]:
        """The reply in a generated text."""
        ...

    @property
    def stop_ids(self) -> Sequence[int]:
        """The tokens that end a reply."""
        ...

    def score_contexts(self, contexts: Sequence[Sequence[int]]) -> np.ndarray:
        """The retriever's scores ``[n, K]`` of n contexts in tokens."""
        ...

    def encode_context(self, persona: Sequence[str], history: Sequence[str], *, room: int = 0) -> list[int]:
        """The tokens of an inference prompt, without its oldest turns where the LM would have no `room` behind it."""
        ...


Opener = Callable[..., RestoredRun]
"""Opens a run: ``opener(workdir, step="best")``."""


@dataclasses.dataclass(frozen=True)
class ReplySettings:
    """What the flags say about replies.

    Attributes:
        given: Options of decoding that override the run's.
        max_new_tokens: Tokens, at most, in a reply; None for as many as the run's evaluation.
        seed: Where draws begin.
        prompt: The prompt that answers every time; None leaves the choice to the retriever.
    """

    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    max_new_tokens: int | None = None
    seed: int = 0
    prompt: int | None = None


@dataclasses.dataclass(frozen=True)
class Selection:
    """A context and the prompt that answers it.

    Attributes:
        tokens: The context, T ids.
        prompt: Index into the bank.
        scores: The retriever's K scores.
    """

    tokens: tuple[int, ...]
    prompt: int
    scores: tuple[float, ...]


def define_reply_flags(flag_values: flags.FlagValues, *, samples: bool = False) -> None:
    """Adds --workdir, --checkpoint and the flags that `reply_settings` reads; see `define_decoding_flags`."""
    fv = flag_values
    flags.DEFINE_string("workdir", None, "Working directory of a trained run.", flag_values=fv)
    flags.DEFINE_string("checkpoint", "best", "Which checkpoint: best, latest or a step's number.", flag_values=fv)
    flags.DEFINE_integer(
        "max_new_tokens",
        None,
        "Tokens in a reply, at most. Else the run's evaluation.max_new_tokens.",
        flag_values=fv,
    )
    flags.DEFINE_integer("seed", 0, "Seed of the draws.", flag_values=fv)
    flags.DEFINE_integer(
        "prompt", None, "Index of a soft prompt that always answers, whatever the scores say.", flag_values=fv
    )
    define_decoding_flags(fv, samples=samples)


def reply_settings(flag_values: flags.FlagValues) -> ReplySettings:
    """Reads the flags of `define_reply_flags`.

    Raises:
        UserError: If a value is outside its range, or --workdir is missing.
    """
    fv = flag_values
    if not fv.workdir:
        raise UserError("--workdir is missing; give the working directory of a trained run")
    if fv.max_new_tokens is not None and fv.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens is {fv['max_new_tokens'].value}; allowed: 1 or more")
    if not 0 <= fv.seed < SEEDS:
        raise UserError(f"--seed is {fv['seed'].value}; allowed: 0 to {SEEDS - 1}")
    if fv.prompt is not None and fv.prompt < 0:
        raise UserError(f"--prompt is {fv['prompt'].value}; allowed: the index of a soft prompt, 0 or more")
    return ReplySettings(given_decoding(fv), fv.max_new_tokens, fv.seed, fv.prompt)


def restored(flag_values: flags.FlagValues, settings: ReplySettings, opener: Opener | None) -> RestoredRun:
    """Opens the run that --workdir and --checkpoint name; `opener` stands in for the usual way.

    Raises:
        UserError: There is no such run, or the settings do not go with it: that is told before its LM is loaded.
    """
    if opener is not None:
        return opener(flag_values.workdir, step=flag_values.checkpoint)
    # Late, so that a wrong flag is told without waiting for the imports.
    from spt_jax.commands.restored import find_run
    from spt_jax.training.description import num_prompts_of

    found = find_run(flag_values.workdir, flag_values.checkpoint)
    _options_of(found.config, settings, num_prompts_of(found.config))
    return found.open()


def _options_of(config: Any, settings: ReplySettings, num_prompts: int) -> tuple[Decoding, int]:
    """A run's options of decoding, and the most tokens of a reply, where the settings do not override them."""
    from spt_jax.generation.decoding import Decoding

    if settings.prompt is not None and settings.prompt >= num_prompts:
        raise UserError(f"--prompt is {settings.prompt}; this run has prompts 0 to {num_prompts - 1}")
    decoding = Decoding.of(config.generation, **settings.given)
    given = settings.max_new_tokens
    most: int = config.evaluation.max_new_tokens if given is None else given
    if decoding.min_new_tokens > most:
        raise UserError(f"--min_new_tokens is {decoding.min_new_tokens}; allowed: up to --max_new_tokens ({most})")
    return decoding, most


class Responder:
    """Selects a prompt for each context and replies behind it.

    Args:
        run: The restored run.
        settings: From the flags.
        max_batch: Rows in a batch, at most.
        length_multiple: Tokens; see `GenerationEngine`.

    Attributes:
        settings: As given.
        decoding: The run's options of decoding where the settings do not override them.
        max_new_tokens: The run's where the settings do not override it.
        mixes: Whether a mixture of all prompts answers, by their scores, and not the one with the best score.

    Raises:
        UserError: If `settings.prompt` is not in the bank, or options of decoding do not go together.
    """

    def __init__(
        self, run: RestoredRun, settings: ReplySettings, *, max_batch: int = 16, length_multiple: int = 32
    ) -> None:
        from spt_jax.generation.engine import GenerationEngine
        from spt_jax.generation.replies import ReplyText

        self._run = run
        self._bank = run.conditions.bank
        self.settings = settings
        options = run.config
        self.decoding, self.max_new_tokens = _options_of(options, settings, self._bank.shape[0])
        self.mixes = settings.prompt is None and options.evaluation.selection == "soft" and self._bank.shape[0] > 1
        self._temperature = options.objective.score_temperature
        tokenizer = run.lm.tokenizer
        self._text = ReplyText(tokenizer.decode, run.cut, self.decoding.stop)
        self._engine = GenerationEngine(
            run.lm.config,
            run.conditions.params,
            eos_ids=run.stop_ids,
            pad_id=tokenizer.pad_id,
            vocab_size=tokenizer.vocab_size,
            max_batch=max_batch,
            length_multiple=length_multiple,
        )

    def encode(self, persona: Sequence[str], history: Sequence[str]) -> list[int]:
        """The tokens of an inference prompt, without its oldest turns where the reply would have no room behind it."""
        return self._run.encode_context(persona, history, room=self.max_new_tokens)

    def select(self, contexts: Sequence[Sequence[int]]) -> list[Selection]:
        """The prompt of each context: the forced one, else the best score, the lowest index among equals."""
        if not contexts:
            return []
        scores = np.asarray(self._run.score_contexts(contexts))
        chosen = scores.argmax(axis=1) if self.settings.prompt is None else [self.settings.prompt] * len(contexts)
        return [
            Selection(tuple(context), int(prompt), tuple(float(score) for score in row))
            for context, prompt, row in zip(contexts, chosen, scores, strict=True)
        ]

    def replies(
        self,
        selections: Sequence[Selection],
        on_batch: Callable[[int, int], None] | None,
        seeds: Sequence[int | None] | None = None,
    ) -> list[list[str]]:
        """`decoding.samples` cut replies to each selection, in order.

        Args:
            selections: The contexts.
            on_batch: Hears (rows done, rows in all).
            seeds: Each selection's own seed of draws; None draws by the settings' seed and the selection's place.
        """
        from spt_jax.generation.seeds import seed_at

        bank, prompts = self._fronts(selections)
        own = seeds or [None] * len(selections)
        found = self._engine.continuations(
            bank,
            [selection.tokens for selection in selections],
            prompts,
            max_new_tokens=self.max_new_tokens,
            decoding=self.decoding,
            seed=[seed_at(self.settings.seed, place) if seed is None else seed for place, seed in enumerate(own)],
            ended=self._text.ended,
            stopped=self._text.stopped,
            on_batch=on_batch,
        )
        return [[self._text.of(continued.tokens) for continued in row] for row in found]

    def under_every_prompt(self, tokens: Sequence[int], *, seed: int, decoding: Decoding | None = None) -> list[str]:
        """The cut reply of each of the K prompts to one context, all with the same draws; `decoding` as in `stream`."""
        prompts = range(self._bank.shape[0])
        found = self._engine.generate(
            self._bank,
            [tokens] * len(prompts),
            prompts,
            max_new_tokens=self.max_new_tokens,
            decoding=decoding or self.decoding,
            seed=[seed] * len(prompts),
            ended=self._text.ended,
            stopped=self._text.stopped,
        )
        return [self._text.of(ids) for ids in found]

    def _fronts(self, selections: Sequence[Selection]) -> tuple[Any, list[int]]:
        """The bank and an index into it for each selection; with soft selection, a mixture of its own for each."""
        if not self.mixes:
            return self._bank, [selection.prompt for selection in selections]
        from spt_jax.prompting.selective_lm import mixed_prompts

        scores = np.asarray([selection.scores for selection in selections], np.float32)
        return mixed_prompts(self._bank, scores, self._temperature), list(range(len(selections)))

    def stream(self, selection: Selection, *, seed: int, decoding: Decoding | None = None) -> ReplyStream:
        """The reply to one context, piece by piece; `decoding` stands in for the responder's."""
        from spt_jax.generation.streaming import ReplyStream

        bank, prompts = self._fronts([selection])
        ids = self._engine.stream(
            bank,
            selection.tokens,
            prompts[0],
            max_new_tokens=self.max_new_tokens,
            decoding=decoding or self.decoding,
            seed=seed,
            stopped=self._text.stopped,
        )
        return ReplyStream(ids, self._text)
