"""Pictures to be trained on: cut to buckets, encoded once, shuffled into batches of one size.

Shapes: B pictures of a batch, H x W pixels, C latent channels, h x w the latent grid.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from diffusers.training_utils import generate_aspect_ratio_buckets
from torch.utils.data import DataLoader, Dataset, Sampler

from finetune.pool import Pool, read_each, read_pictures
from finetune.rule_reading import unknown_name
from reward.data import resize
from reward.pictures import size_of
from rl.adapter import require
from rl.keyed import keyed_generator
from rl.policy import StableDiffusionPolicy

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Crop:
    """How a picture becomes one of its bucket's size: enlarged or shrunk until it covers it, then cut in the middle.

    A picture of 600 x 900 in a bucket of 512 x 768 is shrunk to it; in one of 512 x 512 it is shrunk to 512 x 768, and
    128 pixels are cut off left and right.

    Attributes:
        original: height and width of the picture.
        resized: before the cut.
        top_left: where the cut begins.
        bucket: height and width behind it.
    """

    original: tuple[int, int]
    resized: tuple[int, int]
    top_left: tuple[int, int]
    bucket: tuple[int, int]

    @classmethod
    def of(cls, size: tuple[int, int], bucket: tuple[int, int]) -> "Crop":
        scale = max(bucket[0] / size[0], bucket[1] / size[1])
        resized = tuple(max(round(side * scale), edge) for side, edge in zip(size, bucket, strict=True))
        return cls(size, resized, tuple((side - edge) // 2 for side, edge in zip(resized, bucket, strict=True)), bucket)

    def apply(self, picture: torch.Tensor) -> torch.Tensor:
        """(3, H, W) uint8 -> (3, *bucket) float in [0, 1]."""
        (top, left), (height, width) = self.top_left, self.bucket
        picture = resize(picture[None].float() / 255, self.resized)[0]
        return picture[:, top : top + height, left : left + width].clamp(0, 1)

    @property
    def time_ids(self) -> torch.Tensor:
        """(6,) what Stable Diffusion XL is told of it; see `rl.pipelines.Conditioning`."""
        return torch.tensor([*self.original, *self.top_left, *self.bucket], dtype=torch.float32)


def make_buckets(policy: StableDiffusionPolicy, aspect_ratios: bool) -> list[tuple[int, int]]:
    """Heights and widths in pixels that pictures are cut to: the policy's own, or, with `aspect_ratios`, those of about
    as many pixels from 1:2 to 2:1, in multiples that VAE and U-Net can halve."""
    factor = policy.pipeline.vae_scale_factor
    own = tuple(side * factor for side in policy.latent_shape[1:])
    if not aspect_ratios:
        return [own]
    divisor = factor * 2 ** (len(policy.pipeline.unet.config.block_out_channels) - 1)
    return generate_aspect_ratio_buckets(round(math.sqrt(own[0] * own[1])), divisor)


def nearest_bucket(size: tuple[int, int], buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The bucket of the most similar aspect ratio; by logarithms, so that upright and lying are treated alike."""
    ratio = math.log(size[0] / size[1])
    return min(buckets, key=lambda bucket: abs(math.log(bucket[0] / bucket[1]) - ratio))


def read_weights(pool: Pool, weight_by: Mapping[str, float], temperature: float | None) -> torch.Tensor:
    """How much each picture counts, (N,) float32 of mean 1.

    Args:
        weight_by: column -> weight of it in a picture's value; empty: all count alike.
        temperature: a picture counts as exp(value / temperature) (reward-weighted regression, Peters & Schaal 2007);
            None: as its value ("Aligning text-to-image models using human feedback", Lee et al. 2023, arXiv
            2302.12192).

    Raises:
        ValueError: a column is not there or holds no numbers, or values cannot be weights.
    """
    if not weight_by:
        return torch.ones(len(pool.entries))
    for column in weight_by:
        known = [name for name, value in pool.entries[0].columns.items() if _is_number(value)]
        if column not in known:
            raise ValueError(f"weight_by: {unknown_name(f'column of numbers in {pool.place}', column, known)}")
    try:
        values = torch.tensor(
            [sum(weight * float(one.columns[name]) for name, weight in weight_by.items()) for one in pool.entries],
            dtype=torch.float64,
        )
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"weight_by: a picture of {pool.place} has no number there ({error})") from error
    weights = values if temperature is None else ((values - values.max()) / temperature).exp()
    require(
        bool(weights.isfinite().all()) and float(weights.min()) >= 0 and float(weights.sum()) > 0,
        f"weight_by: values from {float(values.min()):.4g} to {float(values.max()):.4g} are no weights, which are at "
        "least 0 and not all 0; set weight_temperature",
    )
    return (weights / weights.mean()).float()


def _is_number(cell: Any) -> bool:
    """Also as a CSV has it, whose cells are all texts."""
    try:
        float(cell)
    except (TypeError, ValueError):
        return False
    return True


class Visit(NamedTuple):
    """One time that a picture is shown; what is random about it is keyed by this.

    Attributes:
        epoch: which pass over the pictures.
        place: of the picture in its pool.
        time: 0, or more where a bucket's last batch was filled up with pictures that the epoch has had already.
    """

    epoch: int
    place: int
    time: int


HANDED_ON = 256
"""Pictures of each process whose latents are handed on at once: 64 MB of them at XL's size."""


