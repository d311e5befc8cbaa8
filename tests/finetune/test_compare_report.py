"""The report says what was found, in three files, and works in a browser."""

import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from finetune.compare.__main__ import main
from finetune.compare.facts import TrainingFacts
from finetune.compare.pages import chance, figure, signed
from finetune.compare.report import LARGEST
from finetune.compare.runs import Failure
from tests.finetune.compare_case import (
    HELD_OUT,
    PLAIN,
    REDNESS,
    Figures,
    comparison_of,
    settings_of,
    write_agreement,
    write_config,
)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
GAINS = {
    "red": {"satisfied": 0.1, "blue": 0.05, "redness": 0.2, "own": 0.2},
    "plain": {"satisfied": -0.2, "blue": -0.1, "own": 0.3},
    "the judge": {"satisfied": 0.25, "blue": 0.2, "own": 0.25},
}
PARTS = ("verdict", "cross-table", "entrants-table", "curves", "pairs-table", "pictures", "agreement-table", "rules")


@pytest.fixture
def reported(tmp_path, pipeline_folder):
    """The folder of a comparison whose report has been written."""

    def report(leave_out=frozenset(), drawn=None, gains=GAINS, **changes):
        comparison = comparison_of(tmp_path, pipeline_folder, **changes)
        Figures(comparison, gains, drawn, noise=0.01).write(leave_out)
        write_agreement(comparison)
        file = tmp_path / "comparison.yaml"
        file.write_text(json.dumps(settings_of(tmp_path, pipeline_folder, **changes)))
        main(["--config", str(file), "--report_only", "true"])
        return comparison.folder

    return report


class Page(HTMLParser):
    """What a screen reader and a network would meet in a page."""

    def __init__(self, text: str):
        super().__init__()
        self.language, self.ids, self.addresses, self.without_alt = None, [], [], []
        self.tables = self.captions = self.heads = self.scoped = 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.language = given.get("lang", self.language) if tag == "html" else self.language
        self.ids += [given["id"]] if "id" in given else []
        self.addresses += [given[name] for name in ("src", "href", "xlink:href") if name in given]
        if (tag == "img" and not given.get("alt")) or (tag == "svg" and not given.get("aria-label")):
            self.without_alt.append(given)
        self.tables += tag == "table"
        self.captions += tag == "caption"
        self.heads += tag == "th"
        self.scoped += tag == "th" and given.get("scope") in ("row", "col")


def test_three_files_say_the_same(reported, capsys):
    folder = reported()
    content = json.loads((folder / "report.json").read_text())
    page, markdown = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    assert content["verdict"]["headline"] == "Train on red."
    assert "Train on red." in capsys.readouterr().out
    rows = {row["name"]: row for row in content["entrants"]}
    assert list(rows) == ["red", "plain", "the judge"]  # who may win, who may not, upper bounds
    assert rows["red"]["gains"]["satisfied"]["value"] == pytest.approx(0.1, abs=0.02)
    assert rows["red"]["trains_on"] == ["redness"]
    assert [flag["kind"] for flag in rows["plain"]["flags"]] == ["gamed"]
    assert rows["red"]["images"] == 8
    assert rows["red"]["gain_a_thousand_images"] == pytest.approx(125 * rows["red"]["gains"]["satisfied"]["value"])
    assert rows["red"]["kl"] == 2e-4
    assert rows["red"]["command"].startswith("python -m run_ddpo --config")
    (pair,) = content["pairs"]  # upper bounds are not compared in pairs
    assert pair["shown"]
    for text in (page, markdown):
        for said in ("Train on red.", signed(rows["red"]["gains"]["satisfied"]["value"]), "upper bound", "gamed",
                     "finetune.agreement", *content["rules"][:1]):  # fmt: skip
            assert said.replace("'", "&#39;" if text is page else "'") in text, said
    assert markdown.count("\n| red |") >= 2
    figures = [signed(look["mean"]) for chart in content["charts"] for curve in chart.get("curves", ())
               for look in curve["looks"]]  # fmt: skip
    assert len(figures) == 3 * 3 * 3  # charts of curves, entrants, looks and their start
    assert all(figure in markdown for figure in figures)
    assert content["charts"][0]["bars"][0]["value"] == rows["red"]["gains"]["satisfied"]["value"]
    grid = content["grid"]["rows"]
    shown = sum(len(row["shown"]) for row in grid)
    assert len(re.findall(r'alt="The same with its \w+ marked"', page)) == shown >= 4  # of one map each
    assert all(f'alt="{row["prompt"]}, trained on red: satisfied ' in page for row in grid)
    assert page.count("which it trains on") == 3  # red on redness; the judge on the whole and a term of itself
    assert len(re.findall(r"[^*]\* \|", markdown)) == page.count("which it trains on")
    assert page.count(content["command"]) == page.count("The command of these figures") - 1  # agreement has its own
    for row in content["entrants"]:
        assert unescape(page).count(row["command"]) == markdown.count(row["command"]) == 1
        assert f'<td data-value="{row["kl"]}">' in page
        assert f'<td data-value="{row["diversity"]}">' in page
    assert "red (more red)" in markdown
    for said in ("within prompts", "across prompts", rows["red"]["command"], *HELD_OUT[:2]):
        assert said in markdown
    tables = [table.splitlines() for table in re.findall(r"(?:^\|.*\n)+", markdown, flags=re.MULTILINE)]
    assert len(tables) >= 10
    assert all(len({line.count("|") for line in table}) == 1 and len(table) >= 3 for table in tables)


