import pytest
import torch

from reward.feedback import Reward, RewardError
from reward.weighted import WeightedReward

PROMPTS = ["a red circle", "two"]
IMAGES = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


class Member:
    """A reward that says what it was given."""

    def __init__(self, total, penalties=None, words=None, terms=None, differentiable=False, wrong=None, heatmaps=None):
        self.reward = Reward(torch.tensor(total), penalties or {}, words, terms or {}, wrong, heatmaps or {})
        self.differentiable = differentiable

    def __call__(self, images, prompts):
        return self.reward


def test_every_part_is_the_weighted_sum_by_hand():
    words = [torch.tensor([0.1, 0.0, 0.2]), torch.tensor([0.3])]
    first = Member(
        [1.0, 2.0], {"flaws": torch.tensor([[[0.0, 1.0]], [[2.0, 4.0]]])}, words, {"fit": torch.tensor([5.0, 6.0])}
    )
    second = Member([10.0, 20.0], {"flaws": torch.full((2, 3, 3), 0.5)}, [torch.ones(3), torch.ones(1)])
    reward = WeightedReward({"a": first, "b": second}, {"a": 2.0, "b": 0.1})(IMAGES, PROMPTS)
    torch.testing.assert_close(reward.total, torch.tensor([3.0, 6.0]))
    assert reward.penalties["a.flaws"].tolist() == [[[0.0, 2.0]], [[4.0, 8.0]]]
    assert reward.penalties["b.flaws"].shape == (2, 3, 3)  # each in its own size
    torch.testing.assert_close(reward.word_penalties[0], torch.tensor([0.3, 0.1, 0.5]))
    torch.testing.assert_close(reward.word_penalties[1], torch.tensor([0.7]))
    assert set(reward.terms) == {"a", "a.fit", "b"}
    assert reward.terms["a"].tolist() == [0.5, -1.0]  # the objective, before weighting
    torch.testing.assert_close(reward.objective, 2.0 * first.reward.objective + 0.1 * second.reward.objective)


def test_what_members_say_on_another_device_comes_to_the_pictures():
    """As of a member that computes with NumPy, on a GPU; the "meta" device stands for it."""
    member = Member([1.0, 2.0], {"flaws": torch.ones(2, 1, 2)}, [torch.ones(3), torch.ones(1)])
    reward = WeightedReward({"a": member}, {"a": 2.0})(IMAGES.to("meta"), PROMPTS)
    told = [reward.objective, *reward.penalties.values(), *reward.word_penalties]
    assert {tensor.device.type for tensor in told} == {"meta"}


def test_a_word_is_wrong_where_any_member_that_counts_says_so():
    def said(*wrong):
        return Member([1.0, 2.0], wrong=[torch.tensor(words) for words in wrong])

    members = {"a": said([True, False, False], [False]), "b": said([True, True, False], [False])}
    silent, off = Member([0.0, 0.0]), said([True] * 3, [True])
    weights = {"a": 1.0, "b": 0.1, "silent": 1.0, "off": 0.0}
    reward = WeightedReward({**members, "silent": silent, "off": off}, weights)(IMAGES, PROMPTS)
    assert [words.tolist() for words in reward.wrong_words] == [[True, True, False], [False]]
    assert WeightedReward({"a": silent}, {"a": 1.0})(IMAGES, PROMPTS).wrong_words is None


def test_heatmaps_keep_their_values_and_those_of_no_weight_are_left_out():
    members = {name: Member([1.0, 2.0], heatmaps={"m": torch.full((2, 1, 1), 0.5)}) for name in "abc"}
    reward = WeightedReward(members, {"a": 0.1, "b": 0.0, "c": -1.0})(IMAGES, PROMPTS)
    assert {name: maps.flatten().tolist() for name, maps in reward.heatmaps.items()} == {"a.m": [0.5, 0.5]}


def test_a_weight_may_be_negative_where_there_are_no_penalties():
    member = Member([1.0, 2.0])
    assert WeightedReward({"a": member}, {"a": -1.0})(IMAGES, PROMPTS).total.tolist() == [-1.0, -2.0]
    for costs in ({"penalties": {"m": torch.zeros(2, 1, 1)}}, {"words": [torch.zeros(3), torch.zeros(1)]}):
        with pytest.raises(RewardError, match=r"a has a weight of -1.0 and penalties"):
            WeightedReward({"a": Member([1.0, 2.0], **costs)}, {"a": -1.0})(IMAGES, PROMPTS)


def test_a_weight_of_zero_only_shows_its_terms():
    member = Member([1.0, 2.0], {"m": torch.ones(2, 1, 1)})
    reward = WeightedReward({"a": member, "b": Member([3.0, 4.0])}, {"a": 0.0, "b": 1.0})(IMAGES, PROMPTS)
    assert reward.total.tolist() == [3.0, 4.0]
    assert not reward.penalties
    assert reward.terms["a"].tolist() == [0.0, 1.0]


def test_gradients_flow_only_if_they_do_in_all():
    yes, no = Member([1.0, 2.0], differentiable=True), Member([1.0, 2.0])
    assert WeightedReward({"a": yes, "b": yes}, {"a": 1.0, "b": 1.0}).differentiable
    assert not WeightedReward({"a": yes, "b": no}, {"a": 1.0, "b": 1.0}).differentiable


def test_what_members_offer_is_passed_on():
    class Offers(Member):
        ranges = {"fit": (0.0, 1.0)}  # noqa: RUF012

        def features(self, images):
            return images.mean((2, 3))

    reward = WeightedReward({"a": Member([1.0, 2.0]), "b": Offers([1.0, 2.0])}, {"a": 1.0, "b": 1.0})
    assert reward.ranges == {"b.fit": (0.0, 1.0)}
    assert reward.features(IMAGES).shape == (2, 3)
    assert not hasattr(WeightedReward({"a": Member([1.0, 2.0])}, {"a": 1.0}), "features")


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (Member([1.0]), r"b: the reward's total has shape \(1,\) for 2 pictures"),
        (Member([1.0, float("nan")]), "b: the reward's total is nan for the prompt 'two'"),
        (Member([1.0, 2.0], words=[torch.ones(2), torch.ones(1)]), "b tells of 2 words .* sees 3"),
        (lambda images, prompts: images, "b: the reward function returned a Tensor"),
    ],
)
def test_the_member_that_is_wrong_is_named(member, message):
    good = Member([1.0, 2.0], words=[torch.ones(3), torch.ones(1)])
    with pytest.raises(RewardError, match=message):
        WeightedReward({"a": good, "b": member}, {"a": 1.0, "b": 1.0})(IMAGES, PROMPTS)


def test_nothing_cannot_be_weighed():
    with pytest.raises(ValueError, match="no reward to weigh"):
        WeightedReward({}, {})
