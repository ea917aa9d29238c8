"""Rows of text -> columns for a terminal.

A module of its own because several jobs print tables, which know nothing of each other.
"""

from collections.abc import Iterable, Sequence


def aligned(rows: Iterable[Sequence[str]]) -> str:
    """Rows under each other: what looks like a number to the right, with its title; the rest to the left."""
    rows = list(rows)
    if not rows:
        return ""
    num_columns = max(map(len, rows))
    cells = [[*row, *[""] * (num_columns - len(row))] for row in rows]
    widths = [max(len(row[place]) for row in cells) for place in range(num_columns)]
    is_number = [all(_looks_like_a_number(row[place]) for row in cells[1:]) for place in range(num_columns)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if number and len(cells) > 1 else cell.ljust(width)
            for cell, width, number in zip(row, widths, is_number, strict=True)
        ).rstrip()
        for row in cells
    )


def _looks_like_a_number(cell: str) -> bool:
    return not cell or cell.replace(",", "").replace(".", "").isdecimal()
