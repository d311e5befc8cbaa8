"""The parts that `tinyworld.build` is made of: loop, autoencoder, text, pretraining tasks, pool."""

import numpy as np
import pytest
import torch
from torch import nn

from tinyworld import build, rated
from tinyworld.autoencoder import decode, encode, new_autoencoder, whiten
from tinyworld.build import PROMPTS, STAGES, draw_prompts
from tinyworld.corruption import corrupt
from tinyworld.eye import Labelled, agreement_of_viewers, contact_sheet, disagreements
from tinyworld.grammar import WORDS, draw_request, is_held_out, parse
from tinyworld.loop import fit, keyed
from tinyworld.pool import make_pool
from tinyworld.pretrain import falsify, make_predictor_tokenizer
from tinyworld.rated import SPLITS, Split, draw_captions
from tinyworld.scenes import Thing, render
from tinyworld.text import LENGTH, make_tokenizer, tokenize


def quadratic(model: nn.Linear):
    """A loss whose batch depends on the step alone."""
    return lambda step: (model(torch.randn(8, 3, generator=keyed(1, step))) - 1).square().mean()


def test_a_resumed_fit_ends_where_an_uninterrupted_one_does(tmp_path, capsys):
    def run(name: str, stops: list[int]) -> dict[str, torch.Tensor]:
        for stop in stops:
            torch.manual_seed(0)
            model = nn.Linear(3, 1)
            # A schedule of 8 steps throughout: the run is cut off after `stop` of them.
            loss = quadratic(model)

            def cut_off(step: int, loss=loss, stop=stop) -> torch.Tensor:
                if step == stop:
                    raise KeyboardInterrupt
                return loss(step)

            try:
                average = fit(model, cut_off, tmp_path / name, steps=8, rate=0.1, warmup=2, save_every=2)
            except KeyboardInterrupt:
                continue
        return average.state_dict()

    whole, resumed = run("whole.pt", [8]), run("resumed.pt", [3, 8])
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_state_of_another_schedule_is_refused(tmp_path, capsys):
    """Its rate would be neither's."""
    path = tmp_path / "state.pt"
    fit(model := nn.Linear(3, 1), quadratic(model), path, steps=4, rate=0.1)
    for other in ({"steps": 8, "rate": 0.1}, {"steps": 4, "rate": 0.2}):
        with pytest.raises(ValueError, match="is the state of a training of 4 steps"):
            fit(model, quadratic(model), path, **other)


def test_the_average_normalises_as_the_model_does(tmp_path, capsys):
    seen = []
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))

    def loss(step: int) -> torch.Tensor:
        seen.append(torch.randn(8, 3, generator=keyed(2, step)) + 5)
        return model(seen[-1]).square().mean()

    average = fit(model, loss, tmp_path / "normed.pt", steps=5, rate=0.0)
    torch.manual_seed(0)
    alone = nn.BatchNorm1d(2)
    for batch in seen:
        alone(model[0](batch))
    assert alone.running_mean.abs().min() > 0.1
    torch.testing.assert_close(average[1].running_mean, alone.running_mean)
    torch.testing.assert_close(average[1].running_var, alone.running_var)


def test_keyed_draws_differ_by_key_and_agree_for_the_same():
    draws = {key: torch.rand(3, generator=keyed(*key)) for key in [(0, 1), (1, 0), (0, 2), (0, 1, 0)]}
    values = {tuple(draw.tolist()) for draw in draws.values()}
    assert len(values) == len(draws)
    assert torch.equal(draws[0, 1], torch.rand(3, generator=keyed(0, 1)))


def test_whitening_changes_the_latents_and_not_the_pictures():
    vae = new_autoencoder().eval()
    pictures = np.random.default_rng(0).integers(0, 255, (16, 64, 64, 3), dtype=np.uint8)
    before, drawn = encode(vae, pictures), decode(vae, encode(vae, pictures))
    whiten(vae, pictures)
    latents = encode(vae, pictures)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)
    assert before.std((0, 2, 3)).sub(1).abs().max() > 0.1
    assert np.abs(decode(vae, latents).astype(int) - drawn).max() <= 1


