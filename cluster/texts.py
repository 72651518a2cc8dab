"""The texts that a model is evaluated on: files, folders of files, or one that ships inside Python.

Knows no tokenizer and no model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

BUILT_IN = "python-reference"
BUILT_IN_NOTE = (
    f"{BUILT_IN} is the language reference inside CPython (pydoc_data.topics), each paragraph on "
    "one line; mixtral-mini and the deltas of smol-moe were trained on Python documentation, so "
    "they have seen text of that kind."
)


WIKITEXT_FILES = ("wiki.test.raw", "wiki.test.tokens")
"""The test part of WikiText-2 as it is distributed: in a folder of its own."""


@dataclass(frozen=True, slots=True)
class EvalText:
    """A named text."""

    name: str
    text: str


def built_in_text() -> EvalText:
    """The language reference, topics in order of name, each paragraph on one line."""
    whole = "\n\n".join(topics[name].strip() for name in sorted(topics))
    paragraphs = re.split(r"\n\s*\n", whole)
    return EvalText(BUILT_IN, "\n\n".join(" ".join(part.split()) for part in paragraphs))


def read_texts(paths: Sequence[Path]) -> list[EvalText]:
    """The files, and the *.txt files of the folders, in order of name; built-in when none is given.

    A folder of WikiText-2 gives its test part, named after the folder.
    Raises ValueError for a path that does not exist, a folder without texts, or what is not UTF-8.
    """
    if not paths:
        return [built_in_text()]
    return [_read(file) for path in paths for file in _files(path)]


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"--text: {path} does not exist; give text files or folders of *.txt")
    found = sorted(path.glob("*.txt"))
    found = found or [path / name for name in WIKITEXT_FILES if (path / name).is_file()][:1]
    if not found:
        raise ValueError(f"--text: {path} holds no *.txt files and no {WIKITEXT_FILES[0]}")
    return found


def _read(file: Path) -> EvalText:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text: {file} is not UTF-8 text (byte {error.start})") from error
    name = file.parent.name if file.name in WIKITEXT_FILES else file.stem
    return EvalText(name, text)
