"""What the commands show: errors without tracebacks, progress with an ETA, tables."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from typer.core import TyperGroup

BAD_INPUT, FAILED = 2, 1
DEBUG = "ALPENGLOW_DEBUG"


class Commands(TyperGroup):
    """Commands whose errors end in one message on stderr: exit code 2 for bad input, 1 for a failed run."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was called."""
        if os.environ.get(DEBUG):
            return super().invoke(ctx)
        try:
            return super().invoke(ctx)
        except (BrokenPipeError, typer.Exit, typer.Abort):
            raise  # typer's own: a closed pipe, the end of a command, Ctrl-C
        except (ValueError, OSError) as error:
            message, code = _text(error), BAD_INPUT
        except (RuntimeError, MemoryError) as error:
            message, code = _text(error), FAILED
        typer.secho("error: ", fg=typer.colors.RED, bold=True, nl=False, err=True)
        typer.echo(message, err=True)
        raise typer.Exit(code)


def _text(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError):
        return f"out of memory {error}; take fewer samples, or a smaller prior"
    return str(error) or type(error).__name__


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[float], None]]:
    """A function that takes the share of work done, in [0, 1]; on a terminal it moves a bar on stderr."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    # Transient: what stays on the screen are the results.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=1.0)
        yield lambda share: progress.update(task, completed=share)


def print_facts(facts: Mapping[str, Any], title: str | None = None) -> None:
    """Names and values in two columns on stdout; None values are left out."""
    if title:
        typer.secho(title, bold=True)
    width = max((len(name) for name in facts), default=0)
    for name, value in facts.items():
        if value is not None:
            typer.echo(f"  {name:<{width}}  {number(value)}")


def print_table(columns: list[str], rows: list[list[Any]], *, total: list[Any] | None = None) -> None:
    """A table of numbers and text on stdout, with a last row apart."""
    table = Table(box=None, pad_edge=False, header_style="bold", show_footer=total is not None)
    for i, column in enumerate(columns):
        footer = "" if total is None else number(total[i])
        table.add_column(column, justify="right", footer=footer, footer_style="bold", no_wrap=True)
    for row in rows:
        table.add_row(*map(number, row))
    Console(markup=False, highlight=False).print(table)


def number(value: Any) -> str:
    """A value for people: floats with four significant digits, name=value for dictionaries."""
    if isinstance(value, dict):
        return ", ".join(f"{key}={number(v)}" for key, v in value.items() if v is not None)
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.6g}"
