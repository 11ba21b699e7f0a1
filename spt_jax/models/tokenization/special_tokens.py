"""Which tokens begin, end and pad a row: each family's rule in one table, and what a model's files say instead."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from spt_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class SpecialTokenRule:
    """The special tokens of one family, where its files leave them out.

    Attributes:
        family: Its name.
        model_types: ``model_type`` of its ``config.json``, and ``general.architecture`` of its GGUF files.
        bos: The token that stands for the template's ``<bos>``; None where the LM was trained without one.
        eos: The base model's end of sequence.
        pad: Its padding; None where it has none and the end of sequence serves.
        turn_ends: What else ends a reply: the chat variants' end of turn.
        split: How text is cut into words where there is no more than ``vocab.json`` and ``merges.txt``: a name of
            `spt_jax.models.tokenization.byte_level_bpe.SPLITS`; None where such files are not byte-level BPE or never
            occur.
        source: Where the rule is written down.
    """

    family: str
    model_types: tuple[str, ...]
    bos: str | None
    eos: str
    pad: str | None
    turn_ends: tuple[str, ...] = ()
    split: str | None = None
    source: str = ""

    def fits(self, ids: Mapping[str, int]) -> bool:
        """Whether a vocabulary has the tokens that the rule is about."""
        return self.eos in ids and (self.bos is None or self.bos in ids)


_GPT_END = "<|endoftext|>"
_CHATML_END = "<|im_end|>"

SPECIAL_TOKEN_RULES: tuple[SpecialTokenRule, ...] = (
    SpecialTokenRule(
        "OPT",
        ("opt",),
        bos="</s>",
        eos="</s>",
        pad="<pad>",
        split="gpt-2",
        source="facebook/opt-125m, config.json (ids 2, 2, 1) and tokenizer_config.json (add_bos_token: true)",
    ),
    SpecialTokenRule(
        "Llama 3",
        ("llama",),
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        pad=None,
        turn_ends=("<|eot_id|>", "<|eom_id|>"),
        source="meta-llama/Meta-Llama-3-8B-Instruct, tokenizer_config.json and generation_config.json",
    ),
    SpecialTokenRule(
        "Llama 1 and 2",
        ("llama",),
        bos="<s>",
        eos="</s>",
        pad=None,
        source="meta-llama/Llama-2-7b-hf, tokenizer.model (ids 1 and 2, no padding)",
    ),
    SpecialTokenRule(
        "SmolLM2",
        ("llama",),
        bos=_GPT_END,
        eos=_GPT_END,
        pad=None,
        turn_ends=(_CHATML_END,),
        source="HuggingFaceTB/SmolLM2-135M, tokenizer_config.json; -Instruct's names <|im_start|> and <|im_end|>",
    ),
    SpecialTokenRule(
        "SmolLM3",
        ("smollm3",),
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        pad=None,
        turn_ends=(_CHATML_END,),
        source="HuggingFaceTB/SmolLM3-3B, config.json (ids 128000 and 128001; its pad 128004 is reserved)",
    ),
    SpecialTokenRule(
        "Mistral",
        ("mistral",),
        bos="<s>",
        eos="</s>",
        pad=None,
        source="mistralai/Mistral-7B-v0.1, tokenizer_config.json",
    ),
    SpecialTokenRule(
        "Qwen2 and Qwen2.5",
        ("qwen2",),
        bos=None,
        eos=_GPT_END,
        pad=_GPT_END,
        turn_ends=(_CHATML_END,),
        split="qwen2",
        source="Qwen/Qwen2.5-0.5B, tokenizer_config.json (bos_token: null); its config's bos_token_id parts texts",
    ),
    SpecialTokenRule(
        "Qwen3",
        ("qwen3",),
        bos=None,
        eos=_GPT_END,
        pad=_GPT_END,
        turn_ends=(_CHATML_END,),
        split="qwen2",
        source="Qwen/Qwen3-0.6B, tokenizer_config.json (bos_token: null)",
    ),
    SpecialTokenRule(
        "Gemma 1, 2 and 3",
        ("gemma", "gemma2", "gemma3", "gemma3_text"),
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        turn_ends=("<end_of_turn>",),
        source="google/gemma-3-270m, tokenizer_config.json (add_bos_token: true); the LM is far off without <bos>",
    ),
    SpecialTokenRule(
        "Phi-3",
        ("phi3",),
        bos="<s>",
        eos=_GPT_END,
        pad=_GPT_END,
        turn_ends=("<|end|>", "<|assistant|>"),
        source="microsoft/Phi-3-mini-4k-instruct, tokenizer_config.json and generation_config.json",
    ),
    SpecialTokenRule(
        "Phi-4 and Phi-4-mini",
        ("phi3",),
        bos=_GPT_END,
        eos=_GPT_END,
        pad=None,
        turn_ends=(_CHATML_END, "<|end|>"),
        source="microsoft/phi-4 and microsoft/Phi-4-mini-instruct, tokenizer_config.json and generation_config.json",
    ),
    SpecialTokenRule(
        "GPT-2",
        ("gpt2",),
        bos=_GPT_END,
        eos=_GPT_END,
        pad=None,
        split="gpt-2",
        source="openai-community/gpt2, config.json (50256); the token that stood between the texts it was trained on",
    ),
    SpecialTokenRule(
        "GPT-NeoX and Pythia",
        ("gpt_neox",),
        bos=_GPT_END,
        eos=_GPT_END,
        pad=None,
        source="EleutherAI/pythia-70m, tokenizer_config.json (id 0); the token that stood between texts, as in GPT-2",
    ),
    SpecialTokenRule(
        "StableLM 2",
        ("stablelm",),
        bos=_GPT_END,
        eos=_GPT_END,
        pad=None,
        turn_ends=(_CHATML_END,),
        source="stabilityai/stablelm-2-1_6b, config.json (100257); the chat models end turns with <|im_end|>",
    ),
    SpecialTokenRule(
        "OLMo 2",
        ("olmo2",),
        bos=_GPT_END,
        eos=_GPT_END,
        pad="<|pad|>",
        turn_ends=(_CHATML_END,),
        source="allenai/OLMo-2-0425-1B, tokenizer_config.json; marks both ends of a text (allenai/dolma2-tokenizer)",
    ),
)
"""Every family's rule; of several with one model type the first that fits the vocabulary holds."""


