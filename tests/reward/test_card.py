import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from reward.card import choose_examples, example_sheet, markdown, statistics
from reward.feedback import SCORES
from reward.pictures import encode_png
from reward.richhf import FEATURES


def image(value, mode="L"):
    return {"bytes": encode_png(Image.new(mode, (8, 8), value)), "path": None}


@pytest.fixture
def split():
    """Four examples: plausibility 0, 0.25, 0.5, 0.75; the others 1; one map in four, and none, is marked."""
    rows = [
        {
            "uid": f"u{index}",
            "image": image((0, 128, 255), "RGB"),
            "prompt": "a b",
            "tokens": ["a", "b"][: 1 + index % 2],
            "keyword_labels": [1, 0][: 1 + index % 2],
            **dict.fromkeys(SCORES, 1.0),
            "plausibility": index / 4,
            "implausibility_map": image(85 if index == 2 else 0),
            "misalignment_map": image(0),
        }
        for index in range(4)
    ]
    return Dataset.from_list(rows, features=FEATURES)


def test_statistics_are_the_counted_ones(split):
    found = statistics(split)
    assert len(found) == 4
    assert found.scores["plausibility"].tolist() == [0, 0.25, 0.5, 0.75]
    assert found.empty == {"implausibility": 0.75, "misalignment": 1.0}
    assert found.words.tolist() == [1, 2, 1, 2]
    assert found.misaligned == 4 / 6


def test_the_table_says_them(split):
    text = markdown({"train": statistics(split), "dev": statistics(split.select([]))}, "what was dropped")
    for line in (
        "|  | train | dev |",
        "| examples | 4 | 0 |",
        "| plausibility, mean ± std | 0.375 ± 0.280 | - |",
        "| empty implausibility maps | 75.0% | - |",
        "| words per prompt, median | 1.5 | - |",
        "| words per prompt, longest | 2 | - |",
        "| misaligned words | 66.7% | - |",
        "    what was dropped",
    ):
        assert line in text.splitlines()
    assert "nan" not in text


def test_examples_are_different_and_drawn_from_all():
    sizes = {"train": 30, "dev": 20}
    chosen = choose_examples(sizes, seed=0)
    assert len(set(chosen)) == len(chosen) == 12
    assert all(row < sizes[name] for name, row in chosen)
    assert chosen == choose_examples(sizes, seed=0) != choose_examples(sizes, seed=1)
    assert len({pair for seed in range(60) for pair in choose_examples(sizes, seed)}) == 50
    assert sorted(choose_examples({"train": 2, "dev": 1}, seed=0)) == [("dev", 0), ("train", 0), ("train", 1)]


def test_marks_are_drawn_over_their_picture_only(split):
    """The third example's first map is marked all over, the first one's is empty."""
    empty, marked = (np.asarray(example_sheet([("", split[index])])).reshape(-1, 3) for index in (0, 2))
    plain = (0, 128, 255)
    counts = [int((pixels == plain).all(1).sum()) for pixels in (empty, marked)]
    assert counts == [3 * 160 * 160, 2 * 160 * 160]  # picture and two overlays, 160 pixels each
