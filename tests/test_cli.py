"""The `polyadapt` command: what it finds, what it refuses, and how."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from types import ModuleType

import pytest

from polyadapt import __version__
from polyadapt.core import cli
from polyadapt.core.errors import AdaptError

Verb = Callable[[list[str]], int]


@pytest.fixture
def domain(monkeypatch: pytest.MonkeyPatch) -> Callable[[Verb], None]:
    """Puts one function in the place of all installed domains, under the name `vision`."""

    def install(verb: Verb) -> None:
        module = ModuleType("pretended_domain")
        module.main = verb  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        entry = metadata.EntryPoint("vision", "pretended_domain:main", "polyadapt.domains")
        monkeypatch.setattr(metadata, "entry_points", lambda group: metadata.EntryPoints([entry]))

    return install


def _refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on stderr of a command that is refused with exit code 2."""
    assert cli.main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    return line


def _fresh(*argv: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from polyadapt.core.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)


def test_help_names_the_installed_domains_and_the_verbs_of_the_core() -> None:
    ran = _fresh("--help")
    assert ran.returncode == 0
    assert "vision" in ran.stdout
    assert "adapters" in ran.stdout
    assert ran.stderr == ""


@pytest.mark.parametrize(
    "argv", [["--help"], ["adapters", "--help"], ["adapters", "merge", "-h"], ["sweep", "-h"]]
)
def test_help_loads_nothing_that_makes_one_wait(argv: list[str]) -> None:
    code = (
        "import sys\nfrom polyadapt.core.cli import main\n"
        f"try: main({argv})\n"
        "except SystemExit: print([n for n in ('torch', 'lightning', 'numpy') if n in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"polyadapt {__version__}\n"
    assert metadata.version("polyadapt") == __version__


def test_without_a_word_it_shows_the_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert capsys.readouterr().err.startswith("usage: polyadapt ")


def test_a_domain_gets_every_word_after_its_name(domain: Callable[[Verb], None]) -> None:
    heard = []

    def verb(argv: list[str]) -> int:
        heard.extend(argv)
        return 7

    domain(verb)
    assert cli.main(["vision", "--help", "fit", "--config", "a.yaml", "--", "-x"]) == 7
    assert heard == ["--help", "fit", "--config", "a.yaml", "--", "-x"]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["visoin", "fit"], "unknown domain 'visoin'; did you mean vision? allowed: adapters, "),
        (["zzz"], "unknown domain 'zzz'; allowed: adapters, sweep, vision"),
        (["adapters", "inspct"], "unknown verb 'inspct'; did you mean inspect? allowed: "),
        (["--bogus"], "unrecognized arguments: --bogus; `polyadapt --help` lists "),
        (["adapters"], "the following arguments are required: VERB"),
        (["adapters", "inspect"], "the following arguments are required: FILE"),
        (["adapters", "merge", "a"], "the following arguments are required: --base, --out"),
    ],
)
def test_a_wrong_word_is_refused_in_one_line(
    argv: list[str],
    line: str,
    domain: Callable[[Verb], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    domain(lambda _: 0)
    assert _refused(capsys, *argv).startswith(f"polyadapt: {line}")


def test_what_the_user_did_wrong_is_one_line_and_no_traceback(
    domain: Callable[[Verb], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def verb(argv: list[str]) -> int:
        raise AdaptError(f"no such file: {argv[0]}")

    domain(verb)
    assert _refused(capsys, "vision", "a.yaml") == "polyadapt: no such file: a.yaml"


def test_a_bug_keeps_its_traceback(domain: Callable[[Verb], None]) -> None:
    def verb(argv: list[str]) -> int:
        raise ValueError(argv)

    domain(verb)
    with pytest.raises(ValueError, match="fit"):
        cli.main(["vision", "fit"])


def test_a_missing_package_is_named_with_the_group_that_brings_it(
    domain: Callable[[Verb], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def verb(argv: list[str]) -> int:
        raise ModuleNotFoundError("No module named 'timm'", name="timm")

    domain(verb)
    line = _refused(capsys, "vision", "fit")
    assert "'timm'" in line
    assert line.endswith("pip install 'polyadapt[vision]'")


def test_a_module_of_ours_that_is_missing_is_a_bug(domain: Callable[[Verb], None]) -> None:
    def verb(argv: list[str]) -> int:
        raise ModuleNotFoundError("No module named 'polyadapt.gone'", name="polyadapt.gone")

    domain(verb)
    with pytest.raises(ModuleNotFoundError, match=r"polyadapt\.gone"):
        cli.main(["vision", "fit"])


def test_an_interrupt_is_one_line_and_the_shell_s_exit_code(
    domain: Callable[[Verb], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def verb(argv: list[str]) -> int:
        raise KeyboardInterrupt

    domain(verb)
    assert cli.main(["vision", "fit"]) == 130
    assert capsys.readouterr().err == "polyadapt: interrupted\n"


def test_a_missing_adapter_file_is_refused_from_the_shell() -> None:
    ran = _fresh("adapters", "inspect", "gone.safetensors")
    assert ran.returncode == 2
    (line,) = ran.stderr.splitlines()
    assert line.startswith("polyadapt: ")
    assert "gone.safetensors" in line


def test_every_installed_domain_can_be_loaded() -> None:
    entries = metadata.entry_points(group="polyadapt.domains")
    names = {entry.name for entry in entries}
    assert names == {"geometry3d", "speech", "timeseries", "vision", "vlm"}
    assert all(callable(entry.load()) for entry in entries)
