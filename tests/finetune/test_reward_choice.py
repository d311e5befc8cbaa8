"""What is known of rewards that are not made yet."""

import pytest

from finetune.reward_choice import given_by
from reward.by_name import NamedReward

MAPS = NamedReward("reward.rich:RichReward", {"model": "nowhere", "penalty_weights": {"implausibility": 1.0}})
WORDS = NamedReward("reward.rich:RichReward", {"model": "nowhere", "word_weight": 1.0})
MAPS_OF_NO_WEIGHT = NamedReward(MAPS.reward, MAPS.kwargs, weight=0.0)
SERVED = NamedReward("reward.http:HttpReward", {"url": "http://127.0.0.1:1/"})


@pytest.mark.parametrize(
    ("rewards", "given"),
    [
        ([MAPS], {"penalties"}),
        ([MAPS, WORDS], {"penalties", "word_penalties"}),
        ([MAPS_OF_NO_WEIGHT, WORDS], {"word_penalties"}),
        ([MAPS, SERVED], None),
        ([NamedReward("tests.rl.toy_rewards:brightness")], None),
    ],
)
def test_given_by_several_is_what_any_of_them_gives(rewards, given):
    assert given_by(rewards) == given


def test_names_that_are_none_are_refused_beside_rewards_that_do_not_say():
    with pytest.raises(ValueError, match="no attribute Nothing"):
        given_by([SERVED, NamedReward("tests.rl.toy_rewards:Nothing")])
