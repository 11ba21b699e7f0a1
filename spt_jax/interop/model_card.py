"""The README of an exported run: what it is, how PEFT loads it, how its prompt is chosen, what it reaches."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from huggingface_hub import ModelCardData

import spt_jax
from spt_jax.config import Config
from spt_jax.models.files.sources import Source
from spt_jax.models.loading import LMIdentity

CHECKED_WITH = {"transformers": "5.23.0", "peft": "0.21.2"}
"""Versions with which exports were found to give the logits and the greedy replies of the run itself."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_METHODS = {
    "spt": ("Selective Prompt Tuning", "selective-prompt-tuning"),
    "prompt_tuning": ("Prompt tuning", "prompt-tuning"),
    "prefix_tuning": ("Prefix tuning", "prefix-tuning"),
    "p_tuning": ("P-tuning", "p-tuning"),
    "lora": ("LoRA", "lora"),
}
_SCALED_LATER = ("Gemma", "Gemma 2")
"""Families whose embeddings transformers 4 scaled behind the place where PEFT joins a soft prompt."""


@dataclasses.dataclass(frozen=True)
class CardFacts:
    """What a card says.

    Attributes:
        config: The run's configuration.
        identity: The LM that it was trained on.
        source: Where that LM lies.
        family: The LM's family.
        adapters: The folders of the adapters.
        figures: A table of results in Markdown; empty for none.
        projected: Whether the LM projects its embeddings to the width of its blocks, as OPT-350m does.
    """

    config: Config
    identity: LMIdentity
    source: Source
    family: str
    adapters: tuple[str, ...]
    figures: str = ""
    projected: bool = False


def hub_id(source: str) -> str | None:
    """The hub id that a ``model.source`` is, or None where it is a folder, a file, a package or a shape."""
    local = source.startswith((".", "~", "/")) or source.endswith(".gguf") or Path(source).exists()
    return None if local or not _HUB_ID.fullmatch(source) else source


def model_card(facts: CardFacts, bos_id: int | None) -> str:
    """The card, with the front matter that the hub reads.

    Args:
        facts: What it says.
        bos_id: The token that begins a row; None for none.
    """
    c = facts.config
    method, tag = _METHODS[c.method.kind]
    base = hub_id(c.model.source)
    front = ModelCardData(
        library_name="peft",
        pipeline_tag="text-generation",
        base_model=base,
        base_model_relation="adapter" if base else None,
        tags=[tag, "dialogue", "persona", "spt-jax"],
    ).to_yaml()
    parts = [
        f"---\n{front}\n---",
        f"# {method} on {_name(facts)}",
        _what(facts),
        "## Use with PEFT",
        _base(facts),
        f"```python\n{_code(facts, bos_id)}\n```",
        _notes(facts),
    ]
    if facts.figures:
        parts += ["## Figures", facts.figures.strip()]
    parts += [
        "## Licence",
        "These adapters hold no weight of the base model, whose licence governs its use; say here under which licence "
        "you publish the adapters.",
    ]
    return "\n\n".join(parts) + "\n"


def _name(facts: CardFacts) -> str:
    return hub_id(facts.config.model.source) or Path(facts.identity.name.rstrip("/")).name


def _what(facts: CardFacts) -> str:
    c, count = facts.config, len(facts.adapters)
    kinds = {
        "spt": f"A bank of K = {count} {_kind(c)} of P = {c.bank.prompt_length} virtual tokens and a retriever that "
        "chooses one for each context (Selective Prompt Tuning, [arXiv 2406.18187](https://arxiv.org/abs/2406.18187)),",
        "prompt_tuning": f"One soft prompt of P = {c.bank.prompt_length} virtual tokens "
        "([arXiv 2104.08691](https://arxiv.org/abs/2104.08691)),",
        "prefix_tuning": f"One prefix of P = {c.bank.prompt_length} virtual tokens "
        "([arXiv 2101.00190](https://arxiv.org/abs/2101.00190)),",
        "p_tuning": f"One soft prompt of P = {c.bank.prompt_length} virtual tokens, learned through an encoder that is "
        "no longer needed ([arXiv 2103.10385](https://arxiv.org/abs/2103.10385)),",
        "lora": f"Low-rank updates (r = {c.lora.rank}) of {', '.join(c.lora.targets)} "
        "([arXiv 2106.09685](https://arxiv.org/abs/2106.09685)),",
    }
    folders = ", ".join(f"`{name}`" for name in facts.adapters[:2])
    folders += f", … `{facts.adapters[-1]}`" if count > 2 else ""
    files = "`spt_config.json` is the whole configuration of the run"
    if c.method.kind == "spt":
        files = f"`retriever.safetensors` holds the retriever and the bank, {files}"
    return (
        f"{kinds[c.method.kind]} for personal conversations with the frozen base model, trained with spt_jax "
        f"{spt_jax.__version__}.\n\n{folders}: {'one PEFT adapter each' if count > 1 else 'the PEFT adapter'}; {files}."
    )


def _kind(config: Config) -> str:
    return "prefixes" if config.bank.kind == "prefixes" else "soft prompts"


