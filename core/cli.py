"""The `polyadapt` command: core's own verbs, and one word for each domain.

Nothing heavy is imported before a verb needs it, so that help answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import NoReturn

from .. import __version__
from .errors import AdaptError

Command = Callable[[list[str]], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `polyadapt WORD ...` and return its exit code; what the user did wrong is one line.

    >>> main(["adapters", "inspect", "--bogus"])  # and on stderr what is wrong with it
    2
    """
    try:
        return _run(argv)
    except AdaptError as error:
        print(f"polyadapt: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("polyadapt: interrupted", file=sys.stderr)
        return 130


def _run(argv: Sequence[str] | None) -> int:
    domains = domain_commands()
    parser = _root_parser(sorted(domains))
    asked = parser.parse_args(argv)
    if asked.word is None:
        parser.print_help(sys.stderr)
        return 2
    words = {"adapters": _adapters, "sweep": _sweep} | domains
    return command_named(asked.word, words, "domain")(asked.rest)


def domain_commands() -> dict[str, Command]:
    """The installed domains; nothing of one is loaded before it is called."""
    entries = metadata.entry_points(group="polyadapt.domains")
    return {entry.name: _domain_command(entry.name, entry) for entry in entries}


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line and not a usage text."""

    def error(self, message: str) -> NoReturn:
        raise AdaptError(f"{message}; `{self.prog} --help` lists what is allowed")


def _root_parser(domains: Sequence[str]) -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="polyadapt",
        description="Specialise frozen backbones with small adapter sets.",
        epilog=f"domains: {', '.join(domains) or 'none is installed'}. "
        "`polyadapt adapters --help` and `polyadapt DOMAIN --help` list their verbs; "
        "`polyadapt sweep --help` tells how to fit one configuration many times.",
    )
    parser.add_argument("--version", action="version", version=f"polyadapt {__version__}")
    parser.add_argument(
        "word",
        nargs="?",
        metavar="DOMAIN",
        help="a domain below, `adapters` for files of sets, or `sweep` for many fits",
    )
    # Whatever follows the word, options and --help included, is the domain's to read.
    parser.add_argument(
        "rest", nargs=argparse.REMAINDER, metavar="...", help="its verb, its options"
    )
    return parser


def _domain_command(name: str, entry: metadata.EntryPoint) -> Command:
    def command(rest: list[str]) -> int:
        try:
            domain: Command = entry.load()
            return domain(rest)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("polyadapt"):
                raise  # ours is missing: a bug, not an installation to complete
            raise AdaptError(
                f"the domain {name!r} needs the package {error.name!r}, which is not installed: "
                f"pip install 'polyadapt[{name}]'"
            ) from error

    return command


def command_named(word: str, table: Mapping[str, Command], kind: str) -> Command:
    if word in table:
        return table[word]
    near = difflib.get_close_matches(word, table, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ";"
    raise AdaptError(f"unknown {kind} {word!r}{hint} allowed: {', '.join(sorted(table))}")


def _adapters(argv: list[str]) -> int:
    from .verbs import adapters

    return adapters(argv)


def _sweep(argv: list[str]) -> int:
    from .sweep import main as sweep

    return sweep(argv)