def test_what_the_settings_ask_is_answered_apart(reported, tmp_path, pipeline_folder):
    entrants = settings_of(tmp_path, pipeline_folder)["entrants"]
    entrants["plain"]["against"] = "red"
    folder = reported(entrants=entrants)
    content = json.loads((folder / "report.json").read_text())
    (asked,) = content["asked"]
    assert (asked["one"], asked["other"]) == ("plain", "red")
    assert asked["less"]["value"] == pytest.approx(-0.3, abs=0.02)
    (sentence,) = [one for one in content["verdict"]["sentences"] if one.startswith("Asked: ")]
    assert sentence.startswith("Asked: plain less red: -0.3")
    assert "## What was asked, by satisfied" in (folder / "report.md").read_text()
    assert 'id="asked-table"' in (folder / "report.html").read_text()


def test_trainings_by_other_code_are_named(reported):
    folder = reported()
    assert "states of the toolkit's code" not in (folder / "report.md").read_text()
    (folder / "runs/red/seed1/code.txt").write_text("abc")
    main(["--config", str(folder.parent / "comparison.yaml"), "--report_only", "true"])
    assert json.loads((folder / "report.json").read_text())["codes"] == ["", "abc"]
    for name in ("report.md", "report.html"):
        said = " ".join(unescape((folder / name).read_text()).split())
        assert "made by 2 states of the toolkit's code (unknown, abc)" in said


def test_the_page_is_one_file_for_everybody(reported):
    text = (reported() / "report.html").read_text()
    page = Page(text)
    assert len(text.encode()) < LARGEST
    assert set(PARTS) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert page.language == "en"
    assert not page.without_alt
    assert page.captions == page.tables >= 6
    assert page.scoped == page.heads
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert not re.findall(r"url\((?!['\"]?(?:data:|#))", text)


def test_a_page_that_would_be_too_large_leaves_pictures_out(reported, monkeypatch, capsys):
    page = reported() / "report.html"
    whole = page.read_bytes()
    monkeypatch.setattr("finetune.compare.report.LARGEST", len(whole) - 1)
    main(["--config", str(page.parents[1] / "comparison.yaml"), "--report_only", "true"])
    text = page.read_text()
    assert len(text.encode()) < len(whole)
    assert "The pictures of 1 more prompts are left out" in text
    assert "leaves out the last 1 of the prompts" in capsys.readouterr().out


def test_worst_cases_come_first(reported):
    rows = json.loads((reported() / "report.json").read_text())["grid"]["rows"]
    worst = [next(shown["change"] for shown in row["shown"] if shown["policy"] == "red") for row in rows]
    assert worst == sorted(worst)  # red alone may win, so its losses count
    assert [shown["policy"] for shown in rows[0]["shown"]] == ["base", "red", "plain", "the judge"]


def test_pictures_are_of_the_seed_that_most_have(reported):
    folder = reported(leave_out={("plain", 0), ("plain", 1), ("red", 0)})
    grid = json.loads((folder / "report.json").read_text())["grid"]
    assert grid["seed"] == 2
    assert grid["absent"] == []
    shutil.rmtree(folder)
    folder = reported(leave_out={("plain", 0), ("plain", 2), ("red", 1)})
    grid = json.loads((folder / "report.json").read_text())["grid"]
    assert (grid["seed"], grid["absent"]) == (0, ["plain"])
    assert [shown["policy"] for shown in grid["rows"][0]["shown"]] == ["base", "red", "the judge"]
    for name in ("report.html", "report.md"):
        assert "Of plain there are no pictures of this seed" in (folder / name).read_text()


