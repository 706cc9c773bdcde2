"""Tables for a terminal; wide enough to be searched when they go into a file."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

_FILE_WIDTH = 240


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows of text; nothing in them is markup."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    width = None if sys.stdout.isatty() else _FILE_WIDTH
    Console(width=width).print(table)
