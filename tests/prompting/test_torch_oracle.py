"""Losses and gradients against an oracle written independently in torch: a row a turn, K separate forwards."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny
from torch_llama import torch_llama

from spt_jax.prompting.objective import Objective

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch


def oracle(lm, objective, bank, kernel, bias, rows, texts):
    """METHOD, line by line; `texts` is the persona of each row's turn."""
    import sacrebleu

    table = lm.get_input_embeddings().weight
    nll, scores, fused = [], [], []
    prompt_side = torch.nn.functional.linear(bank, kernel.T, bias).mean(dim=1)
    for row in rows:
        context = table[torch.tensor(row.tokens[: row.context_lengths[0]], dtype=torch.long)]
        side = torch.nn.functional.linear(context, kernel.T, bias).mean(dim=0)
        cosine = torch.nn.functional.cosine_similarity(side[None], prompt_side, dim=-1, eps=1e-8)
        score = torch.log1p(torch.exp(10 * cosine)) / 10
        text = table[torch.tensor(row.tokens, dtype=torch.long)]
        targets = torch.tensor(row.target_ids, dtype=torch.long)
        logits = []
        for prompt in bank:
            out = lm(inputs_embeds=torch.cat([prompt, text])[None]).logits[0, prompt.shape[0] :]
            logits.append(out[torch.tensor(row.target_positions, dtype=torch.long)])
        logits = torch.stack(logits)
        nll.append(torch.stack([torch.nn.functional.cross_entropy(z, targets, reduction="none") for z in logits]))
        scores.append(score)
        z = (score[:, None, None] * logits).sum(dim=0)
        fused.append(torch.nn.functional.cross_entropy(z, targets))
    scores = torch.stack(scores)
    means = torch.stack([x.mean(dim=1) for x in nll])
    lm_loss = torch.cat([x.reshape(-1) for x in nll]).mean()
    gold = torch.softmax(-means.detach() / objective.gold_temperature, dim=-1)
    log_q = torch.log_softmax(scores / objective.score_temperature, dim=-1)
    selection = torch.nn.functional.kl_div(log_q, gold, reduction="batchmean")
    pairs = []
    for i in range(len(rows)):
        for j in range(i + 1, len(rows)):
            if objective.pairs == "across" and rows[i].dialogue == rows[j].dialogue:
                continue
            similar = sacrebleu.sentence_bleu(texts[i], [texts[j]]).score > 20
            label = torch.tensor([1.0 if similar else -1.0])
            pairs.append(torch.nn.functional.cosine_embedding_loss(scores[i : i + 1], scores[j : j + 1], label))
    contrastive = torch.stack(pairs).mean()
    fusion = torch.stack(fused).mean()
    total = (
        lm_loss
        + objective.selection_weight * selection
        + objective.contrastive_weight * contrastive
        + objective.fusion_weight * fusion
    )
    terms = {"total": total, "lm": lm_loss, "selection": selection, "contrastive": contrastive, "fusion": fusion}
    return terms, means, scores


@pytest.mark.parametrize("layout", ["dialogue", "turn"])
@pytest.mark.parametrize("pairs", ["across", "all"])
def test_losses_and_gradients_equal_the_torch_oracle(layout, pairs, record_property):
    objective = Objective(0.7, 0.4, 0.9, gold_temperature=0.5, score_temperature=0.8, pairs=pairs)
    frozen, tree = tiny.params(), tiny.trainable()
    losses, gradients = tiny.STEP(tiny.MODEL, objective, frozen, tree, tiny.packed(layout).batch())

    turns = tiny.packed("turn")
    bank = torch.tensor(np.asarray(tree["bank"]["prompts"]), requires_grad=True)
    kernel = torch.tensor(np.asarray(tree["retriever"]["lin"]["kernel"]), requires_grad=True)
    bias = torch.tensor(np.asarray(tree["retriever"]["lin"]["bias"]), requires_grad=True)
    texts = [t for row in turns.texts for t in row]
    terms, nll, scores = oracle(torch_llama(tiny.CONFIG, frozen), objective, bank, kernel, bias, turns.rows, texts)
    terms["total"].backward()

    ours = {name: getattr(losses, name) for name in terms}
    expected = {name: value.detach().numpy() for name, value in terms.items()}
    expected_gradients = {
        "bank": {"prompts": bank.grad.numpy()},
        "retriever": {"lin": {"kernel": kernel.grad.numpy(), "bias": bias.grad.numpy()}},
    }
    present = np.asarray(tiny.packed(layout).batch()["turn_mask"]) > 0
    differences = {
        "losses": tiny.relative_difference(ours, expected),
        "gradients": tiny.relative_difference(gradients, expected_gradients),
        "nll": tiny.relative_difference(np.asarray(losses.nll)[present], nll.detach().numpy()),
        "scores": tiny.relative_difference(np.asarray(losses.scores)[present], scores.detach().numpy()),
    }
    record_property("differences", differences)
    print(differences)
    assert np.max(list(differences.values())) <= 1e-4, differences


@pytest.mark.parametrize(
    "wrong",
    [
        {"selection_weight": 1.0},
        {"contrastive_weight": 0.8},
        {"fusion_weight": 1.0},
        {"gold_temperature": 1.0},
        {"score_temperature": 1.0},
        {"pairs": "all"},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_the_oracle_would_notice_a_wrong_option(wrong):
    objective = Objective(0.7, 0.4, 0.9, gold_temperature=0.5, score_temperature=0.8)
    frozen, tree, turns = tiny.params(), tiny.trainable(), tiny.packed("turn")
    bank, linear = np.array(tree["bank"]["prompts"]), tree["retriever"]["lin"]
    learned = [torch.tensor(np.array(x)) for x in (bank, linear["kernel"], linear["bias"])]
    texts = [t for row in turns.texts for t in row]
    terms, _, _ = oracle(
        torch_llama(tiny.CONFIG, frozen), dataclasses.replace(objective, **wrong), *learned, turns.rows, texts
    )
    losses, _ = tiny.STEP(tiny.MODEL, objective, frozen, tree, tiny.packed("dialogue").batch())
    ours = {name: getattr(losses, name) for name in terms}
    assert tiny.relative_difference(ours, {name: value.numpy() for name, value in terms.items()}) > 1e-3
