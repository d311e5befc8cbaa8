"""How long the heatmap metrics take on maps of RichHF-18K's size.

    python benchmarks/metrics_speed.py [--quick] [--json FILE]

100 predicted maps of 512x512 pixels against 100 true ones with a few disks each, all seven metrics, AUC-Judd exact:
once with predictions that are all different, once with those of an 8-bit image, which are full of ties.
"""

import time

import numpy as np
from report import Row, flags, publish

from reward.metrics import heatmap_metrics

MAPS, SIDE = 100, 512
REPEATS = 5


def true_maps(rng: np.random.Generator) -> np.ndarray:
    """(100, 512, 512) float32, each with one to four disks of radius 1/20 of the side, marked by 1 to 3 of 3 raters."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    maps = np.zeros((MAPS, SIDE, SIDE), np.float32)
    for heatmap in maps:
        for y, x in rng.uniform(0, SIDE, (rng.integers(1, 5), 2)):
            heatmap[(rows - y) ** 2 + (columns - x) ** 2 <= (SIDE / 20) ** 2] = rng.integers(1, 4) / 3
    return maps


def main() -> None:
    options = flags(__doc__.splitlines()[0], seeds=None).parse_args()
    began = time.perf_counter()
    rng = np.random.default_rng(0)
    true = true_maps(rng)
    different = rng.random((MAPS, SIDE, SIDE), dtype=np.float32)
    table = []
    for name, predicted in (("all different", different), ("8-bit", np.round(different * 255) / 255)):
        seconds = []
        for _ in range(1 if options.quick else REPEATS):
            start = time.perf_counter()
            heatmap_metrics(predicted, true)
            seconds.append(time.perf_counter() - start)
        table.append(
            Row(f"seconds for {MAPS} maps of {SIDE}x{SIDE}, {name}", float(np.median(seconds)), n=MAPS, goal="<= 5")
        )
    publish(table, began, options.json, options.quick)


if __name__ == "__main__":
    main()
