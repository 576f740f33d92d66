"""Tables in the terminal."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table


def wide_console() -> Console:
    """Standard output; where it is no terminal, wide enough for a table."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def text_table(rows: Sequence[Mapping[str, str]], title: str | None = None) -> Table:
    """Rows of equal columns as a table; names, in the first column, to the left, and numbers to the right."""
    table = Table(title=title)
    for index, heading in enumerate(rows[0]):
        table.add_column(heading, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    return table