def test_pictures_that_were_deleted_are_not_shown(reported):
    folder = reported()
    command = ["--config", str(folder.parent / "comparison.yaml"), "--report_only", "true"]
    for seed in (0, 1):
        shutil.rmtree(folder / f"runs/red/seed{seed}/pictures")
    main(command)
    grid = json.loads((folder / "report.json").read_text())["grid"]
    assert (grid["seed"], grid["absent"], len(grid["rows"])) == (2, [], len(HELD_OUT))
    for pictures in folder.glob("runs/*/*/pictures"):
        shutil.rmtree(pictures)
    main(command)
    content = json.loads((folder / "report.json").read_text())
    assert (content["grid"]["seed"], content["grid"]["rows"]) == (None, [])
    assert 'id="no-pictures"' in (folder / "report.html").read_text()
    assert content["verdict"]["headline"] == "Train on red."


def test_collapse_is_flagged_and_monitors_are_named(reported):
    content = json.loads((reported(drawn={"red": 0.4}) / "report.json").read_text())
    red = next(row for row in content["entrants"] if row["name"] == "red")
    assert [flag["kind"] for flag in red["flags"]] == ["collapsing"]
    assert red["monitors"] == {"drawn": 3}
    assert red["drawn"] == pytest.approx(0.4)
    assert content["verdict"]["winners"] == []


def test_two_seeds_have_no_intervals_and_that_is_said(reported):
    folder = reported(seeds=[0, 1])
    content = json.loads((folder / "report.json").read_text())
    assert content["few_seeds"]
    assert content["verdict"]["headline"].startswith("No verdict yet: of 2 seeds")
    gain = content["entrants"][0]["gains"]["satisfied"]
    assert (gain["low"], gain["high"], gain["corrected"]) == (None, None, None)
    assert 'id="few-seeds"' in (folder / "report.html").read_text()
    assert "intervals and p-values are left out" in (folder / "report.md").read_text()


def test_what_is_not_finished_is_left_out_and_named(reported):
    content = json.loads(
        (reported(leave_out={("plain", 1), *(("red", seed) for seed in range(3))}) / "report.json").read_text()
    )
    rows = {row["name"]: row for row in content["entrants"]}
    assert rows["red"]["gains"] == {}
    assert rows["red"]["unfinished"] == "no training yet of seeds 0, 1, 2"
    assert rows["plain"]["seeds"] == [0, 2]
    assert not rows["plain"]["sound"]


def test_what_failed_is_still_failed_when_nothing_is_run(reported, capsys):
    folder = reported(leave_out={("red", 1), ("red", 2)})
    for seed in (1, 2):
        Failure("training", "it broke", "log.txt").write(folder / "runs" / "red" / f"seed{seed}" / "failure.json")
    with pytest.raises(SystemExit) as ended:
        main(["--config", str(folder.parent / "comparison.yaml"), "--report_only", "true"])
    assert ended.value.code == 1
    assert "failed: red, seed 2: training: it broke; see log.txt" in capsys.readouterr().err
    content = json.loads((folder / "report.json").read_text())
    red = next(row for row in content["entrants"] if row["name"] == "red")
    assert [flag["text"] for flag in red["flags"]] == ["seeds 1, 2: training failed, it broke"]
    assert [one["seed"] for one in content["failures"]] == [1, 2]
    assert "red" not in content["verdict"]["winners"]


def test_one_picture_a_prompt_has_no_diversity(reported):
    content = json.loads((reported(generations=1, overlay={}) / "report.json").read_text())
    assert {row["diversity"] for row in content["entrants"]} == {None}


def test_what_decides_is_said_as_it_is(reported, tmp_path):
    by_judge = (reported() / "report.html").read_text()
    assert "decides: nobody but an upper bound trains on it" in by_judge
    shutil.rmtree(tmp_path / "comparison")
    nobody = (reported(evaluators={"redness": REDNESS}, overlay={}) / "report.html").read_text()
    assert "trains on it</span>" not in nobody
    assert "<b>none</b><span>decides: every evaluator is trained on" in nobody


def test_checkpoints_may_be_deleted_and_facts_are_kept(reported):
    folder = reported(drawn={"red": 0.4})
    before = json.loads((folder / "report.json").read_text())
    command = ["--config", str(folder.parent / "comparison.yaml"), "--report_only", "true"]
    for run in folder.glob("runs/*/*"):
        TrainingFacts.read(run).keep(run)
        shutil.rmtree(run / "checkpoint-2")
    main(command)
    after = json.loads((folder / "report.json").read_text())
    assert after["entrants"] == before["entrants"]
    (folder / "runs" / "red" / "seed0" / "facts.json").unlink()
    with pytest.raises(ValueError, match=r"holds neither facts\.json nor a checkpoint"):
        main(command)


