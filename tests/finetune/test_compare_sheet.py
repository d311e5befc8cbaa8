"""People choose blindly, each prompt once, and what they chose is counted."""

import csv
import json
import re
from collections import Counter

import pytest
from PIL import Image

from finetune.compare.__main__ import main
from finetune.compare.sheet import _picture, count_answers, draw, read_answers
from tests.finetune.compare_case import HELD_OUT, PLAIN, Figures, comparison_of, settings_of, write_config

GAINS = {"red": {"satisfied": 0.1}, "plain": {"satisfied": 0.05}, "the judge": {"satisfied": 0.3}}


@pytest.fixture
def compared(tmp_path, pipeline_folder):
    """A finished comparison, and how its command is called."""
    comparison = comparison_of(tmp_path, pipeline_folder, overlay={})
    Figures(comparison, GAINS, noise=0.01).write()
    file = tmp_path / "comparison.yaml"
    file.write_text(json.dumps(settings_of(tmp_path, pipeline_folder, overlay={})))
    return comparison, lambda *flags: main(["--config", str(file), "--report_only", "true", *flags])


def fill_in(file, answers):
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, rows[0])
        writer.writeheader()
        writer.writerows(row | {"answer": answer} for row, answer in zip(rows, answers, strict=False))
    return rows


def only_sheet(comparison):
    (sheet,) = (comparison.folder / "sheet").iterdir()
    return sheet


def key_of(comparison, sheet):
    return comparison.folder / "sheet_keys" / f"{sheet.name}.json"


def test_a_sheet_is_blind_and_comes_back_as_win_rates(compared):
    comparison, command = compared
    command("--sheet", "true")
    sheet = only_sheet(comparison)
    key = json.loads(key_of(comparison, sheet).read_text())
    assert {file.name for file in sheet.iterdir()} == {"answers.csv", "sheet.html"}  # the key is apart
    page = (sheet / "sheet.html").read_text()
    assert sorted(row["prompt"] for row in key) == sorted(HELD_OUT)
    assert Counter(frozenset((row["one"], row["other"])) for row in key) == {
        frozenset(("red", "base")): 3, frozenset(("red", "plain")): 3,
    }  # fmt: skip
    said = re.sub(r'"data:[^"]*"', "", page.split("<main>")[1])
    assert not any(name in said for name in ("plain", "base", "judge", "seed", "runs/"))
    assert said.count("<img") == 2 * len(HELD_OUT)

    # red wins everywhere but in a tie and in one that nobody looked at
    answers = ["left" if row["left"] == "red" else "right" for row in key]
    answers[0], answers[1] = "Tie ", ""
    assert fill_in(sheet / "answers.csv", answers)[0]["pair"] == "1"
    command("--read_sheet", str(sheet / "answers.csv"))
    people = json.loads((comparison.folder / "report.json").read_text())["people"]
    counted = {row["other"]: (row["wins"], row["ties"], row["losses"], row["rate"]) for row in people}
    first, second = key[0]["other"], key[1]["other"]
    assert counted == {first: (2, 1, 0, pytest.approx(5 / 6)), second: (2, 0, 0, 1.0)}
    assert 'id="people-table"' in (comparison.folder / "report.html").read_text()
    assert "red over base" in (comparison.folder / "report.md").read_text()

    command("--sheet", "true")  # answers that are there stay
    assert only_sheet(comparison) == sheet
    assert "tie" in (sheet / "answers.csv").read_text().lower()


def test_another_sheet_leaves_answers_and_what_they_were_given_to(compared, tmp_path):
    comparison, command = compared
    command("--sheet", "true")
    first = only_sheet(comparison)
    kept = {file: file.read_bytes() for file in (key_of(comparison, first), first / "sheet.html")}
    answers = ["left" if row["left"] == "red" else "right" for row in json.loads(kept[key_of(comparison, first)])]
    copy = tmp_path / "answers of a rater.csv"
    copy.write_bytes((first / "answers.csv").read_bytes())  # nothing is filled in beside the key
    fill_in(copy, answers)
    said = read_answers(comparison, copy)

    command("--sheet", "true", "--sheet_pairs", "plain/base")
    (second,) = set((comparison.folder / "sheet").iterdir()) - {first}
    assert {file: file.read_bytes() for file in kept} == kept
    assert read_answers(comparison, copy) == said
    assert {row["one"] for row in read_answers(comparison, copy)} == {"red"}
    both = tmp_path / "both.csv"
    both.write_text(copy.read_text() + (second / "answers.csv").read_text().split("\n", 1)[1])
    with pytest.raises(ValueError, match="it must answer one of those in"):
        read_answers(comparison, both)


def test_a_sheet_of_large_pictures_has_several_pages_of_which_each_leads_to_the_others(compared, monkeypatch):
    comparison, command = compared
    command("--sheet", "true")
    whole = (only_sheet(comparison) / "sheet.html").read_text()
    assert "<nav" not in whole
    pictures = [len(uri) for uri in re.findall(r'<img src="([^"]*)"', whole)]
    pairs = [sum(pictures[place : place + 2]) for place in range(0, len(pictures), 2)]
    monkeypatch.setattr("finetune.compare.sheet.MOST_BYTES", 2 * max(pairs))
    assert 3 * min(pairs) > 2 * max(pairs)  # so that two fit, and no third
    command("--sheet", "true")
    pages = {file.name: file.read_text() for file in only_sheet(comparison).glob("*.html")}
    assert set(pages) == {"sheet.html", "sheet_2.html", "sheet_3.html"}
    places = [re.findall(r'id="pair-(\d+)"', pages[name]) for name in sorted(pages)]
    assert places == [["1", "2"], ["3", "4"], ["5", "6"]]
    for name, page in pages.items():
        assert set(re.findall(r'href="(sheet[^"]*)"', page)) == set(pages) - {name}
        assert page.count('aria-current="page"') == 2  # above and below