class TrainingPictures(Dataset):
    """A pool's pictures as training takes them: `self[visit]`, a `Visit`, is a dict of

    visit; prompt; weight; time_ids (6,); and latents (C, h, w), or pixels (3, H, W) in [0, 1] where latents
    are not kept.

    Args:
        pool: the pictures; of each the head is read, for its size (of a row of parquet, all of it).
        buckets: heights and widths they are cut to.
        weights: (N,).

    Raises:
        ValueError: a picture has no head that can be read.
    """

    def __init__(self, pool: Pool, buckets: Sequence[tuple[int, int]], weights: torch.Tensor):
        self.pool, self.weights = pool, weights
        self.latents: dict[int, torch.Tensor] = {}

        def size(place: int) -> tuple[int, int]:
            with pool.head(place) as file:
                return size_of(file)

        sizes = read_each(pool, range(len(pool.entries)), size)
        self.crops = [Crop.of(size, nearest_bucket(size, buckets)) for size in sizes]
        small = sum(crop.resized[0] > crop.original[0] for crop in self.crops)
        if small:
            logger.warning("%d of %d pictures are smaller than they are trained at, and enlarged", small, len(sizes))

    def __len__(self) -> int:
        return len(self.crops)

    def pixels(self, place: int) -> torch.Tensor:
        """(3, *bucket) float in [0, 1]."""
        return self.crops[place].apply(read_pictures(self.pool, [place])[0])

    def __getitem__(self, visit: Visit) -> dict[str, Any]:
        place = visit.place
        example = {
            "visit": visit,
            "prompt": self.pool.entries[place].prompt,
            "weight": self.weights[place],
            "time_ids": self.crops[place].time_ids,
        }
        if place not in self.latents:
            return {**example, "pixels": self.pixels(place)}
        return {**example, "latents": self.latents[place]}

    def by_bucket(self) -> dict[tuple[int, int], list[int]]:
        """Bucket -> the places of its pictures, rising."""
        found = defaultdict(list)
        for place, crop in enumerate(self.crops):
            found[crop.bucket].append(place)
        return dict(found)

    def encode(self, policy: StableDiffusionPolicy, batch_size: int, rank: int, world_size: int, on_picture) -> None:
        """Keep the latents of all pictures in memory, 4 bytes a number, in each process; all must call it, and share
        the work. They are handed on a few at a time: with NCCL what is handed on lies on the GPU, from all processes.

        Args:
            on_picture: called with the number of pictures that are done.
        """
        mine: list[tuple[int, torch.Tensor]] = []
        for places in self.by_bucket().values():
            share = places[rank::world_size]
            for first in range(0, len(share), batch_size):
                chunk = share[first : first + batch_size]
                latents = policy.encode_images(torch.stack([self.pixels(place) for place in chunk]))
                # A view would be kept, and sent to the others, with the whole batch.
                mine += [(place, one.clone()) for place, one in zip(chunk, latents.cpu(), strict=True)]
                on_picture(len(chunk))
        most = sum(-(-len(places) // world_size) for places in self.by_bucket().values())  # of any process
        for first in range(0, most, HANDED_ON):
            self.latents |= dict(gather_object(mine[first : first + HANDED_ON]))


class BucketBatches(Sampler[list[Visit]]):
    """Batches of visits, each of pictures of one bucket, in an order that depends on (seed, epoch) only.

    The pictures of a bucket are shuffled and cut into batches for all processes together; where they do not divide, the
    last batch is filled up from the first of the same order. With 5 pictures and batches of 2: [3 0] [4 1] [2 3].
    Process r of R takes of a batch of R * B the r-th B.
    """

    def __init__(self, buckets: Mapping[Any, Sequence[int]], batch_size: int, seed: int, rank: int, world_size: int):
        self.buckets = {bucket: list(places) for bucket, places in sorted(buckets.items())}
        self.batch_size, self.seed, self.rank, self.world_size, self.epoch = batch_size, seed, rank, world_size, 0

    @property
    def _together(self) -> int:
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        return sum(self._filled(len(places)) // self._together for places in self.buckets.values())

    @property
    def most_shown(self) -> dict[Any, int]:
        """Bucket -> how often an epoch shows one picture of it, at most: 1, but for what fills up the last batch."""
        return {bucket: -(-self._filled(len(places)) // len(places)) for bucket, places in self.buckets.items()}

    def _filled(self, count: int) -> int:
        """`count` pictures, and what fills up their last batch."""
        return -(-count // self._together) * self._together

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[Visit]]:
        source = keyed_generator(self.seed, "order", self.epoch)
        batches = []
        for places in self.buckets.values():
            order = [places[index] for index in torch.randperm(len(places), generator=source).tolist()]
            for first in range(0, len(order), self._together):
                rounds = [divmod(index, len(order)) for index in range(first, first + self._together)]
                batches.append([Visit(self.epoch, order[index], time) for time, index in rounds])
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        for index in torch.randperm(len(batches), generator=source).tolist():
            yield batches[index][mine]


class BucketLoader(DataLoader):
    """Batches of `TrainingPictures`, and a way to tell the sampler which epoch it is."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


def collate(examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Examples of one bucket -> tensors (B, ...), and lists of B of what is no tensor."""
    columns = {name: [example[name] for example in examples] for name in examples[0]}
    return {
        name: torch.stack(values) if isinstance(values[0], torch.Tensor) else values for name, values in columns.items()
    }