@pytest.mark.parametrize("name", [r"a $5\frac or $6", "_private"])
def test_names_are_shown_as_they_are(name, reported, tmp_path, pipeline_folder):
    entrants = {name: {"config": write_config(tmp_path, pipeline_folder)}}
    page = (reported(gains={name: GAINS["red"]}, entrants=entrants, overlay={}) / "report.html").read_text()
    assert page.count(f">{name}</text>") >= 4  # a tick and three legends


def test_an_entrant_is_shown_beside_what_it_starts_from(reported, tmp_path, pipeline_folder):
    config = write_config(tmp_path, pipeline_folder)
    slow = {"config": config, "changes": {"reward": PLAIN, "num_inference_steps": 4}}
    entrants = {"red": {"config": config}, "slow": slow}
    folder = reported(entrants=entrants, overlay={}, gains={"red": GAINS["red"]})
    content = json.loads((folder / "report.json").read_text())
    shown = {one["policy"]: one for one in content["grid"]["rows"][0]["shown"]}
    assert list(shown) == ["base of red", "base of slow", "red", "slow"]
    assert [one["change"] is None for one in shown.values()] == [True, True, False, False]
    for name in ("red", "slow"):
        start = shown[f"base of {name}"]["value"]
        assert shown[name]["value"] == pytest.approx(start + shown[name]["change"])
    satisfied = content["evaluators"][0]
    assert [one["of"] for one in satisfied["bases"]] == [["red"], ["slow"]]
    assert "(red), " in (folder / "report.md").read_text()


def test_figures_as_text():
    assert signed(0.1234) == "+0.123"
    assert signed(-0.5) == "\N{MINUS SIGN}0.500"
    assert (signed(0.00641), signed(-0.00041), signed(0.0)) == ("+0.00641", "\N{MINUS SIGN}0.000410", "+0.000")
    assert (signed(1e-9), signed(-1234.5)) == ("+0.000000", "\N{MINUS SIGN}1,234.500")
    assert figure(5120, 0) == "5,120"
    assert figure(None) == signed(None) == chance(None) == "\N{EN DASH}"
    assert (chance(0.0004), chance(0.04)) == ("p < 0.001", "p 0.040")


LOOK = """
<script>
const told = [];
window.addEventListener("error", (event) => told.push("error: " + event.message));
console.error = (...words) => told.push("console: " + words.join(" "));
</script>
"""
ASK = """
<script>
const head = document.querySelectorAll("#cross-table thead th")[1], order = () =>
  [...document.querySelectorAll("#cross-table tbody tr")].map((row) => Number(row.cells[1].dataset.value));
const before = order();
head.querySelector("button").click(); const down = order(), saidDown = head.getAttribute("aria-sort");
head.querySelector("button").click(); const up = order(), saidUp = head.getAttribute("aria-sort");
const first = document.querySelectorAll("#cross-table thead th")[0];
first.querySelector("button").click();
const other = head.getAttribute("aria-sort");
const sorted = [...document.querySelectorAll("table.sortable")].map((table) =>
  [...table.tHead.rows[0].cells].map((head, column) => {
    const cells = () => [...table.tBodies[0].rows].map((row) => row.cells[column]);
    const read = () => cells().map((cell) => cell.dataset.value ?? cell.textContent.trim());
    const turn = (way) => {
      do head.querySelector("button").click(); while (head.getAttribute("aria-sort") !== way);
      return read();
    };
    return [turn("descending"), turn("ascending")];
  }));
const answer = {
  told, sorted, before, down, up, saidDown, saidUp, other,
  width: document.documentElement.scrollWidth, screen: window.innerWidth,
  broken: [...document.images].filter((image) => !image.complete || image.naturalWidth === 0).length,
  drawn: [...document.querySelectorAll("svg")].map((svg) => svg.getBoundingClientRect().height),
  ink: getComputedStyle(document.body).color, paper: getComputedStyle(document.body).backgroundColor,
  height: document.documentElement.scrollHeight,
  boxes: PARTS.map((id) => {
    const box = document.getElementById(id)?.getBoundingClientRect();
    return box && [box.left, box.top, box.right, box.bottom];
  }),
  parts: PARTS.filter((id) => { const it = document.getElementById(id); return it && it.offsetHeight > 20; }),
};
document.body.innerHTML = "<pre id='answer'></pre>";
document.getElementById("answer").textContent = JSON.stringify(answer);
</script>
"""


