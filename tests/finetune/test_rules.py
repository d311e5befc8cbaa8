import numpy as np
import pytest

from finetune.predictions import MAP_SIDE
from finetune.rule_reading import read_rules
from finetune.rules import EmptySelectionError, select


def kept(spec, predictions):
    """Places kept by one rule."""
    return select(read_rules({"rule": spec}), predictions)[-1].kept.tolist()


def test_thresholds_hold_at_their_ends(make_predictions):
    predictions = make_predictions(4, overall=[0.25, 0.5, 0.75, 1.0])
    assert kept({"score": "overall", "at_least": 0.5}, predictions) == [1, 2, 3]
    assert kept({"score": "overall", "at_most": 0.5}, predictions) == [0, 1]
    assert kept({"score": "overall", "at_least": "5e-1", "at_most": 0.75}, predictions) == [1, 2]


def test_a_value_may_be_a_weighted_sum(make_predictions):
    predictions = make_predictions(3, plausibility=[1.0, 0.5, 0.5], implausibility=[0.25, 0.0, 0.25])
    objective = {"plausibility": 1.0, "implausibility": -4.0}  # 0, 0.5, -0.5
    assert kept({"score": objective, "at_least": 0.0}, predictions) == [0, 1]
    assert kept({"best_of": objective}, predictions) == [1]


def test_quantiles_are_of_what_the_rule_is_asked_about(make_predictions):
    predictions = make_predictions(5, overall=[0.1, 0.2, 0.3, 0.4, 0.5], aesthetics=[0, 1, 1, 1, 1])
    rules = read_rules(
        {"nice": {"score": "aesthetics", "at_least": 1}, "upper half": {"quantile": "overall", "at_least": 0.5}}
    )
    assert select(rules, predictions)[-1].kept.tolist() == [3, 4]  # the median of the four is 0.35, of all five 0.3
    assert kept({"quantile": "overall", "at_least": 0.5}, predictions) == [2, 3, 4]


def test_best_of_each_prompt_takes_the_first_of_equals(make_predictions):
    predictions = make_predictions(6, prompts=["a", "b"] * 3, overall=[0.1, 0.9, 0.7, 0.9, 0.7, 0.2])
    assert kept({"best_of": "overall"}, predictions) == [1, 2]
    assert kept({"best_of": "overall", "keep": 2}, predictions) == [1, 2, 3, 4]


