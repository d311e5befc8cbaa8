"""How fast RAHF is at the paper's size, with the paper's heads and with light ones, and where the time goes.

    python benchmarks/rahf_speed.py [--quick] [--batch 1 8] [--step_batch 1 8] [--json FILE]

ViT-L/16 of 384x384 pixels and T5-base's encoder, random weights, float32: time does not ask what weights are. With the
paper's heads, with light ones, and with light ones behind a T5 that reads one token for each 2 x 2 patches ("pooled":
`image_pooling`), one model at a time in memory: images per second of a prediction and of a training step (forward,
backward, AdamW), each with its shares of time. A step's batch is fed picture by picture with accumulated gradients, as
on a machine of this size it must be: a picture's activations under the paper's heads take some 7 GB. `--quick` takes a
ViT-S/16 of 192x192 pixels, a T5-small's encoder, and two pictures at most. Of the full run, the steps of 8 are the
longest part; `--step_batch 1` leaves them out.

A part's time is what lies between the moments at which its work begins and the next part's begins, forward and
backward; the step of T5 includes the linear map and the embeddings before it.
"""

import gc
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from report import Row, flags, publish
from torch import nn
from transformers import T5Config, ViTConfig

from reward.feedback import HEATMAPS, SCORES
from reward.model import RahfModel
from reward.rahf_config import RahfConfig

