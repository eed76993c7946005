"""`polyadapt adapters VERB ...`: what the command does with files of adapter sets."""

from __future__ import annotations

import argparse
from pathlib import Path

from .cli import Command, OneLineParser, command_named
from .errors import AdaptError


def adapters(argv: list[str]) -> int:
    """Run one verb and return its exit code."""
    parser = OneLineParser(
        prog="polyadapt adapters",
        description="Look into adapter files and use them.",
        epilog="verbs: " + "; ".join(f"{word}: {what}" for word, (_, what) in VERBS.items()),
    )
    parser.add_argument("verb", metavar="VERB", help="a verb below")
    parser.add_argument(
        "rest", nargs=argparse.REMAINDER, metavar="...", help="its file and options"
    )
    asked = parser.parse_args(argv)
    return command_named(asked.verb, {word: run for word, (run, _) in VERBS.items()}, "verb")(
        asked.rest
    )


def _inspect(argv: list[str]) -> int:
    parser = OneLineParser(
        prog="polyadapt adapters inspect",
        description="Print the method, the sites, the counts and the backbone of an adapter file.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the adapter file")
    asked = parser.parse_args(argv)
    from .store import inspect_file

    print(inspect_file(asked.file))
    return 0


def _merge(argv: list[str]) -> int:
    parser = OneLineParser(
        prog="polyadapt adapters merge",
        description="Merge a set into a backbone's weights and write them to a new file.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the adapter file")
    parser.add_argument(
        "--base",
        type=Path,
        required=True,
        metavar="BASE.safetensors",
        help="the backbone's weights",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="OUT.safetensors", help="where the result goes"
    )
    asked = parser.parse_args(argv)
    from .merge_file import merge_file

    print(merge_file(asked.file, asked.base, asked.out))
    return 0


def _combine(argv: list[str]) -> int:
    parser = OneLineParser(
        prog="polyadapt adapters combine",
        description="Add the sets of files of one backbone; print the error of a cut to a rank.",
    )
    add = parser.add_argument
    add("files", type=Path, nargs="+", metavar="FILE", help="adapter files")
    add("--weights", type=float, nargs="+", metavar="W", help="one per file; 1 each if left out")
    add("--method", default="exact", metavar="METHOD", help="exact, svd, ties or dare")
    add("--rank", type=int, metavar="R", help="of the result, for svd, ties and dare")
    add("--density", type=float, metavar="D", help="share of entries that ties and dare keep")
    add("--seed", type=int, default=0, metavar="S", help="of dare's draw")
    add("--name", default="combined", metavar="NAME", help="what the new set is called")
    add("--out", type=Path, required=True, metavar="OUT.safetensors", help="where it goes")
    asked = parser.parse_args(argv)
    from .combine_file import combine_files
    from .combine_rule import Rule

    weights = asked.weights or [1.0] * len(asked.files)
    if len(weights) != len(asked.files) or len(set(asked.files)) != len(asked.files):
        raise AdaptError(
            f"--weights: {len(weights)} weights for {len(set(asked.files))} different files"
        )
    rule = Rule(asked.method, asked.rank, asked.density, asked.seed)
    print(combine_files(dict(zip(asked.files, weights, strict=True)), asked.out, rule, asked.name))
    return 0


def _import(argv: list[str]) -> int:
    parser = OneLineParser(
        prog="polyadapt adapters import",
        description="Write the set of a PEFT folder (LoRA, DoRA, AdaLoRA) as an adapter file.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="a folder, or hub:owner/name")
    _add_backbone(parser, required=True)
    parser.add_argument("--name", default="default", metavar="NAME", help="of the set")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="OUT.safetensors", help="where it goes"
    )
    asked = parser.parse_args(argv)
    from .peft.command import import_folder

    print(import_folder(asked.folder, asked.model, asked.weights, asked.out, asked.name))
    return 0


def _export(argv: list[str]) -> int:
    parser = OneLineParser(
        prog="polyadapt adapters export",
        description="Write an adapter file as a folder that PEFT loads (LoRA, DoRA, AdaLoRA).",
        epilog="Convolutions and rows of fused projections need --model.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the adapter file")
    _add_backbone(parser, required=False)
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="a new folder, or hub:owner/name"
    )
    asked = parser.parse_args(argv)
    from .peft.command import export_file

    print(export_file(asked.file, asked.model, asked.weights, asked.out))
    return 0


def _add_backbone(parser: OneLineParser, required: bool) -> None:
    parser.add_argument(
        "--model", required=required, metavar="MODEL", help="timm:NAME or package.module:function"
    )
    parser.add_argument("--weights", type=Path, metavar="W.safetensors", help="the model's weights")


VERBS: dict[str, tuple[Command, str]] = {
    "inspect": (_inspect, "print what a file holds"),
    "combine": (_combine, "add the sets of several files: exact sums, TIES, DARE"),
    "import": (_import, "make an adapter file of a PEFT folder"),
    "export": (_export, "write a file's set as a PEFT folder"),
    "merge": (_merge, "write a backbone's weights with a set merged into them"),
}
