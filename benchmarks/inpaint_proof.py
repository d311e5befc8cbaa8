"""Does drawing the problem region again make pictures better, to a judge it never saw, and how many get worse?

    python benchmarks/inpaint_proof.py [--quick] [--json FILE] [--seeds N]

The pictures: 256 rendered scenes with one planted flaw of outline (warped, bitten, blotched), and 256 of the rated data
set's test split, two of a caption, drawn by variants of the generator, as they come: some have natural flaws, some
none. The first ones of both kinds are left out: 133 of them had been looked at when the config's `min_gain` was chosen.
Each is mended by the config, as `python -m finetune.inpaint` does, once a seed. A picture gets worse if the judge's
plausibility falls at all; by how much, and what becomes of its alignment, is shown too. Intervals are over captions and
seeds. Pictures that are done (`--work`) are not repeated.
"""

import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from long_runs import assets_digest
from report import Row, flags, publish
from tqdm import tqdm

from finetune.fingerprints import code
from finetune.inpaint_arguments import InpaintArguments
from finetune.mending import FIXED, as_row, mend
from finetune.paired import paired_interval
from finetune.pictures_to_fix import Everything, read_picture
from finetune.results import Results
from finetune.reward_choice import RewardArguments
from reward.arguments import parse_arguments, read_prompt_file
from reward.draw import to_image
from tinyworld.grammar import ASSETS, parse
from tinyworld.judge import judge
from tinyworld.scenes import applicable, lay_out, plant

OUTLINES = ("warped", "bitten", "blotched")
TERMS = ("plausibility", "alignment", "overall")
NOTICED = 0.02  # a fall of plausibility that is more than a nuance
BEHIND = 134
"""So many pictures of each kind are left out. Which kinds the 133 looked at were of was not kept: they may all be of
one. It is even, so that no caption's two pictures are torn apart."""


def planted(count: int) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(uid, caption, picture (3, 64, 64) uint8): scenes of held-out captions, each with one flaw of outline."""
    captions = read_prompt_file(ASSETS / "prompts_held_out.txt")
    for index in range(BEHIND, BEHIND + count):
        rng = np.random.default_rng((2026, index))
        scene = lay_out(parse(captions[index % len(captions)]), rng)
        flaw = str(rng.choice([one for one in OUTLINES if one in applicable(scene)]))
        flawed = plant(scene, flaw, float(rng.uniform(0.3, 1.0)), rng)
        yield f"planted{index}", str(scene.request), torch.from_numpy(flawed.picture).permute(2, 0, 1)


def natural(source, count: int) -> Iterator[tuple[str, str, torch.Tensor]]:
    """The same of pictures that the generator's variants drew."""
    for item in islice(source.pictures(Everything()), BEHIND, BEHIND + count):
        yield f"natural_{item.uid}", item.prompt, read_picture(item)


def verdict(picture: torch.Tensor, caption: str) -> dict[str, float]:
    """The judge's scores of a picture (3, 64, 64) uint8."""
    return judge(picture.permute(1, 2, 0).numpy(), caption).scores


def mended(pictures, work: Path, options: list[str]) -> tuple[list[dict], InpaintArguments]:
    """A row for each picture: the command's, and the judge's scores before and after."""
    run, choice = parse_arguments([InpaintArguments, RewardArguments], [*options, "--output_dir", str(work)])
    settings = {"options": options, **vars(run), **vars(choice), "assets": assets_digest()}
    results = Results(work, settings, ("pictures",), overwrite=False)
    reward, _ = choice.make(run.device)
    draw = run.inpainter()
    with results.begun():
        for uid, caption, picture in tqdm(pictures):
            if uid not in results.rows:
                made_by = code()
                one = mend(picture, caption, uid, run, reward, draw)
                scores = {"judged_before": verdict(picture, caption), "judged_after": verdict(one.picture, caption)}
                files = {f"pictures/{uid}.png": to_image(one.picture / 255)}
                results.add(uid, {"prompt": caption, **as_row(one), **scores, "code": made_by}, files)
    return [results.rows[uid] for uid, _, _ in pictures], run


