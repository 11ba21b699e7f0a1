"""The rivals of `train_step.py` in torch: the authors' way, and the strongest that fits a page.

Nothing here has heard of this package: rows, the similarity of personas and the first values of what is learned come
from the files that `train_step_setup.py` writes. `Authors` runs as the authors' program does: every turn a row padded
to 512 tokens, for each of the K prompts a forward pass of PEFT's prompt tuning with gradient checkpointing, logits of
the whole vocabulary at every position. `Strong` folds the prompts into the batch axis, does not pad beyond the batch,
stores activations, and projects target positions alone; its rows are turns, or packed dialogues as ours are.
All sums are weighted as METHOD's micro-batches are, so any division of the same turns gives the same losses.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div, log_softmax, softplus

PADDED = 512
"""Tokens of the authors' rows, soft prompt not counted."""
IGNORED = -100
"""The label that cross-entropy leaves out."""


class Batch(NamedTuple):
    """Rows side by side, B of T tokens, with U turns and n targets.

    Attributes:
        tokens: ``[B, T]``, right-padded.
        lengths: ``[B]``.
        target_rows: ``[n]``, the row of each target.
        target_positions: ``[n]``, the position whose output predicts it.
        target_ids: ``[n]``.
        target_turns: ``[n]``, its turn among the U.
        turn_rows: ``[U]``.
        context_lengths: ``[U]``.
        names: U pairs of dialogue and turn.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    target_rows: torch.Tensor
    target_positions: torch.Tensor
    target_ids: torch.Tensor
    target_turns: torch.Tensor
    turn_rows: torch.Tensor
    context_lengths: torch.Tensor
    names: list[tuple[int, int]]


def collate(rows: Sequence[dict[str, Any]], pad_id: int, width: int) -> Batch:
    """A batch of rows, padded to `width` tokens."""
    tokens = torch.full((len(rows), width), pad_id)
    columns: dict[str, list[int]] = {name: [] for name in Batch._fields[2:-1]}
    names: list[tuple[int, int]] = []
    for place, row in enumerate(rows):
        tokens[place, : len(row["tokens"])] = torch.tensor(row["tokens"])
        columns["target_rows"] += [place] * len(row["target_ids"])
        columns["target_positions"] += row["target_positions"]
        columns["target_ids"] += row["target_ids"]
        columns["target_turns"] += [len(names) + turn for turn in row["target_turns"]]
        columns["turn_rows"] += [place] * len(row["turns"])
        columns["context_lengths"] += row["context_lengths"]
        names += [(row["dialogue"], turn) for turn in row["turns"]]
    lengths = torch.tensor([len(row["tokens"]) for row in rows])
    return Batch(tokens, lengths, **{name: torch.tensor(column) for name, column in columns.items()}, names=names)


def turn_means(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Means over each turn's targets: ``[n, ...]`` to ``[U, ...]``."""
    turns = len(batch.names)
    sums = values.new_zeros((turns, *values.shape[1:])).index_add(0, batch.target_turns, values)
    counts = torch.bincount(batch.target_turns, minlength=turns)
    return sums / counts.reshape(-1, *[1] * (values.ndim - 1))


