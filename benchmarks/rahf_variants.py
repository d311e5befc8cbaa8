"""RAHF's variants and heads on the small world, side by side: parameters, time, and each metric's share of its ceiling.

    python benchmarks/rahf_variants.py [--variants default sequence] [--new_heads] [--epochs N] [--jobs N] [--quick]
        [--json FILE] [--seeds N]

Trains each as its config says (for `--epochs`, if given: all alike, warm-up and decay included), once a seed, from the
pretrained encoders and what fits of the heads that were pretrained with them, those of words and of implausible places
(`tinyworld/pretrain.py`). The default, `paper_scores`, `pooled` and `marked` keep both, `augmented` and
`paper_heatmaps` that of words, `sequence`, whose decoder is new, that of implausible places. `finer` keeps all heads,
of which all but those of aesthetics and overall were pretrained. So this says what to take with these checkpoints, not
what is better in itself. With `--new_heads` all but `finer` begin with the pretrained encoders alone, and none has a
head start.

It evaluates with `reward.evaluate` on the test split against fresh raters. A value is the mean over seeds, its interval
Student's over seeds; "less the default's" is paired by seed. It needs what `python -m tinyworld.build --stages feedback
pretraining` leaves in `build/tinyworld` (`--data`, `--pretrained`), and `finer` what `--stages feedback finer` does.
Trainings that are there already (`--work`) are not repeated, so the JSON's `seconds` are of what was left to do; one
that was killed goes on from its last checkpoint. An epoch of the default takes 2 minutes on one core with AVX-512, and
4 with AVX2; of augmented prompts and of the paper's heads for heatmaps 4 and 8 times as long.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from long_runs import write_json
from report import Row, flags, over_seeds, publish
from safetensors.torch import load_file, save_file
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from reward.checkpoints import COMPLETE
from reward.feedback import SCORES
from reward.predict import RichFeedbackPredictor
from tinyworld import fresh_raters
from tinyworld.rated import read_pictures

DEFAULT = ["--config", "configs/rahf_tinyworld.yaml"]
VARIANTS = {
    "default": DEFAULT,
    "augmented": [*DEFAULT, "--variant", "augmented_prompt"],
    "sequence": [*DEFAULT, "--words", "sequence"],
    "paper_heatmaps": [*DEFAULT, "--heatmap_head", "paper", "--head_width", "0.0625"],
    "paper_scores": [*DEFAULT, "--score_head", "paper", "--head_width", "0.25"],
    "pooled": [*DEFAULT, "--image_pooling", "2"],
    "marked": [*DEFAULT, "--heatmap_positive_weight", "3"],
    "finer": ["--config", "configs/rahf_tinyworld_finer.yaml"],
}
"""Settings. The default is `multi_head`, `tagging`, light heads. The paper's heads for heatmaps are a sixteenth as
wide, those for scores a quarter: on a grid of 8 x 8 their last layers have one place, and a sixteenth would leave their
norm four values there. T5 reads a quarter of the places in `pooled`; marked pixels of a heatmap count three
times in `marked`; `finer` sees pictures at twice the resolution, and was pretrained otherwise.
"""

GOALS = {
    **{f"{metric} {score}": 0.95 for score in SCORES for metric in ("plcc", "srcc")},
    **{"cc implausibility": 0.85, "auc_judd implausibility": 0.95, "cc misalignment": 0.8, "f1 words": 0.95},
}
"""Share of the ceiling that is aimed at, by the whole training."""
MOST_LOWER = 0.05  # on held-out compositions
PICTURES = 64
SETTINGS, REPORT = "asked.json", "report.json"


def encoders_alone(pretrained: Path, folder: Path) -> Path:
    """`folder`, with the checkpoint `pretrained` but for its heads."""
    if not folder.exists():
        beside = folder.with_name(f"{folder.name}.{os.getpid()}.part")
        shutil.copytree(pretrained, beside)
        weights = load_file(beside / SAFE_WEIGHTS_NAME)
        kept = {name: weight for name, weight in weights.items() if "_head" not in name.partition(".")[0]}
        save_file(kept, beside / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        beside.rename(folder)
    return folder


def train(folder: Path, settings: list[str], seed: int, options) -> None:
    """Train into `folder`, which has a `config.json` once it is whole; on one thread where several train at a time.

    Raises:
        SystemExit: the folder is of a training with other settings, data or encoders.
    """
    config = Path(settings[settings.index("--config") + 1]).read_text(encoding="utf-8")
    asked = {"settings": settings, "config": config, "epochs": options.epochs}
    asked |= {name: str(Path(getattr(options, name)).absolute()) for name in ("data", "pretrained")}
    told = folder / SETTINGS
    if told.exists() and (was := json.loads(told.read_text(encoding="utf-8"))) != asked:
        differing = ", ".join(sorted(name for name in asked if was.get(name) != asked[name]))
        raise SystemExit(f"{folder} holds a training with other {differing}; give another --work")
    if (folder / "config.json").exists():
        return
    if not told.exists():
        write_json(told, asked)
    places = ["--data", options.data, "--output_dir", folder, "--seed", seed]
    if DEFAULT[1] in settings:
        places += ["--model", options.pretrained]
    length = ["--num_train_epochs", str(options.epochs)] if options.epochs else []
    if options.quick:
        length = ["--max_steps", "60", "--save_strategy", "no", "--load_best_model_at_end", "false"]
    command = [sys.executable, "-m", "reward.train", *settings, *places]
    threads = {"OMP_NUM_THREADS": "1"} if options.jobs > 1 else {}
    begun = any(folder.glob(f"checkpoint-*/{COMPLETE}"))
    command += [*length, *(["--resume_from_checkpoint", "last"] if begun else ["--overwrite_output_dir", "true"])]
    subprocess.run([*map(str, command)], check=True, env=os.environ | threads)


def judge(folder: Path, raters: Path, held_out: Path, options) -> None:
    """Write `folder`'s `report.json`, unless it is there; on one thread where several are at work."""
    if (folder / REPORT).exists():
        return
    places = {"--model": folder, "--data": options.data, "--raters": raters, "--out": folder}
    command = [sys.executable, "-m", "reward.evaluate", *(word for place in places.items() for word in place)]
    command += ["--batch_size", "64", "--device", "cpu"]  # as the published figures
    command += ["--split", "test", "--group_prompts", held_out, "--draws", "0"]
    threads = {"OMP_NUM_THREADS": "1"} if options.jobs > 1 else {}
    subprocess.run([*map(str, command)], check=True, env=os.environ | threads, stdout=subprocess.DEVNULL)


