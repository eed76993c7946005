"""The least expected WER decides: the paper's table, ties, doubts, and the bootstrap."""

from __future__ import annotations

import math

import pytest

from polyadapt.core import AdaptError
from polyadapt.speech.decision import (
    NONE,
    Costs,
    Decision,
    Interval,
    Scenario,
    break_even,
    predicted,
)
from polyadapt.speech.noise import Label
from polyadapt.speech.validation import best_edge, costs_of, gain_of, paired_bootstrap

CLASSES = ("babble", "music", "noise", "side")
# WER of each set at -10 dB under each category, Whisper base (arXiv 2502.01709, table I).
TABLE = {
    "babble": (51.5, 48.5, 36.1, 122.7),
    "music": (77.1, 11.4, 19.2, 87.4),
    "noise": (80.0, 21.9, 17.3, 124.2),
    "side": (90.8, 22.1, 26.6, 8.7),
}
ALL = (60.7, 13.7, 18.8, 16.6)
WORST = (200.0, 200.0, 200.0, 200.0)  # a base that nothing prefers
COLUMNS = tuple(map(Scenario, CLASSES))
SETS = Costs((NONE, *TABLE), COLUMNS, (WORST, *TABLE.values()))
WITH_ALL = Costs((NONE, *TABLE, "all"), COLUMNS, (WORST, *TABLE.values(), ALL), "all")


def test_a_less_likely_scenario_wins_when_its_mistake_costs_more() -> None:
    choice = Decision(SETS, CLASSES).choose((0.7, 0, 0, 0.3))
    assert choice.name == "side"
    assert choice.scenario == "babble"
    assert choice.expected["side"] == pytest.approx(66.17)
    assert choice.expected["babble"] == pytest.approx(72.86)


def test_a_sure_selector_takes_the_specialist() -> None:
    choice = Decision(SETS, CLASSES).choose((0.9, 0, 0, 0.1))
    assert choice.name == "babble"
    assert choice.expected["babble"] == pytest.approx(58.62)
    assert choice.expected["side"] == pytest.approx(82.59)


def test_two_sets_cost_the_same_at_their_break_even() -> None:
    assert break_even(SETS, "babble", "side", scenario=3, against=0) == pytest.approx(
        0.2564, abs=5e-5
    )
    assert break_even(WITH_ALL, "babble", "all", 3, 0) == pytest.approx(9.2 / 115.3)
    assert math.isnan(break_even(WITH_ALL, "all", NONE, 3, 0))  # never


def test_a_set_for_all_noise_wins_unless_the_selector_is_sure() -> None:
    decision = Decision(WITH_ALL, CLASSES)
    for side, wanted in ((0.3, 47.47), (0.1, 56.29)):
        choice = decision.choose((1 - side, 0, 0, side))
        assert choice.name == "all"
        assert choice.expected["all"] == pytest.approx(wanted)
    assert decision.choose((0.921, 0, 0, 0.079)).name == "babble"
    assert decision.choose((0.920, 0, 0, 0.080)).name == "all"


def test_the_frozen_base_is_a_candidate_like_any_other() -> None:
    costs = Costs((NONE, "a"), (Scenario("clean"), Scenario("loud")), ((3, 80), (5, 20)))
    decision = Decision(costs, ("clean", "loud"))
    assert decision.choose((1.0, 0.0)).name is None
    assert decision.choose((0.5, 0.5)).name == "a"


def test_where_sets_tie_the_general_one_is_taken_and_then_the_base() -> None:
    columns = (Scenario("x"),)
    tied = Costs(("a", NONE, "all"), columns, ((5,), (5,), (5,)), "all")
    assert Decision(tied, ("x",)).choose((1.0,)).name == "all"
    assert Decision(tied, ("x",)).choose((1.0,), among=("a",)).name is None


def test_unsure_and_unknown_sound_falls_back() -> None:
    decision = Decision(WITH_ALL, CLASSES, threshold=0.6)
    choice = decision.choose((0.55, 0.45, 0, 0))
    assert choice.name == "all"
    assert choice.why == "unsure: the likeliest class has 0.55, below 0.6"
    assert decision.choose((0.0, 0.6, 0.4, 0)).why == "least expected WER"
    unknown = decision.choose_for("wind")
    assert unknown.name == "all"
    assert unknown.why == "unknown noise 'wind'; known: babble, music, noise, side"
    assert Decision(SETS, CLASSES).choose_for("wind").name is None
    assert decision.choose_for("wind", among=("babble",)).name is None


def test_a_known_category_takes_the_best_of_its_column() -> None:
    decision = Decision(WITH_ALL, CLASSES)
    assert [decision.choose_for(c).name for c in CLASSES] == ["babble", "music", "noise", "side"]


def test_a_set_that_is_not_at_hand_is_not_chosen() -> None:
    choice = Decision(SETS, CLASSES).choose((1.0, 0, 0, 0), among=("music", "side"))
    assert choice.name == "music"
    assert set(choice.expected) == {"music", "side", NONE}


