import numpy as np
import torch
from PIL import Image

from reward import draw


def test_overlay_shows_where_the_map_is():
    image, heatmap = torch.full((3, 32, 32), 0.5), torch.zeros(8, 8)
    heatmap[:4] = 1.0
    drawn = draw.to_array(draw.overlay(image, heatmap)).astype(int)
    assert drawn.shape == (32, 32, 3)
    assert (drawn[24:] == 128).all()  # an empty map leaves the picture
    assert (np.abs(drawn[:8] - 128).sum(-1) > 60).all()


def test_pictures_keep_their_values_and_are_clipped():
    image = torch.tensor([-1.0, 0.2, 2.0])[:, None, None].expand(3, 4, 6)
    assert draw.to_array(draw.to_image(image))[0, 0].tolist() == [0, 51, 255]
    assert draw.to_image(image, height=8).size == (12, 8)
    assert np.array(draw.heatmap_image(torch.tensor([[0.0, 1.0], [0.5, 2.0]]))).tolist() == [[0, 255], [128, 255]]


def test_strips_are_drawn_at_most_eight_times_as_long_as_wide():
    for size, drawn in (((1000, 1), (5, 40)), ((1, 3000), (320, 40)), ((10, 80), (320, 40)), ((30, 90), (120, 40))):
        assert draw.overlay(torch.rand(3, *size), torch.rand(4, 4), height=40).size == drawn


def red(image):
    array = draw.to_array(image).astype(int)
    return ((array[..., 0] - array[..., 1]) > 100).sum()


def test_words_above_the_threshold_are_struck_out():
    tokens = ["a", "red", "circle"]
    assert red(draw.struck_text(tokens, [0.1, 0.2, 0.3], 200)) == 0
    assert red(draw.struck_text(tokens, [0.1, 0.2, 0.3], 200, threshold=0.25)) > 20
    assert red(draw.struck_text(tokens, [0.9, 0.9, 0.9], 200)) > red(draw.struck_text(tokens, [0.9, 0.2, 0.3], 200)) > 0


def test_words_wrap():
    one, three = (draw.struck_text(["circle"] * count, [0.0] * count, 60) for count in (1, 3))
    assert three.height == 3 * one.height
    assert three.width == 60
    assert draw.struck_text([], [], 60).size == one.size


def test_grid_places_rows():
    tile = Image.new("RGB", (10, 6), "black")
    sheet = draw.grid([[tile, tile], [tile]], gap=2)
    assert sheet.size == (2 + 10 + 2 + 10 + 2, 2 + 6 + 2 + 6 + 2)
    assert (draw.to_array(sheet) == 0).all(-1).sum() == 3 * 60


def test_feedback_panel(predictor):
    image = torch.rand(2, 3, 20, 20)
    panel = draw.feedback_panel(image[1], predictor(image, ["a red circle", "blue"]), 1, height=40)
    assert panel.width > 120
    assert panel.height > 60
