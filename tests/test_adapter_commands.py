"""`polyadapt adapters inspect` and `merge` on good and bad files."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from polyadapt.core import cli
from polyadapt.core.merge_file import merge_file
from polyadapt.tests.layer_zoo import good_files


@pytest.fixture
def good(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Adapter, base and result: see `good_files`."""
    return good_files(tmp_path)


def test_the_merge_command_writes_what_the_function_writes(
    good: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, base, out = good
    line = merge_file(adapter, base, out)
    expected = out.read_bytes()
    out.unlink()
    argv = ["adapters", "merge", str(adapter), "--base", str(base), "--out", str(out)]
    assert cli.main(argv) == 0
    assert capsys.readouterr() == (f"{line}\n", "")
    assert out.read_bytes() == expected


def test_the_inspect_command_prints_the_sites(
    good: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["adapters", "inspect", str(good[0])]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "set 'default', LoRA(rank=2, " in printed.out
    assert "linear  4x6    linear  output" in printed.out


def test_the_commands_refuse_bad_files_in_one_line_and_with_code_2(
    good: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, base, out = good
    empty, short, pickled = (tmp_path / f"{n}.safetensors" for n in ("empty", "short", "pickle"))
    empty.touch()
    short.write_bytes(adapter.read_bytes()[:100])
    pickled.write_bytes(pickle.dumps({"a": 1}))
    asked: list[tuple[str | Path, ...]] = [
        ("inspect", empty),
        ("inspect", pickled),
        ("inspect", base),
        ("inspect", tmp_path),
        ("merge", short, "--base", base, "--out", out),
        ("merge", adapter, "--base", pickled, "--out", out),
        ("merge", adapter, "--base", base, "--out", base),
        ("merge", adapter, "--base", base, "--out", tmp_path / "none" / "out.safetensors"),
    ]
    for argv in asked:
        assert cli.main(["adapters", *map(str, argv)]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        (line,) = printed.err.splitlines()
        assert line.startswith("polyadapt: ")
    assert not out.exists()


def test_a_refusal_is_the_exit_code_of_the_process_and_no_traceback(tmp_path: Path) -> None:
    missing = tmp_path / "none.safetensors"
    code = "import sys; from polyadapt.core.cli import main; sys.exit(main(sys.argv[1:]))"
    argv = [sys.executable, "-c", code, "adapters", "inspect", str(missing)]
    ran = subprocess.run(argv, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == f"polyadapt: there is no adapter file {missing}\n"
