"""The figures of one bank of prompts on a set of dialogues: a column of the table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from spt_jax.data.dialogue import Dialogue
from spt_jax.data.packing import Row
from spt_jax.data.template import PlainTemplate, Template, turn_history
from spt_jax.evaluation import hits
from spt_jax.evaluation.candidate_scores import CandidateScores, score_candidates
from spt_jax.evaluation.candidates import RankedTurn, check_room, ranked_turns
from spt_jax.evaluation.journal import KeptColumn
from spt_jax.evaluation.likelihood import Likelihoods, score_rows
from spt_jax.evaluation.reply_writer import ReplyWriter, turn_contexts
from spt_jax.evaluation.spread import spread_evenly
from spt_jax.evaluation.text_metrics import TextMetrics, text_metrics
from spt_jax.generation.decoding import Decoding
from spt_jax.generation.engine import GenerationEngine
from spt_jax.generation.replies import ReplyText
from spt_jax.metric_groups import EVERYDAY, chosen_groups, is_chosen
from spt_jax.models.loading import LanguageModel
from spt_jax.parallel.rules import row_sharding
from spt_jax.progress import ProgressBar
from spt_jax.prompting.adapters import Conditions, Trainable
from spt_jax.prompting.selective_lm import SelectiveLM, inference_conditions, mixed_prompts

PERPLEXITY_DEFINITIONS = {
    "perplexity": "exp(total nll under the selected prompt / target tokens), end of sequence included",
    "perplexity_per_word": "the same sum over the whitespace words of the responses",
    "oracle_perplexity": "as perplexity, under each turn's best prompt in hindsight",
    "usage": "share of the turns whose highest score is each prompt's",
}


@dataclasses.dataclass(frozen=True)
class Column:
    """What one bank does on the dialogues.

    Attributes:
        likelihoods: Of every turn.
        answered: int ``[R]``, which turns (indices into `likelihoods`) have a reply.
        replies: The R replies, cut.
        metrics: Text metrics of the replies.
        hits: Of the turns that were ranked; None where hits@1 was not asked for.
        figures: Name of a figure to its value, as in ``results.json``.
        definitions: Name of a figure to one sentence.
    """

    likelihoods: Likelihoods
    answered: np.ndarray
    replies: list[str]
    metrics: TextMetrics
    hits: hits.Hits | None
    figures: dict[str, Any]
    definitions: dict[str, str]


@dataclasses.dataclass(frozen=True)
class ColumnOptions:
    """How columns are measured; the same for all of a table.

    Attributes:
        batch_size: Rows scored and replies decoded at once.
        max_buckets: Length buckets.
        max_new_tokens: Tokens of a reply at most.
        cut: The reply in a generated text.
        decoding: How its tokens are chosen; greedy by default.
        template: How the rows were written.
        pad_id: Fills rows that are scored; None for the tokenizer's.
        end_id: What ends a reply, beside the tokenizer's stop tokens; None for nothing else.
        replies: How many turns get a reply, and have their candidates ranked, spread evenly; 0 for all.
        metrics: Groups of figures (`spt_jax.metric_groups`).
        selection: ``"hard"`` answers under the prompt with the best score, ``"soft"`` under the mixture of all prompts
            with the weights ``softmax_k(score / τ_sim)``.
        selection_noise: Standard deviation of normal noise on the scores before the choice.
        score_temperature: τ_sim of the mixture.
        bert_score_model: Encoder of BERTScore; one that is given asks for it.
        bert_score_layers: Layers of it that are used; 0 leaves the choice to bert-score.
        nli_model: Classifier of entailment; one that is given asks for the consistency with the persona.
        seed: Of the noise, and of draws.
        front: Tokens of the longest soft prompt: beside it and a context every candidate must have room.
    """

    batch_size: int
    max_buckets: int
    max_new_tokens: int
    cut: Callable[[str], str]
    decoding: Decoding = dataclasses.field(default_factory=Decoding)
    template: Template = dataclasses.field(default_factory=PlainTemplate)
    pad_id: int | None = None
    end_id: int | None = None
    replies: int = 0
    metrics: Iterable[str] = (EVERYDAY,)
    selection: str = "hard"
    selection_noise: float = 0.0
    score_temperature: float = 1.0
    bert_score_model: str = ""
    bert_score_layers: int = 0
    nli_model: str = ""
    seed: int = 0
    front: int = 0


class ColumnEvaluator:
    """Evaluates banks on the same rows and LM.

    Args:
        lm: The frozen LM.
        mesh: Its mesh.
        dialogues: The dialogues.
        rows: Their rows.
        options: How.

    Raises:
        UserError: A candidate that is to be ranked does not fit into the LM's context.

    Attributes:
        answered: int ``[R]``, which turns, in order, get a reply.
        learns_persona: Whether it is not responses that are learned but personas, from what was said.
    """

    def __init__(
        self, lm: LanguageModel, mesh: Mesh, dialogues: Sequence[Dialogue], rows: Sequence[Row], options: ColumnOptions
    ) -> None:
        self._lm, self._mesh, self._dialogues, self._rows, self._options = lm, mesh, dialogues, rows, options
        self._contexts = turn_contexts(rows)
        self.answered = spread_evenly(len(self._contexts), options.replies)
        self.learns_persona = options.template.learns_persona
        self._text = ReplyText(lm.tokenizer.decode, options.cut, options.decoding.stop)
        self._groups = chosen_groups(options.metrics)
        self._ranked, self._unranked = self._find_ranked() if "hits" in self._groups else ([], "")
        # How rows are scored, be it turns or candidates.
        self._scoring = {
            "mesh": mesh,
            "batch_size": options.batch_size,
            "pad_id": lm.tokenizer.pad_id if options.pad_id is None else options.pad_id,
            "max_buckets": options.max_buckets,
        }

    @property
    def turns(self) -> int:
        """How many turns are scored."""
        return len(self._contexts)

    def notes(self, column: Column) -> list[str]:
        """A sentence for every figure of the column that was asked for and could not be computed."""
        return [*column.metrics.notes, *([self._unranked] if self._unranked else [])]

    def _find_ranked(self) -> tuple[list[RankedTurn], str]:
        """The answered turns that can be ranked, and why there are none."""
        if self.learns_persona:
            return [], "hits@1 is left out: it ranks responses, and data.task = persona writes none."
        if any(row.inference_prompt is not None for row in self._rows):
            return [], "hits@1 is left out: the official mode, whose contexts depend on their batch, ranks nothing."
        wanted = sorted(self._contexts)
        keys = [wanted[u] for u in self.answered]
        found = ranked_turns(self._rows, self._dialogues, keys, self._options.template, self._lm.tokenizer)
        check_room(found, self._options.front, self._lm.config.longest_row)  # before anything is scored
        if found:
            return found, ""
        return [], (
            "hits@1 is left out: no answered turn has candidates with its response among them; ConvAI2's files with "
            "candidates (valid_self_original.txt) and JSON lines with 'candidates' have them."
        )

    def reference(self, dialogue: int, turn: int) -> str:
        """What the dialogue has in the place of a reply: the response, or the persona where that is learned."""
        found = self._dialogues[dialogue]
        return " ".join(found.persona) if self.learns_persona else found.turns[turn].response

    def history(self, dialogue: int, turn: int) -> list[str]:
        """What a reply goes by: the utterances up to the query, and the response too where the persona is learned."""
        found = self._dialogues[dialogue]
        said = turn_history(found, turn)
        return [*said, found.turns[turn].response] if self.learns_persona else said

    def run(
        self,
        model: SelectiveLM,
        trainable: Trainable,
        bars: Callable[[str, int], ProgressBar],
        kept: KeptColumn | None = None,
    ) -> Column:
        """Scores every turn, replies to the chosen ones under their selected prompts, and measures both.

        Args:
            model: The description; K and P are those of `trainable`.
            trainable: What was learned.
            bars: Makes the bar of a part of the work from its name and the number of turns.
            kept: What an evaluation that was stopped has found of this column; it gets what is found now.
        """
        with bars("scoring", self.turns) as bar:
            likelihoods = self._likelihoods(model, trainable, bar, kept)
        options = self._options
        if options.selection_noise:
            noise = np.random.default_rng(options.seed).normal(size=likelihoods.scores.shape)
            noisy = likelihoods.scores + options.selection_noise * noise
            likelihoods = dataclasses.replace(likelihoods, scores=noisy.astype(np.float32))
        keys = [(int(likelihoods.dialogue[u]), int(likelihoods.turn[u])) for u in self.answered]
        conditions = inference_conditions(model, self._lm.params, trainable)
        writer = self.writer(model, conditions)
        chosen: Sequence[int] = likelihoods.selected[self.answered].tolist()
        if options.selection == "soft" and model.num_prompts > 1:
            mixed = mixed_prompts(writer.bank, likelihoods.scores[self.answered], options.score_temperature)
            writer, chosen = dataclasses.replace(writer, bank=mixed), range(len(keys))
        with bars("replying", len(keys)) as bar:
            replies = writer.replies(keys, chosen, bar, kept)
        references = [self.reference(*key) for key in keys]
        personas = None if self.learns_persona else [self._dialogues[d].persona for d, _ in keys]
        metrics = text_metrics(
            replies,
            references,
            personas,
            metrics=self._groups,
            bert_score_model=options.bert_score_model,
            bert_score_layers=options.bert_score_layers,
            nli_model=options.nli_model,
        )
        ranking = None
        if self._ranked:
            with bars("ranking candidates", len(self._ranked)) as bar:
                ranking = self._rank(model, conditions, likelihoods, bar, kept)
        words = [len(self.reference(d, t).split()) for d, t in zip(likelihoods.dialogue, likelihoods.turn, strict=True)]
        figures = {
            "perplexity": likelihoods.perplexity,
            "perplexity_per_word": likelihoods.perplexity_per_word(words),
            "oracle_perplexity": likelihoods.oracle_perplexity,
            **({} if ranking is None else ranking.values),
            # Without a retriever there is nothing to select.
            "usage": likelihoods.usage.tolist() if model.retriever_config else None,
        }
        figures = {name: value for name, value in figures.items() if is_chosen(name, self._groups)}
        known = PERPLEXITY_DEFINITIONS | hits.DEFINITIONS
        definitions = {name: known[name] for name in figures} | metrics.definitions
        return Column(likelihoods, self.answered, replies, metrics, ranking, figures | metrics.values, definitions)

    def _likelihoods(
        self, model: SelectiveLM, trainable: Trainable, bar: ProgressBar, kept: KeptColumn | None
    ) -> Likelihoods:
        def on_batch(found: Likelihoods, known: bool) -> None:
            if known:
                bar.skip(len(found))
                return
            if kept is not None:
                kept.keep_likelihoods(found)
            bar.advance(len(found))

        known = None if kept is None else kept.likelihoods()
        if known is not None and known.nll.shape[1] != model.num_prompts:
            known = None
        return score_rows(
            model, self._lm.params, trainable, self._rows, **self._scoring, known=known, on_batch=on_batch
        )

    def _rank(
        self,
        model: SelectiveLM,
        conditions: Conditions,
        likelihoods: Likelihoods,
        bar: ProgressBar,
        kept: KeptColumn | None,
    ) -> hits.Hits:
        pairs = zip(likelihoods.dialogue.tolist(), likelihoods.turn.tolist(), strict=True)
        turn_of = {key: u for u, key in enumerate(pairs)}
        selected = likelihoods.selected
        numbers = {(turn.dialogue, turn.turn): len(turn.ids) for turn in self._ranked}
        known = {} if kept is None else kept.candidates()
        known = {key: scores for key, scores in known.items() if len(scores.nll) == numbers.get(key)}
        left = [turn for turn in self._ranked if (turn.dialogue, turn.turn) not in known]
        bar.skip(len(self._ranked) - len(left))

        def keep(places: Sequence[int], scores: Sequence[CandidateScores]) -> None:
            if kept is not None:
                kept.keep_candidates([(left[place].dialogue, left[place].turn) for place in places], scores)
            bar.advance(len(places))

        scores = score_candidates(
            model,
            conditions,
            self._rows,
            left,
            [int(selected[turn_of[turn.dialogue, turn.turn]]) for turn in left],
            **self._scoring,
            on_scores=keep,
        )
        known |= {(turn.dialogue, turn.turn): found for turn, found in zip(left, scores, strict=True)}
        return hits.rank(self._ranked, [known[turn.dialogue, turn.turn] for turn in self._ranked])

    @property
    def ranked(self) -> dict[tuple[int, int], int]:
        """The place in `Column.hits` of every turn (dialogue, turn) that was ranked."""
        return {(turn.dialogue, turn.turn): place for place, turn in enumerate(self._ranked)}

    def writer(self, model: SelectiveLM, conditions: Conditions) -> ReplyWriter:
        """What replies under the conditions that were learned."""
        tokenizer, options = self._lm.tokenizer, self._options
        engine = GenerationEngine(
            model.decoder,  # as it is fastest on these devices
            conditions.params,
            eos_ids=[*tokenizer.stop_ids, *([] if options.end_id is None else [options.end_id])],
            pad_id=tokenizer.pad_id,
            vocab_size=tokenizer.vocab_size,
            max_batch=options.batch_size,
            row_sharding=row_sharding(self._mesh) if self._mesh.size > 1 else None,
        )
        return ReplyWriter(
            engine, conditions.bank, self._contexts, self._text, options.max_new_tokens, options.decoding, options.seed
        )
