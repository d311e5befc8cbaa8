import pytest

from reward.by_name import make_reward, make_weighted_reward, read_named_rewards
from tests.rl.toy_rewards import Redness


def test_rewards_are_named_by_module_and_attribute():
    assert make_reward("tests.rl.toy_rewards:Redness", {"weight": 2.0}).weight == 2.0
    assert make_reward("tests.rl.toy_rewards:brightness").__name__ == "brightness"  # not a class: taken as it is
    assert isinstance(make_reward("tests.rl.toy_rewards:Redness"), Redness)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("tests.rl.toy_rewards", {}, "package.module:Attribute"),
        ("tests.rl.no_such:Thing", {}, "no module tests.rl.no_such"),
        ("tests.rl.toy_rewards:Thing", {}, "no attribute Thing"),
        ("tests.rl.toy_rewards:Redness", {"wait": 1}, r"unexpected keyword argument 'wait'.*it takes \(weight"),
        ("tests.rl.toy_rewards:torch", {"a": 1}, "not a class"),
        ("tests.rl.toy_rewards:torch", {}, "is a module, which cannot be called"),
        ("tests.rl.toy_rewards:Uncallable", {}, "is a Uncallable, which cannot be called"),
        ("math:sqrt", {}, r"math:sqrt takes \(x, /\); a reward takes images"),
        ("tests.rl.toy_rewards:OfPicturesAlone", {}, r"OfPicturesAlone takes \(self, images\); a reward takes"),
        ("builtins:dict", {"a": 1}, "does not say what arguments it takes"),
        (3, {}, "3 does not name a reward"),
    ],
)
def test_rewards_that_cannot_be_made(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_reward(name, kwargs)


def test_a_weighted_sum_is_made_of_named_rewards():
    entries = {
        "blue": {"reward": "tests.rl.toy_rewards:Redness", "weight": 2, "kwargs": {"weight": 3.0}},
        "bright": {"reward": "tests.rl.toy_rewards:brightness", "weight": "1e-1"},  # as YAML 1.1 reads 1e-1
        "plain": "tests.rl.toy_rewards:Plain",
    }
    reward = make_weighted_reward(read_named_rewards("rewards", entries, weights=True))
    assert reward.weights == {"blue": 2.0, "bright": 0.1, "plain": 1.0}
    assert reward.members["blue"].weight == 3.0


@pytest.mark.parametrize(
    ("entries", "weights", "message"),
    [
        ({"a": 3}, True, r"rewards: 'a': 3 does not name a reward; write .* reward, kwargs, weight"),
        ({"a": {"weight": 1}}, True, "None does not name a reward"),
        ({"a": {"reward": "m:a", "wieght": 1}}, True, "unknown key 'wieght' .nearest valid one: 'weight'"),
        ({"a": {"reward": "m:a", "weight": 1}}, False, "unknown key 'weight'"),
        ({"a": {"reward": "m:a", "kwargs": [1]}}, True, r"kwargs must be a mapping, not \[1\]"),
        ({"a.b": "m:a"}, True, "'a.b' cannot be a reward's name"),
        ({1: "m:a"}, True, "1 cannot be a reward's name"),
        *(
            ({"a": {"reward": "m:a", "weight": weight}}, True, "its weight is .*; it must be a finite number")
            for weight in ("heavy", None, True, float("nan"), float("inf"), [1])
        ),
    ],
)
def test_entries_that_cannot_be_read(entries, weights, message):
    with pytest.raises(ValueError, match=message):
        read_named_rewards("rewards", entries, weights)


def test_no_reward_is_made_before_all_are_known(monkeypatch):
    monkeypatch.setattr(Redness, "__init__", lambda self: pytest.fail("was made"))
    entries = {"first": "tests.rl.toy_rewards:Redness", "second": "tests.rl.toy_rewards:Nothing"}
    with pytest.raises(ValueError, match="no attribute Nothing"):
        make_weighted_reward(read_named_rewards("rewards", entries, weights=True))
