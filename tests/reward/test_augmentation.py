import numpy as np
import pytest
import torch

from reward.augmentation import Augmentation, adjust_colour, through_jpeg, turn_hue

EVERYTHING = {
    "flip_probability": 0.5,
    "crop_probability": 0.5,
    "crop_min_side": 0.5,
    "brightness": 0.3,
    "contrast": 0.3,
    "hue": 0.3,
    "saturation": 0.3,
    "grayscale_probability": 0.3,
    "jpeg_probability": 0.5,
    "jpeg_min_quality": 20,
}


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(3, 16, 16, generator=generator), torch.rand(2, 8, 8, generator=generator)


@pytest.fixture
def places():
    """A picture and maps in which each value tells its place, the picture four times as fine."""
    grid = torch.arange(32.0)[:, None] * 32 + torch.arange(32.0)
    image = grid.repeat_interleave(4, 0).repeat_interleave(4, 1).expand(3, 128, 128) / 1024
    return image, (grid / 1024).expand(2, 32, 32)


def test_by_default_nothing_changes(pair):
    image, maps = Augmentation()(*pair, "a 0", (8, 8))
    assert image is pair[0]
    assert maps is pair[1]


def test_crops_cut_picture_and_maps_alike(places):
    augment = Augmentation(seed=1, crop_probability=1.0, crop_min_side=0.5)
    sides = set()
    for key in range(30):
        cut_image, cut_maps = augment(*places, f"{key}", (32, 32))
        side = cut_maps.shape[-1]
        assert cut_image.shape == (3, 4 * side, 4 * side)
        assert 16 <= side <= 32
        assert torch.equal(cut_image[0, ::4, ::4], cut_maps[0])
        sides.add(side)
    assert len(sides) > 5


def test_flips_swap_left_and_right_of_picture_and_maps(places):
    image, maps = Augmentation(flip_probability=1.0)(*places, "a 0", (32, 32))
    assert torch.equal(image[0, :, 0], places[0][0, :, -1])
    assert torch.equal(maps, places[1].flip(-1))
    flipped = [
        bool(Augmentation(flip_probability=0.25)(*places, f"{key}", (32, 32))[1][0, 0, 0] > places[1][0, 0, 0])
        for key in range(200)
    ]
    assert 0.15 < np.mean(flipped) < 0.35


def test_prompts_that_speak_of_sides_are_not_flipped(places):
    flip = Augmentation(flip_probability=1.0)
    for tokens, flipped in ((["a", "cat"], True), (["Left", "of", "it"], False), (["leftovers"], True), ([], True)):
        assert torch.equal(flip(*places, "a 0", (32, 32), tokens)[1], places[1].flip(-1) if flipped else places[1])
    sided = Augmentation(flip_probability=1.0, sided_words=("Gauche",))
    assert torch.equal(sided(*places, "a 0", (32, 32), ["gauche"])[1], places[1])


def test_a_flip_and_a_crop_together_keep_picture_and_maps_in_step(places):
    for key in range(10):
        image, maps = Augmentation(flip_probability=1.0, crop_probability=1.0)(*places, f"{key}", (32, 32))
        assert torch.equal(image[0, ::4, ::4], maps[0])
        assert (maps[0, :, 0] > maps[0, :, -1]).all()


def test_only_geometry_touches_the_maps(pair):
    colours = {**EVERYTHING, "flip_probability": 0.0, "crop_probability": 0.0, "jpeg_probability": 1.0}
    image, maps = Augmentation(**colours)(*pair, "a 0", (8, 8))
    assert torch.equal(maps, pair[1])
    assert not torch.equal(image, pair[0])


def test_draws_depend_on_seed_and_key_only(pair):
    first = Augmentation(1, **EVERYTHING)(*pair, "a 0", (8, 8))
    torch.manual_seed(5)
    again = Augmentation(1, **EVERYTHING)(*pair, "a 0", (8, 8))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    for seed, key in ((1, "a 1"), (1, "b 0"), (2, "a 0")):
        assert not torch.equal(first[0].mean(), Augmentation(seed, **EVERYTHING)(*pair, key, (8, 8))[0].mean())


def test_one_setting_moves_no_other_ones_draws(pair):
    alone = Augmentation(3, crop_probability=1.0, crop_min_side=0.5)(*pair, "a 0", (8, 8))[1]
    beside = Augmentation(3, crop_probability=1.0, crop_min_side=0.5, hue=0.2, jpeg_probability=1.0)(
        *pair, "a 0", (8, 8)
    )[1]
    assert torch.equal(alone, beside)


def test_everything_together_stays_in_range(pair):
    for key in range(50):
        image, maps = Augmentation(**EVERYTHING)(*pair, f"{key}", (8, 8))
        for values in (image, maps):
            assert 0 <= values.min() <= values.max() <= 1


