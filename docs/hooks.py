"""What the pages take from elsewhere, so that they cannot drift: MkDocs calls the `on_` functions.

A line `{{ word }}` of a page stands for what `FILLINGS[word]` returns. A page that shows a recipe
(`::: polyadapt.core.adapters...`) ends with the laws that the law table holds it to.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from polyadapt import core
from polyadapt.core import Recipe
from polyadapt.core.adapters import recipes
from polyadapt.geometry3d.cli import VERBS as GEOMETRY3D_VERBS
from polyadapt.speech.cli import VERBS as SPEECH_VERBS
from polyadapt.tests.law_models import LAYERS
from polyadapt.tests.law_table import CELLS, ROWS, Row
from polyadapt.timeseries.cli import VERBS as TIMESERIES_VERBS
from polyadapt.vision.cli import VERBS as VISION_VERBS
from polyadapt.vlm.cli import VERBS as VLM_VERBS

ROOT = Path(__file__).resolve().parent.parent
METHODS = ROOT / "docs" / "methods"
RESULTS = ROOT / "benchmarks" / "results"
SHOWN = re.compile(r"^::: (polyadapt\.core\.adapters\.(\w+)\.(\w+))$", re.MULTILINE)


def on_startup(**_: Any) -> None:
    """Make `build/shown/polyadapt`, the package alone and under its own name.

    mkdocstrings reads all sources below a package before it shows one; the checkout may be called
    anything, and holds tests and environments, too.
    """
    shown = ROOT / "build" / "shown" / "polyadapt"
    shown.mkdir(parents=True, exist_ok=True)
    (shown / "__init__.py").write_bytes((ROOT / "__init__.py").read_bytes())
    for name in ("core", "geometry3d", "speech", "timeseries", "vision", "vlm"):
        if not (shown / name).is_symlink():
            (shown / name).symlink_to(f"../../../{name}", target_is_directory=True)


def on_config(config: MkDocsConfig) -> None:
    """List every method's page."""
    assert config.nav is not None, "mkdocs.yml has one"
    (listed,) = (section["Methods"] for section in config.nav if "Methods" in section)
    listed += [f"methods/{page.name}" for page in method_pages()]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pictures that benchmark scripts wrote beside their tables."""
    for picture in sorted(RESULTS.glob("*.png")):
        name = f"benchmarks/{picture.name}"
        files.append(File.generated(config, name, abs_src_path=str(picture)))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in what a page takes from elsewhere."""
    filled = re.sub(r"^\{\{ (\w+) \}\}$", lambda m: FILLINGS[m[1]](), markdown, flags=re.MULTILINE)
    methods = [name for _, _, name in SHOWN.findall(markdown)]
    shown = SHOWN.sub(r"\g<0>\n    options: {members: false}", filled)  # its settings, no code
    return "\n\n".join([shown, *map(laws_of, methods)])


def method_pages() -> list[Path]:
    """The pages of the methods, in alphabetical order."""
    return sorted(page for page in METHODS.glob("*.md") if page.name != "index.md")


def laws_of(method: str) -> str:
    """The rows of the law table that are of this method, as a section of its page."""
    rows = {name: row for name, row in ROWS.items() if type(row.recipe).__name__ == method}
    cells = {name: sum(cell.method == name for cell in CELLS) for name in rows}
    head = ("row", "settings", "at the start", "acts on", "merges", "cells")
    table = [
        (name, f"`{_settings(row.recipe)}`", _start(row), _acts_on(row), _merges(row), cells[name])
        for name, row in rows.items()
    ]
    return "\n\n".join(
        [
            "## Laws",
            "Every cell, a row at one kind of layer, is held to the [laws](../laws.md) by"
            " `tests/test_laws.py` and `tests/test_compile.py`. This section is made from the"
            " rows of `tests/law_table.py`.",
            _table(head, table),
            *_places(rows),
        ]
    )


def _places(rows: dict[str, Row]) -> Iterator[str]:
    """Where the rows are tried, one paragraph for rows that share their layer kinds."""
    shared: dict[tuple[str, ...], list[str]] = {}
    for name, row in rows.items():
        shared.setdefault(tuple(row.layers), []).append(name)
    for layers, names in shared.items():
        yield f"Layer kinds of {' and '.join(f'*{name}*' for name in names)}: {'; '.join(layers)}."


def _settings(recipe: Recipe) -> str:
    """The recipe with the settings that are not its defaults."""
    plain = type(recipe)()
    changed = [
        f"{field.name}={getattr(recipe, field.name)!r}"
        for field in dataclasses.fields(recipe)
        if getattr(recipe, field.name) != getattr(plain, field.name)
    ]
    return f"{type(recipe).__name__}({', '.join(changed)})"


