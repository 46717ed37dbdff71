"""Tables as text: never squeezed or cut, whatever the terminal or pipe."""

from io import StringIO

WIDE = 10_000
"""Console width in characters."""


def wide_text(*parts: object) -> str:
    """What `rich` prints for tables and lines of text, without blanks at the ends of lines."""
    from rich.console import Console

    text = StringIO()
    console = Console(file=text, width=WIDE, markup=False, emoji=False, highlight=False)
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip("\n")
