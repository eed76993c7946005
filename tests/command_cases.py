"""Commands as tests run them, the configurations that they read, and the tables that they leave."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from polyadapt.core import cli

# A job in the background starts with interrupts ignored, and so do the processes that it starts.
CODE = """import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from polyadapt.core.cli import main
sys.exit(main(sys.argv[1:]))"""


class Ran(NamedTuple):
    """What a command returned and printed."""

    code: int
    out: str
    err: str

    def line(self) -> str:
        """The one line on stderr of a command that was refused."""
        assert self.code == 2
        (line,) = self.err.splitlines()
        assert line.startswith("polyadapt: ")
        return line


Run = Callable[..., Ran]


def command(capsys: pytest.CaptureFixture[str], *first: str) -> Run:
    """`polyadapt FIRST ...` as a function of the words that follow."""

    def run(*words: object) -> Ran:
        capsys.readouterr()
        code = cli.main([*first, *map(str, words)])
        return Ran(code, *capsys.readouterr())

    return run


def changed(made: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A configuration with other values by their keys, dots as `__`; None takes a key away."""
    for key, value in changes.items():
        *above, last = key.split("__")
        place = made
        for word in above:
            place = place.setdefault(word, {})
        if value is None:
            del place[last]
        else:
            place[last] = value
    return made


def write(name: str, content: dict[str, Any]) -> str:
    """Save a configuration."""
    Path(name).write_text(yaml.safe_dump(content))
    return name


def trained_in(folder: Path, verb: str, made: dict[str, Any], *saves: Callable[[], object]) -> Path:
    """A folder with what is saved there, the configuration a.yaml and its run, runs/a."""
    with contextlib.chdir(folder):
        for save in saves:
            save()
        write("a.yaml", made)
        assert cli.main([*verb.split(), "--config", "a.yaml"]) == 0
    return folder


def rows_of(path: str | Path) -> list[dict[str, str]]:
    """A table in a CSV file."""
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))