def _start(row: Row) -> str:
    return "the frozen backbone, bit for bit" if row.recipe.identity else "not the frozen backbone"


def _acts_on(row: Row) -> str:
    forms = {"weights": row.weight, "outputs": row.output}
    return " and ".join(form for form, there in forms.items() if there) or "nothing"


def _merges(row: Row) -> str:
    return "yes" if row.weight else "no"


def law_table() -> str:
    """How many cells each row has at each kind of layer; two mean both ways of acting."""
    counts = {name: [_cells_at(name, layer) for layer in LAYERS] for name in ROWS}
    body = [(layer, *(counts[name][at] or "" for name in ROWS)) for at, layer in enumerate(LAYERS)]
    sums = [("**all**", *(f"**{sum(numbers)}**" for numbers in counts.values()))]
    says = f"{len(ROWS)} rows, {len(LAYERS)} kinds of layers, {len(CELLS)} cells."
    return f"{says}\n\n{_table(('layer kind', *ROWS), [*body, *sums])}"


def _cells_at(method: str, layer: str) -> int:
    return sum(cell.method == method and cell.layer == layer for cell in CELLS)


def benchmark_results() -> str:
    """Every table in benchmarks/results, as its script wrote it, one heading level deeper."""
    found = sorted(RESULTS.glob("*.md"))
    tables = [re.sub(r"^#", "##", f.read_text().strip(), flags=re.MULTILINE) for f in found]
    return "\n\n".join(tables) or "There is no result file in this checkout."


def method_table() -> str:
    """README's table of methods, each linked to its page."""
    pages = {name: file.name for file in method_pages() for name in _shown_in(file)}
    text = section("README.md", "Methods")
    return re.sub(
        r"^\| `(\w+)`", lambda m: f"| [`{m[1]}`]({pages[m[1]]})", text, flags=re.MULTILINE
    )


def _shown_in(page: Path) -> Iterable[str]:
    return [name for _, _, name in SHOWN.findall(page.read_text())]


def public_names() -> str:
    """Every public name of the core that is no method, in alphabetical order."""
    named = {name: getattr(core, name) for name in dir(core) if name not in recipes()}
    return "\n\n".join(f"::: {thing.__module__}.{name}" for name, thing in named.items())


def verb_table(verbs: Mapping[str, str]) -> str:
    """What each verb of a domain does."""
    return _table(("verb", "what it does"), [(f"`{verb}`", says) for verb, says in verbs.items()])


def configurations(domain: str) -> str:
    """Every configuration of the domain and what its comment says first."""
    files = sorted((ROOT / "configs" / domain).glob("*.yaml"))
    rows = [(f"`{file.name}`", _first_sentence(file)) for file in files]
    return _table(("file", "what it is"), rows)


def _first_sentence(file: Path) -> str:
    """The comment that a configuration begins with, up to where its first sentence ends."""
    lines = takewhile(lambda line: line.startswith("#"), file.read_text().splitlines())
    comment = " ".join(line.lstrip("# ") for line in lines)
    return re.split(r"(?<=[a-z)\d])[.:;] ", comment)[0].rstrip(".:;")


def section(file: str, heading: str) -> str:
    """What stands below a second-level heading of a file at the root."""
    text = (ROOT / file).read_text()
    found = re.search(
        rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE
    )
    if found is None:
        raise LookupError(f"{file} has no section {heading!r}")
    return found[1].strip()


def _table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(map(str, head))]
    lines += [["---"] * len(lines[0]), *(list(map(str, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


FILLINGS: dict[str, Callable[[], str]] = {
    "benchmark_results": benchmark_results,
    "geometry3d_verbs": partial(verb_table, GEOMETRY3D_VERBS),
    "law_table": law_table,
    "laws": lambda: section("CONTRIBUTING.md", "The laws"),
    "medical_configurations": partial(configurations, "vision/medical"),
    "method_table": method_table,
    "public_names": public_names,
    "speech_configurations": partial(configurations, "speech"),
    "speech_verbs": partial(verb_table, SPEECH_VERBS),
    "timeseries_configurations": partial(configurations, "timeseries"),
    "timeseries_verbs": partial(verb_table, TIMESERIES_VERBS),
    "vision_configurations": partial(configurations, "vision"),
    "vision_verbs": partial(verb_table, VISION_VERBS),
    "vlm_configurations": partial(configurations, "vlm"),
    "vlm_verbs": partial(verb_table, VLM_VERBS),
}
