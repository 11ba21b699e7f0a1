"""Files whose form is right and whose content lies: what a mutation of bytes seldom reaches."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from readers import all_tensors
from safetensors import SafetensorError
from safetensors.numpy import load

from spt_jax.config import default_config, flatten, from_dict
from spt_jax.config_rules import RULES
from spt_jax.errors import UserError
from spt_jax.models.files.safetensors_file import SafetensorsFolder
from spt_jax.models.files.weight_shards import FLOATING

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
BODY = np.arange(6, dtype=np.float32).tobytes()
WHOLE = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, len(BODY)]}

dtypes = st.sampled_from(["F32", "F16", "BF16", "F64", "I32", "BOOL", "F8_E4M3", "f32", ""])
sizes = st.sampled_from([0, 1, 2, 3, 6, 12, 24, -1, 2**31, 2**62, 2**63, 2**64]) | st.integers(-3, 40)
tensors = st.fixed_dictionaries(
    {
        "dtype": dtypes | JSON,
        "shape": st.lists(sizes, max_size=4) | JSON,
        "data_offsets": st.lists(sizes, min_size=2, max_size=2) | JSON,
    }
) | st.just(WHOLE)
headers = st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), tensors | JSON, max_size=3)


def safetensors(header: Any, claimed: int = 0) -> bytes:
    """A file with the header, whose length is told `claimed` bytes too long."""
    text = json.dumps(header).encode()
    return (len(text) + claimed).to_bytes(8, "little") + text + BODY


def read(content: bytes) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.safetensors").write_bytes(content)
        opened = SafetensorsFolder(Path(folder))
        all_tensors(opened)
        return {name: np.array(opened.read(name)) for name in opened.shapes}


@given(headers, st.sampled_from([0, 0, 0, 1, -1, 2**40]))
@example({"a": WHOLE}, 0)
@example({"a": WHOLE, "b": WHOLE}, 0)
@example({"a": WHOLE | {"shape": "23"}}, 0)
@example({"a": WHOLE | {"shape": [2.0, 3]}}, 0)
@example({"a": WHOLE | {"shape": [True, 6]}}, 0)
@example({"a": WHOLE | {"shape": [1, 3], "data_offsets": [12, 24]}}, 0)
@example({"a": WHOLE | {"shape": [1, 3], "data_offsets": [0, 12]}}, 0)
@example({"a": WHOLE | {"shape": [2**62, 4], "data_offsets": [0, 0]}}, 0)
@example({"a": WHOLE | {"shape": [0, 2**62, 4], "data_offsets": [0, 0]}}, 0)
def test_a_header_of_safetensors_gives_what_the_package_reads_or_a_sentence(header: Any, claimed: int) -> None:
    content = safetensors(header, claimed) if claimed >= 0 else safetensors(header)[:claimed]
    expected, refused = None, False
    try:
        expected = load(content)
    except SafetensorError:
        refused = True
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
        pass  # of types that NumPy has not
    try:
        found = read(content)
    except UserError as error:
        assert "model.safetensors" in str(error)
        floats = expected and all(tensor.dtype in (np.float16, np.float32, np.float64) for tensor in expected.values())
        assert not floats, "the package reads it"
        return
    floats = all(tensor["dtype"] in FLOATING for name, tensor in header.items() if name != "__metadata__")
    assert not (refused and floats), "the package refuses it"
    for name, tensor in (expected or {}).items():
        np.testing.assert_array_equal(found[name], tensor)


DEFAULTS = flatten(default_config())
values = JSON | st.sampled_from([0, 1, -1, 2, 0.5, "", "none", True, [], [""], 10**30])


def nested(options: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in options.items():
        section, _, leaf = name.rpartition(".")
        holder = found
        for part in filter(None, section.split(".")):
            holder = holder.setdefault(part, {})
        holder[leaf] = value
    return found


@given(st.dictionaries(st.sampled_from(sorted(DEFAULTS)), values, max_size=4))
def test_any_values_of_options_are_a_configuration_or_a_sentence_that_names_one(options: dict[str, Any]) -> None:
    try:
        config = from_dict(nested(options))
    except UserError as error:
        assert any(name in str(error) for name in options)
        return
    again = from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    assert all(RULES[name].holds(value) for name, value in flatten(config).items() if name in RULES)


@given(st.text(max_size=12) | st.sampled_from(sorted(DEFAULTS)).map(lambda name: name[:-1]), values)
def test_an_option_that_does_not_exist_is_named(name: str, value: Any) -> None:
    if name in DEFAULTS or isinstance(value, dict):
        return
    with pytest.raises(UserError, match="there is no option") as told:
        from_dict({name: value})
    assert repr(name) in str(told.value)
