"""The README's figure of where a policy gradient's signal is, from the results of two benchmarks.

    python benchmarks/signal_figure.py [--steps_json FILE] [--kinds_json FILE] [--reach_json FILE] [--out FILE]

Left: the gradient's signal-to-noise ratio at each sampling step (`gradient_snr.py --credits image`). Middle: how much
of what a place's noise changes is near that place (`noise_reach.py`), and what would be if all places changed alike.
Right: what each kind of credit gains more than `image`, at an early and a late step (`gradient_snr.py --steps 1 8`).
"""

import json
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Interval = tuple[float, float, float]
"""A value and its interval's ends."""

NEAR = 2
RESULTS = Path("benchmarks/results")


def rows_of(file: Path) -> dict[str, Interval]:
    """Row's name -> its figure; one without an interval has its value thrice."""
    found = {}
    for row in json.loads(file.read_text(encoding="utf-8"))["rows"]:
        ends = [row["value"] if end is None else end for end in (row["low"], row["high"])]
        found[row["name"]] = (row["value"], *ends)
    return found


def matching(rows: Mapping[str, Interval], pattern: str) -> dict[str, Interval]:
    """What `pattern` catches in its only group -> the figure, of the rows whose whole name it is."""
    found = {name: re.fullmatch(pattern, name) for name in rows}
    return {match[1]: rows[name] for name, match in found.items() if match}


def bars(axes: Axes, places: list[float], figures: list[Interval], **look) -> None:
    values, lows, highs = zip(*figures, strict=True)
    below = [value - low for value, low in zip(values, lows, strict=True)]
    above = [high - value for value, high in zip(values, highs, strict=True)]
    axes.errorbar(places, values, yerr=[below, above], capsize=3, **look)


def draw(steps: Mapping[str, Interval], kinds: Mapping[str, Interval], reach: Mapping[str, Interval]) -> Figure:
    """The three panels, of the rows of the three files.

    Raises:
        ValueError: a file has no row of what is to be drawn.
    """
    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.4))
    ratios = matching(steps, r"step (\d+), image: signal to noise")
    near = matching(reach, rf"noise of step (\d+): share within {NEAR}, all pictures together")
    even = matching(reach, rf"if all places changed alike: share within ({NEAR})")
    gains = {step: matching(kinds, f"step {step}, (.*): gain less image's") for step in ("1", "8")}
    if not (ratios and near and even and all(gains.values())):
        raise ValueError("a results file lacks rows; make all three by the commands of this benchmark's docstring")
    bars(left, [int(step) for step in ratios], list(ratios.values()), marker="o")
    left.axhline(0, color="grey", linewidth=0.8)
    left.set(title="signal to noise of the gradient, 64 pictures", xlabel="sampling step")
    bars(middle, [int(step) for step in near], list(near.values()), marker="o")
    middle.axhline(even[str(NEAR)][0], color="grey", linestyle="--", label="if all places changed alike")
    middle.set(title=f"share of a place's noise within {NEAR} places", xlabel="sampling step", ylim=(0, 1))
    middle.legend()
    for shift, (step, of) in zip((-0.1, 0.1), gains.items(), strict=True):
        bars(right, [place + shift for place in range(len(of))], list(of.values()), marker="o", linestyle="none",
             label=f"step {step}")  # fmt: skip
    right.axhline(0, color="grey", linewidth=0.8)
    right.set_xticks(range(len(gains["1"])), list(gains["1"]), rotation=40, ha="right")
    right.set(title="gain of an update of length 1 less image's, thousandths")
    right.legend()
    return figure


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--steps_json", type=Path, default=RESULTS / "gradient_snr_steps.json")
    parser.add_argument("--kinds_json", type=Path, default=RESULTS / "gradient_snr.json")
    parser.add_argument("--reach_json", type=Path, default=RESULTS / "noise_reach.json")
    parser.add_argument("--out", type=Path, default=Path("docs/signal.png"))
    return parser


def main(options: Namespace) -> None:
    figure = draw(*(rows_of(file) for file in (options.steps_json, options.kinds_json, options.reach_json)))
    beside = options.out.with_name(f"{options.out.stem}.part{options.out.suffix}")
    figure.savefig(beside, dpi=110)
    beside.replace(options.out)


if __name__ == "__main__":
    main(make_parser().parse_args())
