import numpy as np
import pytest
import torch
from draft_proof import BY_DDPO, HOLDING, SHORTER, UNHELD, Found, change_outside, rows_of


def test_change_is_counted_where_there_was_no_problem():
    """Two prompts of two pictures: the left half is the problem, the right one changes by 51, 0, 102 and 0 of 255."""
    before = np.zeros((4, 64, 64, 3), np.uint8)
    after = before.copy()
    after[:, :, :32] = 255
    after[0, :, 32:], after[2, :, 32:] = 51, 102
    region = torch.zeros(4, 1, 64, 64)
    region[..., :32] = 1
    assert change_outside(before, after, region, generations=2) == pytest.approx([0.1, 0.2])


def found(gain, change, pictures):
    """Three seeds, four prompts."""
    by_prompt = np.array([-0.02, 0.0, 0.0, 0.02])
    gains = [gain + by_prompt + 0.001 * seed for seed in (-1, 0, 1)]
    return Found({"satisfied": gains}, [np.full(4, change)] * 3, 1.0, pictures)


def test_the_goals_are_ratios_of_what_was_found():
    rows = {
        row.name: row
        for row in rows_of(
            {
                BY_DDPO: found(0.1, 0.06, 5120),
                SHORTER: found(0.09, 0.05, 1024),
                UNHELD: found(0.2, 0.08, 3200),
                HOLDING: found(0.19, 0.02, 6400),
            }
        )
    }
    goals = {name: (row.value, row.holds) for name, row in rows.items() if row.goal}
    assert goals == {
        "pictures, a fifth / ddpo": (pytest.approx(0.2), True),
        "gain, a fifth / ddpo": (pytest.approx(0.9), False),
        "change outside, with / without the constraint": (pytest.approx(0.25), True),
        "gain, with / without the constraint": (pytest.approx(0.95), True),
    }
    assert rows["draft: satisfied, gain"].low < 0.2 < rows["draft: satisfied, gain"].high
    assert rows["ddpo: pictures trained on"].value == 5120
