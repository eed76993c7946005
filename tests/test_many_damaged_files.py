"""Thousands of damaged and forged files: none loads wrong, none raises anything but one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from polyadapt.core import container
from polyadapt.tests.damage import DAMAGE, FORGERIES, good_sets, read_damaged

pytestmark = pytest.mark.filterwarnings("ignore:.*was made on other weights")


@pytest.mark.slow
def test_damaged_files_are_refused_and_forged_ones_are_refused_or_as_they_say(
    tmp_path: Path,
) -> None:
    """`benchmarks/damaged_files.py` does the same with 100,000."""
    outcome = read_damaged(good_sets(tmp_path), 2000, tmp_path / "a.safetensors", seed=1)
    assert outcome.wrong == []
    for make in DAMAGE:
        assert outcome.counts[make.__name__, "refused"] > 150
    told = [outcome.counts[make.__name__, "as it says"] for make in FORGERIES]
    assert all(told), "forgeries come as far as being loaded"


def test_a_reader_that_checked_no_digest_would_be_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goods = good_sets(tmp_path)

    class Fits:
        def __ne__(self, other: object) -> bool:
            return False

    monkeypatch.setattr(container, "_digest", lambda *parts: Fits())
    wrong = read_damaged(goods, 100, tmp_path / "a.safetensors").wrong
    assert any("is loaded though damaged" in line for line in wrong)
