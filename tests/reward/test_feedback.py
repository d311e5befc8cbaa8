import pytest
import torch

from reward.feedback import Reward, RewardError, check_reward

NAN = float("nan")
PROMPTS = ["a circle", "two"]
GOOD = torch.tensor([1.0, 2.0])


def test_what_can_be_trained_on():
    words = [torch.zeros(2), torch.zeros(0)]
    check_reward(Reward(GOOD, {"m": torch.zeros(2, 3, 1)}, words, {"t": GOOD}), PROMPTS)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (GOOD, "returned a Tensor, not a reward.feedback.Reward"),
        (None, "returned a NoneType"),
        (Reward([1.0, 2.0]), r"total is a list, not a tensor \(2,\)"),
        (Reward(torch.tensor(1.0)), r"total has shape \(\) for 2 pictures, not \(2,\)"),
        (Reward(GOOD[:, None]), r"total has shape \(2, 1\) for 2 pictures, not \(2,\)"),
        (Reward(torch.ones(3)), r"total has shape \(3,\) for 2 pictures"),
        (Reward(torch.tensor([1.0, NAN])), r"total is nan for the prompt 'two' \(1 of 2 pictures\)"),
        (Reward(GOOD, terms={"t": torch.tensor([-torch.inf, 0])}), "term `t` is -inf for the prompt 'a circle'"),
        (Reward(GOOD, {"m": torch.ones(2, 4)}), r"map `m` has shape \(2, 4\) for 2 pictures, not \(2, H, W\)"),
        (Reward(GOOD, {"m": torch.ones(2, 1, 4, 4)}), r"map `m` has shape \(2, 1, 4, 4\)"),
        (Reward(GOOD, {"m": torch.ones(2, 0, 4)}), r"map `m` has shape \(2, 0, 4\): a map must have places"),
        (Reward(GOOD, {"m": torch.full((2, 1, 1), -0.5)}), r"map `m` is negative \(-0.5\); penalties are costs"),
        (Reward(GOOD, {"m": torch.full((2, 2, 2), NAN)}), "map `m` is nan for the prompt 'a circle'"),
        (Reward(GOOD, word_penalties=[torch.ones(2)]), "word penalties for 1 pictures, not 2"),
        (Reward(GOOD, wrong_words=[torch.ones(2).bool()]), "wrong words for 1 pictures, not 2"),
        (Reward(GOOD, heatmaps={"m": torch.ones(2, 4)}), r"heatmap `m` has shape \(2, 4\) for 2 pictures"),
        (Reward(GOOD, heatmaps={"m": torch.full((2, 1, 1), 1.5)}), r"heatmap `m` has values from 1.5 to 1.5, not in"),
        (Reward(GOOD, word_penalties=[[1.0], [2.0]]), "word penalties must be a tensor .T,. for each picture, not a"),
        (Reward(GOOD, word_penalties=[GOOD, -torch.ones(1)]), r"word penalties is negative \(-1.0\)"),
        (Reward(GOOD, word_penalties=[GOOD, torch.tensor([NAN])]), "word penalties are not finite .* 'two'"),
    ],
)
def test_what_cannot(reward, message):
    with pytest.raises(RewardError, match=message):
        check_reward(reward, PROMPTS)
