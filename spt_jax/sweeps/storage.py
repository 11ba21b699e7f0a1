"""Where a sweep is kept: an Optuna storage in SQLite or PostgreSQL, opened so that any number of workers share it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import optuna
import sqlalchemy
from optuna.storages import RDBStorage
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from spt_jax.config import default_config, flat_json
from spt_jax.errors import UserError
from spt_jax.exit_codes import FAILED
from spt_jax.sweeps.leases import Leases
from spt_jax.sweeps.outages import Patience, is_away, reason_of
from spt_jax.sweeps.process_identity import this_process

Direction = Literal["minimize", "maximize"]

_DESCRIPTION = "sweep"
_PART_LENGTH = 2000
_BUSY_SECONDS = 30.0
_OPENINGS = 8
_OPENING_SECONDS = 60.0
_CONNECTION = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}
"""libpq's: seconds, and milliseconds. A server that fell silent is noticed in half a minute, not in hours."""


def storage_url(text: str, folder: Path) -> str:
    """The SQLAlchemy address of a storage.

    Args:
        text: ``postgresql://USER@HOST/DATABASE``, ``sqlite:///FILE``, or nothing for ``sweep.db`` in `folder`.
        folder: The sweep's.

    Raises:
        UserError: Another kind of address.
    """
    if not text:
        # In an address a question mark begins options, and a percent sign the number of a character.
        path = str((folder / "sweep.db").absolute()).replace("%", "%25").replace("?", "%3F")
        return f"sqlite:///{path}"
    scheme, separator, rest = text.partition("://")
    try:
        sqlalchemy.engine.make_url(text)
    except (SQLAlchemyError, ValueError):
        separator = ""  # such as a port that is no number
    if separator and scheme in ("postgresql", "postgres", "postgresql+psycopg"):
        return f"postgresql+psycopg://{rest}"
    if separator and scheme == "sqlite" and rest.strip("/"):
        return text
    raise UserError(
        f"--storage={hidden(text)} is not a storage; allowed: postgresql://USER@HOST/DATABASE, sqlite:///FILE"
    )


def hidden(url: str) -> str:
    """An address without its password, for the eyes of others."""
    try:
        parsed = sqlalchemy.engine.make_url(url)
        told = {name: "***" if "pass" in name else value for name, value in parsed.query.items()}
        return parsed.set(query=told).render_as_string(hide_password=True)
    except (SQLAlchemyError, ValueError):
        return url.rpartition("@")[2].partition("?")[0]


class StorageAway(UserError):
    """A storage that has not answered for long; it may answer another start."""

    exit_code = FAILED


def open_storage(url: str, away_seconds: float = 0.0) -> RDBStorage:
    """The storage at an address of `storage_url`, its tables made where they are missing.

    Several processes may open a new one at once: those that find tables half made try again.

    Args:
        url: The address.
        away_seconds: For how long to try again while the storage does not answer.

    Raises:
        UserError: It cannot be reached or made; `StorageAway` where it was waited for.
    """
    patience = Patience(partial(print, flush=True), away_seconds)
    openings = 0
    while True:
        try:
            return _opened(url)
        except ImportError as error:
            raise UserError(f"--storage={hidden(url)} needs psycopg; install spt_jax with the extra sweep") from error
        except (DBAPIError, RuntimeError) as error:
            if openings < _OPENINGS and _being_made(error):
                time.sleep(0.1 * 2**openings)
                openings += 1
            elif patience.bears(error):
                time.sleep(1.0)
            else:
                kind = StorageAway if away_seconds and is_away(error) else UserError
                raise kind(f"the storage {hidden(url)} cannot be used: {reason_of(error)}") from error


def _opened(url: str) -> RDBStorage:
    if not url.startswith("sqlite"):
        given = sqlalchemy.engine.make_url(url).query
        limits = {name: value for name, value in _CONNECTION.items() if name not in given}
        return RDBStorage(url, engine_kwargs={"pool_pre_ping": True, "connect_args": limits})
    options = {"connect_args": {"timeout": _BUSY_SECONDS}}
    _write_ahead(url, options)
    return RDBStorage(url, engine_kwargs=options)


def _write_ahead(url: str, options: Mapping[str, Any]) -> None:
    """SQLite's write-ahead log: who reads does not wait for who writes, and is not waited for."""
    engine = sqlalchemy.create_engine(url, **options)
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA journal_mode=WAL")
    engine.dispose()


def _being_made(error: Exception) -> bool:
    text = str(error).lower()
    return any(
        sign in text for sign in ("already exists", "duplicate key", "locked", "unique constraint", "no such table")
    )


def open_study(
    storage: RDBStorage, name: str, description: Mapping[str, Any], direction: Direction, num_trials: int
) -> optuna.Study:
    """The sweep's study, made or found, with at least `num_trials` trials that wait to be run.

    Any number of processes may do this at once. Trials are told by their numbers, which the storage counts up from 0.

    Args:
        storage: Where.
        name: The sweep's name in it.
        description: `spt_jax.sweeps.description.record`; a study that is there must have the same.
        direction: ``minimize`` or ``maximize``.
        num_trials: How many trials.

    Raises:
        UserError: A sweep of this name, but with another description, is there; the differences are named.
    """
    study = optuna.create_study(storage=storage, study_name=name, direction=direction, load_if_exists=True)
    # Of several that open a new sweep at once, perhaps two of one name, one writes what the others then find.
    with Leases(storage.engine, name, this_process(), _OPENING_SECONDS).alone():
        _agree(study, name, description)
        for _ in range(num_trials - len(study.get_trials(deepcopy=False))):
            study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.WAITING))
    return study


def _agree(study: optuna.Study, name: str, description: Mapping[str, Any]) -> None:
    kept = read_description(study)
    if kept is None:
        _write_description(study, description)
        return
    differing = _differences(_whole(kept), _whole(json.loads(json.dumps(description))))
    if differing:
        raise UserError(
            f"the storage holds another sweep of the name {name!r}: {'; '.join(differing)}; choose another --name, or "
            "another --out"
        )


def _whole(description: dict[str, Any]) -> dict[str, Any]:
    """With the defaults of options that are younger than the sweep: they do what was done without them."""
    return description | {"base": flat_json(default_config()) | description.get("base", {})}


def _write_description(study: optuna.Study, description: Mapping[str, Any]) -> None:
    """In parts, as an attribute of a study has a largest length in some databases; the count comes last."""
    text = json.dumps(description)
    parts = [text[start : start + _PART_LENGTH] for start in range(0, len(text), _PART_LENGTH)]
    for index, part in enumerate(parts):
        study.set_user_attr(f"{_DESCRIPTION}_{index}", part)
    study.set_user_attr(_DESCRIPTION, len(parts))


def read_description(study: optuna.Study) -> dict[str, Any] | None:
    """The description that a sweep was begun with; None while it has none."""
    kept = study.user_attrs
    if _DESCRIPTION not in kept:
        return None
    return json.loads("".join(kept[f"{_DESCRIPTION}_{index}"] for index in range(kept[_DESCRIPTION])))


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(set(old) | set(new))
        return [
            difference
            for key in names
            for difference in _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if old == new else [f"{name} ({old!r} there, {new!r} here)"]
