from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import spt_jax
from spt_jax.commands.main import DOORS, main

CONFIG = str(Path(__file__).resolve().parent.parent.parent / "configs" / "quickstart.py")


def refused(capsys, *arguments: str) -> str:
    """The one sentence on standard error of a command that must exit with 2."""
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert said.err.startswith("spt-jax")
    assert "Traceback" not in said.err
    return said.err


@pytest.mark.parametrize("door", DOORS)
def test_help_of_a_door_shows_its_own_flags_and_examples_alone(capsys, door):
    assert main([door, "--help"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert f"spt-jax {door} " in said.out.partition("Examples:")[2]
    own = {"inspect": "--source", "compare": "--baseline", "plan": "--topology"}.get(door, "--workdir")
    assert own in said.out.partition("\n\nFlags")[2]
    assert not re.search("absl|flagfile|undefok|spt_jax\\.", said.out)
    assert main(["help", door]) == 0
    assert capsys.readouterr().out == said.out


def test_help_of_convert_shows_each_conversion_with_its_own_flags(capsys):
    assert main(["convert", "--help"]) == 0
    _, official, peft = re.split(r"\n\nFlags of convert \w+:\n", capsys.readouterr().out)
    named = [re.findall(r"^  --(\S+)", text, re.MULTILINE) for text in (official, peft)]
    assert named[0] == ["dir", "model", "revision", "config_file", "workdir"]
    assert named[1] == ["workdir", "checkpoint", "out", "push", "[no]private"]
    for word, flags in zip(("official", "peft"), (official, peft), strict=True):
        assert main(["convert", word, "--help"]) == 0
        assert capsys.readouterr().out.rstrip().endswith(f"Flags:\n{flags.rstrip()}")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_of_the_command_names_every_door(capsys, arguments):
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert all(f"  {door} " in out for door in DOORS)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"spt-jax {spt_jax.__version__}\n"


@pytest.mark.parametrize(
    "arguments", [*([door, "--help"] for door in DOORS), ["chat", "--workdri=x"], ["train", "--config=absent.py"]]
)
def test_help_and_usage_errors_never_wait_for_jax(arguments, tmp_path):
    code = "import sys; from spt_jax.commands.main import main; main(sys.argv[1:]); sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, cwd=tmp_path)


def test_the_module_is_the_command_and_starts_within_a_second():
    began = time.process_time(), os.times().children_user + os.times().children_system
    done = subprocess.run([sys.executable, "-m", "spt_jax", "trian"], capture_output=True, text=True)
    assert os.times().children_user + os.times().children_system - began[1] < 1.0
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (f"spt-jax: there is no door 'trian'; allowed: {', '.join(DOORS)}. Did you mean 'train'?\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--workdir=x", "train"], "the door comes first, then its flags; allowed: train"),
        (["score", "--workdri=x"], "no flag --workdri for score. Did you mean '--workdir'"),
        (["train", "--config=absent.py", "--workdri=x"], "no flag --workdri for train. Did you mean '--workdir'"),
        (["convert"], "the first word, what is converted, is missing; allowed: official, peft"),
        (["convert", "--workdir=x"], "the first word says what is converted; allowed: official, peft"),
        (["convert", "ofical", "x"], "there is no conversion 'ofical'; allowed: official, peft. Did you mean 'offici"),
        (["convert", "official"], "spt-jax convert official: DIR is missing; give the folder"),
        (["convert", "official", "a"], "--model is missing; give the LM"),
        (["convert", "official", "a", "--out=x"], "there is no flag --out for convert official"),
        (["convert", "official", "a", "b"], "takes one DIR, and 'b' is another"),
        (["convert", "peft"], "spt-jax convert peft: --workdir is missing"),
        (["evaluate", "runs/a"], "'runs/a' is not a flag of evaluate; flags are written --name=value"),
        (["evaluate"], "--workdir is missing; give the working directory"),
        (["evaluate", "--workdir"], "--workdir needs a value, as in --workdir=value"),
        (["evaluate", "--limit=-1"], "--limit is '-1'; allowed: a whole number, 0 or more"),
        *(
            (["evaluate", f"--heartbeat={value}"], f"--heartbeat is '{value}'; allowed: a number from 1 to 86400")
            for value in ("0", "inf", "nan", "1e300")
        ),
        (["evaluate", "--seed=-5"], "--seed is '-5'; allowed: a whole number from -1 to 2147483647"),
        (["evaluate", "--limit=many"], "--limit is 'many'; allowed: a whole number"),
        (["evaluate", "--nobaselines=no"], "--nobaselines=no does not take an argument"),
        (["plan", "--nosearch", "--config=absent.py"], "absent.py"),
        (["plan", "--noserach"], "there is no flag --noserach for plan"),
        (["score", "--layout=rows"], "--layout is 'rows'; allowed: dialogue, turn"),
        (["score", "--workdir=x", "--data=y"], "--out is missing; give a file"),
        (["chat", "--temperature=hot"], "--temperature is 'hot'; allowed: a number"),
        (["train"], "--config is missing; give a config file, such as --config=configs/quickstart.py"),
        (["train", f"--config={CONFIG}"], "--workdir is missing; give a folder"),
        (["train", "--config"], "--config needs a value"),
        (["train", f"--config={CONFIG}", f"--config={CONFIG}"], "--config is given twice"),
        (["train", f"--config={CONFIG}", "--workdir=x", "y"], "'y' is not a flag of train"),
        (["train", f"--config={CONFIG}:3"], "get_config.. of this file takes none"),
        (["train", "--config=configs"], "configs does not exist|configs is a folder"),
        (["train", f"--config={CONFIG.replace('quickstart', 'quickstrat')}"], "does not exist. Did you mean .*quickst"),
    ],
)
def test_a_mistake_in_the_flags_is_one_sentence(capsys, arguments, sentence):
    assert re.search(sentence, refused(capsys, *arguments))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("--config.bank.num_promts=3", "no option 'bank.num_promts' in the configuration. Did you mean 'bank.num_pr"),
        ("--config.bank=3", "'bank' is a section of the configuration; set its options"),
        ("--config.bank.num_prompts=three", "--config.bank.num_prompts is 'three'; allowed: a whole number"),
        ("--config.optimizer.learning_rate=fast", "learning_rate is 'fast'; allowed: a number"),
        ("--config.retriever.share=perhaps", "share is 'perhaps'; allowed: true or false"),
        ("--config.bank.num_prompts", "--config.bank.num_prompts needs a value"),
        ("--config.bank.num_prompts=0", "bank.num_prompts is 0; allowed: 1 or more"),
        ("--config.bank.prompt_length=0", "bank.prompt_length is 0; allowed: 1 or more"),
        ("--config.optimizer.learning_rate=nan", "learning_rate is nan; allowed: more than 0"),
        ("--noconfig.bank.num_prompts", "--noconfig.bank.num_prompts is not allowed"),
    ],
)
def test_a_mistake_in_an_override_is_one_sentence_and_leaves_no_workdir(capsys, tmp_path, override, sentence):
    assert re.search(sentence, refused(capsys, "train", f"--config={CONFIG}", f"--workdir={tmp_path / 'a'}", override))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("def get_config(:", r"c\.py:1: the config file is not Python"),
        ("x = 1", r"c\.py has no function get_config"),
        ("import nothing_of_this_name", r"c\.py:1: the config file fails with ModuleNotFoundError"),
        ("def get_config():\n    return 1 / 0", r"c\.py:2: the config file fails with ZeroDivisionError"),
        ("def get_config(): pass", "returns nothing .is its return missing"),
        ("def get_config(): return {}", "returns a dict; it must return a ConfigDict"),
        ("def get_config(size): return None", r"takes an argument, as in --config=.*c\.py:TEXT"),
        (
            "from spt_jax.config import *\ndef get_config():\n    c = default_config()\n    c.bank.num_prompts = 'x'",
            r"c\.py:4: the option 'num_prompts' is x of type str; allowed: a value of type int",
        ),
        (
            "from spt_jax.config import *\ndef get_config():\n    c = default_config()\n    c.bnk = 3\n    return c",
            "no option 'bnk' in the configuration",
        ),
    ],
)
def test_a_mistake_in_a_config_file_is_one_sentence_with_its_place(capsys, tmp_path, text, sentence):
    (tmp_path / "c.py").write_text(text)
    assert re.search(sentence, refused(capsys, "train", f"--config={tmp_path / 'c.py'}", f"--workdir={tmp_path / 'a'}"))
    assert not (tmp_path / "a").exists()


