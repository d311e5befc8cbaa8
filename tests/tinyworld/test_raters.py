import numpy as np
import pytest
from scipy import ndimage
from scipy.stats import pearsonr, spearmanr

from reward.feedback import HEATMAPS, SCORES
from tinyworld.grammar import ASSETS, draw_request
from tinyworld.judge import judge
from tinyworld.rated import read_pictures
from tinyworld.raters import FRESH, Rating, ceiling, consolidate, disks, rate
from tinyworld.scenes import SIZE, lay_out, plant
from tinyworld.verdicts import read_verdicts


def _rating(score=3, implausible=(), misaligned=(), words=(0, 0, 0)):
    marks = {"implausibility": implausible, "misalignment": misaligned}
    marks = {name: np.array(points, float).reshape(-1, 2) for name, points in marks.items()}
    return Rating(dict.fromkeys(SCORES, score), marks, words)


@pytest.fixture(scope="module")
def population():
    """Verdicts on generated pictures such as raters are asked about, with captions' lengths."""
    _, pictures, captions = zip(*read_pictures(ASSETS / "pickapic" / "test.parquet"), strict=True)
    kept = read_verdicts(ASSETS / "verdicts" / "test.parquet", pictures, captions)
    return [(verdict, len(caption.split())) for verdict, caption in zip(kept, captions, strict=True)][::2]


def _trio(population, first):
    return [
        consolidate([rate(verdict, words, f"u{k}", first + rater) for rater in range(3)], SIZE)
        for k, (verdict, words) in enumerate(population)
    ]


def test_consolidation_in_closed_form():
    ratings = [
        _rating(1, implausible=[(10, 20)], words=(1, 0, 1)),
        _rating(4, implausible=[(10, 20), (50, 50)], words=(1, 0, 0)),
        _rating(5, words=(0, 0, 1)),
    ]
    said = consolidate(ratings, height=60, width=80)
    assert said.scores == pytest.approx(dict.fromkeys(SCORES, (10 / 3 - 1) / 4))
    assert said.labels == (1, 0, 1)
    assert said.words == pytest.approx([2 / 3, 0, 2 / 3])
    heatmap = said.maps["implausibility"]
    assert heatmap.shape == (60, 80)
    assert heatmap.dtype == np.float32
    assert set(np.unique(heatmap)) == {0, np.float32(1 / 3), np.float32(2 / 3)}
    rows, columns = np.mgrid[:60, :80] + 0.5
    near = [np.hypot(columns - x, rows - y) <= 3 for x, y in ((10, 20), (50, 50))]  # 1/20 of the height
    assert heatmap == pytest.approx((2 * near[0] + 1 * near[1]) / 3)
    assert not said.maps["misalignment"].any()


def test_overlapping_marks_of_one_rater_count_once():
    assert consolidate([_rating(implausible=[(30, 30), (31, 30)])], 60).maps["implausibility"].max() == 1


def test_a_disk_has_the_area_of_a_disk():
    assert disks(np.array([[200.0, 200.0]]), 400, 400).sum() == pytest.approx(np.pi * 20**2, rel=0.01)
    assert not disks(np.zeros((0, 2)), 40, 40).any()


def test_bad_ratings_are_named():
    with pytest.raises(ValueError, match="no rating"):
        consolidate([], 64)
    with pytest.raises(ValueError, match=r"\[3, 4\] words"):
        consolidate([_rating(), _rating(words=(0, 0, 0, 0))], 64)


def test_ratings_are_fixed_by_seed_picture_and_rater(population):
    verdict, words = next(one for one in population if one[0].implausible.any() and one[0].words)

    def said(*key):
        rating = rate(verdict, words, *key)
        return rating.scores, {name: points.tolist() for name, points in rating.marks.items()}, rating.words

    assert said("a", 1) == said("a", 1)
    others = [("b", 1), ("a", 2), ("a", 1, 5)]
    assert all(said(*key) != said("a", 1) for key in others)


def test_two_trios_agree_as_people_do(population):
    one, other = _trio(population, 0), _trio(population, 3)
    for name in SCORES:
        agreement = spearmanr([said.scores[name] for said in one], [said.scores[name] for said in other])[0]
        assert 0.75 <= agreement <= 0.9, f"{name}: {agreement:.3f}"


def test_raters_are_right_on_the_whole(population):
    trio = _trio(population, 0)
    for name in SCORES:
        truth = [verdict.scores[name] for verdict, _ in population]
        # Not by ranks: seven pictures of ten are aligned to the full, and there is no order among them.
        assert pearsonr([said.scores[name] for said in trio], truth)[0] > 0.75
    wrong = np.concatenate([np.isin(np.arange(words), verdict.words) for verdict, words in population])
    said = np.concatenate([said.labels for said in trio])
    assert 0.85 < said[wrong].mean() < 1
    assert 0 < said[~wrong].mean() < 0.02
    masks = {"implausibility": "implausible", "misalignment": "misaligned"}
    for name in HEATMAPS:
        inside, outside, empty = [], [], []
        for (verdict, _), record in zip(population, trio, strict=True):
            mask = getattr(verdict, masks[name])
            if mask.any():
                inside.append(record.maps[name][mask].mean())
                outside.append(record.maps[name][~ndimage.binary_dilation(mask, iterations=6)].mean())
            else:
                empty.append(record.maps[name].max() == 0)
        assert np.mean(inside) > 20 * np.mean(outside)
        assert np.mean(empty) > 0.7


def test_small_flaws_are_overlooked_more_often():
    rng = np.random.default_rng(1)
    seen = []
    for strength in (0.3, 1.0):
        marks = []
        for number in range(25):
            scene = lay_out(draw_request(rng), rng)
            caption = str(scene.request)
            verdict = judge(plant(scene, "bitten", strength, rng).picture, caption)
            marks += [
                len(rate(verdict, len(caption.split()), f"u{number}", k).marks["implausibility"]) for k in range(8)
            ]
        seen.append((np.mean([count > 0 for count in marks]), np.mean(marks)))
    assert seen[0][0] < seen[1][0]
    assert seen[0][1] < seen[1][1], "large flaws are marked by several points"


def test_ceiling_is_the_mean_of_fresh_raters(population):
    verdict, words = population[1]
    top = ceiling(verdict, words, "u1", SIZE)
    again = consolidate([rate(verdict, words, "u1", FRESH + k) for k in range(64)], SIZE)
    assert top.scores == again.scores
    assert (top.maps["implausibility"] == again.maps["implausibility"]).all()
    assert len(top.words) == words
    with pytest.raises(ValueError, match="at least 64"):
        ceiling(verdict, words, "u1", SIZE, raters=3)


def test_ceiling_predicts_a_trio_better_than_a_trio_does(population):
    population = population[::4]  # 64 raters each
    trio, other = _trio(population, 0), _trio(population, 3)
    tops = [ceiling(verdict, words, f"u{k}", SIZE) for k, (verdict, words) in enumerate(population)]
    for name in SCORES:
        labels = [said.scores[name] for said in trio]
        top, fellow = (np.corrcoef([said.scores[name] for said in group], labels)[0, 1] for group in (tops, other))
        assert top > fellow
