"""Tables, questions and complaints in the terminal."""

import sys
from collections.abc import Callable, Mapping, Sequence

import typer
from rich.console import Console
from rich.table import Table

from tasks.settings import DISK_FULL, home_directory, redact

EXTRAS = {"math_verify": "eval", "mamba_ssm": "cuda", "causal_conv1d": "cuda", "ray": "ray"}  # all others: pipeline


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


def confirmed(yes: bool) -> Callable[[str], bool]:
    """Asks in the terminal; where nobody can answer, a ValueError unless `yes`."""

    def confirm(question: str) -> bool:
        if not yes and not sys.stdin.isatty():
            raise ValueError(f"{question} Nobody is there to say so: add --yes")
        return yes or typer.confirm(question)

    return confirm


def complain(message: str) -> None:
    """One line on standard error, without secrets."""
    typer.echo(f"elastic: {redact(' '.join(message.split()))}", err=True)


def missing(error: ModuleNotFoundError) -> str:
    """Which extra to install for a package that a command needs; raises the error itself where it is a defect."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "elastic_core", "tasks", "flows"):
        raise error
    extra = EXTRAS.get(package, "pipeline")
    return f"this needs {package}, which is not installed: pip install 'elastic-family[{extra}]'"


def explained(error: Exception) -> str:
    """What an error says, and what to do about it where it comes from the file system."""
    if isinstance(error, OSError) and error.filename is None and error.errno in DISK_FULL:
        return f"{error.strerror}; make room where this command writes (its state is in {home_directory()})"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; check the path, its permissions and the room on its disk"
    return str(error) or type(error).__name__