class Rival:
    """What the rivals share: the frozen LM, what is learned, the losses, a step of Adam and the clock.

    Args:
        folder: What `train_step_setup.py` wrote.
        batch: Rows of a step.
        checking: Whether the turns are those of the comparison of losses, not those that are timed.
        device: ``"cpu"``, in float32, or ``"gpu"``, where the LM and the prompts are bfloat16.
    """

    attention = "sdpa"
    layout = "turn"

    def __init__(self, folder: Path, batch: int, checking: bool = False, device: str = "cpu") -> None:
        import transformers

        self.on_gpu = device == "gpu"
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        torch.set_default_device("cuda" if self.on_gpu else "cpu")
        data = json.loads((folder / ("check.json" if checking else "timing.json")).read_text())
        self.folder = folder
        self.weights: dict[str, float] = data["objective"]
        self.similar = torch.tensor(data["similar"])
        self.lm: Any = transformers.OPTForCausalLM.from_pretrained(
            folder, dtype=self.dtype, attn_implementation=self.attention
        ).to(torch.get_default_device())
        self.lm.requires_grad_(False)
        first = {name: torch.tensor(array) for name, array in np.load(folder / "initial.npz").items()}
        width = first["bias"].shape[0]
        self.num_prompts, self.prompt_length = first["bank"].shape[:2]
        self.lin = torch.nn.Linear(width, width)
        with torch.no_grad():
            self.lin.weight.copy_(first["kernel"].T)
            self.lin.bias.copy_(first["bias"])
        prompts = self.learn_prompts(first["bank"])
        self.adam = torch.optim.Adam([*prompts, *self.lin.parameters()], lr=data["learning_rate"])
        self.batches = self.make_batches(data[self.layout], batch, data["pad_id"])
        self._next = 0

    def learn_prompts(self, bank: torch.Tensor) -> list[torch.nn.Parameter]:
        """Takes the first prompts ``[K, P, M]``; the parameters to learn."""
        raise NotImplementedError

    def bank(self) -> torch.Tensor:
        """The prompts as they are, ``[K, P, M]``, differentiable."""
        raise NotImplementedError

    def make_batches(self, rows: list[dict[str, Any]], batch: int, pad_id: int) -> list[Batch]:
        """The steps of an epoch: rows by length, no padding beyond a batch's longest."""
        rows = sorted(rows, key=lambda row: len(row["tokens"]))
        parts = [rows[start : start + batch] for start in range(0, len(rows), batch)]
        return [collate(part, pad_id, len(part[-1]["tokens"])) for part in parts]

    def context_means(self, batch: Batch) -> torch.Tensor:
        """``e_c = mean_t(lin(embed(c_t)))``, ``[U, M]``; a linear map commutes with the mean, a sum over a prefix."""
        with torch.no_grad():
            sums = self.lm.get_input_embeddings()(batch.tokens).float().cumsum(dim=1)
            means = sums[batch.turn_rows, batch.context_lengths - 1] / batch.context_lengths[:, None]
        return self.lin(means.float())

    def scores(self, batch: Batch) -> torch.Tensor:
        """METHOD 1, ``[U, K]``."""
        prompts = self.lin(self.bank().float()).mean(dim=1)
        cosine = cosine_similarity(self.context_means(batch)[:, None], prompts[None], dim=-1, eps=1e-8)
        return softplus(cosine, beta=10)

    def target_losses(self, batch: Batch, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each target's nll under every prompt ``[n, K]``, and the cross-entropy of the fused logits ``[n]``."""
        raise NotImplementedError

    def losses_and_gradients(self, batches: Sequence[Batch]) -> dict[str, float]:
        """The losses of all turns of `batches` together; leaves the gradients of their total in the parameters."""
        tokens = sum(len(batch.target_ids) for batch in batches)
        turns = sum(len(batch.names) for batch in batches)
        scores = torch.cat([self.scores(batch) for batch in batches])
        seen = scores.detach().requires_grad_()
        lm, fusion, means, done = 0.0, 0.0, [], 0
        for batch in batches:
            part = seen[done : done + len(batch.names)]
            done += len(batch.names)
            nll, fused = self.target_losses(batch, part)
            lm_part, fusion_part = nll.sum() / (tokens * self.num_prompts), turn_means(fused, batch).sum() / turns
            (lm_part + self.weights["fusion"] * fusion_part).backward()
            lm, fusion = lm + lm_part.item(), fusion + fusion_part.item()
            means.append(turn_means(nll.detach(), batch))
        gold = torch.softmax(-torch.cat(means), dim=-1)
        selection = kl_div(log_softmax(scores, dim=-1), gold, reduction="batchmean")
        contrastive = self.contrastive(scores, [name for batch in batches for name in batch.names])
        over_turns = self.weights["selection"] * selection + self.weights["contrastive"] * contrastive
        torch.autograd.backward([over_turns, scores], [torch.ones(()), seen.grad])
        losses = {"lm": lm, "selection": selection.item(), "contrastive": contrastive.item(), "fusion": fusion}
        return losses | {"total": lm + self.weights["fusion"] * fusion + over_turns.item()}

    def contrastive(self, scores: torch.Tensor, names: Sequence[tuple[int, int]]) -> torch.Tensor:
        """METHOD 4 over pairs of turns of different dialogues, in the order of dialogues and turns."""
        order = sorted(range(len(names)), key=lambda place: names[place])
        dialogues = torch.tensor([names[place][0] for place in order])
        first, second = torch.triu_indices(len(order), len(order), offset=1)
        across = dialogues[first] != dialogues[second]
        first, second = first[across], second[across]
        if not len(first):
            return scores.sum() * 0
        scores = scores[order]
        cosine = cosine_similarity(scores[first], scores[second], dim=-1)
        similar = self.similar[dialogues[first], dialogues[second]]
        return torch.where(similar, 1 - cosine, cosine.clamp(min=0)).mean()

    def bank_gradient(self) -> torch.Tensor:
        """``[K, P, M]``."""
        raise NotImplementedError

    def check(self) -> dict[str, float]:
        """The losses of all turns; writes the gradients beside the data."""
        losses = self.losses_and_gradients(self.batches)
        assert self.lin.weight.grad is not None and self.lin.bias.grad is not None
        gradients = {"bank": self.bank_gradient(), "kernel": self.lin.weight.grad.T, "bias": self.lin.bias.grad}
        arrays = {key: x.float().cpu().numpy() for key, x in gradients.items()}
        np.savez(self.folder / f"gradients_{self.name}.npz", **arrays)
        return losses

    def step(self, batch: Batch) -> dict[str, float]:
        """One step of Adam."""
        self.adam.zero_grad()
        losses = self.losses_and_gradients([batch])
        self.adam.step()
        return losses

    def warm_up(self) -> None:
        """The largest step once."""
        self.step(self.batches[-1])

    def probe(self) -> dict[str, float]:
        """The second of two equal steps of middle length; as `run`."""
        batch = self.batches[len(self.batches) // 2]
        self.step(batch)
        return self._timed([batch])

    def run(self, steps: int) -> dict[str, float]:
        """The next `steps` steps, or a whole epoch where it is 0: turns, seconds, and seconds of all cores together."""
        count = steps or len(self.batches)
        chosen = [self.batches[(self._next + number) % len(self.batches)] for number in range(count)]
        self._next += count
        return self._timed(chosen)

    def _timed(self, batches: Sequence[Batch]) -> dict[str, float]:
        begun, worked = time.perf_counter(), time.process_time()
        for batch in batches:
            self.step(batch)  # reads the losses, so it is done when it returns
        return {
            "turns": sum(len(batch.names) for batch in batches),
            "seconds": time.perf_counter() - begun,
            "core_seconds": time.process_time() - worked,
        }

    def product(self) -> float:
        """FLOP/s of a large square matrix product, the best of ten."""
        size = 8192 if self.on_gpu else 1024
        a, times = torch.randn(size, size, dtype=self.dtype), []
        for _ in range(11):
            self._wait()
            begun = time.perf_counter()
            a @ a
            self._wait()
            times.append(time.perf_counter() - begun)
        return 2 * size**3 / min(times)

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def device_memory(self) -> int:
        """Bytes, the most that was taken of the GPU; 0 on the CPU."""
        return torch.cuda.max_memory_allocated() if self.on_gpu else 0

    @property
    def name(self) -> str:
        """The side's name."""
        return next(name for name, side in RIVALS.items() if type(self) is side)


class Authors(Rival):
    """Huang et al.'s program: K forward passes of padded turn rows, checkpointed, with logits everywhere."""

    attention = "eager"

    def learn_prompts(self, bank: torch.Tensor) -> list[torch.nn.Parameter]:
        import peft

        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=self.prompt_length)
        self.model: Any = peft.get_peft_model(self.lm, config, adapter_name="0")
        for k in range(1, self.num_prompts):
            self.model.add_adapter(str(k), config)
        self.model.to(torch.get_default_device(), self.dtype)
        self.embeddings = [self.model.prompt_encoder[str(k)].embedding.weight for k in range(self.num_prompts)]
        with torch.no_grad():
            for embedding, prompt in zip(self.embeddings, bank, strict=True):
                embedding.requires_grad_().copy_(prompt)
        # transformers renames it during version 5.
        getattr(self.lm, "activation_checkpointing_enable", self.lm.gradient_checkpointing_enable)()
        self.model.train()  # transformers checkpoints in training alone; every dropout of the model is 0
        return self.embeddings

    def bank(self) -> torch.Tensor:
        return torch.stack(self.embeddings)

    def bank_gradient(self) -> torch.Tensor:
        return torch.stack([embedding.grad for embedding in self.embeddings])

    def make_batches(self, rows: list[dict[str, Any]], batch: int, pad_id: int) -> list[Batch]:
        """Rows in file order, padded to 512."""
        return [collate(rows[start : start + batch], pad_id, PADDED) for start in range(0, len(rows), batch)]

    def context_means(self, batch: Batch) -> torch.Tensor:
        mapped = self.lin(self.lm.get_input_embeddings()(batch.tokens).float())
        inside = torch.arange(batch.tokens.shape[1]) < batch.context_lengths[:, None]
        return (mapped[batch.turn_rows] * inside[..., None]).sum(dim=1) / batch.context_lengths[:, None]

    def target_losses(self, batch: Batch, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows, width = batch.tokens.shape
        mask = (torch.arange(width) < batch.lengths[:, None]).long()
        at = (batch.target_rows, batch.target_positions + self.prompt_length)
        labels = torch.full((rows, self.prompt_length + width), IGNORED)
        labels[at] = batch.target_ids

        def target_nll(logits: torch.Tensor) -> torch.Tensor:
            nll = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED)
            return nll.reshape(labels.shape)[at].float()

        nll, logits = [], []
        for k in range(self.num_prompts):
            self.model.set_adapter(str(k))
            logits.append(self.model(input_ids=batch.tokens, attention_mask=mask, use_cache=False).logits)
            nll.append(target_nll(logits[k]))
        # A row is a turn, so its score is the row's.
        scores = scores.to(logits[0].dtype)
        fused = scores[:, 0, None, None] * logits[0]
        for k in range(1, self.num_prompts):
            fused = fused + scores[:, k, None, None] * logits[k]
        return torch.stack(nll, dim=1), target_nll(fused)


class Strong(Rival):
    """One forward pass of all K prompts, activations stored, logits at targets alone, fused attention."""

    def learn_prompts(self, bank: torch.Tensor) -> list[torch.nn.Parameter]:
        self.prompts = torch.nn.Parameter(bank.to(self.dtype))
        return [self.prompts]

    def bank(self) -> torch.Tensor:
        return self.prompts

    def bank_gradient(self) -> torch.Tensor:
        assert self.prompts.grad is not None
        return self.prompts.grad

    def target_losses(self, batch: Batch, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        text = self.lm.get_input_embeddings()(batch.tokens)
        rows, k = len(text), self.num_prompts
        joined = torch.cat(
            [self.prompts.expand(rows, *self.prompts.shape), text[:, None].expand(rows, k, *text.shape[1:])], dim=2
        )
        # Padding stands behind, where causal attention hides it: without a mask the fused kernel is the causal one.
        hidden = self.lm.model.decoder(inputs_embeds=joined.flatten(0, 1), use_cache=False).last_hidden_state
        hidden = hidden.unflatten(0, (rows, k))[batch.target_rows, :, batch.target_positions + self.prompt_length]
        logits = self.lm.lm_head(hidden).float()
        targets = batch.target_ids.repeat_interleave(k)
        nll = cross_entropy(logits.flatten(0, 1), targets, reduction="none").reshape(-1, k)
        fused = torch.einsum("nk,nkv->nv", scores[batch.target_turns], logits)
        return nll, cross_entropy(fused, batch.target_ids, reduction="none")


class StrongPacked(Strong):
    """`Strong` on our rows: a dialogue each, with all its turns' targets."""

    layout = "dialogue"


RIVALS: dict[str, type[Rival]] = {"authors": Authors, "strong": Strong, "strong_packed": StrongPacked}
