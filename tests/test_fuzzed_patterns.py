"""Any text, and any value, as a pattern: it finds sites or is refused in one line."""

from __future__ import annotations

from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Generator, nn

from polyadapt.core import AdaptError, LoRA, attach, select
from polyadapt.core.errors import SiteError
from polyadapt.core.sites import Sites
from polyadapt.tests.saved_sets import net, state

MODEL = net()
NAMES = sorted({n for name, _ in MODEL.named_parameters() for n in name.split(".")})
SIGNS = ["*", "**", ".", "{", "}", "[", "]", ",", "q", "v", " ", "\n", "é", "\\", "(", "+", "\x00"]
# Mostly a real path with something wrong or right put into it.
TEXTS = st.lists(st.sampled_from([*NAMES, *SIGNS]), max_size=8).map("".join)
PATHS = st.lists(st.sampled_from([*NAMES, "*", "**"]), min_size=1, max_size=4).map(".".join)
PARTS = st.sampled_from(["", "", "[q]", "[q,v]", "[k,]", "[x]", "[q][v]", "[0]"])
BRACED = st.builds("{{{},{}}}{}".format, PATHS, PATHS, PARTS)
PATTERNS = st.one_of(TEXTS, st.builds(str.__add__, PATHS, PARTS), BRACED, st.text(max_size=12))


def found(model: nn.Module, at: Any) -> Sites:
    """The sites, none when they are refused, which must be in one line."""
    try:
        return select(model, at)
    except SiteError as error:
        refusal = str(error)
    assert refusal.isprintable()
    return Sites()


@settings(max_examples=200, deadline=None)
@given(PATTERNS)
@example("blocks.*.qkv[q,v]")
@example("**")
def test_a_pattern_finds_sites_or_is_refused_in_one_line(text: str) -> None:
    before = state(MODEL)
    for site in found(MODEL, text):
        assert select(MODEL, site.name) == (site,)  # what it is called finds it again
        module = MODEL.get_submodule(site.path)
        assert site.parameter is None or site.parameter in module._parameters
    assert state(MODEL) == before


JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), PATTERNS, st.binary()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner)),
    max_leaves=4,
)


@settings(max_examples=100, deadline=None)
@given(JUNK)
@example(["blocks.0.mlp", "head"])
def test_a_value_of_any_kind_is_taken_or_refused_in_one_line(at: Any) -> None:
    assert isinstance(found(MODEL, at), Sites)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(PATTERNS, BRACED), min_size=1, max_size=3))
@example(["blocks.*.qkv[q,v]", "head"])
def test_attaching_by_any_pattern_works_and_is_undone_or_leaves_no_trace(at: list[str]) -> None:
    model = net()
    before = state(model)
    refusal = ""
    try:
        made = attach(model, LoRA(rank=1), at, generator=Generator())
    except AdaptError as error:
        refusal = str(error)
    else:
        assert made.sites
        made.detach()
    assert refusal.isprintable()
    assert state(model) == before