def test_other_pictures_are_another_sheet(compared):
    comparison, command = compared
    command("--sheet", "true")
    first = only_sheet(comparison)
    for picture in comparison.folder.glob("runs/red/*/pictures/*.png"):
        Image.new("RGB", (16, 16)).save(picture)
    command("--sheet", "true")
    assert len(list((comparison.folder / "sheet").iterdir())) == 2
    assert (first / "answers.csv").is_file()


def test_the_base_is_the_one_that_the_entrant_beside_it_starts_from(tmp_path, pipeline_folder):
    config = write_config(tmp_path, pipeline_folder)
    slow = {"config": config, "changes": {"reward": PLAIN, "num_inference_steps": 4}}
    comparison = comparison_of(tmp_path, pipeline_folder, entrants={"red": {"config": config}, "slow": slow})
    for one, other in (("slow", "base"), ("base", "slow"), ("red", "base")):
        entrant = comparison.entrant(one if one != "base" else other)
        row = {"left": one, "right": other, "seed": 1, "place": 3}
        sides = {row[side]: _picture(comparison, row, side) for side in ("left", "right")}
        assert sides["base"] == comparison.folder / "base" / entrant.base / "pictures" / "00003.png"
        assert sides[entrant.name] == comparison.folder / "runs" / entrant.name / "seed1" / "pictures" / "00003.png"


def test_sides_are_random_and_the_same_every_time(compared):
    comparison, _ = compared
    pairs, seeds = [("red", "plain")], {"red": [0, 1, 2], "plain": [1, 2, 5]}
    drawn = draw(comparison, pairs, seeds)
    assert drawn == draw(comparison, pairs, seeds)
    assert {row["seed"] for row in drawn} <= {1, 2}
    assert len({row["left"] for row in drawn}) == 2
    assert [row["prompt"] for row in drawn] != list(comparison.held_out)
    with pytest.raises(ValueError, match="no finished training of the same seed"):
        draw(comparison, pairs, {"red": [0], "plain": [1]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("pair,prompt", "number,prompt"), "lacks the columns pair"),
        (lambda text: text.replace("sheet_", "shoot_"), "answers 'shoot_.*it must answer one of those in .*: sheet_"),
        (lambda text: text, "holds no answer"),
        (lambda text: text.replace(",1,", ",77,", 1), "pair '77'.*is not of the sheet"),
        (lambda text: text.replace(",\r\n", ",best\r\n"), "answers are left, right, tie.*pair 1: 'best'"),
        (lambda text: text + text.split("\r\n")[1] + "left\r\n", "pair 1 is answered twice"),
        (lambda text: re.sub(r"(?s),1,(.*?),(.*),2,(.*?),", r",1,\3,\2,2,\1,", text), "pair '1'.*is not of"),
    ],
)  # fmt: skip
def test_answers_that_cannot_be_counted(compared, change, message):
    comparison, command = compared
    command("--sheet", "true")
    file = only_sheet(comparison) / "answers.csv"
    file.write_text(change(file.read_bytes().decode()), newline="")
    with pytest.raises(ValueError, match=message):
        read_answers(comparison, file)


@pytest.mark.parametrize("separator", [";", "\t"])
def test_answers_come_back_as_spreadsheets_write_them(compared, separator):
    """With other separators, and a prompt that was taken for a formula."""
    comparison, command = compared
    command("--sheet", "true")
    file = only_sheet(comparison) / "answers.csv"
    rows = fill_in(file, ["left"] * len(HELD_OUT))
    text = file.read_text().replace(rows[0]["prompt"], "#NAME?")
    file.write_text(text.replace(",", separator), encoding="utf-8-sig", newline="")
    found = read_answers(comparison, file)
    assert [row["answer"] for row in found] == ["left"] * len(HELD_OUT)
    assert found[0]["prompt"] == rows[0]["prompt"]


def test_there_must_be_a_sheet_and_pairs_must_be_pairs(compared):
    comparison, command = compared
    with pytest.raises(ValueError, match="holds no sheet: --sheet writes one"):
        command("--read_sheet", "answers.csv")
    for pair in ("red", "red/red", "red/nobody"):
        with pytest.raises(ValueError, match=f"'{pair}' is no pair"):
            command("--sheet", "true", "--sheet_pairs", pair)
    command("--sheet", "true", "--sheet_pairs", "plain/the judge")
    key = json.loads(key_of(comparison, only_sheet(comparison)).read_text())
    assert {frozenset((row["left"], row["right"])) for row in key} == {frozenset(("plain", "the judge"))}


def test_counting_by_hand():
    rows = [
        {"one": "a", "other": "b", "left": "a", "right": "b", "answer": answer}
        for answer in ("left", "left", "right", "tie")
    ]
    (counted,) = count_answers(rows)
    assert (counted.wins, counted.ties, counted.losses, counted.rate) == (2, 1, 1, 0.625)
    assert counted.p == 1.0
    ties = count_answers([rows[3]])[0]
    assert (ties.rate, ties.p) == (0.5, None)
