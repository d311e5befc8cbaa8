import numpy as np
import pytest
import torch

from tinyworld.grammar import GROUND, KINDS, is_held_out, parse
from tinyworld.judge import judge
from tinyworld.lessons import NO_WORD, draw_lesson, make_lessons
from tinyworld.pretrain_on_lessons import planted_scores
from tinyworld.scenes import SIZE


@pytest.fixture(scope="module")
def lessons():
    rng = np.random.default_rng(3)
    return [draw_lesson(rng) for _ in range(60)]


def mask(lesson, name):
    return np.unpackbits(lesson[name]).reshape(SIZE, SIZE).astype(bool)


def test_the_judge_finds_what_was_planted(lessons):
    """The judge looks at the picture alone; a lesson knows what was done to it."""
    agreed = {True: [], False: []}
    for lesson in lessons:
        verdict = judge(lesson["pictures"], lesson["captions"])
        spoiled = bool(mask(lesson, "implausible").any())
        agreed[spoiled].append(set(verdict.words) == set(np.flatnonzero(lesson["words"] == 1)))
        if not spoiled:
            assert not verdict.implausible.any()
            wrong = mask(lesson, "misaligned")
            assert verdict.misaligned.any() == wrong.any()
    assert min(map(len, agreed.values())) > 10
    assert np.mean(agreed[False]) > 0.9


def test_words_kinds_and_compositions(lessons):
    belied = 0
    for lesson in lessons:
        request, length = parse(lesson["captions"]), len(lesson["captions"].split())
        assert not is_held_out(request)
        assert (lesson["words"][length:] == NO_WORD).all()
        assert set(lesson["words"][:length]) <= {0, 1}
        drawn = {KINDS[index] for index in np.flatnonzero(lesson["kinds"])}
        if not (lesson["words"] == 1).any() and not mask(lesson, "misaligned").any():
            assert drawn == {noun.kind for noun in request.nouns}
        else:
            belied += 1
    assert 15 < belied < 45


def test_lessons_are_kept_and_the_same_again(tmp_path):
    made = make_lessons(tmp_path / "one", seed=1, count=5)
    again, other = make_lessons(tmp_path / "one", seed=1, count=5), make_lessons(tmp_path / "two", seed=1, count=5)
    assert len(made.captions) == 5
    assert made.captions == again.captions == other.captions
    for name in ("pictures", "implausible", "misaligned", "words", "kinds"):
        assert np.array_equal(getattr(made, name), getattr(other, name))
    rng = np.random.default_rng((1, 0))
    expected = np.stack([mask(draw_lesson(rng), "misaligned") for _ in range(5)])
    assert np.array_equal(made.mask("misaligned", np.arange(5)), expected)


def test_chunks_are_drawn_by_other_processes_as_they_would_be_here(tmp_path, monkeypatch):
    monkeypatch.setattr("tinyworld.lessons._CHUNK", 3)
    made = make_lessons(tmp_path, seed=1, count=5)
    rngs = [np.random.default_rng((1, start)) for start in (0, 3)]
    expected = [draw_lesson(rngs[row // 3]) for row in range(5)]
    assert made.captions == [lesson["captions"] for lesson in expected]
    for name in ("pictures", "implausible", "misaligned", "words", "kinds"):
        assert np.array_equal(getattr(made, name), np.stack([lesson[name] for lesson in expected]))


def test_planted_scores_by_hand():
    images = torch.tensor(GROUND)[:, None, None].expand(3, 64, 64)[None].repeat(2, 1, 1, 1) / 255
    images[:, :, :10, :10] = 0  # 100 pixels are drawn
    spoiled, astray = torch.zeros(2, 64, 64, dtype=torch.bool), torch.zeros(2, 64, 64, dtype=torch.bool)
    spoiled[1, :5, :10] = True  # half of them
    astray[1, :10, :10] = True
    words = torch.tensor([[0, 0, NO_WORD], [1, 0, 1]])
    scores = planted_scores(images, spoiled, astray, words)
    torch.testing.assert_close(scores["plausibility"], torch.tensor([1.0, float(np.exp(-1.5))]))
    torch.testing.assert_close(scores["alignment"], torch.tensor([1.0, float(np.exp(-2 / 3 - 1))]))
