"""The verdict follows from figures by the stated rules."""

import re
from dataclasses import replace

import numpy as np
import pytest

from finetune.compare.measures import Difference, difference
from finetune.compare.verdict import Flag, Pair, Standing, compare_pairs, correct, decide, flags_of, in_words


def gains(mean, seeds=3, prompts=40, number=0, noise=0.05):
    return mean + np.random.default_rng(number).normal(0, noise, (seeds, prompts))


def standing(name, mean, seeds=3, **changes):
    table = gains(mean, seeds, number=len(name))
    found = {"judge": difference(table)}
    own = difference(gains(changes.pop("own", 0.3), seeds, number=99))
    settings = {
        "name": name, "note": "", "upper_bound": False, "seeds": list(range(seeds)), "own": own, "gains": found,
        "corrected": correct([found])[0], "trains_on": [], "drawn": 1.0, "diversity": 0.95, "kl": 1e-4, "monitors": {},
    }  # fmt: skip
    return Standing(**settings | changes)


def pairs(means, seeds=3, shared=0.0, smallest=None):
    common = np.random.default_rng(5).normal(0, shared, 40)
    tables = {name: dict(enumerate(gains(mean, seeds, number=len(name)) + common)) for name, mean in means.items()}
    return compare_pairs(tables, smallest)


def test_the_best_wins_alone_where_it_is_shown():
    means = {"good": 0.3, "middling": 0.1, "nil": 0.0}
    verdict = decide([standing(name, mean) for name, mean in means.items()], pairs(means), "judge")
    assert verdict.headline == "Train on good."
    assert verdict.winners == ["good"]
    assert any(line.startswith("good less middling: +0.") and "is shown" in line for line in verdict.sentences)


def test_no_difference_is_said_with_the_seeds_that_are_missing():
    means = {"one": 0.200, "other": 0.195}
    found = decide([standing(name, mean) for name, mean in means.items()], pairs(means), "judge")
    assert "no difference from" in found.headline
    assert set(found.winners) == {"one", "other"}
    (line,) = [line for line in found.sentences if " less " in line]
    assert "no difference can be shown" in line
    assert "more seed" in line
    (pair,) = pairs(means, smallest=0.1)
    assert pair.less.more_seeds == 0
    assert in_words(pair).endswith("no difference can be shown; none of 0.1 or more is there, as the interval says.")
    unsettled = replace(pair, less=replace(pair.less, high=0.11))
    assert "these seeds would mostly show" in in_words(unsettled)


def test_a_noisy_entrant_does_not_hide_one_whose_gain_is_shown():
    seeds = {"luck": [0.8, 0.1, 0.05], "sure": [0.25, 0.24, 0.26]}
    tables = {name: dict(enumerate(gains(np.array(means)[:, None], number=len(name)))) for name, means in seeds.items()}
    found = [{"judge": difference(np.stack(list(table.values())))} for table in tables.values()]
    both = [
        standing(name, 0.0, gains=gain, corrected=p) for name, gain, p in zip(seeds, found, correct(found), strict=True)
    ]
    assert both[0].gains["judge"].value > both[1].gains["judge"].value
    verdict = decide(both, compare_pairs(tables, None), "judge")
    assert verdict.winners == ["sure", "luck"]
    assert verdict.headline == "Train on sure: it leads, but no difference from luck can be shown."


def test_who_is_shown_to_be_behind_does_not_win_alone():
    """One whose own gain is not shown, as it differs by prompts, may yet be ahead of the leader by prompts."""
    means = {"first": 0.1, "second": 0.3}
    verdict = decide([standing("first", 0.1), standing("second", 0.3, corrected={"judge": 0.2})], pairs(means), "judge")
    assert verdict.winners == ["first", "second"]