def _base(facts: CardFacts) -> str:
    weights = f"(weight files' sha256 `{facts.identity.sha256[:16]}…`)"
    if hub_id(facts.config.model.source):
        at = f" at revision `{facts.identity.revision}`" if facts.identity.revision else ""
        return f"Base model: `{_name(facts)}`{at} {weights}."
    if facts.source.kind == "gguf":
        return (
            f"Base model: `{_name(facts)}` {weights}, read from a GGUF file. PEFT needs a folder or a hub id of "
            "transformers with the same weights: put its name for `BASE` below. Where the GGUF file is quantised, the "
            "original differs from it by the rounding, and replies may differ."
        )
    return f"Base model: the folder `{_name(facts)}` {weights}; put its path, or the hub id it came from, for `BASE`."


def _code(facts: CardFacts, bos_id: int | None) -> str:
    c, adapters, first = facts.config, facts.adapters, next(iter(facts.adapters))
    base = hub_id(c.model.source) or "BASE"
    revision = f', revision="{facts.identity.revision}"' if hub_id(c.model.source) and facts.identity.revision else ""
    selects = _selection(facts) if len(adapters) > 1 else []
    end = " " if c.retriever.context == "official" else ""
    cut = "colon or line break" if c.retriever.context == "official" else "Q:, R: or line break"
    bos = "" if bos_id is None else f"[{bos_id}] + "
    lines = [
        "import torch",
        "from peft import PeftModel",
        *(["from safetensors.torch import load_file"] if selects else []),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "."  # where this file lies',
        f'tokenizer = AutoTokenizer.from_pretrained("{base}"{revision})',
        f'lm = AutoModelForCausalLM.from_pretrained("{base}"{revision}, dtype=torch.{c.model.dtype}).eval()',
        f'model = PeftModel.from_pretrained(lm, f"{{folder}}/{first}", adapter_name="{first}").eval()',
    ]
    if len(adapters) > 1:
        lines += [
            f"for k in range(1, {len(adapters)}):",
            '    model.load_adapter(f"{folder}/prompt_{k}", adapter_name=f"prompt_{k}")',
        ]
    lines += [
        "",
        f'text = "given persona: i have two dogs.; context: Q: hi, how are you? R:{end}"',
        f"ids = torch.tensor([{bos}tokenizer(text, add_special_tokens=False).input_ids])",
        *selects,
    ]
    if len(adapters) > 1 and not selects:
        lines += ["k = 0  # the prompt that answers: see below"]
    if len(adapters) > 1:
        lines += ['model.set_adapter(f"prompt_{k}")']
    lines += [
        f"reply = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, "
        f"max_new_tokens={c.evaluation.max_new_tokens})[0, ids.shape[1]:]",
        f"print(tokenizer.decode(reply, skip_special_tokens=True))  # the reply ends at the first {cut}",
    ]
    return "\n".join(lines)


def _selection(facts: CardFacts) -> list[str]:
    """Choosing a prompt in torch, without spt_jax; empty where a few lines cannot say it."""
    c = facts.config
    r = c.retriever
    if r.kind != "linear" or r.context != "context":
        return []

    def side(name: str, mean: str) -> str:
        layer = "lin" if r.share else f"lin_{name}"
        if r.sides not in ("both", f"{name}s"):
            return mean
        return f'{mean} @ t["retriever/{layer}/kernel"] + t["retriever/{layer}/bias"]'

    prompts = 't["bank/keys"]' if c.bank.kind == "prefixes" else 't["bank/prompts"].mean(1)'
    embeddings = "lm.get_input_embeddings()(ids)"
    if facts.projected:
        embeddings = f"lm.model.decoder.project_in({embeddings})"
    context = f"{embeddings}[0].float().mean(0)"
    # Other activations keep the order of the cosines.
    scores = "cosines.relu()" if r.activation == "relu" else "cosines"
    return [
        't = load_file(f"{folder}/retriever.safetensors")',
        "with torch.no_grad():",
        f"    context = {side('context', context)}",
        f"    prompts = {side('prompt', prompts)}",
        "    cosines = torch.nn.functional.cosine_similarity(context[None], prompts)",
        f"k = int({scores}.argmax())  # the prompt that answers",
    ]


def _notes(facts: CardFacts) -> str:
    c, versions = facts.config, " and ".join(f"{name} {version}" for name, version in CHECKED_WITH.items())
    notes = [
        f"Checked with {versions}: the same logits and the same greedy replies as in spt_jax, for one conversation "
        "at a time. In a batch of several, PEFT leaves padding between a soft prompt and its text, and replies may "
        "differ."
    ]
    if facts.family in _SCALED_LATER and c.method.kind != "lora":
        notes.append(
            f"{facts.family} needs transformers 5: version 4 scaled embeddings after PEFT had joined the soft prompt, "
            "so that replies would differ."
        )
    if len(facts.adapters) > 1 and not _selection(facts):
        why = "is a transformer" if c.retriever.kind == "transformer" else "reads a whole batch at once"
        notes.append(f"The retriever {why}; `spt-jax score` and `spt-jax chat` choose the prompt with it.")
    if c.evaluation.selection == "soft" and len(facts.adapters) > 1:
        notes.append("The run's own evaluation mixes the prompts by their scores; PEFT takes the best one alone.")
    if c.data.template != "plain" or c.data.task != "response":
        notes.append(
            "This run was not trained on the text above, but "
            + ("with the base model's chat template." if c.data.template != "plain" else "to say a persona.")
        )
    if c.model.quantization != "none":
        notes.append(
            f"The base model was kept in {c.model.quantization} in training; replies may differ by its rounding."
        )
    return "\n".join(f"- {note}" for note in notes)
