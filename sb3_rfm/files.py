"""Files that are replaced as a whole: nobody ever sees a part of one, and none is lost to a process that is killed."""

import json
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path to write to; what is written takes the place of ``file`` at the end, unless there is an error."""
    temporary = file.with_name(f".{uuid.uuid4().hex}.{file.name}")  # process numbers are not unique across machines
    try:
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())  # a machine that crashes may otherwise keep the new name without the content
        temporary.replace(file)
        if os.name == "posix":  # the new name, too, is only certain to survive a crash once the folder is on the disk
            folder = os.open(file.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path, name: str) -> None:
    """Remove the unfinished files that a killed process left in a folder.

    :param folder: The folder
    :param name: Regular expression of the names that they were to get
    """
    for path in folder.iterdir():
        if re.fullmatch(rf"\.[0-9a-f]{{32}}\.{name}", path.name):
            path.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Replace ``file`` by one with the content ``text``."""
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_figure(file: Path, figure: "Figure", dpi: int = 150) -> None:
    """Replace ``file``, whose suffix names the format, by the picture of a figure."""
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=dpi)


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Replace ``file`` by ``content``; what is not JSON is written as its ``repr``."""
    write_text(file, json.dumps(content, indent=2, default=repr) + "\n")


def read_json(file: Path) -> dict[str, Any]:
    """Content of a JSON file; empty if there is none.

    :raises ValueError: if it is damaged
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}.") from error