def test_gamed_and_collapsing_cannot_win():
    gamed = standing("gamed", -0.2, own=0.5)
    flags = flags_of(gamed, {"judge": 0.4}, own_spread=1.0)
    assert [flag.kind for flag in flags] == ["gamed"]
    assert "others fell: judge -0." in flags[0].text
    empty = standing("empty", 0.5, drawn=0.4, diversity=0.5)
    flags = flags_of(empty, {"judge": 0.4}, own_spread=1.0)
    assert [flag.kind for flag in flags] == ["collapsing"]
    assert "40% of the base's edges" in flags[0].text
    assert "50%" in flags[0].text
    assert not flags_of(standing("sound", 0.2), {"judge": 0.4}, own_spread=1.0)
    assert not flags_of(standing("unlearned", -0.2, own=0.0), {"judge": 0.4}, own_spread=1.0)

    leader = standing("empty", 0.5, flags=flags)
    verdict = decide([leader, standing("sound", 0.2)], pairs({"empty": 0.5, "sound": 0.2}), "judge")
    assert verdict.winners == ["sound"]
    assert any(line.startswith("empty is out: collapsing") for line in verdict.sentences)


def test_a_small_fall_is_a_price_and_a_deep_one_is_gaming():
    """-0.2 is half a standard deviation of 0.4, and a tenth of one of 2."""
    fell = standing("fell", -0.2, own=0.5)
    (flag,) = flags_of(fell, {"judge": 2.0}, own_spread=1.0)
    assert (flag.kind, flag.rules_out) == ("at a price", False)
    assert "others fell a little: judge -0." in flag.text
    assert standing("fell", -0.2, flags=[flag]).sound
    two = replace(fell, gains={"judge": fell.gains["judge"], "taste": fell.gains["judge"]},
                  corrected=dict.fromkeys(("judge", "taste"), 0.001))  # fmt: skip
    (flag,) = flags_of(two, {"judge": 2.0, "taste": 0.4}, own_spread=1.0)
    assert flag.kind == "gamed"
    assert "taste" in flag.text
    assert "judge" not in flag.text

    dear = standing("dear", 0.2, flags=[replace(flag, kind="at a price")])
    verdict = decide([dear, standing("out", 0.5, flags=[flag])], pairs({"dear": 0.2}), "judge")
    assert verdict.winners == ["dear"]
    assert any(line.startswith("dear, at a price: ") for line in verdict.sentences)
    (out,) = [line for line in verdict.sentences if line.startswith("out is out: gamed; ")]
    assert "(in judge +0." in out  # it may lead the table


def test_where_only_the_correction_hides_a_difference_both_chances_are_said():
    less = Difference(0.03, 0.01, 0.05, 0.009, 5, 256, more_seeds=16, smallest=0.02)
    assert in_words(Pair("a", "b", less, 0.19)) == (
        "a less b: +0.03 (+0.01 .. +0.05; p 0.009 by itself, 0.19 corrected): no difference can be shown; about 16 "
        "more seeds would be needed to show one of 0.02."
    )
    assert in_words(Pair("a", "b", less, 0.02)) == "a less b: +0.03 (+0.01 .. +0.05; p 0.02): the difference is shown."


def test_a_fall_is_corrected_for_the_number_of_evaluators():
    fell = standing("fell", -0.2, own=0.5, corrected={"judge": 0.02})
    assert flags_of(fell, {"judge": 0.4}, own_spread=1.0)
    three = replace(fell, gains=dict.fromkeys("abc", fell.gains["judge"]), corrected={"a": 0.02, "b": 0.02, "c": 0.9})
    assert not flags_of(three, dict.fromkeys("abc", 0.4), own_spread=1.0)
    assert flags_of(replace(three, trains_on=["c"]), dict.fromkeys("abc", 0.4), own_spread=1.0)


def test_an_evaluator_that_is_trained_on_does_not_flag():
    assert not flags_of(standing("it", -0.2, trains_on=["judge"]), {"judge": 0.4}, own_spread=1.0)


def test_of_two_seeds_flags_go_by_the_means_and_there_is_no_verdict():
    fell = standing("fell", -0.2, seeds=2, own=0.5)
    assert [flag.kind for flag in flags_of(fell, {"judge": 0.4}, own_spread=1.0)] == ["gamed"]
    assert not flags_of(fell, {"judge": 4.0}, own_spread=1.0)  # -0.2 is nothing beside a spread of 4
    verdict = decide([standing("one", 0.2, seeds=2)], [], "judge")
    assert verdict.headline.startswith("No verdict yet: of 2 seeds")
    assert verdict.winners == []
    assert "one is ahead in judge: +0." in verdict.sentences[0]
    assert in_words(pairs({"a": 0.2, "bb": 0.1}, seeds=2)[0]).endswith("2 seeds, so no interval.")