def by_caption(values: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """Figures of captions whose mean is that of all pictures, to be an interval's units: two pictures of a caption are
    not independent.

    Where all captions have as many pictures, a caption's figure is its pictures' mean. Else it is what these differ
    from the mean of all by, summed, over the mean number of pictures a caption, beside the mean of all: so each picture
    counts alike, and 1, 1, 1 of one caption with 0 of another are 1.125 and 0.375.

    Args:
        values: (N,), a picture each.
        captions: N.

    Returns:
        (C,), in the order in which captions first come.
    """
    places = {caption: place for place, caption in enumerate(dict.fromkeys(captions))}
    differs = np.zeros(len(places))
    np.add.at(differs, [places[caption] for caption in captions], values - values.mean())
    return values.mean() + differs * len(places) / len(values)


def table(found: list[list[dict]], kinds: dict[str, slice]) -> list[Row]:
    """Rows for each kind of pictures and all of them; `found` holds, for each seed, a row a picture."""
    rows = []
    for kind, places in (kinds | {"all": slice(None)}).items():
        captions = [row["prompt"] for row in found[0][places]]

        def interval(figures: Sequence[np.ndarray], captions: Sequence[str] = captions) -> tuple[float, float, float]:
            return paired_interval([by_caption(one, captions) for one in figures])

        rows.append(Row(f"{kind}: captions", len(set(captions)), n=len(captions)))
        goals = {("plausibility", "gain"): "low > 0", "worse": "<= 0.05"} if kind == "all" else {}
        for term in TERMS:
            before, after = (
                [np.array([row[f"judged_{side}"][term] for row in one[places]]) for one in found]
                for side in ("before", "after")
            )
            gains = [new - old for old, new in zip(before, after, strict=True)]
            rows.append(Row(f"{kind}: {term} before", float(np.mean(before)), n=gains[0].size))
            goal = goals.get((term, "gain"))
            rows.append(Row(f"{kind}: {term} gain", *interval(gains), n=sum(map(len, gains)), goal=goal))
            falls = {"gets worse": 0.0, f"gets worse by more than {NOTICED}": NOTICED}
            for name, limit in falls.items() if term == "plausibility" else ():
                shares = [(gain < -limit).astype(float) for gain in gains]
                goal = goals.get("worse") if not limit else None
                rows.append(Row(f"{kind}: share that {name}", *interval(shares), n=gains[0].size, goal=goal))
        fixed = [np.array([row["status"] == FIXED for row in one[places]], float) for one in found]
        rows.append(Row(f"{kind}: share that is drawn anew", float(np.mean(fixed)), n=fixed[0].size))
        predicted = [
            np.array([row["after"]["reward"] - row["before"]["reward"] for row in one[places]]) for one in found
        ]
        rows.append(Row(f"{kind}: predicted gain", *interval(predicted), n=sum(map(len, predicted))))
    every = [row for one in found for row in one]
    states = len({row.get("code") for row in every})  # all that did not note theirs count as one
    rows.append(Row("states of the code among the pictures", states, n=len(every)))
    return rows


def main() -> None:
    parser = flags(__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("configs/inpaint_tinyworld.yaml"))
    parser.add_argument("--work", type=Path, default=Path("outputs/inpaint_proof"), help="folder of what is done")
    parser.add_argument("--pictures", type=int, default=256, metavar="N", help="of each kind (default 256)")
    options, extra = parser.parse_known_args()
    if options.pictures < 4:
        parser.error(
            f"--pictures is {options.pictures}; an interval needs two captions of two pictures each: at least 4"
        )
    began = time.perf_counter()
    count, seeds = (8, 1) if options.quick else (options.pictures, options.seeds)
    torch.set_num_threads(1)
    found = []
    for seed in range(seeds):
        flags_ = ["--config", str(options.config), "--seed", str(seed), *extra]
        run, _ = parse_arguments([InpaintArguments, RewardArguments], flags_)
        pairs = zip(planted(count), natural(run.source(), count), strict=True)
        pictures = [picture for pair in pairs for picture in pair]
        rows, _ = mended(pictures, options.work / f"seed{seed}", flags_)
        found.append(rows)
    kinds = {"planted": slice(0, None, 2), "natural": slice(1, None, 2)}
    publish(table(found, kinds), began, options.json, options.quick)


if __name__ == "__main__":
    main()
