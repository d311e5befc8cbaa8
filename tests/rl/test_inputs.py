import pytest

from rl.inputs import make_reward
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
        (3, {}, "3 does not name a reward"),
    ],
)
def test_rewards_that_cannot_be_made(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_reward(name, kwargs)
