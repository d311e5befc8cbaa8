from collections import Counter

import pytest
import torch

from finetune.pool import open_pool
from finetune.sft_data import BucketBatches, Crop, TrainingPictures, Visit, make_buckets, nearest_bucket, read_weights
from finetune.sft_trainer import warn_of_rare
from rl.policy import StableDiffusionPolicy


@pytest.fixture
def policy(pipeline_folder):
    return StableDiffusionPolicy.load(pipeline_folder, lora_rank=2)


def test_a_picture_is_shrunk_until_it_covers_its_bucket_then_cut_in_the_middle():
    assert Crop.of((600, 900), (512, 768)) == Crop((600, 900), (512, 768), (0, 0), (512, 768))
    crop = Crop.of((600, 900), (512, 512))
    assert (crop.resized, crop.top_left) == ((512, 768), (0, 128))
    assert crop.time_ids.tolist() == [600, 900, 0, 128, 512, 512]
    ramp = torch.arange(8, dtype=torch.uint8).expand(3, 4, 8)  # 4 x 8 pixels, brighter to the right
    assert torch.equal(Crop.of((4, 8), (4, 4)).apply(ramp)[0, 0] * 255, torch.tensor([2.0, 3.0, 4.0, 5.0]))


def test_buckets_are_multiples_the_network_can_halve_of_about_as_many_pixels(policy):
    assert make_buckets(policy, aspect_ratios=False) == [(16, 16)]
    buckets = make_buckets(policy, aspect_ratios=True)
    assert len(buckets) > 2
    assert all(side % 4 == 0 for bucket in buckets for side in bucket)  # the VAE halves once, the U-Net once
    assert all(0.6 < height * width / 256 < 1.5 for height, width in buckets)


def test_nearest_bucket_treats_upright_and_lying_alike():
    buckets = [(512, 512), (384, 640), (640, 384)]
    assert nearest_bucket((900, 600), buckets) == (640, 384)
    assert nearest_bucket((600, 900), buckets) == (384, 640)
    assert nearest_bucket((600, 650), buckets) == (512, 512)


def test_batches_hold_one_bucket_and_an_epoch_holds_every_picture():
    buckets = {"wide": range(0, 5), "square": range(5, 13)}
    sampler = BucketBatches(buckets, 2, seed=0, rank=0, world_size=1)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 3 + 4
    places = [[visit.place for visit in batch] for batch in batches]
    assert all(len({place < 5 for place in batch}) == 1 and len(batch) == 2 for batch in places)
    together = [place for batch in places for place in batch]
    assert sorted(together)[-8:] == list(range(5, 13))
    assert set(together) == set(range(13))
    assert list(sampler) == batches
    sampler.set_epoch(1)
    assert [[visit.place for visit in batch] for batch in sampler] != places
    assert {visit.epoch for batch in sampler for visit in batch} == {1}