HEADS = {
    "light": {"heatmap_head": "light", "score_head": "light"},
    "light, pooled": {"heatmap_head": "light", "score_head": "light", "image_pooling": 2},
    "paper": {"heatmap_head": "paper", "score_head": "paper"},
}
GOAL = ">= 3"  # times the speed of the paper's
PARTS = ("vision encoder", "T5 encoder", "heatmap heads", "score heads", "word head")
STEP_PARTS = (*PARTS, "optimizer")
PIECES, WORDS = 24, 16  # of a prompt
REPEATS = 3  # of a prediction of one picture; what takes longer is timed once
SIZES = {
    "ViT-L/16-384 + T5-base": (
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
        384,
        {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
    ),
    "ViT-S/16-192 + T5-small": (
        {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536},
        192,
        {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
    ),
}


@dataclass(frozen=True)
class Timing:
    """Seconds of one prediction or training step: by the clock, of the processor, and by the clock of each part.

    `images` is its batch. Where other work shares the cores, processor time is the steadier of the two.
    """

    images: int
    wall: float
    processor: float
    parts: dict[str, float]

    def share(self, part: str) -> float:
        return self.parts[part] / self.wall


class PartClock:
    """Notes when each part of a model begins its work, forward and backward.

    Autograd runs the parts in the reverse of their order forward, one after another, so that a part's backward lasts
    until the next one's begins: that is when the gradient of its output is whole.
    """

    def __init__(self, model: RahfModel):
        self.began: list[tuple[float, str]] = []
        self.hooks = []
        heads = [(part, head) for part, group in _head_groups(model).items() for head in group]
        for part, module in (("vision encoder", model.vision), ("T5 encoder", model.encoder), *heads):
            self.hooks.append(module.register_forward_pre_hook(lambda *_, part=part: self.mark(part)))
            self.hooks.append(module.register_forward_hook(lambda *said, part=part: self._after(part, said[-1])))
        # What lies between the two encoders belongs to the second.
        self.hooks.append(model.project.register_forward_pre_hook(lambda *_: self.mark("T5 encoder")))

    def mark(self, part: str) -> None:
        self.began.append((time.perf_counter(), part))

    def _after(self, part: str, output) -> None:
        tensor = output if isinstance(output, torch.Tensor) else output.last_hidden_state
        if tensor.requires_grad:
            tensor.register_hook(lambda _: self.mark(part))

    def seconds(self, end: float) -> dict[str, float]:
        """Part -> seconds until `end`."""
        found = defaultdict(float)
        ends = [when for when, _ in self.began[1:]] + [end]
        for (begin, part), until in zip(self.began, ends, strict=True):
            found[part] += until - begin
        return found

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def _head_groups(model: RahfModel) -> dict[str, list[nn.Module]]:
    groups = {"heatmap heads": model.heatmap_heads.values(), "score heads": model.score_heads.values()}
    return {name: list(heads) for name, heads in groups.items()} | {"word head": [model.word_head]}


def make_config(size: str, heads: str) -> RahfConfig:
    """The config of one of `SIZES` with one of `HEADS`; nothing is downloaded."""
    vision, side, text = SIZES[size]
    return RahfConfig(
        vision_config=ViTConfig(image_size=side, patch_size=16, **vision).to_dict(),
        text_config=T5Config(vocab_size=32128, **text).to_dict(),
        **HEADS[heads],
    )


def make_batch(config: RahfConfig, images: int, pieces: int = PIECES) -> dict[str, torch.Tensor]:
    """Random inputs and targets of `images` pictures, as `RahfModel.forward` takes them; prompts of `pieces` each."""
    source = torch.Generator().manual_seed(0)
    side = config.heatmap_size
    return {
        "pixel_values": torch.randn(images, 3, config.image_size, config.image_size, generator=source),
        "input_ids": torch.randint(2, config.text_config.vocab_size, (images, pieces), generator=source),
        "attention_mask": torch.ones(images, pieces, dtype=torch.long),
        "word_positions": torch.arange(WORDS).expand(images, -1),
        "scores": torch.rand(images, len(SCORES), generator=source),
        "heatmaps": torch.rand(images, len(HEATMAPS), side, side, generator=source),
        "word_labels": torch.randint(0, 2, (images, WORDS), generator=source),
    }


def time_prediction(model: RahfModel, batch: dict[str, torch.Tensor]) -> Timing:
    """One prediction of a batch, without gradients."""
    names = ("pixel_values", "input_ids", "attention_mask", "word_positions")

    def predict(clock: PartClock) -> None:
        with torch.no_grad():
            model(**{name: batch[name] for name in names})

    return _timed(model.eval(), predict, len(batch["scores"]))


def time_training_step(model: RahfModel, batch: dict[str, torch.Tensor], micro_batch: int = 1) -> Timing:
    """One step of AdamW on a batch, whose gradient is accumulated over micro-batches; its state is made on the way."""
    images = len(batch["scores"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step(clock: PartClock) -> None:
        for start in range(0, images, micro_batch):
            part = {name: value[start : start + micro_batch] for name, value in batch.items()}
            (model(**part).loss * (len(part["scores"]) / images)).backward()
        clock.mark("optimizer")
        optimizer.step()

    found = _timed(model.train(), step, images)
    optimizer.zero_grad(set_to_none=True)
    return found


def _timed(model: RahfModel, work: Callable[[PartClock], None], images: int) -> Timing:
    clock = PartClock(model)
    try:
        began, used = time.perf_counter(), time.process_time()
        work(clock)
        ended, used = time.perf_counter(), time.process_time() - used
    finally:
        clock.remove()
    return Timing(images, ended - began, used, clock.seconds(ended))


def typical(timings: list[Timing]) -> Timing:
    """The one whose duration is the median (of an even number: the shorter of the two in the middle)."""
    return sorted(timings, key=lambda timing: timing.wall)[(len(timings) - 1) // 2]


def measure(size: str, heads: str, batches: dict[str, list[int]], repeats: int) -> dict[tuple[str, int], Timing]:
    """("prediction" or "training step", batch) -> its timing; a first prediction warms up and does not count.

    Args:
        batches: kind -> how many pictures, one after another.
        repeats: of a prediction of one picture, whose median counts; all else is timed once.
    """
    config = make_config(size, heads)
    torch.manual_seed(0)
    model, found = RahfModel(config), {}
    time_prediction(model, make_batch(config, 1))
    for kind, timed in (("prediction", time_prediction), ("training step", time_training_step)):
        for images in batches[kind]:
            batch = make_batch(config, images)
            times = repeats if (kind, images) == ("prediction", 1) else 1
            found[kind, images] = one = typical([timed(model, batch) for _ in range(times)])
            print(f"{heads}: {kind} of {images}: {one.wall:.1f} s", file=sys.stderr, flush=True)
    return found


def rows_of(found: dict[str, dict[tuple[str, int], Timing]]) -> list[Row]:
    """Heads -> timings, as a table: speeds, their quotient, shares of time."""
    rows = []
    for kind, images in found["paper"]:
        speeds, processor = {}, {}
        for heads in HEADS:
            timing = found[heads][kind, images]
            speeds[heads], processor[heads] = images / timing.wall, timing.processor / images
            name = f"{kind} of {images}, {heads}"
            rows.append(Row(f"{name}: images per second", speeds[heads], n=images))
            rows.append(Row(f"{name}: processor seconds an image", processor[heads], n=images))
            for part in STEP_PARTS if kind == "training step" else PARTS:
                rows.append(Row(f"{name}: share of {part}", timing.share(part), n=images))
        for heads in (one for one in HEADS if one != "paper"):
            name = f"{kind} of {images}: {heads} / paper"
            rows.append(Row(name, speeds[heads] / speeds["paper"], n=images, goal=GOAL))
            quotient = processor["paper"] / processor[heads]
            rows.append(Row(f"{name}, by processor time", quotient, n=images, goal=GOAL))
    return rows


def main() -> None:
    parser = flags(__doc__.splitlines()[0], seeds=None)
    for flag, what in (("--batch", "a prediction"), ("--step_batch", "a training step")):
        text = f"pictures of {what} (default 1 8; 1 2 with --quick)"
        parser.add_argument(flag, type=int, nargs="+", metavar="N", help=text)
    options = parser.parse_args()
    usual = [1, 2] if options.quick else [1, 8]
    batches = {"prediction": options.batch or usual, "training step": options.step_batch or usual}
    if min(map(min, batches.values())) < 1:
        parser.error("--batch and --step_batch must be at least 1")
    began = time.perf_counter()
    size = list(SIZES)[int(options.quick)]
    found = {}
    for heads in HEADS:
        found[heads] = measure(size, heads, batches, 1 if options.quick else REPEATS)
        gc.collect()  # a model's weights go before the next one's come
    rows = rows_of(found)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
    rows.append(Row("peak memory, GiB", memory, goal="<= 12"))
    rows.append(Row("threads", torch.get_num_threads()))
    print(size)
    publish(rows, began, options.json, options.quick)


if __name__ == "__main__":
    main()
