"""Which tokens begin, end and pad a row: the families' table, what files say instead, and what an LM's size allows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from spt_jax.data.sources import read_dialogues
from spt_jax.errors import UserError
from spt_jax.models.families.registry import FAMILIES
from spt_jax.models.tokenization.folder_tokenizer import tokenizer_of_folder
from spt_jax.models.tokenization.gguf_tokenizer import tokenizer_of_gguf
from spt_jax.models.tokenization.special_tokens import SPECIAL_TOKEN_RULES, NamedTokens, rule_of, special_tokens
from spt_jax.models.tokenization.tokenizer import Tokenizer

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
END, IM_END = "<|endoftext|>", "<|im_end|>"
LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
LLAMA2 = ["<unk>", "<s>", "</s>"]
GEMMA = ["<pad>", "<eos>", "<bos>", "<unk>", "<end_of_turn>"]


def ids_of(tokens: Sequence[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


@pytest.mark.parametrize(
    ("model_type", "tokens", "bos", "eos", "pad", "stops"),
    [
        ("opt", ["<s>", "<pad>", "</s>", "<unk>"], "</s>", "</s>", "<pad>", ["</s>"]),
        ("llama", LLAMA2, "<s>", "</s>", "</s>", ["</s>"]),
        ("llama", LLAMA3, LLAMA3[0], LLAMA3[1], LLAMA3[1], LLAMA3[1:]),
        ("llama", [END, "<|im_start|>", IM_END], END, END, END, [END, IM_END]),
        ("smollm3", [*LLAMA3, "<|im_start|>", IM_END], LLAMA3[0], LLAMA3[1], LLAMA3[1], [LLAMA3[1], IM_END]),
        ("mistral", LLAMA2, "<s>", "</s>", "</s>", ["</s>"]),
        ("qwen2", [END, "<|im_start|>", IM_END], None, END, END, [END, IM_END]),
        ("qwen3", [END, "<|im_start|>", IM_END], None, END, END, [END, IM_END]),
        ("gemma", GEMMA, "<bos>", "<eos>", "<pad>", ["<eos>", "<end_of_turn>"]),
        ("gemma2", GEMMA, "<bos>", "<eos>", "<pad>", ["<eos>", "<end_of_turn>"]),
        ("gemma3_text", GEMMA, "<bos>", "<eos>", "<pad>", ["<eos>", "<end_of_turn>"]),
        ("phi3", [*LLAMA2, END, "<|assistant|>", "<|end|>"], "<s>", END, END, [END, "<|end|>", "<|assistant|>"]),
        ("phi3", [END, "<|im_start|>", IM_END], END, END, END, [END, IM_END]),
        ("gpt2", [END], END, END, END, [END]),
        ("gpt_neox", [END, "<|padding|>"], END, END, END, [END]),
        ("stablelm", [END, IM_END], END, END, END, [END, IM_END]),
        ("olmo2", [END, "<|pad|>"], END, END, "<|pad|>", [END]),
    ],
)
def test_each_family_frames_its_rows_by_its_own_rule(
    model_type: str, tokens: list[str], bos: str | None, eos: str, pad: str, stops: list[str]
) -> None:
    ids = ids_of(["a", *tokens])
    rule = rule_of(model_type, ids)
    special = special_tokens(NamedTokens(), rule, ids, "a model")
    assert special.bos_id == (None if bos is None else ids[bos])
    assert (special.eos_id, special.pad_id) == (ids[eos], ids[pad])
    assert special.stop_ids == tuple(ids[token] for token in stops)


def test_every_supported_family_has_a_rule_with_a_source() -> None:
    known = {model_type for rule in SPECIAL_TOKEN_RULES for model_type in rule.model_types}
    assert {kind for family in FAMILIES for kind in (*family.model_types, *family.gguf_architectures)} <= known
    assert all(rule.source for rule in SPECIAL_TOKEN_RULES)
    assert len({rule.family for rule in SPECIAL_TOKEN_RULES}) == len(SPECIAL_TOKEN_RULES)


def test_what_the_files_name_wins_over_the_rule() -> None:
    ids = ids_of([*LLAMA2, "<x>", "<y>"])
    rule = rule_of("llama", ids)
    special = special_tokens(NamedTokens(bos_id=3, eos_id=4, pad_id=0, stop_ids=(4, 3)), rule, ids, "a model")
    assert (special.bos_id, special.eos_id, special.pad_id, special.stop_ids) == (3, 4, 0, (4, 3, 2))
    assert special_tokens(NamedTokens(without_bos=True), rule, ids, "a model").bos_id is None


def test_a_family_without_bos_takes_a_named_one_only_where_the_files_ask_for_it() -> None:
    ids = ids_of([END, IM_END, "<begin>"])
    rule = rule_of("qwen2", ids)
    for add_bos, expected in ((None, None), (False, None), (True, 2)):
        assert special_tokens(NamedTokens(bos_id=2, add_bos=add_bos), rule, ids, "a model").bos_id == expected
    assert special_tokens(NamedTokens(bos_id=2, eos_id=0, add_bos=False), None, ids, "a model").bos_id == 2


def test_no_end_of_sequence_anywhere_is_refused() -> None:
    with pytest.raises(UserError, match=r"a model: neither the tokenizer nor config\.json names an end-of-sequence"):
        special_tokens(NamedTokens(bos_id=1), None, {"a": 0}, "a model")


def gguf(architecture: str, tokens: list[str], **fields: Any) -> Tokenizer:
    metadata = {
        "general.architecture": architecture,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*BYTES, *tokens],
        "tokenizer.ggml.token_type": [1] * len(BYTES) + [3] * len(tokens),
        "tokenizer.ggml.merges": [],
        **{f"tokenizer.ggml.{name}": value for name, value in fields.items()},
    }
    return tokenizer_of_gguf(metadata, "x.gguf")


@pytest.mark.parametrize("kind", [1, 4])
def test_what_ends_replies_of_a_gguf_is_text_inside_a_text_whatever_the_file_calls_it(kind: int) -> None:
    first = len(BYTES)
    typed = [1] * first + [3, kind]
    tokenizer = gguf("llama", [END, IM_END], eos_token_id=first + 1, bos_token_id=first, token_type=typed)
    (ids,) = tokenizer.encode([f"i say {IM_END}"])
    assert not {first, first + 1} & set(ids)
    assert tokenizer.decode([*ids, first + 1]) == f"i say {IM_END}"


def test_a_spelling_of_two_ids_in_a_gguf_is_special_though_the_file_names_the_first() -> None:
    first = len(BYTES)
    tokenizer = gguf("llama", [IM_END, IM_END], eos_token_id=first, token_type=[1] * (first + 2))
    assert tokenizer.eos_id == first
    assert tokenizer.decode(tokenizer.encode(["a"])[0]) == "a"


def test_gguf_metadata_is_completed_by_the_rule_of_its_architecture() -> None:
    first = len(BYTES)
    tokenizer = gguf("qwen3", [END, IM_END], bos_token_id=first, eos_token_id=first + 1, add_bos_token=False)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, first + 1, first)
    assert tokenizer.stop_ids == (first + 1, first)
    tokenizer = gguf("llama", LLAMA3, bos_token_id=first, eos_token_id=first + 1, eot_token_id=first + 2)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (first, first + 1, (first + 1, first + 2))
    assert gguf("gpt2", [END]).eos_id == first
    with pytest.raises(UserError, match=r"eos_token_id is 999, but the file has 257 tokens"):
        gguf("gpt2", [END], eos_token_id=999)


def write(folder: Path, **files: Mapping[str, Any]) -> Path:
    for name, fields in files.items():
        (folder / f"{name}.json").write_text(json.dumps(fields))
    return folder


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder with `vocab.json` and `merges.txt` alone: OPT's first four tokens, then the bytes."""
    write(tmp_path, vocab=ids_of(["<s>", "<pad>", "</s>", "<unk>", *BYTES, END]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    return tmp_path


def test_bare_vocabulary_and_merges_are_framed_by_the_model_type(bare: Path) -> None:
    with pytest.raises(UserError, match=r"vocab\.json and merges\.txt alone.*put its config\.json beside them"):
        tokenizer_of_folder(bare)
    named = tokenizer_of_folder(bare, "opt")
    tokenizer = tokenizer_of_folder(write(bare, config={"model_type": "opt"}))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.stop_ids) == (2, 2, 1, (2,))
    assert tokenizer.fingerprint == named.fingerprint
    [row] = tokenizer.encode(["hi </s> <pad>"])
    assert not {1, 2} & set(row) and tokenizer.decode([2, *row, 2, 1]) == "hi </s> <pad>"
    assert tokenizer_of_folder(bare, "gpt2").bos_id == len(BYTES) + 4


def test_files_name_tokens_in_their_order(bare: Path) -> None:
    write(bare, config={"model_type": "opt", "eos_token_id": 0, "pad_token_id": 3})
    assert tokenizer_of_folder(bare).eos_id == 0 and tokenizer_of_folder(bare).pad_id == 3
    write(bare, generation_config={"eos_token_id": [3, 0]})
    assert tokenizer_of_folder(bare).stop_ids == (3, 0, 2)
    write(bare, special_tokens_map={"eos_token": {"content": "<s>"}, "bos_token": "<unk>"})
    assert tokenizer_of_folder(bare).stop_ids == (0, 3, 2) and tokenizer_of_folder(bare).bos_id == 3
    write(bare, tokenizer_config={"bos_token": None})
    assert tokenizer_of_folder(bare).bos_id is None
    write(bare, tokenizer_config={"eos_token": "<absent>", "pad_token": "<absent>"})
    with pytest.raises(UserError, match="its eos token is '<absent>', which its vocabulary does not have"):
        tokenizer_of_folder(bare)


def test_configured_ids_beyond_the_vocabulary_say_nothing(bare: Path) -> None:
    write(bare, config={"model_type": "opt", "bos_token_id": 50256, "eos_token_id": 50256, "pad_token_id": -1})
    tokenizer = tokenizer_of_folder(bare)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (2, 2, 1)


def test_added_tokens_follow_the_vocabulary_or_are_refused(bare: Path) -> None:
    size = len(BYTES) + 5
    added = {str(size): {"content": IM_END, "special": True}, str(size + 1): {"content": "<think>", "special": False}}
    tokenizer = tokenizer_of_folder(write(bare, tokenizer_config={"added_tokens_decoder": added}), "gpt2")
    assert tokenizer.encode(["<think>"]) == [[size + 1]] and size not in tokenizer.encode([IM_END])[0]
    write(bare, tokenizer_config={"added_tokens_decoder": {"9999": {"content": "<far>", "special": True}}})
    with pytest.raises(UserError, match="the added token '<far>' has id 9999, which does not follow"):
        tokenizer_of_folder(bare, "gpt2")


def test_damaged_files_are_named(bare: Path) -> None:
    (bare / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        tokenizer_of_folder(bare)
    (bare / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json is not a JSON object"):
        tokenizer_of_folder(bare)
    write(bare, config={"model_type": "opt"})
    (bare / "merges.txt").write_text("one two three\n")
    with pytest.raises(UserError, match=r"vocab\.json and merges\.txt do not make a tokenizer"):
        tokenizer_of_folder(bare)


def test_opt_encodes_as_transformers_with_its_published_settings(shared_dir: Path, tmp_path: Path) -> None:
    from transformers import GPT2Tokenizer

    for file in ("vocab.json", "merges.txt"):
        shutil.copyfile(shared_dir / "data/tokenizers/opt" / file, tmp_path / file)
    tokenizer = tokenizer_of_folder(tmp_path, "opt")
    published: dict[str, Any] = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    oracle = GPT2Tokenizer.from_pretrained(str(tmp_path), **published, add_bos_token=True, add_prefix_space=False)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (2, 2, 1)
    assert (oracle.bos_token_id, oracle.eos_token_id, oracle.pad_token_id) == (2, 2, 1)
    assert tokenizer.vocab_size == tokenizer.text_vocab_size == len(oracle) == 50265
    dialogues = read_dialogues(str(shared_dir / "data/convai2/valid_self_original_no_cands.txt")).dialogues[:200]
    texts = [" ".join((*d.persona, *(f"Q: {t.query} R: {t.response}" for t in d.turns))) for d in dialogues]
    texts += [" ", "  hi", "a\r\nb\n\n\n c", "it's 12345 o'CLOCK", "naïve 東京 🙂 \U0001f469‍💻 e\u0301 각", "x" * 50]
    assert [[2, *row] for row in tokenizer.encode(texts)] == [oracle(text)["input_ids"] for text in texts]
    assert [tokenizer.decode([2, *row, 2]) for row in tokenizer.encode(texts)] == texts


@pytest.fixture
def sized() -> Tokenizer:
    """260 ids: the bytes and an end that belong to the LM, then an image, a pad and a stop that nobody trained."""
    backend = Backend(models.BPE(vocab=ids_of([*BYTES, "</s>"]), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in ("</s>", "<image>", "<pad>", "<stop>")])
    return Tokenizer(backend, None, 256, 258, stop_ids=(256, 259))


def test_special_tokens_beyond_the_lm_give_way(sized: Tokenizer) -> None:
    assert (sized.vocab_size, sized.text_vocab_size, sized.stop_ids) == (260, 256, (256, 259))
    fitted = sized.fitted(257, "a model")
    assert (fitted.bos_id, fitted.eos_id, fitted.pad_id, fitted.stop_ids) == (None, 256, 256, (256,))
    assert fitted.encode(["<pad> hi"]) == sized.encode(["<pad> hi"])
    whole = sized.fitted(300, "a model")
    assert (whole.pad_id, whole.stop_ids, whole.fingerprint) == (258, (256, 259), sized.fingerprint)


def test_tokens_of_text_or_an_end_beyond_the_lm_are_refused(sized: Tokenizer) -> None:
    with pytest.raises(UserError, match="a model: the tokenizer has 256 tokens, but the LM's vocabulary holds 255"):
        sized.fitted(255, "a model")
    with pytest.raises(UserError, match="the tokenizer's eos token is 256; allowed: 0 to 255"):
        sized.fitted(256, "a model")


def test_ids_of_a_padded_embedding_table_decode_to_nothing(sized: Tokenizer) -> None:
    [row] = sized.encode(["hi"])
    assert sized.decode([row[0], 5000, row[1]]) == "hi"


def test_the_end_of_sequence_is_the_first_stop(sized: Tokenizer) -> None:
    assert Tokenizer(sized.backend, None, 256, 256).stop_ids == (256,)
    assert Tokenizer(sized.backend, None, 256, 256, stop_ids=(257, 256)).stop_ids == (256, 257)


def test_special_tokens_are_ids_where_they_are_asked_for_and_text_where_they_are_said(sized: Tokenizer) -> None:
    end, image = (sized.special_tokens[token] for token in ("</s>", "<image>"))
    [hi], [said] = sized.encode(["hi "]), sized.encode(["</s>"])
    ids = sized.encode_with_specials([[image, "hi ", "</s>", end], [], [end, end], ["hi </s>"]])
    assert ids == [[image, *hi, *said, end], [], [end, end], sized.encode(["hi </s>"])[0]]
    # The backend itself is as it was.
    assert sized.encode(["hi </s>"]) == [[*hi, *said]]
    assert sized.vocab_size == 260 and sized.backend.get_vocab_size(with_added_tokens=True) == 260


def test_special_tokens_are_read_as_the_backend_reads_them(sized: Tokenizer) -> None:
    backend = Backend.from_str(sized.backend.to_str())  # finds special tokens in a text
    text = "a<image><image> b</s>c<pad>"
    ids = sized.special_tokens
    parts = ["a", ids["<image>"], ids["<image>"], " ", "b", ids["</s>"], "c", ids["<pad>"]]
    assert sized.encode_with_specials([parts]) == [backend.encode(text, add_special_tokens=False).ids]


def test_special_tokens_that_the_lm_lacks_are_none(sized: Tokenizer) -> None:
    assert list(sized.fitted(257, "a model").special_tokens) == ["</s>"]
    with pytest.raises(UserError, match="token 258 is no special token"):
        sized.fitted(257, "a model").encode_with_specials([["hi", 258]])
    with pytest.raises(UserError, match="token 3 is no special token"):
        sized.encode_with_specials([[3]])
