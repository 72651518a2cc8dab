"""The built-in calibration text: docstrings of Python's own library, read from its sources.

English prose and code that every installation has, and none of it in the built-in evaluation text
(the language reference, `cluster/texts.py`). Knows no tokenizer and no model.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from cluster.texts import EvalText

CALIBRATION_TEXT = "python-docstrings"
MODULES = [
    "_pydecimal",
    "argparse",
    "asyncio/tasks",
    "codecs",
    "collections/__init__",
    "configparser",
    "difflib",
    "email/message",
    "enum",
    "fractions",
    "http/cookiejar",
    "http/server",
    "inspect",
    "ipaddress",
    "json/__init__",
    "logging/__init__",
    "logging/handlers",
    "optparse",
    "os",
    "random",
    "re/__init__",
    "shutil",
    "smtplib",
    "socket",
    "socketserver",
    "ssl",
    "statistics",
    "subprocess",
    "tarfile",
    "tempfile",
    "textwrap",
    "threading",
    "timeit",
    "traceback",
    "typing",
    "urllib/parse",
    "urllib/request",
    "uuid",
    "zipfile",
]
MIN_CHARACTERS = 200  # shorter ones are labels, not text


def built_in_calibration_text() -> EvalText:
    """About 380,000 characters, each paragraph on one line; the same for one Python version.

    Raises ValueError where Python was installed without its sources.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    found = [text for name in MODULES for text in _docstrings(folder / f"{name}.py")]
    if not found:
        raise ValueError(
            f"--text: there is no built-in text here: {folder} holds no sources; give a text file"
        )
    return EvalText(CALIBRATION_TEXT, "\n\n".join(found))


def _docstrings(file: Path) -> Iterator[str]:
    if not file.is_file():  # not in this version of Python
        return
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            if len(text) >= MIN_CHARACTERS:
                yield "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))
