"""The records of a training run, one per measured epoch, in .csv and .json files."""

import csv
import json
import os
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from ncfast.collapse import CollapseReport

Record = dict[str, Any]

COLUMNS: dict[str, Any] = {
    "epoch": int,
    "terminal_phase": bool | None,
    **typing.get_type_hints(CollapseReport),
}
"""What a record holds, with the type of each."""


def zero_error_epochs(records: Sequence[Mapping[str, Any]]) -> tuple[int | None, int | None]:
    """The first epoch of zero training error, and the first from which it stays zero to the end.

    Error may return after its first zero, and may be there at the end: None for an epoch that is not. Epochs
    whose `train_accuracy` is None are passed over.
    """
    known = [record for record in records if record["train_accuracy"] is not None]
    first = next((record["epoch"] for record in known if record["train_accuracy"] == 1), None)
    lasting = None
    for record in reversed(known):
        if record["train_accuracy"] != 1:
            break
        lasting = record["epoch"]
    return first, lasting


def write_history(history: Sequence[Record], path: str | os.PathLike[str]) -> None:
    """Write records to a .csv or .json file, which `read_history` reads back exactly.

    None is an empty cell or null. A process killed meanwhile leaves the old file, if any.
    """
    path = Path(path)
    _check_suffix(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with open(unfinished, "w", encoding="utf-8", newline="") as file:
        if path.suffix == ".json":
            json.dump(list(history), file, indent=1, allow_nan=False)
        else:
            table = csv.DictWriter(file, list(COLUMNS), lineterminator="\n")
            table.writeheader()
            table.writerows(history)
    os.replace(unfinished, path)


def read_history(path: str | os.PathLike[str]) -> list[Record]:
    """Read the records of a .csv or .json file that `write_history` wrote.

    Raises:
        OSError: the file cannot be read. ValueError: it is not a history, or was cut short.

    """
    path = Path(path)
    _check_suffix(path)
    text = path.read_text(encoding="utf-8")
    records = _from_json(text, path) if path.suffix == ".json" else _from_csv(text, path)
    return [check_record(record, str(path)) for record in records]


def check_record(record: Any, source: str) -> Record:
    """A copy of the record; raise unless it holds what `COLUMNS` says."""
    if not isinstance(record, dict) or set(record) != set(COLUMNS):
        raise ValueError(f"{source} is not a history of ncfast: a record must hold {', '.join(COLUMNS)}")
    for name, kind in COLUMNS.items():
        if not isinstance(record[name], kind):
            raise ValueError(f"{source} is not a history of ncfast: {name} cannot be {record[name]!r}")
    return dict(record)


def _check_suffix(path: Path) -> None:
    if path.suffix not in (".csv", ".json"):
        raise ValueError(f"a history is a .csv or .json file, got {path.name!r}")


def _from_json(text: str, path: Path) -> list[Any]:
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON, or was cut short: {error}") from None
    if not isinstance(records, list):
        raise ValueError(f"{path} is not a history of ncfast: it holds no list")
    return records


def _from_csv(text: str, path: Path) -> list[Record]:
    rows = csv.DictReader(text.splitlines())
    if rows.fieldnames != list(COLUMNS):
        raise ValueError(f"{path} is not a history of ncfast: its columns must be {', '.join(COLUMNS)}")
    if not text.endswith("\n"):
        raise ValueError(f"{path} was cut short: its last line does not end")
    records = []
    for row in rows:
        if None in row or None in row.values():
            raise ValueError(f"{path} was cut short or damaged: see line {rows.line_num}")
        try:
            records.append({name: _value(name, cell) for name, cell in row.items()})
        except (ValueError, KeyError):
            raise ValueError(f"{path} is damaged: see line {rows.line_num}") from None
    return records


def _value(name: str, cell: str) -> Any:
    if cell == "":
        return None
    kind = next(kind for kind in typing.get_args(COLUMNS[name]) or [COLUMNS[name]] if kind is not NoneType)
    return {"True": True, "False": False}[cell] if kind is bool else kind(cell)
