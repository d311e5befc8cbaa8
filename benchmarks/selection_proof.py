"""Is it worth choosing what to learn from? Fine-tuning on pictures that the predictor chose, against as many at random.

    python benchmarks/selection_proof.py [--quick] [--json FILE] [--seeds N]

One pool is drawn and judged (`configs/select_tinyworld.yaml`). For each seed the same pipeline is tuned twice, with
the same settings and as many updates (`configs/sft_tinyworld.yaml`): on what the rules chose, and on as many of the
pool's pictures at random. A judge that neither has seen compares them with each other and with the base, on the same
held-out prompts and noise. Pairs of tuned and original are counted as the paper counts them (Liang et al. 2024, section
5.1: its tuned model was preferred in 51.8% of pairs, the original in 16.8%).
Whatever is there already (`--work`) is not done again.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import yaml
from report import Row, flags, publish

from finetune.paired import paired_interval

TERMS = ("satisfied", "overall", "plausibility", "alignment")
GOALS = ("satisfied", "overall")
TIE = 0.01  # of the judge's overall: a smaller difference is not seen
KINDS = ("chosen", "random")


class Proof:
    """A pool, what was chosen from it, and the runs on it.

    Args:
        select, sft: the two configs.
        work: folder of everything.
        quick: few pictures, few updates.
    """

    def __init__(self, select: Path, sft: Path, work: Path, quick: bool):
        self.select, self.sft, self.work = select, sft, work
        self.pool_flags: list = []
        self.run_flags: list = ["--save_strategy", "no"]
        if quick:
            few = self._first_lines(yaml.safe_load(select.read_text())["prompts"], "prompts", 32)
            held_out = self._first_lines(yaml.safe_load(sft.read_text())["eval_prompts"], "held_out", 32)
            self.pool_flags = ["--prompts", few, "--num_generations", 4]
            self.run_flags += ["--eval_prompts", held_out, "--max_steps", 4]

    def _first_lines(self, file: str, name: str, count: int) -> Path:
        self.work.mkdir(parents=True, exist_ok=True)
        place = self.work / f"{name}.txt"
        place.write_text("\n".join(Path(file).read_text().splitlines()[:count]) + "\n")
        return place

    def choose(self, name: str, rules: dict | None = None) -> dict:
        """The report of one selection from the pool, by the config's own rules if none are given."""
        folder = self.work / name
        if not (folder / "selection.json").exists():
            more = [] if rules is None else ["--rules", json.dumps(rules)]
            place = ["--pictures", self.work / "pool" / "pictures", "--output_dir", folder]
            run("-m", "finetune.select", "--config", self.select, *place, *self.pool_flags, *more)
        return json.loads((folder / "selection.json").read_text())

    def tune(self, name: str, data: Path, seed: int) -> dict:
        """Every picture's figures of one run, before and after."""
        folder = self.work / name
        if not (folder / "finished.json").exists():
            place = ["--data", data, "--output_dir", folder, "--overwrite_output_dir", "true", "--seed", seed]
            run("-m", "finetune.sft", "--config", self.sft, *place, *self.run_flags)
        return json.loads((folder / "evaluation.json").read_text())

    def runs(self, seeds: range) -> tuple[dict, dict[str, list[dict]]]:
        """The report of the selection, and for each kind of data the runs of all seeds."""
        chosen = self.choose("chosen")
        found: dict[str, list[dict]] = {kind: [] for kind in KINDS}
        for seed in seeds:
            self.choose(f"random{seed}", {"at random": {"random": chosen["kept"], "seed": seed}})
            found["chosen"].append(self.tune(f"on_chosen{seed}", self.work / "chosen" / "data", seed))
            found["random"].append(self.tune(f"on_random{seed}", self.work / f"random{seed}" / "data", seed))
        return chosen, found


def run(*command: object) -> None:
    subprocess.run([sys.executable, *map(str, command)], check=True)


def judged(run: dict, phase: str, term: str) -> np.ndarray:
    """(P, G) what the judge says of G pictures of P prompts."""
    return np.array(run[phase][f"judge.{term}"])


def outcomes(tuned: np.ndarray, original: np.ndarray, tie: float = TIE) -> dict[str, np.ndarray]:
    """Shares of a prompt's pairs (P,) in which the tuned picture is better, the original is, or neither.

    Args:
        tuned, original: (P, G) overall scores of pictures from the same noise.
        tie: differences up to this are none.
    """
    change = tuned - original
    better, worse = (change > tie).mean(axis=1), (change < -tie).mean(axis=1)
    return {"tuned better": better, "original better": worse, "tie": 1 - better - worse}


def rows_of(chosen: dict, found: dict[str, list[dict]]) -> list[Row]:
    rows = [Row("pictures in the pool", chosen["pictures"]), Row("pictures chosen", chosen["kept"])]
    count = judged(found["chosen"][0], "before", "overall").size
    for term in TERMS:
        after = {kind: [judged(one, "after", term).mean(axis=1) for one in found[kind]] for kind in KINDS}
        before = [judged(one, "before", term).mean(axis=1) for one in found["chosen"]]
        rows.append(Row(f"{term}, base", float(np.mean(before)), n=count))
        rows += [Row(f"{term}, tuned on {kind}", float(np.mean(after[kind])), n=count) for kind in KINDS]
        goal = "low > 0" if term in GOALS else None
        gains = [one - other for one, other in zip(after["chosen"], after["random"], strict=True)]
        rows.append(Row(f"{term}, chosen - random", *paired_interval(gains), n=len(gains), goal=goal))
        gains = [one - other for one, other in zip(after["chosen"], before, strict=True)]
        rows.append(Row(f"{term}, chosen - base", *paired_interval(gains), n=len(gains)))
    for kind in KINDS:
        pairs = [outcomes(judged(one, "after", "overall"), judged(one, "before", "overall")) for one in found[kind]]
        for name in pairs[0]:
            rows.append(Row(f"{kind}: {name}", *paired_interval([one[name] for one in pairs]), n=count * len(pairs)))
    return rows


def main() -> None:
    parser = flags(__doc__.splitlines()[0])
    parser.add_argument("--select", type=Path, default=Path("configs/select_tinyworld.yaml"))
    parser.add_argument("--sft", type=Path, default=Path("configs/sft_tinyworld.yaml"))
    parser.add_argument("--work", type=Path, help="folder of pool and runs (default outputs/selection_proof)")
    options = parser.parse_args()
    began = time.perf_counter()
    work = options.work or Path("outputs/selection_proof" + ("_quick" if options.quick else ""))
    proof = Proof(options.select, options.sft, work, options.quick)
    publish(rows_of(*proof.runs(range(1 if options.quick else options.seeds))), began, options.json, options.quick)


if __name__ == "__main__":
    main()
