"""Batches as a pure function of (seed, step), the same for any number of hosts, prefetched in the background."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np

from spt_jax.data.buckets import Buckets, BucketShape, buckets_of_lengths, choose_buckets
from spt_jax.data.collate import Batch, collate, inference_contexts, similar_pairs, training_contexts
from spt_jax.data.packing import Row
from spt_jax.data.similarity import BleuSimilarity
from spt_jax.errors import UserError


class DialogueLoader:
    """Shuffled batches of packed rows, in length buckets, resumable at any step.

    Epoch e = step // steps_per_epoch. Within an epoch every row appears exactly once: rows are shuffled within their
    bucket by a generator seeded with (seed, e), those that do not fill a batch move up to the next longer bucket, the
    last batch is filled with empty rows, and the order of batches is shuffled.

    Args:
      rows: packed rows.
      batch_size: D, rows of a batch over all hosts.
      pad_id: fills tokens and target ids; masked wherever it matters.
      seed: of the order.
      max_buckets: at most so many different batch shapes; fewer where that pays (`choose_buckets`).
      bucket_lengths: row lengths of the buckets, ascending, instead of those that `choose_buckets` finds.
      pair_texts: per row, per turn, the text whose BLEU decides about contrastive pairs; None leaves `similar` out.
      bleu_threshold: METHOD's Γ, 0..100: pairs above are similar.
      rows_here: which rows of a batch, of 0 to D - 1, this host makes (`spt_jax.parallel.rules.rows_here`); None for
        all.
      prefetch: batches made ahead by `iterate`; 0 makes them on demand.
      retriever_width: the limit of a row in tokens where the retriever reads whole rows with their padding, as in the
        authors' program (`training_contexts`); 0 for contexts alone.

    Raises:
      UserError: no rows, a number out of its range, or a row longer than the last of `bucket_lengths`.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        batch_size: int,
        pad_id: int,
        seed: int,
        max_buckets: int = 12,
        bucket_lengths: Sequence[int] | None = None,
        pair_texts: Sequence[Sequence[str]] | None = None,
        bleu_threshold: float = 20.0,
        rows_here: Sequence[int] | np.ndarray | None = None,
        prefetch: int = 4,
        retriever_width: int = 0,
    ) -> None:
        _check(seed, bleu_threshold, prefetch)
        self._rows = rows
        self._buckets = (
            choose_buckets(rows, batch_size, max_buckets)
            if bucket_lengths is None
            else buckets_of_lengths(rows, bucket_lengths, batch_size)
        )
        self._batch_size = batch_size
        self._pad_id = pad_id
        self._seed = seed
        self._threshold = bleu_threshold
        self._prefetch = prefetch
        self._retriever_width = retriever_width
        self._mine = np.arange(batch_size) if rows_here is None else np.asarray(rows_here)
        self._similarity: BleuSimilarity | None = None
        self._first_text = np.zeros(len(rows), dtype=np.int64)
        if pair_texts is not None:
            if [len(texts) for texts in pair_texts] != [len(row.turns) for row in rows]:
                raise UserError("The pair texts do not fit the rows: one text is needed for every turn of every row.")
            self._similarity = BleuSimilarity([text for texts in pair_texts for text in texts])
            self._first_text[1:] = np.cumsum([len(texts) for texts in pair_texts])[:-1]
        self._steps_per_epoch = len(self._buckets.deal(batch_size, None))
        # The epoch in work and, while its last batches are prefetched, the next one.
        self._plan = functools.lru_cache(maxsize=2)(functools.partial(_plan, self._buckets, batch_size, seed))

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch, the same in every epoch."""
        return self._steps_per_epoch

    @property
    def shapes(self) -> tuple[BucketShape, ...]:
        """The static shapes batches can have, shortest first."""
        return self._buckets.shapes

    @property
    def padding_share(self) -> float:
        """Padding tokens / tokens of all batches of an epoch."""
        return self._buckets.padding_share

    @property
    def turns_per_step(self) -> float:
        """Mean number of turns in a batch (U)."""
        return sum(len(row.turns) for row in self._rows) / self._steps_per_epoch

    @property
    def tokens_per_step(self) -> float:
        """Mean number of real tokens in a batch, over all hosts."""
        return sum(len(row) for row in self._rows) / self._steps_per_epoch

    @property
    def targets_per_step(self) -> float:
        """Mean number of target tokens in a batch, over all hosts."""
        return sum(len(row.target_ids) for row in self._rows) / self._steps_per_epoch

    def shape(self, step: int) -> BucketShape:
        """The shape of `batch(step)`, without making it."""
        return self.shapes[self._deal(step)[0]]

    def batch(self, step: int) -> Batch:
        """This host's part of the batch of one step (counted from 0 over all epochs).

        Returns:
          The arrays of `collate` with this host's rows, and with pair texts `similar` of the whole batch:
          [D*N, D*N] bool, (i, j) true where BLEU(text_i, text_j) > threshold; turns in row-major order [D, N].

        Raises:
          UserError: `step` is negative.
        """
        bucket, indices = self._deal(step)
        shape = self.shapes[bucket]
        batch = collate(self._rows, indices[self._mine], shape, self._pad_id)
        if self._retriever_width:
            batch |= training_contexts(self._rows, indices[self._mine], self._retriever_width, self._pad_id)
        if self._similarity is not None:
            texts = np.full((self._batch_size, shape.turns), -1, dtype=np.int64)
            for place, index in enumerate(indices[indices >= 0]):
                turns = len(self._rows[index].turns)
                texts[place, :turns] = self._first_text[index] + np.arange(turns)
            batch["similar"] = similar_pairs(self._similarity, texts.reshape(-1), self._threshold)
        return batch

    def iterate(self, start: int, stop: int) -> Iterator[tuple[int, Batch]]:
        """Yields (step, batch(step)) for start <= step < stop, made ahead by background threads.

        The threads end when the iterator is exhausted, closed or dropped.

        Raises:
          UserError: `start` is negative.
        """
        if start < 0:
            raise UserError(f"Batches are counted from step 0, not {start}.")
        return self._prefetched(start, stop) if stop > start else iter(())

    def _prefetched(self, start: int, stop: int) -> Iterator[tuple[int, Batch]]:
        import grain  # half a second that one who only reads dialogues need not wait

        options = grain.ReadOptions(num_threads=min(2, self._prefetch), prefetch_buffer_size=self._prefetch)
        batches = grain.MapDataset.range(start, stop).map(self.batch).to_iter_dataset(options)
        iterator = iter(batches)
        try:
            yield from zip(range(start, stop), iterator, strict=True)
        finally:
            iterator.close()

    def _deal(self, step: int) -> tuple[int, np.ndarray]:
        if step < 0:
            raise UserError(f"Batches are counted from step 0, not {step}.")
        epoch, position = divmod(step, self._steps_per_epoch)
        return self._plan(epoch)[position]


def sequential_batches(
    rows: Sequence[Row], *, batch_size: int, pad_id: int, max_buckets: int = 4
) -> list[tuple[Batch, np.ndarray]]:
    """Every row exactly once, grouped by length, for evaluation.

    Args:
      rows: packed rows.
      batch_size: D, rows of a batch.
      pad_id: fills tokens and target ids.
      max_buckets: at most so many different batch shapes.

    Returns:
      (batch of `collate`, [D] int64 row indices, -1 for an empty row) for every batch, short rows first.

    Raises:
      UserError: no rows, or a number below 1.
    """
    buckets = choose_buckets(rows, batch_size, max_buckets)
    return [
        (collate(rows, indices, buckets.shapes[bucket], pad_id), indices)
        for bucket, indices in buckets.deal(batch_size, None)
    ]


def consecutive_batches(
    rows: Sequence[Row], *, batch_size: int, pad_id: int, max_buckets: int = 4
) -> list[tuple[Batch, np.ndarray]]:
    """Every row exactly once, neighbours in file order side by side, as the authors' program evaluates.

    Args:
      rows: rows of `spt_jax.data.official`.
      batch_size: D, rows of a batch; the last batch is filled with empty rows.
      pad_id: fills tokens, and is averaged by the retriever like any other token.
      max_buckets: at most so many different batch shapes.

    Returns:
      (batch of `collate` with the arrays of `inference_contexts`, [D] int64 row indices, -1 for an empty row).

    Raises:
      UserError: no rows, or a number below 1.
    """
    shapes = choose_buckets(rows, batch_size, max_buckets).shapes
    batches = []
    for start in range(0, len(rows), batch_size):
        indices = np.full(batch_size, -1, dtype=np.int64)
        members = np.arange(start, min(start + batch_size, len(rows)))
        indices[: len(members)] = members
        longest = max(len(rows[int(index)]) for index in members)
        shape = next(shape for shape in shapes if shape.length >= longest)
        prompts = [rows[int(index)].inference_prompt if index >= 0 else None for index in indices]
        batches.append((collate(rows, indices, shape, pad_id) | inference_contexts(prompts, pad_id), indices))
    return batches


def _plan(buckets: Buckets, batch_size: int, seed: int, epoch: int) -> list[tuple[int, np.ndarray]]:
    return buckets.deal(batch_size, np.random.default_rng((seed, epoch)))


def _check(seed: int, threshold: float, prefetch: int) -> None:
    if seed < 0:
        raise UserError(f"The seed is {seed}; it must be at least 0.")
    if not 0 <= threshold <= 100:
        raise UserError(f"The BLEU threshold is {threshold}; it must be within 0 and 100.")
    if prefetch < 0:
        raise UserError(f"data.prefetch is {prefetch}; it must be at least 0.")
