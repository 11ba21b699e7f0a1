"""Random small models in torch, as transformers has them, and the same weights here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from llama_files import write_tokenizer

from spt_jax.models.loading import LanguageModel, load_lm

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "OPT": ("OPTForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "Llama": ("LlamaForCausalLM", {"intermediate_size": 48, "num_key_value_heads": 2}),
    "GPT-2": ("GPT2LMHeadModel", {}),
}
VOCABULARY, WIDTH, PROMPTS, PROMPT_LENGTH = 261, 32, 4, 3
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LENGTHS, ROWS = (3, 7, 12, 17, 21, 24, 28, 31), 10
"""Rows of each length, so that torch needs no padding."""


@dataclasses.dataclass
class Reference:
    """One model on both sides, soft prompts, and rows of several lengths that mix them."""

    name: str
    torch_model: Any
    lm: LanguageModel
    bank: np.ndarray
    contexts: list[list[int]]
    selected: list[int]

    def generate(self, rows: Sequence[int], **options: Any) -> Any:
        """transformers' ``generate`` for rows of one length, prompt and text as input embeddings."""
        import torch

        tokens = torch.tensor([self.contexts[row] for row in rows])
        prompts = torch.tensor(self.bank[[self.selected[row] for row in rows]])
        with torch.no_grad():
            text = self.torch_model.get_input_embeddings()(tokens)
            embeddings = torch.cat([prompts, text], dim=1)
            return self.torch_model.generate(
                inputs_embeds=embeddings,
                attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.long),
                return_dict_in_generate=True,
                **options,
            )

    def groups(self) -> list[list[int]]:
        """Rows by length."""
        return [
            [row for row, context in enumerate(self.contexts) if len(context) == length]
            for length in sorted({len(context) for context in self.contexts})
        ]


def make_reference(family: str, folder: Path) -> Reference:
    """A random model whose next tokens are clear, yet depend on prompt and text."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    architecture, fields = FAMILIES[family]
    kind = getattr(transformers, architecture)
    torch.manual_seed(3)
    model = kind(kind.config_class(**SIZES, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.25)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    model = kind.from_pretrained(folder, dtype="float32", attn_implementation="eager").eval()
    model.generation_config = transformers.GenerationConfig(pad_token_id=0, eos_token_id=None, bos_token_id=1)
    generator = np.random.default_rng(0)
    contexts = [generator.integers(3, VOCABULARY, length).tolist() for length in LENGTHS for _ in range(ROWS)]
    bank = generator.normal(0, 0.5, (PROMPTS, PROMPT_LENGTH, WIDTH)).astype(np.float32)
    selected = generator.integers(0, PROMPTS, len(contexts)).tolist()
    return Reference(family, model, load_lm(str(folder)), bank, contexts, selected)