LEVELS = (Scenario(high=5), Scenario(low=5))
LEVEL_COSTS = Costs((NONE, "HighNoise", "LowNoise"), LEVELS, ((90, 9), (40, 8), (60, 4)))


def test_an_snr_just_below_and_above_the_edge_chooses_either_level() -> None:
    decision = Decision(LEVEL_COSTS, ())
    assert decision.choose((), 4.9).name == "HighNoise"
    assert decision.choose((), 5.1).name == "LowNoise"


def test_an_unsure_snr_leans_to_the_set_whose_mistake_is_cheaper() -> None:
    """40 p + 8 q = 60 p + 4 q at p = 1/6: HighNoise up to 5 + 0.9674 sigma dB."""
    decision = Decision(LEVEL_COSTS, (), sigma=3.0)
    assert decision.choose((), 5 + 3 * 0.96).name == "HighNoise"
    assert decision.choose((), 5 + 3 * 0.98).name == "LowNoise"
    with pytest.raises(AdaptError, match="'any below 5 dB' needs an estimate of the SNR"):
        decision.choose(())


def test_category_and_level_together_are_four_scenarios() -> None:
    columns = tuple(Scenario(c, *ends) for c in "xy" for ends in ((-math.inf, 0), (0, math.inf)))
    costs = Costs((NONE, "a"), columns, ((10, 10, 10, 10), (4, 20, 20, 20)))
    choice = Decision(costs, ("x", "y")).choose((0.9, 0.1), -3.0)
    assert choice.name == "a"
    assert choice.expected["a"] == pytest.approx(0.9 * 4 + 0.1 * 20)
    assert sum(choice.probabilities.values()) == pytest.approx(1)
    assert choice.probabilities["x below 0 dB"] == pytest.approx(0.9)


def test_scenarios_that_leave_a_gap_or_overlap_are_refused() -> None:
    for edges in ((0, 5), (5, 0)):
        columns = (Scenario("x", high=edges[0]), Scenario("x", low=edges[1]))
        with pytest.raises(AdaptError, match="the SNR ranges of x leave a gap or overlap"):
            Costs((NONE,), columns, ((1, 2),))
    with pytest.raises(AdaptError, match="name categories in some columns and none in others"):
        Costs((NONE,), (Scenario(), Scenario("x")), ((1, 2),))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"sets": (NONE,)}, r"rows of \[1, 1\] numbers, expected 1 sets x 1 scenarios"),
        ({"sets": ("b", "a")}, "one must be 'none'"),
        ({"sets": (NONE, NONE)}, "must differ"),
        ({"wer": ((1,), (math.nan,))}, "negative, NaN or infinite"),
        ({"wer": ((1,), (-1,))}, "negative, NaN or infinite"),
        ({"general": "b"}, "the general set 'b' has no row; there are none, a"),
    ],
)
def test_a_cost_matrix_that_cannot_be_meant_is_refused(
    changed: dict[str, object], said: str
) -> None:
    right = {"sets": (NONE, "a"), "scenarios": (Scenario("x"),), "wer": ((1,), (2,))}
    with pytest.raises(AdaptError, match=said):
        Costs(**{**right, **changed})  # type: ignore[arg-type]


def test_a_selector_and_a_cost_matrix_about_different_noise_are_refused() -> None:
    with pytest.raises(AdaptError, match="every class needs its columns"):
        Decision(SETS, CLASSES[:3])
    with pytest.raises(AdaptError, match=r"threshold 1.5 and sigma 0.0 are not allowed"):
        Decision(SETS, CLASSES, threshold=1.5)


def test_oracle_choices_cost_least_and_mistakes_cost_what_the_table_says() -> None:
    """Of the side speaker's clips 0.44 % taken for babble: 8.7 becomes 9.2, as the paper has it."""
    oracle = [[float(s == c) for s in (NONE, *CLASSES)] for c in CLASSES]
    least = predicted(SETS, oracle)
    assert least == [51.5, 11.4, 17.3, 8.7]
    mistaken = [*oracle[:3], [0, 0.44, 0, 0, 99.56]]
    found = predicted(SETS, mistaken)
    assert found[3] == pytest.approx(9.2, abs=0.05)
    worst = [max(column) for column in zip(*TABLE.values(), strict=True)]
    assert all(a <= b <= c for a, b, c in zip(least, found, worst, strict=True))
    with pytest.raises(AdaptError, match="2 rows of choices do not fit"):
        predicted(SETS, oracle[:2])


def test_the_advice_follows_the_interval() -> None:
    def advice(*interval: float) -> str:
        return Decision(WITH_ALL, CLASSES, gain=Interval(*interval)).advice()

    gains = "against 'all' for everything it gains"
    assert advice(0.3, -0.5, 1.1) == (
        f"choosing is not worthwhile here: {gains} 0.3 points (-0.5 to 1.1), an interval that"
        " reaches zero"
    )
    assert advice(2.0, 0.5, 3.5) == f"choosing is worthwhile: {gains} 2.0 points (0.5 to 3.5)"
    assert advice(-1.0, -2.0, -0.5) == (
        f"choosing is not worthwhile here: {gains} -1.0 points (-2.0 to -0.5), it loses"
    )
    assert Decision(SETS, CLASSES).advice() == "whether choosing is worthwhile was not measured"


