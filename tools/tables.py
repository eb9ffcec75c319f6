"""Tables as CSV."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.checkpoint import write_atomically


def csv_text(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Return rows as text with a line of names; what a row lacks is left empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write rows to a file, which is complete or as it was.

    Raises:
        BadInput: if it cannot be written.
    """
    text = csv_text(rows, columns)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline=""))
