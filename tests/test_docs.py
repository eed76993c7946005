"""The documentation says what is true: its examples run and print what it says they print."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from polyadapt.core.adapters import recipes
from polyadapt.core.cli import main
from polyadapt.docs import hooks
from polyadapt.docs.docstrings import as_markdown
from polyadapt.docs.hooks import (
    METHODS,
    SHOWN,
    benchmark_results,
    law_table,
    laws_of,
    method_pages,
    method_table,
    on_page_markdown,
    section,
)
from polyadapt.geometry3d.cli import VERBS as GEOMETRY3D_VERBS
from polyadapt.speech.cli import VERBS as SPEECH_VERBS
from polyadapt.tests.law_table import CELLS, ROWS
from polyadapt.timeseries.cli import VERBS as TIMESERIES_VERBS
from polyadapt.vision.cli import VERBS as VISION_VERBS
from polyadapt.vlm.cli import VERBS as VLM_VERBS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
SLOW = {
    "guide/training.md",
    "domains/medical.md",
    "domains/timeseries.md",
    "domains/vision.md",
    "domains/vlm.md",
}  # with Lightning
VERBS = {
    "geometry3d": GEOMETRY3D_VERBS,
    "speech": SPEECH_VERBS,
    "timeseries": TIMESERIES_VERBS,
    "vision": VISION_VERBS,
    "vlm": VLM_VERBS,
}
# A block of code, or what the one before it prints.
BLOCK = re.compile(r'^```(python|text title="prints"|sh)\n(.*?)^```$', re.DOTALL | re.MULTILINE)


def _blocks(page: Path, kind: str) -> list[str]:
    return [text for found, text in BLOCK.findall(page.read_text()) if found == kind]


def _name(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


EXAMPLES = [
    pytest.param(page, id=_name(page), marks=[pytest.mark.slow] * (_name(page) in SLOW))
    for page in PAGES
    if _blocks(page, "python")
]
COMMANDS = [
    shlex.split(line, comments=True)
    for page in PAGES
    for block in _blocks(page, "sh")
    for line in block.replace("\\\n", " ").splitlines()
]


@pytest.mark.parametrize("page", EXAMPLES)
def test_the_examples_of_a_page_run_and_print_what_it_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "example"}
    printed = ""
    for kind, text in BLOCK.findall(page.read_text()):
        if kind == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(text, _name(page), "exec"), names)
            printed = out.getvalue()
        elif kind != "sh":
            assert printed == text
            printed = ""
    assert not printed, "what an example prints is shown below it"


def test_every_code_block_is_of_a_kind_that_is_tested() -> None:
    kinds = {
        (_name(page), kind)
        for page in PAGES
        for kind in re.findall(r"^```(.+)$", page.read_text(), re.MULTILINE)
    }
    assert {kind for _, kind in kinds} <= {"python", 'text title="prints"', "sh", "text", "yaml"}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_of_the_docs_is_one_that_there_is(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {*words[1:]} <= {*targets}
    elif words[1] in VERBS and words[2] in (
        "fit",
        "test",
        "fit-av",
    ):  # options are a configuration's
        assert words[2] in VERBS[words[1]]
    else:
        assert words[0] == "polyadapt"
        with pytest.raises(SystemExit):
            main([*words[1 : 2 if words[1] == "sweep" else 3], "--help"])
        told = capsys.readouterr().out
        assert [word for word in words if word.startswith("--") and word not in told] == []
    files = [word for word in words if word.startswith("configs/")]
    assert all((ROOT / file).is_file() for file in files)


def test_every_method_has_a_page_and_every_page_a_method() -> None:
    there = {f"{cls.__module__}.{cls.__name__}" for cls in recipes().values()}
    shown = [
        (name, file, page.stem)
        for page in method_pages()
        for name, file, _ in SHOWN.findall(page.read_text())
    ]
    assert sorted(name for name, _, _ in shown) == sorted(there)
    assert all(file == page for _, file, page in shown), "a page is called as its method's file"


@pytest.mark.parametrize("page", method_pages(), ids=lambda page: page.stem)
def test_a_method_page_has_its_mathematics_its_numbers_and_an_example(page: Path) -> None:
    text = page.read_text()
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings == ["Mathematics", "Numbers", "Example", "Settings"]
    numbers = text.partition("## Numbers")[2].partition("## Example")[0]
    assert '```text title="prints"' in numbers, "a count that the test above compares"


def test_a_method_page_ends_with_the_rows_of_the_law_table() -> None:
    page = on_page_markdown((METHODS / "lora.md").read_text())
    rows = [name for name, row in ROWS.items() if type(row.recipe).__name__ == "LoRA"]
    assert len(rows) == 3
    for name in rows:
        cells = sum(cell.method == name for cell in CELLS)
        assert re.search(rf"^\| {name} \| `LoRA\(rank=3.*\| yes \| {cells} \|$", page, re.MULTILINE)


def test_the_laws_of_a_method_are_what_its_row_says() -> None:
    mosa = laws_of("MoSA")
    assert "| the frozen backbone, bit for bit | outputs | no | 2 |" in mosa
    assert "Layer kinds of *MoSA*: block; block on a strided state." in mosa
    assert "| not the frozen backbone | outputs | no | 2 |" in laws_of("AdapterPlus")
    assert "| the frozen backbone, bit for bit | weights | yes | 1 |" in laws_of("LayerNormTuning")


def test_the_table_of_cells_counts_every_cell_once() -> None:
    last = law_table().splitlines()[-1]
    sums = [int(number) for number in re.findall(r"\*\*(\d+)\*\*", last)]
    assert len(sums) == len(ROWS)
    assert sum(sums) == len(CELLS)


def test_the_method_table_links_every_row_to_a_page() -> None:
    links = re.findall(r"^\| \[`\w+`\]\((\w+\.md)\)", method_table(), re.MULTILINE)
    assert sorted(links) == [page.name for page in method_pages()]


def test_results_of_benchmarks_become_sections_of_their_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks, "RESULTS", tmp_path)
    assert benchmark_results() == "There is no result file in this checkout."
    (tmp_path / "switch.md").write_text("# Switch\n\n| sets | time |\n")
    (tmp_path / "attach.md").write_text("# Attach\n\n## ViT-B\n")
    assert benchmark_results() == "## Attach\n\n### ViT-B\n\n## Switch\n\n| sets | time |"


def test_a_section_that_is_not_there_is_an_error() -> None:
    assert section("CONTRIBUTING.md", "The laws").startswith("One table of tests")
    with pytest.raises(LookupError, match="has no section 'The lows'"):
        section("CONTRIBUTING.md", "The lows")


def test_examples_and_tables_of_docstrings_become_blocks_of_code() -> None:
    text = "Halves.\n\n====  ====\n`a`   1\n====  ====\n\n>>> x[1]\n[0]\n\nMore.\n"
    fenced = "```text\n====  ====\n`a`   1\n====  ====\n```\n\n```pycon\n>>> x[1]\n[0]\n```"
    assert as_markdown(text) == f"Halves.\n\n{fenced}\n\nMore.\n"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    page = (tmp_path / "methods" / "lora.html").read_text()
    assert "LoRA, rank-stabilised" in page
    assert "{{" not in (tmp_path / "laws.html").read_text()