def test_an_upper_bound_is_compared_with_and_never_chosen():
    bound = standing("bound", 0.4, upper_bound=True)
    tables = {name: dict(enumerate(gains(mean, number=len(name)))) for name, mean in {"it": 0.2, "bound": 0.4}.items()}
    verdict = decide([standing("it", 0.2), bound], [], "judge", tables)
    assert verdict.winners == ["it"]
    (line,) = [line for line in verdict.sentences if "of what the upper bound bound gains" in line]
    share, low, high = (float(number) for number in re.findall(r"\d\.\d\d", line))
    assert 0.4 < low < share < high < 0.6
    unshown = standing("bound", 0.4, upper_bound=True, corrected={"judge": 0.5})
    assert not any(
        "upper bound" in line for line in decide([standing("it", 0.2), unshown], [], "judge", tables).sentences
    )


def test_no_gain_shown_and_nobody_left():
    small = difference(np.array([[0.03, 0.01], [-0.03, -0.01], [0.04, 0.0]]))
    small = standing("small", 0.0, gains={"judge": small}, corrected={"judge": small.p})
    verdict = decide([small], [], "judge")
    assert verdict.headline == "None of these: no gain in judge is shown."
    assert (
        verdict.sentences[1] == f"Luck may give as much; about {small.gains['judge'].more_seeds} more seeds would be "
        "needed to show one of this size."
    )
    below = decide([standing("nil", -0.1)], [], "judge")
    assert len(below.sentences) == 1  # no number of seeds makes a loss a gain
    failed = standing("it", 0.2, unfinished="seed 1: training failed", failed=True,
                      flags=[Flag("failed", "seed 1: training failed")])  # fmt: skip
    verdict = decide([failed], [], "judge")
    assert verdict.headline.startswith("None of these")
    assert "it is out: failed; seed 1: training failed (in judge +0.201)." in verdict.sentences
    nothing = replace(failed, flags=[], failed=False, seeds=[])
    assert decide([nothing], [], "judge").headline == "No verdict yet: no training is finished."
    waiting = standing("it", 0.2, unfinished="no training yet of seed 2")
    assert "it is not finished: no training yet of seed 2." in decide([waiting], [], "judge").sentences


def test_without_an_impartial_evaluator_there_is_no_verdict():
    assert decide([standing("it", 0.2)], [], None).headline.startswith("No verdict: every evaluator is trained on")


def test_p_values_are_corrected_for_the_number_of_entrants():
    alone = correct([{"judge": difference(gains(0.02))}])[0]["judge"]
    many = correct(
        [{"judge": difference(gains(0.02))}] + [{"judge": difference(gains(0.0, number=n))} for n in range(1, 5)]
    )
    assert many[0]["judge"] == pytest.approx(min(5 * alone, 1))
    assert correct([{"judge": difference(gains(0.02, seeds=2))}]) == [{"judge": None}]


def test_pairs_are_of_the_seeds_that_both_have():
    tables = {"a": {0: np.ones(5), 1: np.ones(5)}, "b": {1: np.zeros(5), 2: np.zeros(5)}, "c": {9: np.zeros(5)}}
    (pair,) = compare_pairs(tables, None)
    assert (pair.one, pair.other, pair.less.value, pair.less.seeds) == ("a", "b", 1.0, 1)


def test_pairs_that_were_asked_for_are_corrected_for_each_other_only():
    means = {"a": 0.05, "b": 0.02, "c": 0.0, "d": 0.0}
    tables = {name: dict(enumerate(gains(mean, number=place))) for place, (name, mean) in enumerate(means.items())}
    every = {(pair.one, pair.other): pair for pair in compare_pairs(tables, None)}
    asked = compare_pairs(tables, None, [("b", "c"), ("b", "gone")])
    assert [(pair.one, pair.other) for pair in asked] == [("b", "c")]
    assert asked[0].less.value == every["b", "c"].less.value
    assert asked[0].corrected == pytest.approx(asked[0].less.p)  # alone
    assert every["b", "c"].corrected > asked[0].corrected
    both = compare_pairs(tables, None, [("b", "c"), ("c", "d")])
    assert both[0].corrected == pytest.approx(2 * asked[0].less.p)
