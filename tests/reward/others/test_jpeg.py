import io

import pytest
import torch
from PIL import Image

from reward.feedback import check_reward
from reward.others import JpegCompressibility, JpegIncompressibility
from tests.reward.others.conftest import PROMPTS


def kilobytes(image, quality):
    array = (image * 255).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="JPEG", quality=quality)
    return len(buffer.getvalue()) / 1000


def test_it_is_the_files_size_in_kilobytes(images):
    reward = JpegIncompressibility()(images, PROMPTS)
    check_reward(reward, PROMPTS)
    assert reward.total.tolist() == pytest.approx([kilobytes(image, 95) for image in images])
    small = JpegIncompressibility(quality=30)(images, PROMPTS).total
    assert small.tolist() == pytest.approx([kilobytes(image, 30) for image in images])
    assert torch.equal(JpegCompressibility()(images, PROMPTS).total, -reward.total)
    assert not JpegIncompressibility.differentiable


def test_noise_is_worth_more_than_nothing(images):
    images[0], images[1] = torch.rand(3, 40, 56, generator=torch.Generator().manual_seed(0)), 0.5
    noise, nothing, _ = JpegIncompressibility()(images, PROMPTS).total
    assert noise > 3 * nothing


def test_it_lies_between_one_colour_and_noise_as_its_docstring_says():
    noise = torch.rand(3, 512, 512, generator=torch.Generator().manual_seed(0))
    sizes = JpegIncompressibility()(torch.stack([torch.full((3, 512, 512), 0.5), noise]), ["", ""]).total
    assert sizes.tolist() == pytest.approx([5, 308], rel=0.1)


def test_what_makes_no_sense_is_refused(images):
    with pytest.raises(ValueError, match=r"lies in 1\.\.100"):
        JpegIncompressibility(quality=0)
    with pytest.raises(ValueError, match="3 images were given with 1 prompts"):
        JpegCompressibility()(images, ["a"])
    images[1, 0, 0, 0] = float("nan")
    assert JpegCompressibility()(images, PROMPTS).total.isnan().tolist() == [False, True, False]
