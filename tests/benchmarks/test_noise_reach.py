from argparse import Namespace
from pathlib import Path

import noise_reach
import pytest
import torch
from noise_reach import distances, made_anew, measured, near, rows_of


def test_distances_are_along_the_longer_axis():
    (away,) = distances(torch.tensor([[1, 2]]), (3, 4))
    assert away.tolist() == [[2, 1, 1, 1], [2, 1, 0, 1], [2, 1, 1, 1]]


def test_one_draw_at_one_place_is_made_anew():
    noise, fresh = torch.zeros(2, 3, 2, 4, 4), torch.ones(2, 3, 2, 4, 4)
    changed = made_anew(noise, fresh, 1, torch.tensor([[0, 3], [2, 2]]))
    assert changed.sum() == 4  # two channels of each picture
    assert (changed[0, 1, :, 0, 3] == 1).all()
    assert (changed[1, 1, :, 2, 2] == 1).all()
    assert noise.sum() == 0


def test_what_is_near_is_by_hand():
    """Even over 16 x 16 places, from the corner: 4, 9 and 25 of them; from a place inside 9, 25 and 81."""
    places = torch.tensor([[0, 0], [7, 8]])
    even = near(torch.ones(2, 16, 16), places)
    assert {reach: inside.tolist() for reach, inside in even.items()} == {1: [4, 9], 2: [9, 25], 4: [25, 81]}
    change = torch.zeros(2, 16, 16)
    change[0, 0, 1], change[0, 5, 5], change[1, 9, 9] = 1.0, 3.0, 2.0
    assert {reach: inside.tolist() for reach, inside in near(change, places).items()} == {
        1: [1.0, 0.0], 2: [1.0, 2.0], 4: [1.0, 2.0]
    }  # fmt: skip


def test_few_pictures_that_change_much_weigh_in_one_share_and_not_in_the_other():
    """Nine pictures change by 1 at their own place, one by 91 far away."""
    change = torch.zeros(1, 10, 8, 8)
    change[0, :9, 0, 0], change[0, 9, 7, 7] = 1.0, 91.0
    rows = {row.name: row for row in rows_of(change, torch.zeros(10, 2, dtype=torch.long))}
    assert rows["the start: share within 2, all pictures together"].value == pytest.approx(0.09)
    assert rows["the start: share within 2, mean over pictures"].value == pytest.approx(0.9)
    assert rows["the start: median change of a picture"].value == 1
    assert rows["the start: mean change of a picture"].value == 10
    together = rows["the start: share within 2, all pictures together"]
    assert together.low < 0.09 < together.high == 1  # without that picture


def test_the_table_names_each_draw_by_its_step():
    change = torch.zeros(2, 3, 8, 8)
    change[0] = 1.0  # the start changes all
    change[1, :, 2, 2] = 5.0
    rows = {row.name: row for row in rows_of(change, torch.tensor([[2, 2], [2, 2], [7, 7]]))}
    assert rows["the start: mean change of a picture"].value == 64
    assert rows["noise of step 0: mean change of a picture"].value == 5
    assert rows["noise of step 0: share within 1, all pictures together"].value == pytest.approx(2 / 3)
    even = pytest.approx((9 + 9 + 4) / 3 / 64)
    assert rows["if all places changed alike: share within 1"].value == even
    assert rows["the start: share within 1, all pictures together"].value == even


def test_noise_of_late_steps_stays_where_it_is(monkeypatch):
    """Of the small world's ten steps: nothing but the place's own is decided late, and every draw counts."""
    monkeypatch.setattr(noise_reach, "DRAWS", 50)
    monkeypatch.setattr(noise_reach, "BATCH", 4)
    options = Namespace(config=Path("configs/ddpo_tinyworld.yaml"), pictures=6)
    rows = {row.name: row.value for row in measured(options)}
    assert {name for name in rows if name.endswith("median change of a picture")} == {
        "the start: median change of a picture",
        *(f"noise of step {step}: median change of a picture" for step in range(9)),
    }
    late, early = (rows[f"noise of step {step}: share within 2, mean over pictures"] for step in (8, 1))
    assert late > 0.5
    assert late > 2 * early
    changed = [rows[f"noise of step {step}: median change of a picture"] for step in (1, 8)]
    assert changed[0] > 10 * changed[1]
    assert measured(options)[0].value == rows["the start: median change of a picture"]
