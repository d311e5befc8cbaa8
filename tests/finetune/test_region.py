import pytest
import torch

from finetune.region import cells, put_in, region, working_size


def test_region_by_hand():
    """One marked column, 8 x 8: it reaches 2 columns further, and fades over the next 2."""
    marked = torch.zeros(8, 8)
    marked[:, 0] = 0.5
    share = region({"bad": marked}, {"bad": 0.4}, (8, 8), dilate=2 / 8, feather=2 / 8)
    assert share[3].tolist() == [1, 1, 1, 0.5, 0, 0, 0, 0]
    assert region({"bad": marked}, {"bad": 0.4}, (8, 8), dilate=1 / 8)[0].tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert region({"bad": marked}, {"bad": 0.5}, (8, 8), dilate=1, feather=1).max() == 0  # not above


def test_a_place_is_in_the_region_if_any_map_says_so_whatever_its_resolution():
    one, other = torch.zeros(2, 2), torch.zeros(4, 8)
    one[0, 0] = other[3, 7] = 1
    share = region({"one": one, "other": other, "unused": torch.ones(1, 1)}, {"one": 0.9, "other": 0.9}, (4, 8))
    assert share[0, 0] == share[3, 7] == 1
    assert share[0, 7] == share[3, 0] == 0


def test_pixels_outside_the_region_stay_bit_for_bit():
    source = torch.Generator().manual_seed(0)
    picture = torch.randint(0, 256, (3, 9, 7), generator=source, dtype=torch.uint8)
    share = torch.zeros(9, 7)
    share[2:5, 3:6] = torch.rand(3, 3, generator=source)
    new = torch.rand(2, 3, 9, 7, generator=source)
    new[:, :, 0, 0] = float("nan")  # whatever is drawn there
    mixed = put_in(picture, new, share)
    outside = (share == 0).expand(2, 3, 9, 7)
    assert torch.equal(mixed[outside], picture.expand(2, 3, 9, 7)[outside])
    assert torch.equal(put_in(picture, new.nan_to_num(), torch.ones(9, 7)), (new.nan_to_num() * 255).round().byte())
    half = put_in(torch.zeros(3, 1, 1, dtype=torch.uint8), torch.ones(1, 3, 1, 1), torch.full((1, 1), 0.5))
    assert half.flatten().tolist() == [128, 128, 128]


def test_every_latent_cell_that_a_region_touches_is_free_in_whole():
    share = torch.zeros(16, 16)
    share[5, 11] = 0.01
    mask = cells(share, (16, 16), 4)
    assert mask.sum() == 16
    assert (mask[4:8, 8:12] == 1).all()
    assert cells(share, (8, 8), 4).tolist()[0] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert cells(share, (32, 32), 4)[8:12, 20:24].min() == 1


@pytest.mark.parametrize(
    ("size", "resolution", "expected"),
    [((64, 64), None, (64, 64)), ((65, 30), None, (64, 32)), ((512, 768), 512, (416, 624)), ((5, 5), None, (16, 16))],
)
def test_working_size(size, resolution, expected):
    assert working_size(size, resolution, 16) == expected
