"""`python -m tinyworld.build --stages feedback`: pictures as Pick-a-Pic has them -> a rated data set."""

import numpy as np
import pytest
from datasets import load_from_disk

from reward.feedback import HEATMAPS, SCORES
from reward.tfrecords import read_frames
from tinyworld import build, rated
from tinyworld.grammar import ASSETS, draw_request, is_held_out, parse
from tinyworld.judge import judge
from tinyworld.raters import consolidate, rate
from tinyworld.scenes import SIZE, applicable, lay_out, plant, render
from tinyworld.verdicts import read_verdicts, write_verdicts

SPLITS = ("train", "dev", "test")


@pytest.fixture
def work(tmp_path):
    """A folder in which the stages before have drawn two pictures a caption: a flawless and a flawed one."""
    for number, split in enumerate(SPLITS):
        rng, captions, pictures = np.random.default_rng(number), [], []
        while len(captions) < 4:
            request = draw_request(rng)
            if is_held_out(request) != (split == "test"):
                continue
            scene = lay_out(request, rng)
            captions.append(str(request))
            pictures += [render(scene.things), plant(scene, str(rng.choice(applicable(scene))), 1.0, rng).picture]
        rated.write_pictures(split, captions, np.stack(pictures), tmp_path / "pickapic")
    return tmp_path


def test_the_stage_writes_what_three_raters_say_together(work, capsys):
    command = ["--stages", "feedback", "--work", str(work)]
    build.main(command)
    data = load_from_disk(str(work / "feedback"))
    assert set(data) == set(SPLITS)
    for split in SPLITS:
        pictures = list(rated.read_pictures(work / "pickapic" / f"{split}.parquet"))
        rows = {row["uid"]: row for row in data[split]}
        assert list(rows) == [uid for uid, *_ in pictures]
        for uid, picture, caption in pictures:
            row, words = rows[uid], caption.split()
            assert row["prompt"] == caption
            assert list(row["tokens"]) == words
            assert np.array_equal(np.array(row["image"].convert("RGB")), picture)
            verdict = judge(picture, caption)
            together = consolidate([rate(verdict, len(words), uid, rater) for rater in range(3)], SIZE)
            assert [row[name] for name in SCORES] == pytest.approx([together.scores[name] for name in SCORES])
            assert tuple(row["keyword_labels"]) == tuple(together.labels)  # 1 = misaligned, as in RichHF-18K: 0 there
            for name in HEATMAPS:
                blocks = np.array(row[f"{name}_map"]).reshape(SIZE, 8, SIZE, 8) / 255  # 512 x 512, a block a pixel
                np.testing.assert_allclose(blocks.max((1, 3)), together.maps[name], atol=0.5 / 255 + 1e-6)
                assert np.array_equal(blocks.max((1, 3)), blocks.min((1, 3)))
    assert set((work / "rated/held_out.txt").read_text().split("\n")[:-1]) == set(data["test"]["prompt"])

    before = {file: file.stat().st_mtime_ns for file in work.rglob("*") if file.is_file()}
    build.main(command)  # nothing is left to do
    assert {file: file.stat().st_mtime_ns for file in work.rglob("*") if file.is_file()} == before


