"""Plain-text tables and sizes for people who read a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fusion.errors import printable


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Lay rows out in columns as wide as their widest cell; numbers to the right."""
    head, *cells = ([printable(str(cell)) for cell in row] for row in (head, *rows))
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    right = [all(cell[:1].isdigit() for cell in column) for column in zip(*cells, strict=True)] or [False] * len(head)

    def line(row: Sequence[str]) -> str:
        return "  ".join(cell.rjust(width) if flush else cell.ljust(width)
                         for cell, width, flush in zip(row, widths, right, strict=True)).rstrip()
    return "\n".join([line(head), "  ".join("─" * width for width in widths), *map(line, cells)])


def bytes_text(nbytes: float) -> str:
    """A size as people say it: 1.2 GB, 34 MB, 5 kB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}" if nbytes < 10 * size else f"{nbytes / size:.0f} {unit}"
    return f"{nbytes:.0f} bytes"