def test_colours_by_hand():
    image = torch.tensor([0.2, 0.4, 0.6])[:, None, None].expand(3, 2, 2)
    grey = 0.299 * 0.2 + 0.587 * 0.4 + 0.114 * 0.6
    assert adjust_colour(image) is image
    torch.testing.assert_close(adjust_colour(image, brightness=2.0)[:, 0, 0], torch.tensor([0.4, 0.8, 1.0]))
    torch.testing.assert_close(adjust_colour(image, contrast=0.0), torch.full((3, 2, 2), grey))
    torch.testing.assert_close(adjust_colour(image, saturation=0.0), torch.full((3, 2, 2), grey))


def test_hue_by_hand(pair):
    image = pair[0]
    third = turn_hue(image, 1 / 3)  # red -> green -> blue -> red
    torch.testing.assert_close(third, image.roll(1, 0), atol=1e-5, rtol=0)
    torch.testing.assert_close(turn_hue(image, 1.0), image, atol=1e-5, rtol=0)
    torch.testing.assert_close(turn_hue(turn_hue(image, 0.2), -0.2), image, atol=1e-5, rtol=0)
    orange = torch.tensor([1.0, 0.5, 0.0])[:, None, None]  # 30 degrees
    torch.testing.assert_close(turn_hue(orange, 0.5)[:, 0, 0], torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(turn_hue(orange, 1 / 12)[:, 0, 0], torch.tensor([1.0, 1.0, 0.0]))


@pytest.mark.parametrize("turn", [0.1, 0.37, -0.5])
def test_a_turn_of_hue_leaves_grey_and_the_extremes(pair, turn):
    grey = torch.linspace(0, 1, 16).expand(3, 2, 16)
    assert torch.equal(turn_hue(grey, turn), grey)
    turned = turn_hue(pair[0], turn)
    torch.testing.assert_close(turned.amax(0), pair[0].amax(0))
    torch.testing.assert_close(turned.amin(0), pair[0].amin(0), atol=1e-6, rtol=0)


def test_grayscale_takes_all_colour(pair):
    image, _ = Augmentation(grayscale_probability=1.0, saturation=0.5)(*pair, "a 0", (8, 8))
    torch.testing.assert_close(image, image[:1].expand(3, -1, -1))
    torch.testing.assert_close(image[0], pair[0][0] * 0.299 + pair[0][1] * 0.587 + pair[0][2] * 0.114)


def test_jpeg_is_near_repeats_and_worsens_with_quality(pair):
    flat = torch.full((3, 16, 16), 100 / 255)
    torch.testing.assert_close(through_jpeg(flat, 50), flat, atol=1 / 255, rtol=0)
    errors = [(through_jpeg(pair[0], quality) - pair[0]).square().mean().item() for quality in (95, 50, 10)]
    assert 0 < errors[0] < errors[1] < errors[2]
    assert torch.equal(through_jpeg(pair[0], 30), through_jpeg(pair[0], 30))
    odd = through_jpeg(torch.rand(3, 9, 13), 80)
    assert (odd.shape, odd.dtype) == ((3, 9, 13), torch.float32)


def test_jpeg_quality_is_drawn_between_the_lowest_and_95(pair, monkeypatch):
    seen = set()
    monkeypatch.setattr("reward.augmentation.through_jpeg", lambda image, quality: seen.add(quality) or image)
    augment = Augmentation(jpeg_probability=1.0, jpeg_min_quality=90)
    for key in range(200):
        augment(*pair, f"{key}", (8, 8))
    assert seen == {90, 91, 92, 93, 94, 95}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flip_probability": 1.5}, r"flip_probability must be in \[0, 1\], not 1.5"),
        ({"crop_probability": -0.1}, r"crop_probability must be in \[0, 1\], not -0.1"),
        ({"crop_min_side": 0.0}, r"crop_min_side must be in \(0, 1\], not 0.0"),
        ({"brightness": float("nan")}, r"brightness must be in \[0, 1\], not nan"),
        ({"hue": 0.6}, r"hue must be in \[0, 0.5\], not 0.6"),
        ({"grayscale_probability": 2}, "grayscale_probability"),
        ({"jpeg_probability": 2}, "jpeg_probability"),
        ({"jpeg_min_quality": 0}, r"jpeg_min_quality must be in \[1, 95\], not 0"),
        ({"jpeg_min_quality": 100}, r"jpeg_min_quality must be in \[1, 95\], not 100"),
    ],
)
def test_settings_outside_their_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**settings)


def test_crops_of_maps_that_are_not_square():
    """By a share of each side; a lattice of the sides' common divisor would allow none here."""
    augment, flat = Augmentation(crop_probability=1.0, crop_min_side=0.5), torch.zeros(3, 48, 35)
    shapes = {augment(flat, flat[:2], f"{key}", (48, 35))[1].shape[-2:] for key in range(99)}
    assert len(shapes) > 10
    assert all(abs(height / 48 - width / 35) < 1 / 35 and width >= 17 for height, width in shapes)