def test_kept_verdicts_are_the_judges_and_rate_alike(work, monkeypatch):
    pickapic = work / "pickapic"
    rated.judge_all(pickapic, work / "verdicts")
    _, pictures, captions = zip(*rated.read_pictures(pickapic / "dev.parquet"), strict=True)
    kept = list(read_verdicts(work / "verdicts/dev.parquet", pictures, captions))
    for verdict, picture, caption in zip(kept, pictures, captions, strict=True):
        told = judge(picture, caption)
        assert verdict.scores == told.scores
        assert (verdict.words, verdict.flaws, verdict.satisfied) == (told.words, told.flaws, told.satisfied)
        assert np.array_equal(verdict.implausible, told.implausible)
        assert np.array_equal(verdict.misaligned, told.misaligned)
    assert len({verdict.satisfied for verdict in kept}) == 2

    train = work / "verdicts/train.parquet"
    write_verdicts(train, *(rows[:3] for rows in kept_of(pickapic, train, "train")))  # the others are judged
    rated.rate_all(pickapic, work / "kept", work / "verdicts")
    monkeypatch.setattr(rated, "ALONE", 0)  # other processes judge and rate as this one does, to the bit
    rated.rate_all(pickapic, work / "asked")
    for split in SPLITS:
        assert (work / f"asked/{split}.tfrecord").read_bytes() == (work / f"kept/{split}.tfrecord").read_bytes()

    with pytest.raises(ValueError, match=r"dev.parquet is of other pictures; .*--stages verdicts"):
        list(read_verdicts(work / "verdicts/dev.parquet", pictures, captions[::-1]))


def kept_of(pickapic, file, split):
    _, pictures, captions = zip(*rated.read_pictures(pickapic / f"{split}.parquet"), strict=True)
    return pictures, captions, list(read_verdicts(file, pictures, captions))


def test_more_pictures_follow_the_kept_ones(work, monkeypatch, tmp_path):
    """The first rows of train stay as they are, other splits too; a part that is drawn is not drawn again."""
    monkeypatch.setattr(build, "ASSETS", work)
    rated.judge_all(work / "pickapic", work / "verdicts")
    monkeypatch.setattr(rated, "MORE", (rated.Split("train", 2), rated.Split("train", 1)))
    calls = []

    def draw(captions, variants, load, seed):
        calls.append(seed)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return np.full((2 * len(captions), SIZE, SIZE, 3), 100, np.uint8)

    monkeypatch.setattr(rated, "draw_pictures", draw)
    with pytest.raises(KeyboardInterrupt):
        build.Build(tmp_path / "made").more()
    build.Build(tmp_path / "made").more()
    assert len(calls) == 3
    assert calls[1] == calls[2] != calls[0]
    data = load_from_disk(str(tmp_path / "made/more/feedback"))
    assert {split: len(rows) for split, rows in data.items()} == {"train": 8 + 6, "dev": 8, "test": 8}
    kept = [uid for uid, *_ in rated.read_pictures(work / "pickapic/train.parquet")]
    assert data["train"]["uid"][:8] == kept
    assert len(set(data["train"]["uid"])) == 14
    rated.rate_all(work / "pickapic", work / "alone")
    alone = find_records(work / "alone/train.tfrecord")
    assert find_records(tmp_path / "made/more/rated/train.tfrecord")[: len(alone)] == alone
    assert not any(is_held_out(parse(caption)) for caption in data["train"]["prompt"])


def find_records(file):
    return [frame.data for frame in read_frames(file)]


@pytest.mark.parametrize("split", SPLITS)
def test_verdicts_of_the_repository_are_what_the_judge_says(split):
    """Outlines are fitted in float32, and what is forgiven of them has thresholds: of the 1,300 of dev and test, 4 come
    out otherwise on an EPYC with AVX-512 than where they were kept, by 0.008 at most; the others within 1e-6."""
    _, pictures, captions = zip(*rated.read_pictures(ASSETS / "pickapic" / f"{split}.parquet"), strict=True)
    kept = list(read_verdicts(ASSETS / "verdicts" / f"{split}.parquet", pictures, captions))
    places, differ = range(0, len(kept), len(kept) // 25), []
    for place in places:
        there, told = kept[place], judge(pictures[place], captions[place])
        assert there.scores == pytest.approx(told.scores, abs=0.02)
        same = there.scores == pytest.approx(told.scores, abs=1e-6) and there.words == told.words
        masks = (there.implausible, told.implausible), (there.misaligned, told.misaligned)
        if not (same and all(np.array_equal(*pair) for pair in masks)):
            differ.append(place)
    assert len(differ) <= 1, f"of {len(places)} these differ: {differ}"
