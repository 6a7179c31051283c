"""How help looks: headings, and two columns without boxes, in any terminal and pipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cyclopts import App
    from cyclopts.help import HelpEntry, HelpPanel
    from rich.console import Console, ConsoleOptions, RenderableType

_WIDEST = 30  # of the left column
_LAST = "more"  # the heading that stands last


class Formatter:
    """Cyclopts' protocol of a help formatter."""

    def __call__(
        self, console: Console, options: ConsoleOptions, panel: HelpPanel
    ) -> None:
        """Print a heading and what stands under it."""
        from rich.padding import Padding
        from rich.table import Table

        if not panel.entries:
            return
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(max_width=_WIDEST)
        grid.add_column()
        for entry in panel.entries:
            grid.add_row(_label(entry), _about(entry.description))
        console.print(f"[bold]{str(panel.title).lower()}:[/bold]", highlight=False)
        console.print(Padding(grid, (0, 0, 0, 2)), highlight=False)
        if panel.title != _LAST:
            console.print()

    def render_usage(
        self, console: Console, options: ConsoleOptions, usage: Any
    ) -> None:
        """Print the first line."""
        console.print(f"usage: {str(usage).removeprefix('Usage: ')}", highlight=False,
                      markup=False)  # fmt: skip

    def render_description(
        self, console: Console, options: ConsoleOptions, description: Any
    ) -> None:
        """Print what stands before the options, in its own lines."""
        console.print(description, soft_wrap=True, highlight=False)


def end_with_help(app: App) -> None:
    """Put `--help` and `--version` at the end of an app's help."""
    from cyclopts import Group

    more = Group(_LAST, sort_key=1_000_000)
    about = {"--help": "show this and exit", "--version": "show the version and exit"}
    for name, text in about.items():
        if name in app:
            app[name].group, app[name].help = more, text


def _label(entry: HelpEntry) -> RenderableType:
    """A word and its value's shape; that a switch has a --no-NAME is told elsewhere."""
    from rich.text import Text

    label = Text(" ".join([*entry.positive_names, *entry.positive_shorts]), "cyan")
    if entry.positional_label:
        return Text(entry.positional_label, "cyan")
    return label.append(f" {entry.metavar}", "default") if entry.metavar else label


def _about(description: Any) -> RenderableType:
    from rich.text import Text

    return Text("") if description is None else description
