import numpy as np
import torch
from judge_maps import JudgeMaps

from tinyworld.judge import judge


def test_the_judges_maps_are_the_judges():
    images = torch.full((2, 3, 64, 64), 0.5)
    images[1, :, 20:40, 20:40] = torch.tensor([0.9, 0.1, 0.1])[:, None, None]
    images[1, 2, 30:35, 10:50] = 1.0
    prompts = ["a red square", "a red square"]
    reward = JudgeMaps("tinyworld/assets/rahf", {"plausibility": 1.0}, {"implausibility": 4.0})
    said = reward(images, prompts)
    pictures = images.permute(0, 2, 3, 1).numpy()
    for place in range(2):
        expected = judge(pictures[place], prompts[place]).implausible
        np.testing.assert_array_equal(said.penalties["implausibility"][place].numpy(), 4.0 * expected)
    assert said.penalties["implausibility"].max() == 4
    torch.testing.assert_close(said.total, reward.predictor(images, prompts).scores["plausibility"])