def rule_of(model_type: str, ids: Mapping[str, int]) -> SpecialTokenRule | None:
    """The rule of a model type (or GGUF architecture) that fits a vocabulary; None where none does.

    Args:
        model_type: ``model_type`` of ``config.json``, or ``general.architecture``.
        ids: Every token's id.
    """
    return next((rule for rule in SPECIAL_TOKEN_RULES if model_type in rule.model_types and rule.fits(ids)), None)


@dataclasses.dataclass(frozen=True)
class NamedTokens:
    """What a model's own files say; they win over the family's rule.

    Attributes:
        bos_id: Beginning of sequence, where named.
        eos_id: End of sequence, where named.
        pad_id: Padding, where named.
        stop_ids: Every token that the files say ends a generated text.
        without_bos: The files say that there is no beginning of sequence (``"bos_token": null``).
        add_bos: Whether the files ask for a text to begin with the bos; None where they do not say.
        own_pad_id: Padding, where the tokenizer's own files name it; those of the model do not count.
    """

    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    stop_ids: tuple[int, ...] = ()
    without_bos: bool = False
    add_bos: bool | None = None
    own_pad_id: int | None = None


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """The ids that frame rows and end replies; see `spt_jax.models.tokenization.tokenizer.Tokenizer`."""

    bos_id: int | None
    eos_id: int
    pad_id: int
    stop_ids: tuple[int, ...]
    own_pad_id: int | None


def special_tokens(
    named: NamedTokens, rule: SpecialTokenRule | None, ids: Mapping[str, int], where: str
) -> SpecialTokens:
    """The files' own special tokens, completed by the family's rule.

    A named bos begins a row whether or not the tokenizer would add it by itself (METHOD's template has ``<bos>``),
    save in a family that knows none (Qwen, whose configs name the separator of texts): there only if the files ask
    for it (``add_bos_token: true``). The end of turn of a family's chat variants ends replies of its base models too:
    it is never part of a text.

    Args:
        named: What the files say.
        rule: The family's rule, where there is one.
        ids: Every token's id.
        where: The model, for messages.

    Raises:
        UserError: Nothing names an end of sequence.
    """
    bos_id = named.bos_id
    if rule is not None:
        if rule.bos is None and not named.add_bos:
            bos_id = None
        elif bos_id is None and rule.bos is not None and not named.without_bos:
            bos_id = ids[rule.bos]
    eos_id = named.eos_id
    if eos_id is None and rule is not None:
        eos_id = ids[rule.eos]
    if eos_id is None:
        raise UserError(f"{where}: neither the tokenizer nor config.json names an end-of-sequence token, which we need")
    by_rule = None if rule is None or rule.pad is None else ids.get(rule.pad)
    own_pad_id = by_rule if named.own_pad_id is None else named.own_pad_id
    pad_id = next(pad for pad in (named.pad_id, by_rule, eos_id) if pad is not None)
    turn_ends = [] if rule is None else [ids[token] for token in (rule.eos, *rule.turn_ends) if token in ids]
    stop_ids = tuple(dict.fromkeys([eos_id, *named.stop_ids, *turn_ends]))
    return SpecialTokens(bos_id, eos_id, pad_id, stop_ids, own_pad_id)


def mark_special(backend: Backend, special: SpecialTokens) -> None:
    """Marks a model's special tokens, so that they are neither found in a text nor shown in a reply.

    Args:
        backend: The model's tokenizer, whose file may call them otherwise.
        special: The tokens.
    """
    ids = {special.bos_id, special.pad_id, *special.stop_ids} - {None}
    # An id whose spelling is another's by now has none, and no text has it.
    spelled = [token for number in sorted(ids) if (token := backend.id_to_token(number)) is not None]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in spelled])