def chromium(folder, *words):
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={folder / 'profile'}",
        "--hide-scrollbars", "--enable-logging=stderr", "--virtual-time-budget=10000", *words,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def in_browser(page, folder, width, *flags):
    """What a headless Chromium says of a page after sorting a table; in a frame, as windows are never that narrow."""
    text = page.read_text().replace("<head>", "<head>" + LOOK, 1)
    asked = ASK.replace("PARTS", json.dumps(PARTS))
    (folder / "asked.html").write_text(text.replace("</body>", asked + "</body>"))
    (folder / "frame.html").write_text(
        f"<iframe id=f src=asked.html style='width:{width}px;height:900px;border:0'></iframe><pre id=answer></pre>"
        "<script>"
        "f.onload = () => { answer.textContent = f.contentDocument.getElementById('answer').textContent; };</script>"
    )
    done = chromium(folder, "--allow-file-access-from-files", *flags, "--dump-dom", (folder / "frame.html").as_uri())
    found = re.search(r'<pre id="answer">(.+?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-500:] + done.stderr[-1500:]
    assert "CONSOLE" not in done.stderr, done.stderr
    return json.loads(unescape(found.group(1)))


@pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here to look at the report with (Debian: apt install chromium)"
)
def test_in_a_real_browser(reported, tmp_path):
    page = reported() / "report.html"
    phone = in_browser(page, tmp_path, 390)
    assert phone["told"] == []
    assert phone["screen"] == 390
    assert phone["width"] <= 390  # wide tables scroll in themselves
    assert phone["parts"] == list(PARTS)
    assert phone["broken"] == 0
    assert len(phone["drawn"]) == 4
    assert min(phone["drawn"]) > 60
    assert phone["down"] == sorted(phone["before"], reverse=True) != phone["up"]
    assert phone["up"] == sorted(phone["before"])
    assert (phone["saidDown"], phone["saidUp"], phone["other"]) == ("descending", "ascending", "none")
    assert_every_column_sorts(phone["sorted"])
    dark = in_browser(page, tmp_path, 1200, "--blink-settings=preferredColorScheme=0")
    assert dark["told"] == []
    assert dark["width"] <= 1200
    assert (phone["paper"], phone["ink"]) == ("rgb(250, 250, 248)", "rgb(29, 33, 41)")
    assert (dark["paper"], dark["ink"]) == ("rgb(20, 23, 28)", "rgb(230, 233, 239)")
    assert_every_part_is_painted(page, tmp_path, dark, (20, 23, 28), "--blink-settings=preferredColorScheme=0")


def assert_every_column_sorts(tables):
    """Both ways, numbers and texts; what is not there comes last each time."""
    assert len(tables) >= 7
    columns = [column for table in tables for column in table]
    assert any("" in down for down, _ in columns)
    assert any(not is_number(value) for down, _ in columns for value in down if value)
    for down, up in columns:
        there = [value for value in down if value]
        key = float if all(map(is_number, there)) else str.casefold
        blanks = [""] * (len(down) - len(there))
        assert up == sorted(there, key=key) + blanks
        assert [*map(key, there)] == sorted(map(key, there), reverse=True)
        assert down == there + blanks


def is_number(text):
    return re.fullmatch(r"[-+0-9.e]+", text) is not None


def assert_every_part_is_painted(page, folder, found, paper, *flags):
    """A screenshot of the whole page holds, where each part should be, ink and not paper alone; charts and pictures in
    colour."""
    size = f"--window-size={found['screen']},{found['height']}"
    done = chromium(folder, *flags, size, f"--screenshot={folder / 'shot.png'}", page.as_uri())
    assert (folder / "shot.png").exists(), done.stderr[-1500:]
    shot = np.asarray(Image.open(folder / "shot.png").convert("RGB")).astype(int)
    assert shot.shape[1] == found["screen"]
    for part, box in zip(PARTS, found["boxes"], strict=True):
        left, top, right, bottom = (round(edge) for edge in box)
        region = shot[top:bottom, left:right]
        inked = np.abs(region - paper).max(axis=-1) > 100
        assert inked.mean() > 0.004, part
        if part in ("curves", "pictures"):
            coloured = np.ptp(region, axis=-1) > 60
            assert coloured.mean() > 0.002, part