def test_map_mass_and_the_share_of_a_map_above_a_level(make_predictions):
    maps = np.zeros((3, MAP_SIDE, MAP_SIDE), dtype=np.uint8)
    maps[1, : MAP_SIDE // 2] = 255  # half of the places are 1
    maps[2] = 102  # all are 0.4
    predictions = make_predictions(3, implausibility=[0.0, 0.5, 0.4], maps={"implausibility": maps})
    assert kept({"map": "implausibility", "at_most": 0.45}, predictions) == [0, 2]
    assert kept({"map": "implausibility", "above": 0.5, "at_most": 0.4}, predictions) == [0, 2]
    assert kept({"map": "implausibility", "above": 0.3, "at_most": 0.5}, predictions) == [0, 1]


def test_misaligned_words_are_counted_above_the_predictors_own_threshold(make_predictions):
    words = [np.array(row, dtype=np.float32) for row in ([0.39, 0.0, 0.0], [0.41, 0.0, 0.0], [0.41, 0.9, 0.0])]
    predictions = make_predictions(3, misaligned=words)
    assert kept({"misaligned": 0}, predictions) == [0]
    assert kept({"misaligned": 1}, predictions) == [0, 1]
    assert kept({"misaligned": 0, "threshold": 0.5}, predictions) == [0, 1]


def test_of_near_duplicates_the_best_stays(make_predictions):
    features = np.array([[1, 0], [1, 0.01], [0, 1], [-1, 0], [-1, 0.01], [0, -1.02]])
    prompts = ["a", "a", "a", "a", "b", "b"]
    predictions = make_predictions(6, prompts, features=features, overall=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert kept({"distinct": 0.1, "by": "overall"}, predictions) == [1, 2, 3, 4, 5]
    assert kept({"distinct": 0.1, "by": {"overall": -1}}, predictions) == [0, 2, 3, 4, 5]
    assert kept({"distinct": 0.1, "within": "pool"}, predictions) == [1, 2, 4, 5]


@pytest.mark.parametrize("spread", [0.0, 1e-3])
@pytest.mark.parametrize("everywhere", [{}, {"within": "pool"}])
def test_of_a_pool_of_copies_one_stays(make_predictions, spread, everywhere):
    """Standardised over such a pool, what is left of them are directions of noise."""
    rng = np.random.default_rng(0)
    features = np.ones(16) + spread * rng.normal(size=(8, 16))
    predictions = make_predictions(8, features=features, overall=np.linspace(0, 1, 8))
    assert kept({"distinct": 0.1, "by": "overall"} | everywhere, predictions) == [7]


def test_a_random_choice_depends_on_names_and_seed_alone(make_predictions):
    predictions = make_predictions(50, overall=np.linspace(0, 1, 50))
    chosen = kept({"random": 20}, predictions)
    assert len(chosen) == 20
    assert kept({"random": 20, "seed": 1}, predictions) != chosen
    rules = read_rules({"late": {"score": "overall", "at_least": 0.5}, "some": {"random": 50}})
    assert select(rules, predictions)[-1].kept.tolist() == list(range(25, 50))  # more than there are: all
    fewer = read_rules({"late": {"score": "overall", "at_least": 0.5}, "some": {"random": 5}})
    assert set(select(fewer, predictions)[-1].kept) <= set(kept({"random": 40}, predictions))


def test_and_or(make_predictions):
    predictions = make_predictions(4, plausibility=[0, 0, 1, 1], alignment=[0, 1, 0, 1])
    both = [{"score": "plausibility", "at_least": 1}, {"score": "alignment", "at_least": 1}]
    assert kept({"all": both}, predictions) == [3]
    assert kept({"any": both}, predictions) == [1, 2, 3]
    assert kept({"any": [{"all": both}, {"score": "plausibility", "at_most": 0}]}, predictions) == [0, 1, 3]


def test_an_empty_selection_names_the_rule_and_how_far_off_the_last_ones_were(make_predictions):
    predictions = make_predictions(4, overall=[0.1, 0.6, 0.7, 0.2], aesthetics=[1, 1, 0, 0])
    spec = {"nice": {"score": "aesthetics", "at_least": 1}, "strict": {"score": "overall", "at_least": 0.9}}
    with pytest.raises(EmptySelectionError) as caught:
        select(read_rules(spec), predictions)
    for phrase in ("`strict` (overall at least 0.9)", "last 2 of 4", "2 behind `nice`", "from 0.1 to 0.6", "loosen"):
        assert phrase in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"r": {"scor": "overall", "at_least": 1}}, r"`r`: there is no rule `scor` \(nearest name: `score`\)"),
        ({"r": {"score": "overal", "at_least": 1}}, r"there is no score `overal` \(nearest name: `overall`\)"),
        ({"r": {"score": "overall", "atleast": 1}}, r"setting of `score` `atleast` \(nearest name: `at_least`\)"),
        ({"r": {"map": "plausibility", "at_most": 1}}, r"no map `plausibility` \(nearest name: `implausibility`\)"),
        ({"r": {"best_of": {"overal": 1}}}, "there is no score `overal`"),
        ({"r": {"score": "overall"}}, "`r` has no threshold"),
        ({"r": {"score": "overall", "at_least": 0.9, "at_most": 0.1}}, "keeps nothing: at_least 0.9 is above"),
        ({"r": {"score": "overall", "at_least": "high"}}, "a threshold is 'high'; it must be a number"),
        ({"r": {"score": "overall", "best_of": "overall"}}, "has score, best_of; it must have one of"),
        ({"r": {"quantile": "overall", "at_least": 75}}, r"quantiles lie in \[0, 1\]"),
        ({"r": {"map": "implausibility", "at_most": 30}}, r"a threshold of a map is 30.0; it must lie in \[0, 1\]"),
        ({"r": {"map": "implausibility", "above": 50, "at_most": 0.01}}, r"above is 50; it must lie in \[0, 1\]"),
        ({"r": {"misaligned": 0, "threshold": 5}}, r"threshold is 5; it must lie in \[0, 1\]"),
        ({"r": {"distinct": -1}}, r"distinct, 1 - the cosine, is -1; it must lie in \[0, 2\]"),
        ({"r": {"best_of": "overall", "keep": 0}}, "keep is 0; it must be a whole number of at least 1"),
        ({"r": {"misaligned": 0.5}}, "misaligned is 0.5; it must be a whole number"),
        ({"r": {"distinct": 0.1, "within": "prompts"}}, "within is 'prompts'; it must be prompt or pool"),
        ({"r": {"any": {"score": "overall"}}}, "`any` takes a list of rules"),
        ({"r": {"any": [{"scor": 1}]}}, "rule 1 of `any`: there is no rule `scor`"),
        ({"r": 0.5}, "`r` is 0.5; a rule is a mapping"),
        (None, "rules: there is none"),
    ],
)
def test_rules_that_are_not_understood(spec, message):
    with pytest.raises(ValueError, match=message):
        read_rules(spec)