@pytest.fixture
def config_of(monkeypatch):
    """The config that the door would train with."""
    from spt_jax.commands import train

    def read(*arguments: str):
        seen = []
        monkeypatch.setattr(train, "train_run", lambda config, workdir, name: seen.append(config) or 0)
        assert main(["train", *arguments, "--workdir=unused"]) == 0
        return seen[0]

    return read


def test_overrides_come_with_an_equals_sign_or_a_space_before_or_behind_the_config(config_of):
    plain = config_of(f"--config={CONFIG}")
    changed = config_of(
        *(
            "--config.bank.num_prompts=7",
            "--config",
            CONFIG,
            "--config.optimizer.learning_rate",
            "3e-3",
            "--config.seed",
        ),
        *("5", "--noconfig.retriever.share", "--config.tracking.tensorboard", "false", "--config.tracking.wandb"),
        *("--config.model.source=a=b", "--config.mesh.data", "-1", "--config.data.test="),
        *("--config.bank.init_text=be kind, please",),
    )
    assert (plain.bank.num_prompts, plain.retriever.share, plain.tracking.wandb) == (4, True, False)
    assert changed.bank.num_prompts == 7
    assert changed.optimizer.learning_rate == 3e-3
    assert (changed.seed, changed.mesh.data, changed.data.test, changed.model.source) == (5, -1, "", "a=b")
    assert (changed.retriever.share, changed.tracking.tensorboard, changed.tracking.wandb) == (False, False, True)
    assert changed.bank.init_text == ("be kind, please",)
    texts = config_of(f"--config={CONFIG}", "--config.bank.init_text=be kind.", "--config.bank.init_text", "be brief.")
    assert texts.bank.init_text == ("be kind.", "be brief.")
    assert config_of(f"--config={CONFIG}", "--config.bank.init_text=('a', 'b')").bank.init_text == ("a", "b")
    named = config_of(f"--config={CONFIG}", "--config.lora.targets=q_proj, o_proj", "--config.evaluation.metrics=bleu")
    assert (named.lora.targets, named.evaluation.metrics) == (("q_proj", "o_proj"), ("bleu",))
    more = config_of(f"--config={CONFIG}", "--config.evaluation.metrics=('bleu', 'rouge')", "--config.lora.targets=a,b")
    assert (more.evaluation.metrics, more.lora.targets) == (("bleu", "rouge"), ("a", "b"))


