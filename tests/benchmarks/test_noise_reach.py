from argparse import Namespace
from pathlib import Path

import noise_reach
import pytest
import torch
from noise_reach import distances, made_anew, measured, rows_of, shares


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


def test_shares_are_by_hand():
    """Even over 16 x 16 places, from the corner: 4, 9 and 25 of them; from a place inside 9, 25 and 81."""
    places = torch.tensor([[0, 0], [7, 8]])
    even = shares(torch.ones(2, 16, 16), places)
    assert {reach: (share * 256).tolist() for reach, share in even.items()} == {1: [4, 9], 2: [9, 25], 4: [25, 81]}
    change = torch.zeros(2, 16, 16)
    change[0, 0, 1], change[0, 5, 5], change[1, 9, 9] = 1.0, 3.0, 2.0
    assert {reach: share.tolist() for reach, share in shares(change, places).items()} == {
        1: [0.25, 0.0], 2: [0.25, 1.0], 4: [0.25, 1.0]
    }  # fmt: skip


def test_the_table_names_each_draw_by_its_step():
    change = torch.zeros(2, 3, 8, 8)
    change[0] = 1.0  # the start changes all
    change[1, :, 2, 2] = 5.0
    rows = {row.name: row for row in rows_of(change, torch.tensor([[2, 2], [2, 2], [7, 7]]))}
    assert rows["the start: change of a picture"].value == 64
    assert rows["noise of step 0: change of a picture"].value == 5
    assert rows["noise of step 0: share within 1"].value == pytest.approx(2 / 3)
    assert rows["if all places changed alike: share within 1"].value == pytest.approx((9 + 9 + 4) / 3 / 64)
    assert rows["the start: share within 1"].value == pytest.approx((9 + 9 + 4) / 3 / 64)


def test_noise_of_late_steps_stays_where_it_is(monkeypatch):
    """Of the small world's ten steps: nothing but the place's own is decided late, and every draw counts."""
    options = Namespace(config=Path("configs/ddpo_tinyworld.yaml"), pictures=6)
    monkeypatch.setattr(noise_reach, "BATCH", 4)
    rows = {row.name: row.value for row in measured(options)}
    assert {name for name in rows if name.endswith("change of a picture")} == {
        "the start: change of a picture", *(f"noise of step {step}: change of a picture" for step in range(9))
    }  # fmt: skip
    assert rows["noise of step 8: share within 2"] > 0.5
    assert rows["noise of step 8: share within 2"] > 2 * rows["noise of step 1: share within 2"]
    assert rows["noise of step 1: change of a picture"] > 10 * rows["noise of step 8: change of a picture"]
    assert measured(options)[0].value == rows["the start: change of a picture"]
