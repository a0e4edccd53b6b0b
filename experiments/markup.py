"""Tables as HTML; every text is escaped."""

import re
from collections.abc import Iterable
from html import escape

from experiments.tables import Table


def table_html(caption: str, table: Table, commands: list[str], none: str = "") -> str:
    """An HTML table with a head for every column and row, and the commands that made it.

    Args:
      caption: above the table.
      table: plain text; a row with a cell in asterisks holds published figures. A column whose
        cells all begin with a number is set, and sorted, as numbers.
      commands: shown under the table.
      none: the sentence in place of a table without rows.
    """
    if not table.rows:
        return f"<p>{escape(none)}</p>"
    numeric = [_is_numeric(row[i] for row in table.rows) for i in range(len(table.head))]
    kind = ['class="number"' if number else "" for number in numeric]
    pairs = zip(table.head, kind, strict=True)
    head = "".join(f'<th scope="col" {k}>{escape(cell)}</th>' for cell, k in pairs)
    lines = []
    for row in table.rows:
        first, *others = [escape(cell.strip("*")) for cell in row]
        cells = "".join(f"<td {k}>{c}</td>" for c, k in zip(others, kind[1:], strict=True))
        mark = ' class="published"' if any(c.startswith("*") for c in row) else ""
        lines.append(f'<tr{mark}><th scope="row" {kind[0]}>{first}</th>{cells}</tr>')
    body = "\n".join(lines)
    label = escape(caption)
    return (
        f'<div class="scroll" role="region" aria-label="{label}" tabindex="0"><table>'
        f"<caption>{label}</caption><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody>"
        f"</table></div>\n{made_by(commands)}"
    ).replace(" >", ">")


def made_by(commands: list[str]) -> str:
    """The commands that made what stands above them, folded away."""
    lines = "\n".join(map(escape, commands))
    name = "command" if len(commands) == 1 else "commands"
    summary = f"<summary>Made by the {name}</summary>"
    return f"<details>{summary}<pre><code>{lines}</code></pre></details>"


def _is_numeric(cells: Iterable[str]) -> bool:
    full = [cell for cell in cells if cell]
    return bool(full) and all(re.match(r"[+-]?[\d.]", cell) for cell in full)
