import numpy as np
import pytest
from selection_proof import TERMS, outcomes, rows_of


def test_pairs_are_won_lost_or_tied():
    original = np.array([[0.5, 0.5], [0.9, 0.2]])
    tuned = np.array([[0.6, 0.505], [0.8, 0.195]])
    found = outcomes(tuned, original, tie=0.01)
    assert found["tuned better"].tolist() == [0.5, 0.0]
    assert found["original better"].tolist() == [0.0, 0.5]
    assert found["tie"].tolist() == [0.5, 0.5]


def test_goals_are_about_the_difference_to_random_pictures():
    def run(gain):
        base = np.full((40, 2), 0.5)
        return {
            "before": {f"judge.{term}": base.tolist() for term in TERMS},
            "after": {f"judge.{term}": (base + gain).tolist() for term in TERMS},
        }

    rows = rows_of({"pictures": 80, "kept": 20}, {"chosen": [run(0.3), run(0.2)], "random": [run(0.1), run(0.1)]})
    figures = {row.name: row for row in rows}
    gain = figures["satisfied, chosen - random"]
    assert (gain.value, gain.holds) == (pytest.approx(0.15), True)
    assert figures["overall, chosen - base"].value == pytest.approx(0.25)
    assert figures["chosen: tuned better"].value == 1
    none = rows_of({"pictures": 80, "kept": 20}, {"chosen": [run(0.1)], "random": [run(0.1)]})
    assert {row.name: row for row in none}["overall, chosen - random"].holds is False
