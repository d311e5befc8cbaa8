"""Which sampling steps are worth training, and which kind of credit: signal and noise of each policy gradient.

    python benchmarks/gradient_snr.py [--config configs/ddpo_tinyworld.yaml] [--chunks 48] [--steps 1 2 3]
                                      [--credits image paid] [--share_noise none around] [--maps judge]
                                      [--work DIR] [--quick] [--json FILE]

The policy is the config's, untrained. Chunks of 64 pictures of disjoint prompts are drawn, and for each sampling step
and each kind of credit (`rl/credit.py`) the gradient g of the first pass' loss is taken, from the same pictures.
Gradients of two chunks share their expectation and nothing else, so that without bias

- |E g|^2 is the mean of their inner products, the noise of one chunk the mean of |g|^2 less that. Printed is the root
  of their quotient, the signal-to-noise ratio of 64 pictures; it may come out negative where there is no signal;
- the *gain*, what an update of length 1 along g adds to the objective to first order, is the mean inner product of g
  with the objective's own gradient from other chunks, over the root of the mean of |g|^2. The objective is the expected
  reward of a picture, penalties included (what `image` compares), and its gradient at a step that of the sum of the
  latent's log densities times the reward less its group's mean: not normalised, nor clipped. So gains are in the
  reward's own units, thousandths of them; "less image's" is from the same chunks.

Intervals: 95%, jackknife over chunks. All steps and kinds cost the same. Where pictures of a group share noise
(`--share_noise`; the config's own by default), what they share depends on the step, as if that one alone were trained:
so each step has pictures of its own then, and a chunk takes 1.6 times as long (`--chunks 3 --share_noise around` took
210 s of a core, with `none` 128). Of several ways to share noise the first is what the others are compared with: the
objective's gradient has the same expectation in all of them, whatever is shared, so that what they differ in is the
variance, and a share of 0.5 of it is worth twice the pictures.

`--credits` takes three more kinds, which nothing else offers (`benchmarks/other_credits.py`): `focus` on what is drawn
and right, `focus` on where the total's gradient by the pixels is large, and `paid` with a baseline by what is drawn.

`--maps judge` takes the true judge's maps in place of the predictor's, in the objective as in the credit: how much of
what credit by place could gain is lost by predicting the places. `--maps learned` adds one of where the scores come
from (`benchmarks/learned_maps.py`), the objective being what it is: `paid` then places the scores too. A chunk's
gradients are kept in `--work`, and what is there is not made again, so that a run may be stopped, or chunks be added.
"""

import copy
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from judge_maps import JUDGE_MAPS
from learned_maps import LearnedMaps, learn, seen_by, unseen_share
from long_runs import assets_digest, digest
from other_credits import OTHERS, other_credit
from report import Row, flags, publish
from safetensors import safe_open
from safetensors.torch import load_file, save
from step_gradients import step_gradients

from finetune.run import load_policy
from reward.arguments import parse_arguments, read_prompt_file
from reward.feedback import RewardFn
from reward.rich import RichReward
from reward.whole_files import write_whole
from rl.advantages import group_advantages
from rl.attention import WordAttention
from rl.ddpo import DDPOConfig
from rl.experience import credit_map, gather_experience, rollout_noise, sample_and_score
from rl.policy import StableDiffusionPolicy
from rl.rollout import draw_prompts, sample, shared_places
from rl.scoring import score
from rl.sde import Schedule, resolve_train_steps
from rl.timing import PhaseClock
from rl.trunks import Trunks
from run_ddpo import RunArguments

PICTURES = 64
OBJECTIVE = "objective"
MOVES = "moves"
SHARED = ("none", "before", "around")
MAPS = ("predictor", "judge", "learned")
LEARNED_FROM = range(10_000, 10_012)
"""Chunks that no gradient is taken of."""
CREDITS = {
    "image": {},
    "scalar": {"credit": "scalar"},
    "focus on maps": {"credit": "focus"},
    "focus on content": {"credit": "focus", "focus_on": "content"},
    "words": {"credit": "words"},
    "paid, own place": {"credit": "paid", "paid_reach": 0},
    "paid": {"credit": "paid", "paid_reach": 2},
    "paid, unit": {"credit": "paid", "paid_scale": "unit"},
    "mask": {"credit": "mask"},
}


def with_credit(args: DDPOConfig, **changes) -> DDPOConfig:
    """The same settings but for the kind of credit."""
    kind = copy.copy(args)
    for setting, value in {"credit": "image", **changes}.items():
        setattr(kind, setting, value)
    return kind


