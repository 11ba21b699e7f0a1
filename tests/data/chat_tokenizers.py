"""Small tokenizers of three kinds with the chat templates of four families, as the folders that transformers reads."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from spt_jax.models.tokenization.byte_level_bpe import SPLITS

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}{% else %}"
    "{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# As Qwen3's: the answer that is being rendered thinks, those before it do not.
THINKING = (
    "{% for message in messages %}{% if message.role == 'assistant' and loop.last %}"
    "{{'<|im_start|>assistant\n<think>\n\n</think>\n\n' + message.content + '<|im_end|>\n'}}{% else %}"
    "{{'<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and "
    "enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "llama2": LLAMA2, "thinking": THINKING}
TURN_ENDS = {
    "chatml": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "llama2": "</s>",
    "thinking": "<|im_end|>",
}
KINDS = ("bytes", "pieces", "prefixed")

SPECIALS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>")
SPECIALS += ("<|eot_id|>", "<start_of_turn>", "<end_of_turn>")
_CORPUS = [
    "i have two dogs and a cat .",
    "hello , how are you today ?",
    "i am fine , thanks . do you like the beach ?",
    "system\nYou are a person in a casual conversation. Your persona: i run .",
    "user\nassistant\nmodel\n[INST] <<SYS>>\n<</SYS>>\n\n [/INST] __SILENCE__",
]


def chat_folder(folder: Path, kind: str, template: str) -> Path:
    """Writes a tokenizer: byte-level, or sentencepiece-like with a space before the first piece or before each."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=kind != "bytes"))
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else [f"<0x{i:02X}>" for i in range(256)]
    if kind == "bytes":
        # Line breaks are cut off from what follows, as in the chat models of Llama 3 and Qwen.
        cut = pre_tokenizers.Split(Regex(SPLITS["qwen2"][0]), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        backend.decoder = decoders.ByteLevel()
    else:
        if kind == "prefixed":
            backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[*SPECIALS, *(alphabet if kind != "bytes" else [])],
        initial_alphabet=alphabet if kind == "bytes" else [chr(i) for i in range(33, 127)],
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    state = json.loads(backend.to_str())
    # The trainer calls the bytes special too; in a sentencepiece vocabulary they are not.
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIALS]
    backend = Tokenizer.from_str(json.dumps(state))
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIALS])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    fields = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return folder
