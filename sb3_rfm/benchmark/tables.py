"""Measurements as rows: CSV files with all of them, and Markdown tables of what they say."""

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sb3_rfm.files import write_text

Row = dict[str, Any]
"""One measurement, by column."""


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table as Markdown.

    :param header: Names of the columns
    :param rows: Their cells
    """
    return "".join("| " + " | ".join(cells) + " |\n" for cells in (header, ["---"] * len(header), *rows))


def write_csv(file: Path, rows: list[Row]) -> None:
    """Rows as CSV, numbers to four digits."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()})
    write_text(file, text.getvalue())


def save(folder: Path, name: str, rows: list[Row], summarise: Callable[[list[Row]], str]) -> list[Row]:
    """Write rows as CSV and their summary as text, and print it.

    :return: The rows
    """
    write_csv(folder / f"{name}.csv", rows)
    table = summarise(rows)
    write_text(folder / f"{name}.txt", table + "\n")
    print(table)
    return rows
