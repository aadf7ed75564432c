"""What the demo looks like in a terminal; everything but the table goes to stderr."""

from typing import Any

from rich import box
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lookup_experts.benchmarks.demo.report import Report, header, remarks, rows, shorten


class Screen:
    """Tells what happens, stage by stage."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)

    def begin(self, number: int, total: int, why: str) -> None:
        """A stage begins."""
        self._console.print(Text.assemble((f"{number:>2}/{total}  ", "bold cyan"), why))

    def end(self, told: str, seconds: float | None) -> None:
        """A stage is finished; without `seconds` it had been, by an earlier run."""
        when = "finished earlier" if seconds is None else f"{seconds:.1f} s"
        self._console.print(Text(f"       {told} ({when})", style="dim"))

    def working(self, words: str) -> Any:
        """A context with a sign of life, where nobody can know how far it is."""
        return self._console.status(words)


def show_sample(agreement: dict[str, Any]) -> None:
    """The prompt, and what the experts and the table say next, side by side."""
    console = Console(stderr=True, highlight=False)
    width = max(30, (console.width - 3) // 2)
    console.print(Panel(Text(shorten(agreement["prompt"])), title="held-out text", box=box.SIMPLE))
    console.print(
        Columns(
            [
                Panel(Text(shorten(agreement[f"{name}_text"])), title=title, width=width)
                for name, title in (("experts", "trained experts"), ("table", "table on disk"))
            ]
        )
    )


def show_report(report: Report) -> None:
    """The table, on stdout, and what it means."""
    first, *others = header()
    table = Table(first, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.columns[0].no_wrap = True
    for name in others:
        table.add_column(name, justify="right")
    for row in rows(report):
        table.add_row(*(Text(cell) for cell in row))
    console = Console(highlight=False)
    console.print(table)
    for remark in remarks(report):
        console.print(Text(f"• {remark}"))