def test_the_bootstrap_agrees_with_the_normal_interval_of_many_utterances() -> None:
    """Differences of 0 or 1 error in 1 word with probability 1/2: 50 +- 1.96 * 50 / sqrt(400)."""
    found = paired_bootstrap([1, 0] * 200, [0] * 400, [1] * 400)
    assert found.value == 50
    assert found.low == pytest.approx(50 - 4.9, abs=0.7)
    assert found.high == pytest.approx(50 + 4.9, abs=0.7)


def test_the_bootstrap_is_paired() -> None:
    hard = [0, 10] * 50  # utterances differ a lot, the two ways by one error each time
    found = paired_bootstrap([n + 1 for n in hard], hard, [20] * 100)
    assert (found.low, found.value, found.high) == pytest.approx((5, 5, 5))


def test_utterances_of_one_speaker_are_resampled_together() -> None:
    first, second, words = [1] * 50 + [0] * 50, [0] * 100, [1] * 100
    alone = paired_bootstrap(first, second, words)
    speakers = paired_bootstrap(first, second, words, groups=["ann"] * 50 + ["bob"] * 50)
    assert alone.above_zero
    assert not speakers.above_zero  # both draws may be bob's
    assert speakers.value == alone.value == 50
    with pytest.raises(AdaptError, match="a bootstrap over 1 utterances or groups"):
        paired_bootstrap(first, second, words, groups=["ann"] * 100)


def test_costs_and_gain_come_from_the_errors_of_the_validation() -> None:
    labels = [Label(c, snr) for c in ("x", "y") for snr in (-5.0, 5.0)] * 5
    words = [10.0] * 20
    easy_x = [1.0 if label.category == "x" else 5.0 for label in labels]
    easy_y = [5.0 if label.category == "x" else 1.0 for label in labels]
    errors = {NONE: [8.0] * 20, "a": easy_x, "b": easy_y}
    costs = costs_of(errors, words, labels, (Scenario("x"), Scenario("y")))
    assert costs.wer == ((80, 80), (10, 50), (50, 10))
    oracle = ["a" if label.category == "x" else "b" for label in labels]
    assert gain_of(costs, errors, words, oracle).value == pytest.approx(20)
    assert gain_of(costs, errors, words, oracle).above_zero
    assert gain_of(costs, errors, words, [None] * 20).value == pytest.approx(-50)
    with pytest.raises(AdaptError, match="no errors were measured with c"):
        gain_of(costs, errors, words, ["c"] * 20)
    with pytest.raises(AdaptError, match="no validation word under 'z'"):
        costs_of(errors, words, labels, (Scenario("z"),))
    with pytest.raises(AdaptError, match="utterances must be the same for all"):
        costs_of(errors, words[1:], labels, (Scenario("x"),))


def test_the_best_edge_between_two_levels_is_found_on_the_validation_errors() -> None:
    """Estimates -4, 0, 4, 8: the set for loud noise is better at the first three."""
    loud, quiet = [1.0, 1.0, 2.0, 6.0], [5.0, 4.0, 3.0, 1.0]
    order = [2, 0, 3, 1]
    shuffled = ([column[i] for i in order] for column in (loud, quiet, [-4.0, 0.0, 4.0, 8.0]))
    assert best_edge(*shuffled) == 6.0
    assert best_edge([1.0, 1.0], [2.0, 2.0], [0.0, 3.0]) == math.inf  # it is always better
    assert best_edge([2.0, 2.0], [1.0, 1.0], [0.0, 3.0]) == -math.inf
    assert best_edge([0.0, 9.0, 9.0], [1.0, 0.0, 8.0], [1.0, 1.0, 3.0]) == -math.inf
    with pytest.raises(AdaptError, match="utterances must be the same for all"):
        best_edge([1.0], [2.0], [])


@pytest.mark.parametrize("scenario", [Scenario(), Scenario("x", low=-3), Scenario("x", -3, 4.5)])
def test_a_scenario_survives_json(scenario: Scenario) -> None:
    assert Scenario.from_json(scenario.to_json()) == scenario


def test_a_mixture_belongs_to_one_column() -> None:
    costs = Costs((NONE,), LEVELS, ((1, 2),))
    assert [costs.column(Label("any noise", snr)) for snr in (4.9, 5.0, math.inf)] == [0, 1, 1]
    with pytest.raises(AdaptError, match="no column for 'wind at 3 dB"):
        SETS.column(Label("wind", 3.0))
    with pytest.raises(AdaptError, match="low must be below high"):
        Scenario("x", 5, 5)