def test_a_config_file_takes_typed_arguments(config_of, tmp_path):
    text = "from spt_jax.config import default_config\ndef get_config(size='4'):\n    c = default_config()\n"
    (tmp_path / "c.py").write_text(text + "    c.bank.num_prompts = int(size)\n    return c\n")
    assert config_of(f"--config={tmp_path / 'c.py'}").bank.num_prompts == 4
    assert config_of(f"--config={tmp_path / 'c.py'}:9").bank.num_prompts == 9


def test_ctrl_c_says_so_without_a_traceback(capsys, monkeypatch):
    from spt_jax.commands import score

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(score, "run", interrupted)
    assert main(["score"]) == 130
    assert capsys.readouterr().err == "\nspt-jax score: interrupted\n"


def test_compiled_programs_are_kept_in_the_users_cache_folder_unless_jax_is_told_otherwise(tmp_path):
    code = (
        "from spt_jax.commands.main import main; main(['score', '--workdir=absent'])\n"
        "import jax; jax.jit(lambda x: x + 1)(1)"
    )
    for whose in ("ours", "theirs"):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
        environment |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
        if whose == "theirs":
            environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "theirs")
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
    assert any((tmp_path / "spt_jax" / "compiled").iterdir())
    assert any((tmp_path / "theirs").iterdir())


def test_programs_that_were_cut_short_are_compiled_and_those_left_empty_are_kept_again(tmp_path):
    code = (
        "from spt_jax.commands.main import main; main(['score', '--workdir=absent'])\n"
        "import jax; print(jax.jit(lambda x: x + 1)(1))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}

    def run() -> list[Path]:
        done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
        assert done.stdout == "2\n"
        assert "Error reading" not in done.stderr
        return sorted((tmp_path / "spt_jax" / "compiled").glob("*-cache"))

    kept = run()
    sizes = [path.stat().st_size for path in kept]
    for path, size in zip(kept, sizes, strict=True):
        os.truncate(path, size // 2)
    assert run() == kept
    for path in kept:
        os.truncate(path, 0)
        os.utime(path, (0, 0))
    assert run() == kept
    assert all(path.stat().st_size for path in kept)
    os.truncate(kept[0], 0)  # just now, as one that is being written
    assert run() == kept
    assert kept[0].stat().st_size == 0


@pytest.mark.parametrize(("process", "code"), [(1, 143), (2, -signal.SIGTERM)])
def test_the_first_process_of_a_container_ends_at_sigterm_as_any_other(process, code):
    waiting = (
        f"import os, time; os.getpid = lambda: {process}\n"
        "from spt_jax.commands import main\n"
        "main.main = lambda arguments: (print('waits', flush=True), time.sleep(60))\n"
        "main.run()"
    )
    with subprocess.Popen([sys.executable, "-c", waiting], stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None and started.stdout.readline() == "waits\n"
        started.terminate()
        assert started.wait(timeout=30) == code
