"""Tables through Hugging Face `datasets`: a local file or folder, or a hub id, with named columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spt_jax.data.dialogue import Dialogue
from spt_jax.data.problems import Problems
from spt_jax.data.records import FIELDS, parse_rows
from spt_jax.errors import UserError, nearest

HUB_PREFIX = "hf:"
BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".arrow": "arrow"}


def read_table(source: str, problems: Problems, columns: Mapping[str, str] | None, split: str) -> list[Dialogue]:
    """Reads dialogues from a table.

    Args:
      source: `hf:NAME` for a hub id, a folder (`save_to_disk`'s or one of data files), or a file of `BUILDERS`.
      problems: receives row numbers, counted from 1, and reasons.
      columns: this package's name of a field (`FIELDS`) -> the table's column; a name left out stands for itself.
      split: the split's name; a single file has only the split asked for.

    Returns:
      The dialogues in row order; see `parse_rows` for how rows become dialogues.

    Raises:
      UserError: `datasets` is absent or cannot read the source, or a column does not exist.
    """
    names = dict(columns or {})
    for field in names:
        if field not in FIELDS:
            raise UserError(f"data.columns names the field {field!r}, allowed are {FIELDS}.{nearest(field, FIELDS)}")
    table = _load(source, split)
    available = list(table.column_names)
    for field, column in names.items():
        if column not in available:
            raise UserError(
                f"{source} has no column {column!r} for {field!r}; it has {available}.{nearest(column, available)}"
            )
    names = {field: field for field in FIELDS if field in available} | names
    if "persona" not in names:
        raise UserError(f"{source} has no column 'persona' among {available}; name it with data.columns.persona.")
    if "turns" not in names and ("history" not in names or not {"response", "candidates"} & set(names)):
        raise UserError(
            f"{source} needs a column 'turns', or 'history' and 'response', among {available}; "
            "name them with data.columns."
        )

    def rows() -> Iterator[dict[str, Any]]:
        # Of a row that is taken every column is decoded, pictures too.
        for row in table.select_columns(sorted(set(names.values()))):
            yield {field: row[column] for field, column in names.items()}

    return parse_rows(rows(), problems)


def _load(source: str, split: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source} is read through Hugging Face datasets: pip install datasets") from None
    bars, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        return _open(datasets, source, split)
    except UserError:
        raise
    except Exception as error:  # datasets raises dozens of kinds for what a user can mend: names, files, the network
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{source}: datasets cannot read the split {split!r}: {reason}") from error
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()


def _open(datasets: Any, source: str, split: str) -> Any:
    if source.startswith(HUB_PREFIX):
        if source == HUB_PREFIX:
            raise UserError(f"{source} names no data set; allowed: {HUB_PREFIX}NAME, of the hub.")
        return datasets.load_dataset(source.removeprefix(HUB_PREFIX), split=split)
    path = Path(source).expanduser()
    if path.is_dir():
        if not any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
            return datasets.load_dataset(str(path), split=split)
        saved = datasets.load_from_disk(str(path))
        if not isinstance(saved, datasets.DatasetDict):
            return saved
        if split not in saved:
            raise UserError(f"{source} has no split {split!r}; it has {list(saved)}.{nearest(split, saved)}")
        return saved[split]
    if path.suffix not in BUILDERS:
        raise UserError(
            f"{source}: a table's name must end in one of {', '.join(BUILDERS)}, not {path.suffix!r}."
            f"{nearest(path.suffix, BUILDERS)}"
        )
    options = {"sep": "\t"} if path.suffix == ".tsv" else {}
    return datasets.load_dataset(BUILDERS[path.suffix], data_files={split: str(path)}, split=split, **options)
