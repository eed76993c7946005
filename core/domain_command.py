"""`polyadapt DOMAIN VERB ...`: finds the verb, and loads only then what the verb needs."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping
from functools import partial

from .cli import OneLineParser, command_named

_TRAINING = ("fit", "validate", "test")


def run(package: str, about: str, verbs: Mapping[str, str], argv: list[str]) -> int:
    """Run a verb of the domain in `package` and return its exit code.

    `verbs`: each with a line that tells what it does. `fit`, `validate` and `test` are core's, for
    the `DOMAIN` of the package's `configuration`, or for what its `domain_of(verb, words)` returns
    where it has several tasks; another verb is the `main` of the module named after it.
    """
    domain = package.rpartition(".")[2]
    parser = OneLineParser(
        prog=f"polyadapt {domain}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    lines = "\n".join(f"{verb:<14} {what}" for verb, what in verbs.items())
    parser.add_argument("verb", metavar="VERB", help="one of those below")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its options")
    parser.epilog = f"{lines}\n\n`polyadapt {domain} VERB --help` tells a verb's options."
    asked = parser.parse_args(argv)
    table = {verb: partial(_run, package, verb) for verb in verbs}
    return command_named(asked.verb, table, "verb")(asked.rest)


def _run(package: str, verb: str, rest: list[str]) -> int:
    if verb in _TRAINING:
        from . import fitting

        said = importlib.import_module(".configuration", package)
        domain = said.domain_of(verb, rest) if hasattr(said, "domain_of") else said.DOMAIN
        return fitting.run(domain, verb, rest)
    module = importlib.import_module(f".{verb.replace('-', '_')}", package)
    code: int = module.main(rest)
    return code
