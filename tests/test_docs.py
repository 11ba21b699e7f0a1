"""The documents are true: their examples run, their links lead somewhere, their names and options exist."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from absl import flags
from llama_files import random_llama

import spt_jax
from spt_jax.commands.main import DOORS
from spt_jax.config import RULES, default_config, flatten, set_option, validate
from spt_jax.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = [
    *sorted((REPOSITORY / "docs").rglob("*.md")),
    *(REPOSITORY / name for name in ("README.md", "CHANGELOG.md", "SECURITY.md")),
]
NAMES = [str(page.relative_to(REPOSITORY)) for page in PAGES]

_EXAMPLES = re.compile(r"^```pycon\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_COMMANDS = re.compile(r"^```bash\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
_NAMED_IN_FILE = re.compile(r"((?:`\w+`(?:, | and )?)+) in\s+\[`[\w.]+`\]\(([^)#]+\.py)\)")


def read(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama of width 64 as a Hugging Face folder, with a tokenizer of single bytes."""
    return str(random_llama(max_position_embeddings=256).write_folder(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("name", [name for name in NAMES if _EXAMPLES.search(read(name))])
def test_examples_run(name: str, tiny_llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = read(name)
    # Everything outside the examples becomes empty lines, so that a failure names the page's own line.
    kept, end = [], 0
    for match in _EXAMPLES.finditer(text):
        kept += [re.sub(r"[^\n]", "", text[end : match.start(1)]), match.group(1)]
        end = match.end(1)
    test = doctest.DocTestParser().get_doctest("".join(kept), {"source": tiny_llama}, name, name, 0)
    assert test.examples
    runner = doctest.DocTestRunner()
    runner.run(test)
    assert runner.summarize(verbose=False).failed == 0, capsys.readouterr().out


def test_the_api_page_has_examples() -> None:
    assert "docs/python_api.md" in [name for name in NAMES if _EXAMPLES.search(read(name))]


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files_and_headings(name: str) -> None:
    page = REPOSITORY / name
    broken = []
    for _, target in _LINK.findall(read(name)):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def defined(file: Path) -> set[str]:
    """Every name a module defines: functions, classes, their methods and fields, constants."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


@pytest.mark.parametrize("name", NAMES)
def test_names_linked_to_a_module_are_defined_there(name: str) -> None:
    missing = []
    for shown, target in _LINK.findall(read(name)):
        match = re.fullmatch(r"`(\w+)`", shown)
        if match and target.endswith(".py"):
            file = ((REPOSITORY / name).parent / target).resolve()
            if match[1] not in defined(file):
                missing.append(f"{match[1]} in {target}")
    for listed, target in _NAMED_IN_FILE.findall(read(name)):
        file = ((REPOSITORY / name).parent / target).resolve()
        missing += [f"{n} in {target}" for n in re.findall(r"`(\w+)`", listed) if n not in defined(file)]
    assert not missing


@pytest.mark.parametrize("name", NAMES)
def test_dotted_names_of_the_package_can_be_imported(name: str) -> None:
    missing = []
    for dotted in set(re.findall(r"`(spt_jax(?:\.\w+)+)`", read(name))):
        module, _, last = dotted.rpartition(".")
        try:
            found = importlib.util.find_spec(dotted) is not None
        except ModuleNotFoundError:
            found = False
        if not found and not hasattr(importlib.import_module(module), last):
            missing.append(dotted)
    assert not missing


@pytest.mark.parametrize("name", NAMES)
def test_options_in_documents_exist_with_allowed_values(name: str) -> None:
    text = read(name)
    known = flatten(default_config())
    sections = "|".join(sorted({option.partition(".")[0] for option in known if "." in option}))
    suffixes = ("py", "md", "toml", "json", "jsonl", "txt", "html", "yml", "yaml")
    for option in re.findall(rf"`(?:--config\.)?((?:{sections})\.[a-z_.]+[a-z_])(?:`|=| = )", text):
        if option.rpartition(".")[2] in suffixes:
            continue
        assert option in known or any(other.startswith(option + ".") for other in known), f"{option} in {name}"
    for option, value in re.findall(r"--config\.([\w.]+)=([\w./:-]+)", text):
        if option == "a.b":
            continue
        kind = type(known[option])
        if kind is bool:
            assert value.lower() in ("true", "false"), f"{option}={value} in {name}"
            continue
        set_option(default_config(), option, kind(value))
        assert option not in RULES or RULES[option].holds(kind(value)), f"{option}={value} in {name}"


def door_commands() -> list[tuple[str, str]]:
    found = []
    sources = [
        file for folder in ("configs", "spt_jax/commands") for file in sorted((REPOSITORY / folder).glob("*.py"))
    ]
    pages = [*NAMES, *(str(file.relative_to(REPOSITORY)) for file in sources)]
    for name in pages:
        text = read(name)
        blocks = [text] if name.endswith(".py") else _COMMANDS.findall(text)
        for block in blocks:
            joined = re.sub(r"\\\n\s*", " ", block)
            found += [(name, line.strip()) for line in joined.splitlines() if line.strip().startswith("spt-jax ")]
    return found


@pytest.mark.parametrize(("page", "command"), door_commands())
def test_commands_in_documents_name_doors_flags_and_configs_that_exist(page: str, command: str) -> None:
    door, *arguments = shlex.split(command, comments=True)[1:]
    if door.startswith("--"):
        return
    assert door in DOORS, page
    flag_values: Any = flags.FlagValues()
    importlib.import_module(f"spt_jax.commands.{door}").define_flags(flag_values)
    for argument in arguments:
        if not argument.startswith("--") or argument == "--help":
            continue
        flag, _, value = argument[2:].partition("=")
        if flag.startswith("config."):
            assert flag.removeprefix("config.") in flatten(default_config())
            continue
        assert flag in flag_values or (flag.startswith("no") and flag[2:] in flag_values), f"{page}: --{flag}"
        if flag == "config" and value.startswith("configs/"):
            assert (REPOSITORY / value.partition(":")[0]).is_file(), f"{page}: {value}"


def load_generator() -> Any:
    spec = importlib.util.spec_from_file_location(
        "generate_configuration", REPOSITORY / "docs" / "generate_configuration.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_configuration_page_is_the_generated_one() -> None:
    assert read("docs/configuration.md") == load_generator().page(), "run: python docs/generate_configuration.py"


def test_the_configuration_page_names_every_option_and_rule() -> None:
    text = read("docs/configuration.md")
    for option in flatten(default_config()):
        assert f"| `{option}` |" in text
    for rule in RULES.values():
        assert rule.allowed in text


def test_every_relation_of_the_configuration_page_is_enforced() -> None:
    for sentence, broken in load_generator().RELATIONS:
        config = default_config()
        for option, value in broken.items():
            set_option(config, option, value)
        with pytest.raises(UserError) as caught:
            validate(config)
        named = re.findall(r"`([\w.]+)(?: = \w+)?`", sentence)
        assert named
        assert all(option in str(caught.value) for option in named), sentence


def test_the_citation_names_this_version_and_the_paper() -> None:
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["version"] == spt_jax.__version__
    assert f"## [{spt_jax.__version__}]" in read("CHANGELOG.md")
    paper = citation["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]][::6] == ["Huang", "Tang"]
    assert paper["title"] in read("README.md").replace("{", "").replace("}", "")


def test_the_hooks_before_a_commit_run_the_tools_of_the_test_command() -> None:
    hooks = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"][0]["hooks"]
    assert {hook["language"] for hook in hooks} == {"system"}
    test_command = read("launch/test.sh")
    for tool in ("ruff format", "ruff check", "pyright", "lint-imports"):
        assert tool in test_command
        assert any(hook["entry"].startswith(tool) for hook in hooks)


def test_the_readme_keeps_its_two_commands_and_shows_the_figure() -> None:
    text = read("README.md")
    for needed in ("bash launch/quickstart.sh", "bash launch/test.sh", "docs/method.svg"):
        assert needed in text
