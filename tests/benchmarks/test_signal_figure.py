import json

import pytest
from PIL import Image
from signal_figure import draw, main, make_parser, rows_of


def row(name, value, low=None, high=None):
    return {"name": name, "value": value, "low": low, "high": high}


KINDS = ("mask", "paid, own place")
ROWS = [
    *(row(f"step {step}, image: signal to noise", 0.1 * step, 0.0, 0.3) for step in range(3)),
    *(row(f"step {step}, {kind}: gain less image's", 2.0 + step, 1.0, 12.0) for step in (1, 8) for kind in KINDS),
    row("step 1, image: gain", 50.0, 40.0, 60.0),
    *(row(f"noise of step {step}: share within 2, all pictures together", 0.3, 0.2, 0.4) for step in range(3)),
    row("noise of step 0: share within 4, all pictures together", 0.9, 0.8, 1.0),
    row("if all places changed alike: share within 2", 0.08),
]


@pytest.fixture
def results(tmp_path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"rows": ROWS}))
    return file


def test_the_panels_show_the_rows_and_no_others(results):
    rows = rows_of(results)
    assert rows["if all places changed alike: share within 2"] == (0.08,) * 3
    left, middle, right = draw(rows, rows, rows).axes
    (line,) = [line for line in left.lines if line.get_marker() == "o"]
    assert line.get_xydata().tolist() == [[0, 0], [1, 0.1], [2, 0.2]]
    (line,) = [line for line in middle.lines if line.get_marker() == "o"]
    assert line.get_ydata().tolist() == [0.3, 0.3, 0.3]
    assert [label.get_text() for label in right.get_xticklabels()] == list(KINDS)
    early, late = [line for line in right.lines if line.get_marker() == "o"]
    assert (early.get_ydata().tolist(), late.get_ydata().tolist()) == ([3.0, 3.0], [10.0, 10.0])


def test_the_command_writes_a_picture_or_names_what_is_missing(results, tmp_path):
    out = tmp_path / "signal.png"
    files = [flag for name in ("steps", "kinds", "reach") for flag in (f"--{name}_json", str(results))]
    main(make_parser().parse_args([*files, "--out", str(out)]))
    with Image.open(out) as picture:
        assert picture.width > 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "signal.png"]
    results.write_text(json.dumps({"rows": ROWS[:3]}))
    with pytest.raises(ValueError, match="lacks rows"):
        main(make_parser().parse_args([*files, "--out", str(out)]))
