"""What is no checkpoint of the authors is one sentence: nothing in it is run, nothing is written."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from official_checkpoints import (
    BASE,
    PROMPT,
    STATES,
    as_saved,
    convert,
    golden_arrays,
    golden_checkpoint,
    golden_config,
    write_checkpoint,
)

from spt_jax.errors import UserError
from spt_jax.interop.official import find_model_states

pytestmark = pytest.mark.torch


class Executed:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


States = dict[str, Any]
Change = Callable[[States, Path], Any]


def changed_config(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        for name, value in changes.items():
            section, _, key = name.partition("__")
            config[section][key] = value

    return change


def executable(states: States, folder: Path) -> None:
    states["client"] = Executed(f"touch {folder / 'executed'}")


def executable_tensor(states: States, folder: Path) -> None:
    states["module"]["x"] = Executed(f"touch {folder / 'executed'}")


def without(name: str) -> Change:
    return lambda states, _: states["module"].pop(name)


def replaced(name: str, make: Callable[[Any], Any]) -> Change:
    return lambda states, _: states["module"].__setitem__(name, make(states["module"][name]))


DAMAGED: dict[str, tuple[Change, str]] = {
    "code": (executable, r"asks for 'posix.system', which a checkpoint of tensors and plain values does not need.*run"),
    "code among the tensors": (executable_tensor, r"asks for 'posix.system'.*never run"),
    "a class": (lambda s, _: s.update(config=Path("x")), r"asks for 'pathlib\.\w+'.*never run"),
    "no module": (lambda s, _: s.pop("module"), r"holds no 'module'; it holds 'buffer_names', 'optimizer'"),
    "module no dict": (lambda s, _: s.update(module=[1]), "holds a value of type list under 'module'"),
    "a value in module": (lambda s, _: s["module"].update(a=3), "holds a value of type int under 'a' in 'module'"),
    "no prompt": (lambda s, _: [s["module"].pop(PROMPT.format(k)) for k in range(4)], "holds no soft prompt"),
    "a prompt missing": (without(PROMPT.format(1)), "holds 3 soft prompts up to number 3, but not 1"),
    "prompts too few": (without(PROMPT.format(3)), "holds 3 soft prompts, but the run's config file says 4"),
    "another length": (
        replaced(PROMPT.format(2), lambda t: t[:5]),
        r"soft prompt 2 has the shape \[5, 64\].*\[8, 64\]",
    ),
    "no matrix": (replaced(PROMPT.format(0), lambda t: t[0]), r"soft prompt 0 has the shape \[64\]; expected \[P, M\]"),
    "not finite": (replaced(PROMPT.format(1), lambda t: t.clone().fill_(float("inf"))), "'models.1.* not finite"),
    "whole numbers": (replaced(PROMPT.format(1), lambda t: t.long()), "'models.1.*' has type I64, which is not supp"),
    "normaliser missing": (
        without("prompt_normalizer.bias"),
        "prompt_normalizer.weight, but not prompt_normalizer.bias",
    ),
    "normaliser of another width": (
        replaced("prompt_normalizer.weight", lambda t: t[:, :5]),
        r"prompt_normalizer.weight has the shape \[64, 5\], but soft prompts of width 64 need \[64, 64\]",
    ),
    "no normaliser": (
        lambda s, _: [s["module"].pop(f"prompt_normalizer.{part}") for part in ("weight", "bias")],
        r"holds no prompt_normalizer, but the run's config file has one",
    ),
    "a stranger": (
        lambda s, _: s["module"].update({"classifier.weight": s["module"]["prompt_normalizer.bias"]}),
        "holds the tensor 'classifier.weight', which the authors' selective model does not have",
    ),
    "an encoder": (
        lambda s, _: s["module"].update({"retriever.layers.0.norm1.bias": s["module"]["prompt_normalizer.bias"]}),
        "holds a transformer retriever, but the run's config file names none",
    ),
}


def refused(capsys: pytest.CaptureFixture[str], code: int, out: Path) -> str:
    """The sentence of a conversion that must fail and leave nothing."""
    said = capsys.readouterr()
    assert (code, said.out) == (2, "")
    told = [line for line in said.err.splitlines() if not line.startswith("loading weights, ")]
    assert len(told) == 1 and told[0].startswith("spt-jax convert official: "), said.err
    assert not out.exists() and not list(out.parent.glob(f".{out.name}*"))
    return told[0]


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_no_such_checkpoint_is_one_sentence_nothing_run_nothing_written(
    name: str, shared_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    damage, sentence = DAMAGED[name]
    states = as_saved(golden_arrays(shared_dir, BASE), torch.float32)
    damage(states, tmp_path)
    folder = write_checkpoint(tmp_path / "theirs", states, golden_config(shared_dir, BASE))
    code = convert(folder, shared_dir, tmp_path / "run")
    assert re.search(sentence, refused(capsys, code, tmp_path / "run"))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_code_in_any_protocol_of_pickle_is_refused(
    protocol: int, shared_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    states = {"module": {}, "client": Executed(f"touch {tmp_path / 'executed'}")}
    config = golden_config(shared_dir, BASE)
    folder = write_checkpoint(tmp_path / "theirs", states, config, pickle_protocol=protocol)
    code = convert(folder, shared_dir, tmp_path / "run")
    assert "asks for 'posix.system'" in refused(capsys, code, tmp_path / "run")
    assert not (tmp_path / "executed").exists()


def truncated(folder: Path) -> None:
    file = folder / "ds_ckpt" / "best" / STATES
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])


def another_rank(folder: Path) -> None:
    file = folder / "ds_ckpt" / "best" / STATES
    (file.parent / "mp_rank_01_model_states.pt").write_bytes(file.read_bytes())


def stage_three(folder: Path) -> None:
    file = folder / "ds_ckpt" / "best" / STATES
    file.rename(file.parent / "zero_pp_rank_0_mp_rank_00_model_states.pt")


FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncated, "truncated or damaged"),
    "empty": (lambda f: (f / "ds_ckpt" / "best" / STATES).write_bytes(b""), "is empty"),
    "before torch 1.6": (lambda f: (f / "ds_ckpt" / "best" / STATES).write_bytes(b"\x80\x02]."), "no zip archive"),
    "several ranks": (another_rank, "holds 2 files of model states .* only a checkpoint of one mp_rank"),
    "stage 3": (stage_three, "ZeRO stage 3"),
    "no file": (lambda f: (f / "ds_ckpt" / "best" / STATES).unlink(), r"no \*model_states.pt in .*best"),
    "no YAML": (lambda f: (f / "opt.yml").unlink(), "there is no YAML file in .*--config_file=PATH .*never read"),
    "two YAML files": (lambda f: (f / "b.yaml").write_text("a: 1"), "several YAML files; name .* with --config_file="),
    "no mapping": (lambda f: (f / "opt.yml").write_text("- 1"), "expected the sections model, training, dataset"),
    "a section missing": (
        lambda f: (f / "opt.yml").write_text("model: {K: 1}\ntrainin: {a: 1}"),
        "lacks the section 'training'.*Did you mean 'trainin'",
    ),
    "no YAML in it": (lambda f: (f / "opt.yml").write_text("a: 1\nb: ]"), r"opt.yml:2: not YAML"),
    "code in YAML": (
        lambda f: (f / "opt.yml").write_text(f"a: !!python/object/apply:os.system ['touch {f.parent / 'executed'}']"),
        "opt.yml:1: not YAML of plain values .*python/object/apply",
    ),
    "bytes": (lambda f: (f / "opt.yml").write_bytes(b"\xff\xfe\x00a\x01"), "is not YAML"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_damaged_folder_is_one_sentence_and_nothing_is_written(
    name: str, shared_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, sentence = FOLDERS[name]
    folder = golden_checkpoint(shared_dir, tmp_path / "theirs")
    damage(folder)
    code = convert(folder, shared_dir, tmp_path / "run")
    assert re.search(sentence, refused(capsys, code, tmp_path / "run"))
    assert not (tmp_path / "executed").exists()


def test_an_optimizers_state_is_not_a_checkpoint(shared_dir: Path, tmp_path: Path) -> None:
    folder = golden_checkpoint(shared_dir, tmp_path / "theirs")
    with pytest.raises(UserError, match="holds an optimizer's state"):
        find_model_states(folder / "ds_ckpt" / "best" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")


def test_another_lm_and_a_full_folder_are_refused(
    shared_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    arrays = golden_arrays(shared_dir, BASE)
    narrow = {n: a[:, :48] if "weight" in n else a[:48] for n, a in arrays.items()}
    narrow["prompt_normalizer.weight"] = narrow["prompt_normalizer.weight"][:48]
    config = golden_config(shared_dir, BASE)
    folder = write_checkpoint(tmp_path / "narrow", as_saved(narrow, torch.float32), config)
    said = refused(capsys, convert(folder, shared_dir, tmp_path / "run"), tmp_path / "run")
    assert re.search("have width 48, but .*opt-tiny has width 64; .*trained on opt-tiny", said)
    folder = golden_checkpoint(shared_dir, tmp_path / "theirs")
    said = refused(capsys, convert(folder, shared_dir, tmp_path / "run", model="absent"), tmp_path / "run")
    assert "absent" in said
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    assert convert(folder, shared_dir, tmp_path / "full") == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["x"]


def test_a_failure_while_writing_leaves_nothing(
    shared_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from spt_jax.interop import converted_run

    def full(*_: Any) -> None:
        raise UserError("no space left")

    monkeypatch.setattr(converted_run, "save", full)
    folder = golden_checkpoint(shared_dir, tmp_path / "theirs")
    code = convert(folder, shared_dir, tmp_path / "new" / "run")
    assert "no space left" in refused(capsys, code, tmp_path / "new" / "run")
    assert {path.name for path in tmp_path.iterdir()} == {"theirs"}
