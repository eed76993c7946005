"""The pattern language as text: what it expands to, what it matches, what it refuses."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from polyadapt.core.errors import SiteError
from polyadapt.core.patterns import Pattern, parse

LEAVES = ["a", "ab", "*", "**", ".", "{", "}", "[", "]", ",", "0", "_", "-", " ", "\n", "é", "\\"]


def paths(text: str) -> list[str]:
    return [pattern.path for pattern in parse(text)]


def whole(text: str, path: str) -> bool:
    return any(p.matcher(tail=False).fullmatch(path) is not None for p in parse(text))


def tail(text: str, path: str) -> bool:
    return any(p.matcher(tail=True).fullmatch(path) is not None for p in parse(text))


def read(text: str) -> list[Pattern]:
    """The patterns of a text; none when it is refused, which must be in one line."""
    try:
        patterns = parse(text)
    except SiteError as error:
        refusal = str(error)
    else:
        assert patterns
        return patterns
    assert refusal.isprintable()
    return []


# ---- expansion


def test_a_plain_path_stands_for_itself() -> None:
    (pattern,) = parse("blocks.0.attn.qkv")
    assert (pattern.path, pattern.parts) == ("blocks.0.attn.qkv", ())


def test_braces_multiply_and_the_last_varies_fastest() -> None:
    assert paths("h.{0,2}.{q,v}") == ["h.0.q", "h.0.v", "h.2.q", "h.2.v"]


def test_braces_may_stand_inside_a_name_and_be_spaced() -> None:
    assert paths("mlp.fc{1, 2}") == ["mlp.fc1", "mlp.fc2"]


def test_braces_may_span_several_components() -> None:
    assert paths("{attn.qkv,mlp.fc1}.bias") == ["attn.qkv.bias", "mlp.fc1.bias"]


def test_a_single_alternative_is_allowed() -> None:
    assert paths("h.{0}") == ["h.0"]


def test_parts_keep_their_order_and_lose_their_spaces() -> None:
    assert [p.parts for p in parse("attn.qkv[v, q]")] == [("v", "q")]


def test_alternatives_may_stand_in_the_brackets() -> None:
    assert [(p.path, p.parts) for p in parse("qkv[{q,v}]")] == [("qkv", ("q",)), ("qkv", ("v",))]


def test_space_around_a_pattern_is_ignored() -> None:
    assert paths("  blocks.0 ") == ["blocks.0"]


def test_alternatives_know_which_brace_they_come_from() -> None:
    assert [p.choices for p in parse("{a,b}.{a,c}")] == [
        ("0:a", "1:a"),
        ("0:a", "1:c"),
        ("0:b", "1:a"),
        ("0:b", "1:c"),
    ]


# ---- what a pattern matches


@pytest.mark.parametrize(
    ("text", "path", "fits"),
    [
        ("blocks.*.attn", "blocks.0.attn", True),
        ("blocks.*.attn", "blocks.0.x.attn", False),  # `*` is one component
        ("blocks.*.attn", "blocks.attn", False),
        ("blocks.*", "blocks.0", True),
        ("blocks.*", "blocks.0.attn", False),
        ("conv*", "conv12", True),
        ("conv*", "conv", True),
        ("conv*", "conv.1", False),
        ("blocks.**", "blocks.0.attn.qkv.bias", True),
        ("blocks.**", "blocks", False),
        ("**", "anything.at.all", True),
        ("blocks.**.bias", "blocks.0.attn.qkv.bias", True),
        ("blocks.**.bias", "blocks.bias", True),  # `**` may stand for no component
        ("blocks.**.bias", "blocksxbias", False),
        ("**.qkv", "qkv", True),
        ("**.qkv", "blocks.0.attn.qkv", True),
        ("**.qkv", "blocks.0.attn.xqkv", False),
        ("a.**.**.b", "a.b", True),
        ("**.a.*.**.b", "x.a.a.y.b", True),  # the first `a` will do
        ("**.a.b.**.c", "a.x.a.b.c", True),
        ("**.a.b.**.c", "a.x.a.b.x", False),
        ("fc*_*x", "fc1_2_xx", True),
        ("fc*_*x", "fc1_2_xy", False),
        ("*", "", True),
        ("a.b", "axb", False),  # a dot is a dot
        ("h.1", "h.11", False),
    ],
)
def test_wildcards_against_whole_paths(text: str, path: str, fits: bool) -> None:
    assert whole(text, path) is fits


@pytest.mark.parametrize(
    ("text", "path", "fits"),
    [
        ("h.*.attn", "transformer.h.0.attn", True),
        ("h.*.attn", "h.0.attn", True),
        ("h.*.attn", "transformer.xh.0.attn", False),  # a tail starts at a dot
        ("attn", "blocks.0.attn", True),
        ("attn", "blocks.0.attn.proj", False),
    ],
)
def test_a_tail_starts_at_a_dot_and_reaches_the_end(text: str, path: str, fits: bool) -> None:
    assert tail(text, path) is fits


# ---- what cannot be read


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "must be text"),
        ("   ", "must be text"),
        (None, "must be text .*, not NoneType"),
        (3, "must be text .*, not int"),
        ("h.{0,1", "braces must be closed"),
        ("h.0,1}", "braces must be closed"),
        ("h.{0,{1,2}}", "closed and not nested"),
        ("h.{0,}", "an empty alternative"),
        ("h.{}", "an empty alternative"),
        ("h.{0,,1}", "an empty alternative"),
        ("qkv[]", "an empty part"),
        ("qkv[q,]", "an empty part"),
        ("qkv[q", "cannot be read"),
        ("qkv]q", "cannot be read"),
        ("qkv[q][v]", "cannot be read"),
        ("[q]", "cannot be read"),
        ("qkv[q].bias", "cannot be read"),  # parts stand at the end: qkv.bias[q]
        ("a b", "cannot be read"),
        ("h**", "whole components, between dots"),
        ("h.***.q", "whole components, between dots"),
        ("a/b", "cannot be read"),
        ("blocks.0, blocks.1", "cannot be read"),  # several patterns are a list
    ],
)
def test_a_pattern_that_cannot_be_read_is_refused_in_one_line(text: str, complaint: str) -> None:
    with pytest.raises(SiteError, match=complaint) as refused:
        parse(text)
    assert "\n" not in str(refused.value)


def test_the_refusal_quotes_the_pattern_and_shows_how_to_write_one() -> None:
    with pytest.raises(SiteError) as refused:
        parse("blocks.*.attn.qkv(q)")
    assert "'blocks.*.attn.qkv(q)'" in str(refused.value)
    assert "blocks.*.attn.qkv[q,v]" in str(refused.value)


def test_braces_that_would_multiply_without_end_are_refused() -> None:
    assert len(parse("{a,b,c,d,e,f,g,h,i,j}" * 4)) == 10_000
    with pytest.raises(SiteError, match="more than 10,000 paths"):
        parse("{a,b}" * 40)


@pytest.mark.parametrize("pattern", ["**." * 60 + "y", "*x" * 60 + "y", "**.*x*x*x*x." * 20 + "y"])
def test_no_pattern_takes_long_to_match(pattern: str) -> None:
    """As regular expressions of `.*` these would take years."""
    assert not whole(pattern, ".".join(["x" * 20] * 60))
    assert not tail(pattern, ".".join(["x" * 20] * 60))


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(LEAVES), max_size=20).map("".join))
@example("{{}}")
@example("a{,}[{]}")
@example("***")
def test_any_text_is_read_or_refused_and_what_was_read_can_match(text: str) -> None:
    for pattern in read(text):
        assert re.fullmatch(r"[\w*.\-]+", pattern.path)
        assert all(pattern.parts) or pattern.parts == ()
        literal = pattern.path.replace("*", "")  # a `*` may stand for nothing
        if "**" not in pattern.path:
            assert pattern.matcher(tail=False).fullmatch(literal)
        assert pattern.matcher(tail=True).fullmatch(f"front.{literal}") or "**" in pattern.path


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=30))
def test_no_text_raises_anything_but_a_site_error(text: str) -> None:
    read(text)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.text("abc0_-", min_size=1, max_size=4), min_size=1, max_size=6))
def test_every_path_matches_itself_and_its_wildcard(components: list[str]) -> None:
    path = ".".join(components)
    assert whole(path, path)
    assert whole(".".join("*" * len(components)), path)
    assert whole("**." + components[-1], path)
    assert tail(components[-1], path)
    assert not whole(path, path + "x")
