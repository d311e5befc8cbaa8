"""What changed over a folder of results."""

import pytest
from rich.console import Console

from finetune.results import change_table, changes

T_OF_2 = 4.302653  # Student's 97.5% quantile of 2 degrees of freedom


def rows(*pairs):
    """Lines of (prompt, figure before, figure after)."""
    return [
        {"prompt": prompt, "old": {"file": "a.png", "reward": old}, "new": {"file": "b.png", "reward": new}}
        for prompt, old, new in pairs
    ]


def printed(figures):
    console = Console(width=120, record=True)
    console.print(change_table("pictures", figures, "old", "new"))
    return console.export_text()


def test_the_interval_is_students_over_prompts_however_many_pictures_each_has():
    many = rows(("a", 0.0, 1.0), ("a", 0.0, 3.0), ("b", 1.0, 2.0), ("c", 2.0, 2.0), ("c", 2.0, 2.5), ("c", 2.0, 1.5))
    figure = changes(many, "old", "new")["reward"]
    error = 1 / 3**0.5  # of the prompts' changes 2, 1, 0
    assert figure["interval"] == pytest.approx([1 - T_OF_2 * error, 1 + T_OF_2 * error], abs=1e-6)
    assert (figure["old"], figure["new"], figure["change"]) == (1.0, 2.0, 1.0)
    assert figure["worse"] == pytest.approx(1 / 6)
    assert "+1.0000 (-1.4841 .. +3.4841)" in printed({"reward": figure})
    assert "16.7%" in printed({"reward": figure})
    twice = changes([*many, *many], "old", "new")["reward"]  # more of the same says nothing new of prompts
    assert twice["interval"] == pytest.approx(figure["interval"])


def test_one_prompt_has_no_interval_and_that_is_said():
    figures = changes(rows(("a", 0.0, 1.0), ("a", 0.0, 0.5)), "old", "new")
    assert figures == {"reward": {"old": 0.0, "new": 0.75, "change": 0.75, "interval": None, "worse": 0.0}}
    assert "no intervals: they are over prompts, and there is one" in printed(figures)
