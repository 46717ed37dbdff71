"""Results that were saved: reports as JSON, and tables as CSV."""

import csv
import json
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from fusion.planner.processor import PROCESSORS, Processor


def is_table(path: str | os.PathLike[str]) -> bool:
    """Whether a file is read as a table, not as a report: by its name."""
    return Path(path).suffix.lower() == ".csv"


def read_report(path: str | os.PathLike[str], keys: Sequence[str], commands: str) -> tuple[dict, list[dict]]:
    """Meta data and rows of a report, each row with these keys; `commands` are those that write such reports.

    Raises ValueError for other contents, OSError if the file cannot be read.
    """
    try:
        report = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}; give a report that {commands} wrote with --json") from None
    parts = (report.get("meta"), report.get("rows")) if isinstance(report, dict) else (None, None)
    if not isinstance(parts[0], dict) or not isinstance(parts[1], list):
        raise ValueError(f"{path} has no meta data and rows; give a report that {commands} wrote with --json")
    meta, rows = parts
    lacking = [key for key in keys if not all(isinstance(row, dict) and key in row for row in rows)]
    if lacking or not rows:
        what = f"rows without {', '.join(lacking)}" if lacking else "no rows"
        raise ValueError(f"{path} has {what}; give a report that {commands} wrote with --json")
    return meta, rows


def read_table(path: str | os.PathLike[str], columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV that has these columns, and perhaps more.

    Raises ValueError for other contents, OSError if the file cannot be read.
    """
    reader = csv.DictReader(_read(path).splitlines(), skipinitialspace=True, restval="")
    lacking = [column for column in columns if column not in (reader.fieldnames or ())]
    if lacking:
        raise ValueError(f"{path} lacks the columns {', '.join(lacking)}; its first line must name {','.join(columns)}")
    rows = list(reader)
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def number(path: str | os.PathLike[str], row: dict[str, str], column: str, most: float = float("inf")) -> float:
    """A cell as a positive number of at most `most`. Raises ValueError if it is none."""
    try:
        value = float(row[column])
    except ValueError:
        value = 0.0
    if not 0 < value <= most or value == float("inf"):
        limit = "" if most == float("inf") else f" up to {most:g}"
        raise ValueError(
            f"{path}: {column} of {next(iter(row.values()))} is {row[column]!r}, no positive number{limit}"
        )
    return value


def processor_of(device: str) -> Processor | None:
    """The GPU that PyTorch calls `device`, as a report names it; None for one that the planner does not know."""
    words = device.lower().replace("-", " ").split()
    names = {*words, *(first + second for first, second in pairwise(words))}
    return next((processor for name, processor in PROCESSORS.items() if name in names), None)


def _read(path: str | os.PathLike[str]) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text") from None
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror}") from error
