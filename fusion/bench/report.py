"""How every command reports: a table on the screen and `{"meta": {...}, "rows": [...]}` as JSON."""

import errno
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from fusion import __version__
from fusion.planner.processor import Processor
from fusion.plots.style import check_suffix

SOURCE = Path(__file__).parents[2]
WIDE = 10_000
"""Console width in characters: no table is squeezed or cut, whatever the terminal or pipe."""


@dataclass(frozen=True)
class Column:
    """A column of a table. `format` is a `str.format` template of one cell, such as "{:.1f}"."""

    title: str
    format: str = "{}"

    def cell(self, value: object) -> str:
        """The text of a cell; "-" for None."""
        return "-" if value is None else self.format.format(value)


def print_wrong(rows: Iterable[dict], error: str) -> bool:
    """Print which networks failed, or have an `error` of more than `ERROR_FACTOR` times eager's; whether any did."""
    from fusion.reference import ERROR_FACTOR

    wrong = False
    for row in rows:
        name, eager = f"{row['model']} at {row['size']}, batch {row['batch']}", row["eager_error"]
        if row["failed"]:
            wrong = True
            print(f"FAILED: {name}: {row['failed']}")
        if row[error] is not None and not (eager is not None and row[error] <= ERROR_FACTOR * eager):
            wrong = True
            limit = f"{ERROR_FACTOR} x eager PyTorch's {'-' if eager is None else f'{eager:.1e}'}"
            print(f"WRONG: {name} has error {row[error]:.1e}, more than {limit}")
    return wrong


def collect_meta(protocol: str, processor: Processor | None = None, **extra: object) -> dict[str, object]:
    """What a reader needs to judge and repeat a result.

    `protocol` says in words how the rows came about, `processor` carries the ceilings that limits and percentages refer
    to (`peak_tflops` in TFLOP/s, `bandwidth_tbs` in TB/s, `ceilings_source`), `extra` is added as it is. The device is
    "cpu" for a command that does not import torch: it can have run nothing on a GPU. What is unknown is None.
    """
    device = _gpu_name()
    return {
        "device": device or "cpu",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if device else None,
        "torch": _version("torch"),
        "triton": _version("triton"),
        "fusion": __version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "protocol": protocol,
        "processor": processor.title if processor else None,
        "peak_tflops": processor.peak_ops / 1e12 if processor else None,
        "bandwidth_tbs": processor.bandwidth / 1e12 if processor else None,
        "ceilings_source": processor.source if processor else None,
        **extra,
    }


def check_writable(path: str | os.PathLike[str]) -> None:
    """Make sure that a file can be written at `path`, and create its folder; for use before long work.

    Raises OSError, saying why not.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a directory; name a file in it")
        if _in_place(path):
            path.open("a").close()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = _part(path)
            part.touch()
            part.unlink()
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from error


def check_outputs(json_path: str | os.PathLike[str] | None, plot: str | os.PathLike[str] | None) -> None:
    """Make sure that a report and a picture can be written where they are asked for, before long work.

    Raises OSError as `check_writable` does, and ValueError for another suffix of a picture than .png, .svg or .pdf.
    """
    if plot:
        check_suffix(plot)
    for path in filter(None, (json_path, plot)):
        check_writable(path)


def write_json(path: str | os.PathLike[str], meta: Mapping[str, object], rows: Iterable[Mapping[str, object]]) -> None:
    """Write a report, all of it or nothing; numbers that are not finite become null.

    Raises OSError as `check_writable` does.
    """
    path = Path(path)
    report = _finite({"meta": meta, "rows": list(rows)})
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    check_writable(path)
    if _in_place(path):
        path.write_text(text, encoding="utf-8")
        return
    part = _part(path)
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path.resolve())
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror}") from error


def print_table(columns: Sequence[Column | str], rows: Iterable[Sequence[object]], title: str) -> None:
    """Print rows of cells under their columns, those with numbers aligned to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    columns = [Column(column) if isinstance(column, str) else column for column in columns]
    rows = list(rows)
    table = Table(box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        numeric = all(isinstance(row[index], int | float | None) for row in rows)
        table.add_column(column.title, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(column.cell(value) for column, value in zip(columns, row, strict=True)))
    console = Console(width=WIDE, markup=False, emoji=False, highlight=False)
    console.print(title)  # not the table's own title, which would be wrapped to the width of a narrow table
    console.print(table)


def _gpu_name() -> str | None:
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    # The variable is for sources that travelled without their history. An installed copy has no `.git` beside it, and
    # a repository further up is somebody else's.
    described = None
    if (SOURCE / ".git").exists():
        described = _output("git", "-C", str(SOURCE), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return described or os.environ.get("FUSION_COMMIT")


def _output(*command: str) -> str | None:
    """First line that a command prints; None if there is no such command, it fails or prints nothing."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(result.stdout.splitlines()), None)


def _in_place(path: Path) -> bool:
    # Replacing /dev/null or a pipe by a file would do damage.
    return path.exists() and not path.is_file()


def _part(path: Path) -> Path:
    path = path.resolve()
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
