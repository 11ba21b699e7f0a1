"""The config file of a run of the authors' program: where it lies, and its values with what becomes of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from spt_jax.errors import UserError, nearest
from spt_jax.interop.official import BEST, CHECKPOINTS

SECTIONS = ("model", "training", "dataset")
DEFAULTS: dict[str, Any] = {
    "dataset.train": "data_file/ConvAI2/train_self_original_no_cands.txt",
    "dataset.valid": "data_file/ConvAI2/valid_self_original_no_cands.txt",
    "dataset.max_context_turns": -1,
    "dataset.max_token_length": 512,
    "model.score_activation": "softplus",
    "training.mode": "normal",
    "training.only_longest": False,
    "training.task_type": "generate_response",
    "training.ensemble": False,
    "training.tau_gold": 1.0,
    "training.tau_sim": 1.0,
}
"""What their program takes where a config file is silent (its ``config/default.yml``)."""

SUFFIXES = (".yml", ".yaml")
_MOST_BRACKETS = 200  # their files have a few; the time of the scanner grows with the square of those that are open


def find_config_file(place: Path) -> Path:
    """The only YAML file in the run's folder, or in the folder of `place` below it.

    Args:
        place: The run's folder, its ``ds_ckpt``, the ``best`` in there, or a file in that.

    Raises:
        UserError: There is none, or there are several.
    """
    folders = [place if place.is_dir() else place.parent]
    for inner in (BEST, CHECKPOINTS):
        if folders[-1].absolute().name == inner:
            folders.append(folders[-1].absolute().parent)
    for folder in folders:
        found = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())
        if len(found) > 1:
            raise UserError(f"{folder} holds several YAML files; name the run's own with --config_file={found[0]}")
        if found:
            return found[0]
    raise UserError(
        f"there is no YAML file in {folders[-1]}; name the config file of that training with --config_file=PATH (the "
        "copy that it leaves in checkpoint_best.pth is a pickled object, which is never read)"
    )


def read_config_file(path: Path) -> dict[str, Any]:
    """The values by dotted name, such as ``model.peft_config.num_virtual_tokens``: the file's, then `DEFAULTS`.

    Raises:
        UserError: It cannot be read, is no YAML of plain values, or lacks a section.
    """
    try:
        content = path.read_bytes()
        brackets = content.count(b"[") + content.count(b"{")
        if brackets > _MOST_BRACKETS:
            raise ValueError(f"{brackets} opening brackets; at most {_MOST_BRACKETS} are read")
        fields = yaml.safe_load(content)
    except OSError as error:
        raise UserError(f"the config file {path} cannot be read: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: not YAML of plain values ({error.problem})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not YAML of plain values ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path} is not a config file of the authors' program: expected the sections {_listed()}")
    for section in SECTIONS:
        wholly_default = section == "dataset" and section not in fields
        if not wholly_default and not isinstance(fields.get(section), dict):
            hint = nearest(section, [str(name) for name in fields])
            raise UserError(
                f"{path} is not a config file of the authors' program: it lacks the section {section!r}; expected "
                f"{_listed()}.{hint}"
            )
    return DEFAULTS | flat_values(fields)


def _listed() -> str:
    return ", ".join(SECTIONS)


def flat_values(fields: Mapping[Any, Any], prefix: str = "", depth: int = 0) -> dict[str, Any]:
    """``{"a": {"b": 1}}`` to ``{"a.b": 1}``; what lies deeper than eight levels stays as it is."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict) and value and depth < 8:
            flat |= flat_values(value, f"{prefix}{name}.", depth + 1)
        else:
            flat[f"{prefix}{name}"] = value
    return flat


class OfficialFields:
    """The values of a config file, each taken as the authors' program takes it; notes say where that surprises.

    Attributes:
        where: The file, for messages.
        notes: One line for each value that is not used, or not as written.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.where = where
        self.notes: list[str] = []
        self._values = values
        self._read: set[str] = set()

    def get(self, name: str) -> Any:
        """The value as it stands; None where it is missing."""
        self._read.add(name)
        return self._values.get(name)

    def note(self, sentence: str) -> None:
        """Adds a line for the user."""
        self.notes.append(sentence)

    def refuse(self, name: str, allowed: str) -> UserError:
        """The error for a value that cannot be carried over."""
        if name not in self._values:
            hint = nearest(name, [known for known in self._values if known not in self._read])
            return UserError(f"{self.where}: {name} is missing; allowed: {allowed}.{hint}")
        return UserError(f"{self.where}: {name} is {self._values[name]!r}; allowed: {allowed}")

    def one_of(self, name: str, allowed: Sequence[Any]) -> Any:
        """A value that must be one of a few."""
        value = self.get(name)
        if value not in allowed or isinstance(value, bool):
            raise self.refuse(name, ", ".join(str(choice) for choice in allowed))
        return value

    def whole(self, name: str, lowest: int) -> int:
        """A whole number that must be there."""
        value = self.get(name)
        if type(value) is not int or value < lowest:
            raise self.refuse(name, f"a whole number, {lowest} or more")
        return value

    def number(self, name: str, *, positive: bool = False) -> float:
        """A number that must be there; a text such as ``1e-5``, which YAML takes for no number, counts as one."""
        value = self.get(name)
        try:
            found = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            found = math.nan
        if not math.isfinite(found) or (positive and found <= 0):
            raise self.refuse(name, "a number above 0" if positive else "a number")
        return found

    def floating(self, name: str, default: float, spoken: str) -> float:
        """A number that their program uses only if it is written with a point, and otherwise passes over.

        Args:
            name: The key.
            default: What the program uses instead.
            spoken: That in words.
        """
        value = self.get(name)
        if type(value) is float:
            if not math.isfinite(value):
                raise self.refuse(name, "a number")
            return value
        if value is not None:
            self.note(
                f"{name} is {value!r}, which their program passes over (no number with a point): it used {spoken}"
            )
        return default

    def truth(self, name: str) -> bool:
        """Whether it is true; anything but true and false is what their program takes for false."""
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            self.note(f"{name} is {value!r}, which their program passes over (not true or false)")
        return value is True

    def unread(self) -> dict[str, Any]:
        """The values that nobody asked for."""
        return {name: value for name, value in self._values.items() if name not in self._read}
