import pytest
import torch

from finetune.region_constraint import only_within, place_cost, problem_region, region_loss, region_sheet


def maps(*places, size=(1, 8, 8), cost=1.0):
    found = torch.zeros(size)
    for place in places:
        found[0][place] = cost
    return found


def test_region_is_where_all_maps_together_cost_more_than_the_threshold():
    """0.3 here and 0.3 there are none; at one place they are 0.6."""
    penalties = {"a": maps((2, 2), (5, 5), cost=0.3), "b": maps((2, 2), (7, 0), cost=0.3)}
    assert place_cost(penalties, (8, 8)).amax(dim=(1, 2, 3)).tolist() == pytest.approx([0.6])
    region = problem_region(place_cost(penalties, (8, 8)), threshold=0.5, dilation=0.0)
    assert region.shape == (1, 1, 8, 8)
    assert region[0, 0].nonzero().tolist() == [[2, 2]]
    assert problem_region(place_cost(penalties, (8, 8)), threshold=0.6, dilation=0.0).sum() == 0


def test_region_grows_by_a_share_of_the_shorter_side_and_stops_at_the_edges():
    inside = problem_region(place_cost({"a": maps((4, 4))}, (8, 8)), threshold=0.5, dilation=0.25)  # two pixels
    assert inside[0, 0].sum() == 25
    assert inside[0, 0, 2:7, 2:7].all()
    corner = problem_region(place_cost({"a": maps((0, 0))}, (8, 8)), threshold=0.5, dilation=0.25)
    assert corner[0, 0].sum() == 9
    wide = problem_region(place_cost({"a": maps((4, 8), size=(1, 8, 16))}, (8, 16)), threshold=0.5, dilation=0.25)
    assert wide[0, 0].sum() == 25


def test_maps_of_any_resolution_are_stretched():
    region = problem_region(place_cost({"coarse": maps((0, 0), size=(1, 2, 2))}, (8, 8)), threshold=0.5, dilation=0.0)
    assert region[0, 0, :3, :3].all()
    assert region[0, 0, 5:, 5:].sum() == 0


def test_loss_is_the_mean_change_outside():
    before = torch.zeros(2, 3, 4, 4)
    images = torch.full_like(before, 0.5)
    region = torch.zeros(2, 1, 4, 4)
    assert region_loss(images, before, region) == 0.5  # no problem region: the whole picture
    region[:, :, :2] = 1
    assert region_loss(images, before, region) == 0.25  # half of the places, and the mean is over all
    assert region_loss(images, before, torch.ones_like(region)) == 0
    images.requires_grad_(True)
    region_loss(images, before, region).backward()
    assert images.grad[:, :, :2].abs().sum() == 0
    assert images.grad[:, :, 2:] == pytest.approx(1 / images.numel())


def test_sheet_has_a_column_a_picture():
    images = torch.rand(3, 3, 16, 16)
    one, three = (region_sheet(images[:n], torch.zeros(n, 1, 16, 16), images[:n]) for n in (1, 3))
    assert three.width > 2.5 * one.width
    assert three.height == one.height


def test_gradients_reach_pictures_within_the_region_only():
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    region = torch.zeros(2, 1, 4, 4)
    region[0, :, 1:3, 2:] = 1
    within = only_within(images, region)
    assert torch.equal(within, images)
    within.square().sum().backward()
    assert torch.equal(images.grad, (2 * images * region).detach())
