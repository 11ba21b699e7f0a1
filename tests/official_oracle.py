"""The official mode once more, in torch, from METHOD's mathematics and the options' names in the authors' configs.

Nothing here shares code with the package; torch is imported only when it is asked for. Rows run padded, K·B at a time,
prompt by prompt: row ``k·B + b`` is example b behind prompt k.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Learned:
    """What is learned, as torch tensors and modules.

    Attributes:
        bank: ``[K, P, M]``.
        linear: The normaliser, a function of ``[..., M]``.
        encoder: The transformer retriever, a function of ``[rows, T, M]`` that was never told that rows come first.
    """

    bank: Any
    linear: Any
    encoder: Any


@dataclasses.dataclass(frozen=True)
class PaddedRows:
    """A batch as the program holds it, padded on the right; ``[B, T]`` each.

    Attributes:
        ids: Tokens.
        mask: 1 on tokens, 0 on padding.
        labels: The token to predict at each position, the padding where nothing is learned.
        pad_id: The padding.
        personas: B texts.
    """

    ids: Any
    mask: Any
    labels: Any
    pad_id: int
    personas: Sequence[str]


def official_terms(
    lm: Any, options: Mapping[str, Any], learned: Learned, rows: PaddedRows, progress: float
) -> dict[str, Any]:
    """The terms of the loss and their total; ``scores`` and ``nll`` are ``[B, K]``.

    Args:
        lm: A causal LM of transformers, frozen.
        options: The authors' options by dotted name.
        learned: What the total is differentiated by.
        rows: The batch.
        progress: Steps done over all steps.
    """
    import torch
    from torch.nn import functional

    k, p, _ = learned.bank.shape
    b, t = rows.ids.shape
    text = lm.get_input_embeddings()(rows.ids)
    scores = _scores(options, learned, text)
    joined = torch.cat([learned.bank.repeat_interleave(b, dim=0), text.repeat(k, 1, 1)], dim=1)
    mask = torch.cat([torch.ones(k * b, p, dtype=rows.mask.dtype), rows.mask.repeat(k, 1)], dim=1)
    logits = lm(inputs_embeds=joined, attention_mask=mask).logits[:, p:].reshape(k, b, t, -1)
    labels = rows.labels.expand(k, b, t)
    token_losses = functional.cross_entropy(
        logits.reshape(k * b * t, -1), labels.reshape(-1), ignore_index=rows.pad_id, reduction="none"
    ).reshape(k, b, t)
    learned_at = (rows.labels != rows.pad_id).to(token_losses.dtype)
    nll = (token_losses.sum(dim=-1) / learned_at.sum(dim=-1)).detach()
    terms = {"scores": scores.T, "nll": nll.T}
    if options.get("training.only_nll"):
        lm_loss = token_losses.sum() / (k * learned_at.sum())
        return terms | {"lm": lm_loss, "total": lm_loss}

    gold = torch.softmax(-nll.T / options["training.tau_gold"], dim=1)
    log_q = torch.log_softmax(scores.T / options["training.tau_sim"], dim=1)
    selection = functional.kl_div(log_q, gold, reduction="batchmean")
    if options.get("training.annealing_nll"):
        share = torch.softmax(scores.detach().reshape(-1), dim=0).reshape(k, b, 1)
        weights = options["training.annealing_scalar"] * (1 - progress) * share
        token_losses = token_losses * weights.clamp(
            options["training.annealing_min"], options["training.annealing_max"]
        )
    lm_loss = token_losses.sum() / (k * learned_at.sum())
    if options.get("training.selective_loss") is False:
        total = lm_loss
    elif options.get("training.disable_nll"):
        total = options["training.selective_loss_weight"] * selection
    else:
        total = lm_loss + options["training.selective_loss_weight"] * selection
    terms |= {"lm": lm_loss, "selection": selection}
    if options["training.ensemble"]:
        fused = (scores[:, :, None, None] * logits).sum(dim=0)
        each = [functional.cross_entropy(fused[row], rows.labels[row], ignore_index=rows.pad_id) for row in range(b)]
        terms["fusion"] = torch.stack(each).mean()
        total = total + terms["fusion"]
    if options.get("training.contrastive_metric") == "bleu" and b > 1:
        terms["contrastive"] = _contrastive(scores.T, rows.personas, options["training.contrastive_threshold"])
        total = total + options["training.contrastive_weight"] * terms["contrastive"]
    return terms | {"total": total}


def _scores(options: Mapping[str, Any], learned: Learned, text: Any) -> Any:
    """``[K, B]``: padding and response belong to the mean, and the encoder attends across examples and prompts."""
    import torch

    k, b = learned.bank.shape[0], text.shape[0]
    prompts, contexts = learned.bank, text.repeat(k, 1, 1)
    if learned.encoder is not None:
        sides = options["model.retriever.retriever_on"]
        if "extra" in sides:
            prompts = learned.encoder(learned.linear(prompts))
        if "lm" in sides:
            contexts = learned.encoder(contexts)
    prompts, contexts = prompts.mean(dim=1), contexts.mean(dim=1)
    if learned.encoder is None:
        sides = options["model.normalizer_on"]
        prompts = learned.linear(prompts) if "prompt" in sides else prompts
        contexts = learned.linear(contexts) if "lm" in sides else contexts
    cosine = torch.nn.functional.cosine_similarity(prompts.repeat_interleave(b, dim=0), contexts, dim=1, eps=1e-8)
    activation = {
        "softplus": torch.nn.Softplus(beta=10, threshold=1),
        "relu": torch.nn.ReLU(),
        "leaky_relu": torch.nn.LeakyReLU(),
    }[options["model.score_activation"]]
    return activation(cosine).reshape(k, b)


def _contrastive(scores: Any, personas: Sequence[str], threshold: float) -> Any:
    import sacrebleu
    import torch

    losses = []
    for i in range(len(personas)):
        for j in range(i + 1, len(personas)):
            similar = sacrebleu.sentence_bleu(personas[i], [personas[j]]).score > threshold
            label = torch.tensor([1.0 if similar else -1.0])
            losses.append(torch.nn.functional.cosine_embedding_loss(scores[i : i + 1], scores[j : j + 1], label))
    return torch.stack(losses).mean()