def figures(folder: Path) -> dict[tuple[str, str], dict[str, float]]:
    """(kind, group of pictures) -> metric -> figure, all that `reward.evaluate` reports; kinds are "of ceiling" and
    "predictor"."""
    found = {}
    for row in json.loads((folder / REPORT).read_text(encoding="utf-8"))["rows"]:
        if row["kind"] in ("of ceiling", "predictor"):
            values = {f"{metric} {name}": one for name, of in row["scores"].items() for metric, one in of.items()}
            values |= {f"{metric} {name}": one for name, of in row["heatmaps"].items() for metric, one in of.items()}
            values |= {f"{metric} words": one for metric, one in row["words"].items()}
            found[row["kind"], row["group"]] = {name: one["value"] for name, one in values.items()}
    return found


def curves(folder: Path) -> dict[str, float]:
    """How a training went, by epoch: the mean of its loss, and on dev the loss and two of the metrics."""
    (last,) = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))[-1:]
    logs = json.loads((last / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["log_history"]
    found: dict[str, list[float]] = {}
    for log in logs:
        if "loss" in log:
            found.setdefault(f"loss in epoch {math.ceil(log['epoch'] - 1e-6)}", []).append(log["loss"])
        for metric in ("loss", "srcc_plausibility", "cc_implausibility"):
            if f"eval_{metric}" in log:
                found[f"{metric} on dev after epoch {round(log['epoch'])}"] = [log[f"eval_{metric}"]]
    return {name: float(np.mean(values)) for name, values in found.items()}


def cost(folder: Path, rows: list) -> tuple[float, float]:
    """Millions of parameters, and seconds a picture where 64 are judged at once on one thread: the median of five."""
    torch.set_num_threads(1)
    predictor = RichFeedbackPredictor.from_pretrained(folder)
    images = torch.from_numpy(np.stack([picture for _, picture, _ in rows])).permute(0, 3, 1, 2).float() / 255
    captions, times = [caption for *_, caption in rows], []
    for _ in range(6):
        start = time.perf_counter()
        predictor(images, captions)
        times.append(time.perf_counter() - start)
    count = sum(one.numel() for one in predictor.model.parameters())
    return count / 1e6, float(np.median(times[1:])) / len(rows)


def metric_rows(variant: str, kept: dict[str, list], whole: bool) -> list[Row]:
    """Each metric of `variant` over the whole split, and its share of the ceiling; this over the pictures whose
    compositions are not held out, how much lower it is on the others, and less the default's.

    Args:
        kept: variant -> for each seed what `figures` says.
        whole: whether the training was the config's own, which the goals are about.
    """
    known, held_out = ("of ceiling", "other prompts"), ("of ceiling", "listed prompts")
    plain, share = ("predictor", "all"), ("of ceiling", "all")
    table = []
    for name in kept[variant][0][plain]:
        own = [one[plain][name] for one in kept[variant]]
        table.append(Row(f"{variant}: {name}", *over_seeds(own), len(own)))
        if name not in kept[variant][0][known]:  # an error, of which there is no share
            continue
        shares = [one[share][name] for one in kept[variant]]
        table.append(Row(f"{variant}: {name}, of the ceiling, all pictures", *over_seeds(shares), len(own)))
        shares = [one[known][name] for one in kept[variant]]
        lower = [one[known][name] - one[held_out][name] for one in kept[variant]]
        goals = (f">= {GOALS[name]}", f"<= {MOST_LOWER}") if whole and name in GOALS else (None, None)
        table.append(Row(f"{variant}: {name}, of the ceiling", *over_seeds(shares), len(own), goals[0]))
        table.append(Row(f"{variant}: {name}, lower on held-out", *over_seeds(lower), len(own), goals[1]))
        if variant != "default" and "default" in kept:
            less = [
                one[known][name] - other[known][name] for one, other in zip(kept[variant], kept["default"], strict=True)
            ]
            table.append(Row(f"{variant}: {name}, of the ceiling, less the default's", *over_seeds(less), len(less)))
    return table


def main() -> None:
    parser = flags(__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS)[:-1], choices=list(VARIANTS))
    parser.add_argument("--epochs", type=int, help="of each training (default: the config's)")
    parser.add_argument("--new_heads", action="store_true", help="take the encoders alone from --pretrained")
    parser.add_argument("--data", type=Path, default=Path("build/tinyworld/feedback"))
    parser.add_argument("--pretrained", type=Path, default=Path("build/tinyworld/rahf_pretrained"))
    parser.add_argument("--pictures", type=Path, default=Path("tinyworld/assets/pickapic"), help="those of --data")
    parser.add_argument("--work", type=Path, default=Path("outputs/rahf_variants"))
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trainings at a time (default 1)")
    options = parser.parse_args()
    began, seeds = time.perf_counter(), range(1 if options.quick else options.seeds)
    work = options.work / "quick" if options.quick else options.work
    if options.new_heads:
        work /= "new_heads"
        work.mkdir(parents=True, exist_ok=True)
        options.pretrained = encoders_alone(options.pretrained, work / "encoders")
    raters, held_out = work / "fresh_raters", options.data.parent / "rated" / "held_out.txt"
    if not raters.exists():
        fresh_raters.main(["--out", str(raters), "--pictures", str(options.pictures)])
    rows = list(read_pictures(options.pictures / "test.parquet"))[:PICTURES]

    def folder(variant: str, seed: int) -> Path:
        return work / f"{variant}_{options.epochs or 'whole'}_{seed}"

    def train_and_judge(wanted: tuple[str, int]) -> None:
        train(folder(*wanted), VARIANTS[wanted[0]], wanted[1], options)
        judge(folder(*wanted), raters, held_out, options)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(train_and_judge, [(variant, seed) for seed in seeds for variant in options.variants]))

    table, kept = [], {}
    for variant in options.variants:
        kept[variant] = [figures(folder(variant, seed)) for seed in seeds]
        million, seconds = cost(folder(variant, 0), rows)
        table.append(Row(f"{variant}: parameters, millions", million))
        table.append(
            Row(f"{variant}: milliseconds a picture, {PICTURES} at once, one thread", 1000 * seconds, n=PICTURES)
        )
        table += metric_rows(variant, kept, whole=options.epochs is None)
        if not options.quick:  # which keeps no checkpoint
            went = [curves(folder(variant, seed)) for seed in seeds]
            table += [
                Row(f"{variant}: {name}", *over_seeds([one[name] for one in went]), len(went)) for name in went[0]
            ]
    publish(table, began, options.json, options.quick)


if __name__ == "__main__":
    main()
