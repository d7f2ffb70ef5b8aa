"""Tables and times as reports write them."""


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, its columns as wide as what stands in them."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths)) + " |" for cells in lines
    )


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    if seconds >= 7200:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 120:
        return f"{seconds / 60:.0f} min"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