def test_two_processes_share_the_batches_of_one_with_twice_the_size():
    buckets = {"wide": range(0, 5), "square": range(5, 13)}
    whole = list(BucketBatches(buckets, 4, seed=0, rank=0, world_size=1))
    shares = [list(BucketBatches(buckets, 2, seed=0, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [first + second for first, second in zip(*shares, strict=True)] == whole


def test_fewer_pictures_than_a_batch_are_repeated_as_other_visits():
    (batch,) = BucketBatches({"one": [3, 7]}, 5, seed=0, rank=0, world_size=1)
    assert sorted(visit.place for visit in batch) in ([3, 3, 3, 7, 7], [3, 3, 7, 7, 7])
    assert [visit.time for visit in batch] == [0, 0, 1, 1, 2]


def test_weights_have_mean_one(write_pictures, tmp_path):
    pool = open_pool(write_pictures(tmp_path / "p", 2, overall=[0.2, 0.6], name=["a", "b"], plausibility=[1.0, -1.0]))
    assert read_weights(pool, {}, None).tolist() == [1, 1]
    assert read_weights(pool, {"overall": 2.0}, None).tolist() == pytest.approx([0.5, 1.5])
    ratio = read_weights(pool, {"overall": 1.0}, 0.2)
    assert float(ratio.mean()) == pytest.approx(1)
    assert float(ratio[1] / ratio[0]) == pytest.approx(2.718282**2, rel=1e-4)
    with pytest.raises(ValueError, match=r"no column of numbers in .* `overal` \(nearest name: `overall`\)"):
        read_weights(pool, {"overal": 1.0}, None)
    with pytest.raises(ValueError, match=r"no column of numbers in .* `name`"):
        read_weights(pool, {"name": 1.0}, None)
    with pytest.raises(ValueError, match=r"values from -1 to 1 are no weights.*set weight_temperature"):
        read_weights(pool, {"plausibility": 1.0}, None)


def test_weights_of_a_csv_are_numbers_too(write_pictures, tmp_path):
    folder = write_pictures(tmp_path / "p", 2)
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("file_name,text,overall,name\n0.png,a red circle,0.2,a\n1.png,b,0.6,b\n")
    pool = open_pool(folder)
    assert read_weights(pool, {"overall": 1.0}, None).tolist() == pytest.approx([0.5, 1.5])
    with pytest.raises(ValueError, match=r"no column of numbers in .* `name`"):
        read_weights(pool, {"name": 1.0}, None)


def test_kept_latents_are_those_of_the_pictures_and_are_decoded_to_them(write_pictures, tmp_path, policy, caplog):
    pool = open_pool(write_pictures(tmp_path / "p", 3, sizes=((16, 16), (12, 24))))
    pictures = TrainingPictures(pool, [(16, 16), (12, 20)], torch.ones(3))
    assert "1 of 3" not in caplog.text
    assert [crop.bucket for crop in pictures.crops] == [(16, 16), (12, 20), (16, 16)]
    before = pictures[Visit(0, 1, 0)]["pixels"]
    done = []
    pictures.encode(policy, 2, 0, 1, done.append)
    assert sorted(done) == [1, 2]
    example = pictures[Visit(5, 1, 0)]
    for latent in pictures.latents.values():  # and not as a view of its batch, which would be sent whole
        assert latent.untyped_storage().nbytes() == latent.numel() * latent.element_size()
    assert (example["visit"].epoch, example["prompt"], example["latents"].shape) == (5, "a blue square", (4, 6, 10))
    posterior = policy.pipeline.vae.encode(2 * before[None] - 1).latent_dist
    torch.testing.assert_close(example["latents"], posterior.mean[0] * policy.pipeline.vae.config.scaling_factor)
    decoded = policy.pipeline.vae.decode(posterior.mean).sample / 2 + 0.5
    torch.testing.assert_close(policy.decode(example["latents"][None]), decoded.clamp(0, 1).detach())


def test_small_pictures_are_enlarged_with_a_warning(write_pictures, tmp_path, caplog):
    pool = open_pool(write_pictures(tmp_path / "p", 3, sizes=((8, 8), (32, 32))))
    TrainingPictures(pool, [(16, 16)], torch.ones(3))
    assert "2 of 3 pictures are smaller than they are trained at" in caplog.text


def test_how_often_an_epoch_shows_a_picture_of_a_rare_size():
    """Counted from the batches themselves."""
    buckets = {(64, 64): list(range(9)), (64, 96): [9], (96, 64): [10, 11]}
    sampler = BucketBatches(buckets, 4, seed=0, rank=0, world_size=1)
    shown = Counter(visit.place for batch in sampler for visit in batch)
    assert sampler.most_shown == {
        bucket: max(shown[place] for place in places) for bucket, places in buckets.items()
    } == {(64, 64): 2, (64, 96): 4, (96, 64): 2}  # fmt: skip
    assert len(sampler) == len(list(sampler)) == 5


def test_rare_sizes_are_named(caplog):
    buckets = {(64, 64): list(range(9)), (64, 96): [9]} | {(96, 8 * side): [10 + side] for side in range(1, 4)}
    warn_of_rare(BucketBatches(buckets, 3, seed=0, rank=0, world_size=2))
    assert "64x96 (1) up to 6 times, 96x8 (1) up to 6 times, 96x16 (1) up to 6 times and 1 sizes more" in caplog.text
    assert "64x64" not in caplog.text
    caplog.clear()
    warn_of_rare(BucketBatches({(64, 64): list(range(9))}, 4, seed=0, rank=0, world_size=1))
    assert not caplog.text