def test_every_word_is_one_token_and_captions_fit(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    ids = tokenize(tokenizer, [*WORDS, "a red star left of a blue square and a green cross"])
    assert ids.shape == (len(WORDS) + 1, LENGTH)
    assert len({int(row[1]) for row in ids[:-1]}) == len(WORDS)
    assert int((ids[-1] == tokenizer.eos_token_id).sum()) == LENGTH - 13
    assert make_predictor_tokenizer()("a purple star").input_ids.count(2) == 1  # a word it does not know


def test_falsified_captions_are_false_and_marked_where_they_are():
    rng = np.random.default_rng(0)
    for _ in range(300):
        request = draw_request(rng)
        false, labels = falsify(request, rng)
        words, true = str(false).split(), str(request).split()
        assert parse(str(false)) == false
        assert not is_held_out(false)
        assert len(labels) == len(words)
        assert 1 in labels
        assert str(false) != str(request)
        if len(words) == len(true):  # then only plurals may differ besides what is marked
            changed = {place for place, pair in enumerate(zip(words, true, strict=True)) if pair[0] != pair[1]}
            marked = {place for place, label in enumerate(labels) if label}
            plural = {place for place in changed - marked if words[place].rstrip("es") == true[place].rstrip("es")}
            assert changed - marked <= plural
            assert marked <= changed


def test_spoiled_places_are_those_that_changed():
    rng = np.random.default_rng(0)
    things = [Thing("red", "star", *rng.uniform(20, 44, 2).tolist(), 14.0) for _ in range(32)]
    pictures = np.stack([render((thing,)) for thing in things])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    spoiled, where = corrupt(images, keyed(1))
    change = (spoiled - images).abs().amax(1)
    seen = change > 0.25
    around = torch.nn.functional.max_pool2d(seen.float()[:, None], 3, stride=1, padding=1)[:, 0] > 0
    assert torch.equal(where, around)
    assert 0.8 < where.any(2).any(1).float().mean() <= 1
    assert where.float().mean() < 0.2
    again, there = corrupt(images, keyed(1))
    assert torch.equal(again, spoiled)
    assert torch.equal(there, where)
    empty, nowhere = corrupt(images[:, :, :1, :1].expand(-1, -1, 64, 64), keyed(1))  # nothing there to spoil
    assert not nowhere.any()
    assert torch.isfinite(empty).all()


def test_the_eye_and_the_judge_are_compared_picture_by_picture():
    good, bad = (
        render((Thing("red", "circle", 32, 32, 14),)),
        render((Thing("red", "circle", 32, 32, 14, (0.28, 3, 0)),)),
    )
    labelled = [
        Labelled(good, "a red circle", (True, True, False)),
        Labelled(bad, "a red circle", (True, True, True)),
        Labelled(good, "a red square", (False, False, False)),
        Labelled(good, "a red circle", (False, True, False)),
    ]
    assert [one.satisfied for one in labelled] == [True, True, False, False]
    assert agreement_of_viewers(labelled) == [0.75, 0.75, 0.5]
    found = disagreements(labelled)
    assert [number for number, *_ in found] == [1, 3]
    assert "malformed" in found[0][2]
    assert found[1][2] == "satisfied"
    assert contact_sheet(found).size == (5 * 256, 256 + 44)


def test_the_pool_is_drawn_once_and_holds_nothing_held_out(tmp_path):
    pictures, captions = make_pool(tmp_path / "pool", 0.5, seed=3, count=40)
    again, _ = make_pool(tmp_path / "pool", 0.5, seed=4, count=40)  # there already: the seed is not asked
    other, _ = make_pool(tmp_path / "same", 0.5, seed=3, count=40)
    assert np.array_equal(pictures, again)
    assert np.array_equal(pictures, other)
    assert not any(is_held_out(parse(caption)) for caption in captions)


def test_prompts_and_splits_keep_held_out_apart():
    prompts = draw_prompts()
    assert {name: len(chosen) for name, chosen in prompts.items()} == PROMPTS
    assert all(len(set(chosen)) == len(chosen) for chosen in prompts.values())
    assert all(is_held_out(parse(prompt)) for prompt in prompts["held_out"])
    assert not any(is_held_out(parse(prompt)) for prompt in prompts["train"])
    for split in SPLITS[1:]:
        assert all(is_held_out(parse(caption)) == split.held_out for caption in draw_captions(split, 1))
    for split in rated.MORE:
        assert (split.name, split.held_out, len(split.variants)) == ("train", False, 5)
    for variants in (rated.VARIANTS, rated.POLICIES):
        assert sum(variant.share for variant in variants) == pytest.approx(1)
    assert {variant.policy for variant in rated.POLICIES} == set(build.POLICIES)
    assert set(build.BuildArguments().stages) == set(STAGES) - {"verdicts", "ceiling", "finer", "more"}


def test_policies_draw_behind_what_the_variants_drew(monkeypatch, tmp_path):
    """The first predictor's pictures stay as they are, by place and so by uid; the policies' follow in train."""
    splits = (Split("train", 3), Split("dev", 2), Split("train", 2, variants=rated.POLICIES))
    monkeypatch.setattr(rated, "SPLITS", splits)

    def draw(captions, variants, load, seed):
        shade = 100 if variants is rated.VARIANTS else 200
        return np.full((2 * len(captions), 64, 64, 3), shade + len(captions), np.uint8)

    monkeypatch.setattr(rated, "draw_pictures", draw)
    made = build.Build(tmp_path)
    made.rated()
    made.rated_again()
    first, again = (
        {name: list(rated.read_pictures(tmp_path / folder / f"{name}.parquet")) for name in ("train", "dev")}
        for folder in ("pickapic_first", "pickapic")
    )
    assert [(uid, caption) for uid, _, caption in again["train"][:6]] == [(uid, c) for uid, _, c in first["train"]]
    assert [int(picture[0, 0, 0]) for _, picture, _ in again["train"]] == [100] * 6 + [204] * 4  # steps of 8, plus 4
    assert (len(first["train"]), len(first["dev"])) == (6, 4)
    assert [uid for uid, *_ in again["dev"]] == [uid for uid, *_ in first["dev"]]
    assert len({uid for uid, *_ in again["train"]}) == 10


def test_finishing_halves_the_flawed_pictures_and_the_ceiling_sees_none(monkeypatch, tmp_path):
    seen = {}

    def finish(denoiser, tokenizer, latents, captions, path, *, report):
        seen[path.name] = latents.tolist(), captions
        return denoiser

    monkeypatch.setattr(build, "finish_generator", finish)
    monkeypatch.setattr(build, "_save_half", lambda denoiser, file: None)
    made = build.Build(tmp_path)
    monkeypatch.setattr(made, "_train_generator", lambda name, flawed: None)
    monkeypatch.setattr(made, "_tokenizer", lambda: None)
    monkeypatch.setattr(made, "_latents", lambda flawed: torch.full((2,), float(flawed)))
    monkeypatch.setattr(made, "_pool", lambda flawed: (None, [f"flawed {flawed}"] * 2))
    made.finishing()
    made._finish("ceiling", flawed=False)
    assert seen["generator_finished.pt"] == ([1, 1, 0, 0], ["flawed True"] * 2 + ["flawed False"] * 2)
    assert seen["ceiling_finished.pt"] == ([0, 0], ["flawed False"] * 2)
