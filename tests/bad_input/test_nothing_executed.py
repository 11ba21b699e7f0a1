"""No line of the package unpickles, evaluates text, or runs code that comes with a model."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import spt_jax

PACKAGE = Path(spt_jax.__file__).parent
MODULES = frozenset({"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"})
CALLS = frozenset({"eval", "exec", "compile", "__import__"})
UNSAFE_YAML = frozenset({"load", "load_all", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all"})


def dangers(source: str) -> list[str]:
    """What in a module's source would run code of a file, as ``line: what``."""
    return [f"{node.lineno}: {what}" for node in ast.walk(ast.parse(source)) for what in _dangers(node)]  # type: ignore[attr-defined]


def _dangers(node: ast.AST) -> list[str]:
    match node:
        case ast.Import(names=names):
            return [f"import {name.name}" for name in names if name.name.split(".")[0] in MODULES]
        case ast.ImportFrom(module=str(module)) if module.split(".")[0] in MODULES:
            return [f"from {module}"]
        case ast.Call(func=ast.Name(id=name)) if name in CALLS:
            return [name]
        case ast.Call(func=ast.Attribute(value=ast.Name(id="yaml"), attr=name)) if name in UNSAFE_YAML:
            return [f"yaml.{name}"]
        case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="load"), keywords=keywords):
            return [] if _constant(keywords, "weights_only") is True else ["torch.load"]
        case ast.keyword(arg="allow_pickle" | "trust_remote_code" as name, value=value):
            off = isinstance(value, ast.Constant) and value.value is False
            return [] if off else [f"{name} is not False"]
        case ast.Call(func=ast.Attribute(value=ast.Name(id="np" | "numpy"), attr="load"), keywords=keywords):
            return [] if _constant(keywords, "allow_pickle") is False else ["np.load"]
        case ast.Call(func=ast.Attribute(attr="from_pretrained"), keywords=keywords):
            # Where the answer is left open, transformers asks at the terminal whether to run a repository's code.
            return [] if _constant(keywords, "trust_remote_code") is False else ["from_pretrained"]
    return []


def _constant(keywords: list[ast.keyword], name: str) -> object:
    values = [keyword.value for keyword in keywords if keyword.arg == name]
    return values[0].value if values and isinstance(values[0], ast.Constant) else None


def test_the_package_runs_no_code_of_files() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 50
    found = [f"{file.relative_to(PACKAGE)}:{danger}" for file in files for danger in dangers(file.read_text())]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from marshal import loads",
        "eval(text)",
        "exec(text)",
        "yaml.load(text, Loader)",
        "yaml.full_load(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "AutoTokenizer.from_pretrained(path)",
        "AutoTokenizer.from_pretrained(path, trust_remote_code=True)",
        "AutoTokenizer.from_pretrained(path, trust_remote_code=trusted)",
    ],
)
def test_each_danger_is_found(source: str) -> None:
    assert dangers(source)


@pytest.mark.parametrize(
    "source", ["import pickletools", "torch.load(path, weights_only=True)", "yaml.safe_load(text)", "model.eval()"]
)
def test_what_is_safe_is_allowed(source: str) -> None:
    assert dangers(source) == []