class Gradients:
    """Of chunk after chunk, for all steps and kinds of credit, each chunk a file.

    Attributes:
        steps: that are measured.
        names: the kinds of credit, and `OBJECTIVE`.
        notes: what else was found.
    """

    def __init__(self, options: Namespace, share_noise: str | None = None):
        """`share_noise`: None for the config's own."""
        argv = ["--config", str(options.config), "--output_dir"]
        with TemporaryDirectory() as folder:
            run, self.args = parse_arguments([RunArguments, DDPOConfig], [*argv, folder])
        if self.args.lora_dropout > 0:
            raise SystemExit(
                f"{options.config} sets lora_dropout, but gradients are measured of the whole LoRA; leave it out"
            )
        self.args.per_device_train_batch_size = PICTURES
        self.args.share_noise = share_noise or self.args.share_noise
        self.policy: StableDiffusionPolicy = load_policy(run.policy, self.args)
        run.reward = JUDGE_MAPS if options.maps == "judge" else run.reward
        self.reward: RewardFn = run.make_reward()
        self.schedule: Schedule = self.args.make_schedule(self.policy.scheduler)[1]
        noisy = resolve_train_steps("all", self.schedule)
        self.steps = [step for step in noisy if not options.steps or step in options.steps]
        self.prompts, self.seed = read_prompt_file(run.prompts), options.seed
        self.notes: list[Row] = []
        learned = []
        if options.maps == "learned":
            self.reward = self._with_learned_maps(self.reward)
            learned = [self.reward.weights.tolist()]
        self.kinds = {name: with_credit(self.args, **CREDITS.get(name, {})) for name in options.credits}
        self.names = [*self.kinds, OBJECTIVE]
        told = (
            options.config.read_text(encoding="utf-8"), self.args.share_noise, self.steps, self.names, self.seed,
            PICTURES, assets_digest(), options.maps, *learned,
        )  # fmt: skip
        self.folder = options.work / digest(*told)

    def _with_learned_maps(self, reward: RichReward) -> LearnedMaps:
        """Learned from pictures of the same policy that are in no chunk."""
        tokens, totals = [], []
        for chunk in LEARNED_FROM:
            drawn = self._prompts(chunk)
            noise = rollout_noise(self.policy, self.schedule, self.seed, chunk, range(PICTURES))
            with torch.no_grad():
                trajectory = sample(
                    self.policy, self.policy.network, drawn, noise, self.schedule, (), self.args.guidance_scale
                )
                said, seen = seen_by(reward, self.policy.decode(trajectory.final_latents), drawn)
            tokens.append(seen)
            totals.append(said.total)
        share = unseen_share(tokens, totals, self.args.num_generations)
        name = "learned maps: share of the variance of totals within groups, of unseen pictures"
        self.notes.append(Row(name, share, n=len(LEARNED_FROM) * PICTURES))
        return LearnedMaps(reward, learn(torch.cat(tokens), torch.cat(totals), self.args.num_generations))

    def _prompts(self, chunk: int) -> list[str]:
        """Of a chunk's pictures."""
        group = self.args.num_generations
        drawn = draw_prompts(self.prompts, PICTURES // group, chunk, self.seed)
        return [prompt for prompt in drawn for _ in range(group)]

    def file(self, chunk: int) -> Path:
        return self.folder / f"{chunk:04d}.safetensors"

    def collect(self, chunks: int) -> None:
        """Take and keep those of `chunks` that are not there."""
        moves = load_file(self.file(0))[MOVES].bool() if self.file(0).is_file() else None
        for chunk in range(chunks):
            if self.file(chunk).is_file():
                continue
            found = self.of_chunk(chunk)
            if moves is None:
                moves = (found != 0).flatten(0, 1).any(dim=0)  # of a new LoRA, only B has a gradient
            kept = {name: of[:, moves].contiguous() for name, of in zip(self.names, found, strict=True)}
            write_whole(self.file(chunk), save(kept | {MOVES: moves.to(torch.uint8)}))
            print(f"{chunk + 1} of {chunks} chunks", flush=True)

    def at(self, step: int, chunks: int) -> dict[str, np.ndarray]:
        """Minus the gradient of the LoRA's weights at one of `steps`: name -> (chunks, parameters) float32."""
        found: dict[str, list[np.ndarray]] = {name: [] for name in self.names}
        for chunk in range(chunks):
            with safe_open(self.file(chunk), "np") as kept:
                for name, of in found.items():
                    of.append(kept.get_slice(name)[self.steps.index(step)])
        return {name: np.stack(of) for name, of in found.items()}

    def of_chunk(self, chunk: int) -> torch.Tensor:
        """(kinds, steps, parameters) float32."""
        if self.args.share_noise == "none":
            return self._of_pictures(chunk, self.steps, [])
        shares = {step: shared_places(self.args.share_noise, [step], len(self.schedule)) for step in self.steps}
        return torch.cat([self._of_pictures(chunk, [step], shared) for step, shared in shares.items()], dim=1)

    def _of_pictures(self, chunk: int, steps: Sequence[int], shared: Sequence[int]) -> torch.Tensor:
        """The gradients of the same `steps` from one drawing of a chunk's pictures.

        Args:
            shared: places of the noise that is the same for all pictures of a group.
        """
        policy, args, group = self.policy, self.args, self.args.num_generations
        drawn = self._prompts(chunk)
        noise = rollout_noise(policy, self.schedule, self.seed, chunk, range(PICTURES), group, shared)
        by_words = any(kind.credit == "words" for kind in self.kinds.values())
        looking = WordAttention(policy.pipeline.unet, policy.latent_shape[1:], PICTURES) if by_words else None
        trunks = Trunks.of_groups(range(PICTURES), group) if shared and not by_words else None
        with looking or nullcontext():
            batch = sample_and_score(
                policy, policy.network.train(), self.reward, drawn, noise, self.schedule, steps, args, PhaseClock(),
                chunk, trunks=trunks,
            )  # fmt: skip
        images = policy.decode(batch.trajectory.final_latents)
        said, attention = score(self.reward, images, drawn), looking.maps if looking else None
        credits = []
        for name, kind in self.kinds.items():
            maps = credit_map(policy, kind, said, images, drawn, attention)
            compared = gather_experience([replace(batch, maps=maps)], drawn, kind, lambda tensor: tensor, rank=0)
            credit = compared.advantages[:, None, None] * compared.weights
            if name in OTHERS:
                grid, floors = policy.latent_shape[1:], (args.focus_floor, args.advantage_std_floor)
                credit = other_credit(name, self.reward, said, images, drawn, compared.advantages, grid, group, *floors)
            credits.append(credit)
        credits.append(objective_credit(said.objective, group, batch.trajectory.final_latents))
        pictures = range(PICTURES)
        return step_gradients(policy, batch.trajectory, drawn, torch.stack(credits), self.schedule, args, pictures)


def objective_credit(objective: torch.Tensor, group: int, latents: torch.Tensor) -> torch.Tensor:
    """What `step_gradients` has to be given for the gradient of the expected reward itself: (N,) -> (N, h, w).

    Its log-prob at a place is the mean over channels, and it takes the mean over places, so the sum is their number
    times as much; and a mean that the picture itself is in takes 1 / G of its reward away.

    Args:
        objective: rewards, groups of `group` pictures next to each other.
        latents: (N, C, h, w).
    """
    centred = group_advantages(objective, group, std_floor=0, scale="none") * group / (group - 1)
    return (centred * latents[0].numel())[:, None, None].expand(-1, *latents.shape[2:])


def signal_and_noise(gram: np.ndarray) -> tuple[float, float]:
    """|E g|^2 and what one chunk's |g|^2 has more than that, from the inner products (n, n) of n chunks' gradients."""
    count = len(gram)
    signal = (gram.sum() - np.trace(gram)) / (count * (count - 1))
    return float(signal), float(np.trace(gram) / count - signal)


def signal_to_noise(gram: np.ndarray) -> tuple[float, float, float]:
    """|E g| / noise, signed, and its interval, from the inner products (n, n) of n chunks' gradients.

    The interval is of the quotient of squares: a root is too steep at 0 for a jackknife.
    """

    def quotient(who: np.ndarray) -> float:
        signal, noise = signal_and_noise(gram[np.ix_(who, who)])
        return signal / noise

    value, low, high = (float(np.sign(end) * abs(end) ** 0.5) for end in jackknife(quotient, len(gram)))
    return value, low, high


def gain(products: np.ndarray, squares: np.ndarray) -> float:
    """<E g, E f> / sqrt(E |g|^2), in thousandths.

    Args:
        products: (n, n), inner products of g of one chunk (rows) with f of another (columns); the diagonal is not used.
        squares: (n,), |g|^2.
    """
    count = len(products)
    return float((products.sum() - np.trace(products)) / (count * (count - 1)) / np.sqrt(squares.mean()) * 1e3)


def jackknife(of: Callable[[np.ndarray], float], count: int) -> tuple[float, float, float]:
    """What `of` says of all `count` chunks (an index array), and its 95% interval by leaving one out."""
    everything = np.arange(count)
    value, less = of(everything), [of(np.delete(everything, chunk)) for chunk in range(count)]
    error = np.sqrt((count - 1) * np.var(less))
    return value, value - 1.96 * error, value + 1.96 * error


def variance_rows(objectives: dict[str, dict[int, np.ndarray]]) -> list[Row]:
    """Of the objective's gradients how much more, or less, they vary where noise is shared in another way.

    Args:
        objectives: way to share noise -> step -> (chunks, parameters), the chunks' prompts the same in all.
    """
    (first, base), *others = objectives.items()
    grams = {step: of @ of.T for step, of in base.items()}
    rows = []
    for way, of_steps in others:
        for step, of in of_steps.items():
            mine = of @ of.T

            def share(who: np.ndarray, mine=mine, base=grams[step]) -> float:
                (_, noise), (_, others) = (signal_and_noise(gram[np.ix_(who, who)]) for gram in (mine, base))
                return noise / others

            name = f"step {step}, the objective's gradient: variance with share_noise {way}, of {first}'s"
            rows.append(Row(name, *jackknife(share, len(mine)), n=len(mine) * PICTURES))
    return rows


def rows_of_step(step: int, gradients: dict[str, np.ndarray]) -> list[Row]:
    """Of all kinds of credit at one step, `gradients` being (chunks, parameters) each."""
    objective, rows, gains = gradients[OBJECTIVE], [], {}
    count = len(objective)
    for name, of in gradients.items():
        if name == OBJECTIVE:
            continue
        own, across = of @ of.T, of @ objective.T
        rows.append(Row(f"step {step}, {name}: signal to noise", *signal_to_noise(own), n=count * PICTURES))

        def gained(who: np.ndarray, own=own, across=across) -> float:
            return gain(across[np.ix_(who, who)], own.diagonal()[who])

        gains[name] = gained
        rows.append(Row(f"step {step}, {name}: gain", *jackknife(gained, count), n=count * PICTURES))
        if name != "image":
            plain = gains["image"]
            less = jackknife(lambda who, one=gained, plain=plain: one(who) - plain(who), count)
            rows.append(Row(f"step {step}, {name}: gain less image's", *less, n=count * PICTURES))
    return rows


def measured(options: Namespace, chunks: int) -> list[Row]:
    """All rows, of each way to share noise in turn; several are named in each row, and compared."""
    ways, rows, objectives = list(dict.fromkeys(options.share_noise or [None])), [], {}
    for way in ways:
        gradients = Gradients(options, way)
        gradients.collect(chunks)
        rows += gradients.notes
        of_steps = objectives.setdefault(gradients.args.share_noise, {})
        for step in gradients.steps:
            found = gradients.at(step, chunks)
            of_steps[step] = found[OBJECTIVE]
            said = rows_of_step(step, found)
            rows += [replace(row, name=f"share_noise {way}, {row.name}") for row in said] if len(ways) > 1 else said
    return rows + variance_rows(objectives)


def main() -> None:
    parser = flags(__doc__.splitlines()[0], seeds=None)
    parser.add_argument("--config", type=Path, default=Path("configs/ddpo_tinyworld.yaml"))
    parser.add_argument("--chunks", type=int, default=48, help=f"of {PICTURES} pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", nargs="*", type=int, help="which sampling steps (default: all with noise)")
    parser.add_argument(
        "--credits", nargs="+", default=list(CREDITS), choices=[*CREDITS, *OTHERS], help="besides image"
    )
    parser.add_argument("--share_noise", nargs="+", choices=SHARED, help="default: the config's")
    parser.add_argument("--maps", choices=MAPS, default="predictor", help="that are rewarded by")
    parser.add_argument("--work", type=Path, default=Path("outputs/gradient_snr"), help="folder of chunks' gradients")
    options = parser.parse_args()
    options.credits = list(dict.fromkeys(["image", *options.credits]))
    if options.maps == "learned" and (others := set(options.credits) - {"image", "paid, own place", "paid"}):
        parser.error(
            f"--credits has {', '.join(sorted(others))}, but what is learned is a penalty map only up to a constant, "
            "which matters to them; with --maps learned name paid, or paid, own place"
        )
    began, chunks = time.perf_counter(), 3 if options.quick else options.chunks
    rows = measured(options, chunks)
    publish(rows, began, options.json, options.quick)


if __name__ == "__main__":
    main()
