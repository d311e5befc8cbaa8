"""Pictures and their prompts, as `finetune.inpaint` is given them."""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

from finetune.pool import Pool
from reward.data import to_tensor
from reward.pictures import decode
from reward.sources import Picture, Source

_NAMED = 5


@dataclass(frozen=True)
class NamedPictures:
    """Picture files, a prompt for each, as a `reward.sources.Source`; the uid is a file's name, less its suffix."""

    files: Sequence[str]
    prompts: Sequence[str]

    def pictures(self, wanted: Collection[str]) -> Iterator[Picture]:
        for file, prompt in zip(self.files, self.prompts, strict=True):
            if (path := Path(file)).stem in wanted:
                yield Picture(path.stem, path.read_bytes() if path.is_file() else None, prompt)


@dataclass(frozen=True)
class PoolPictures:
    """An image folder's pictures as a `reward.sources.Source`; the uid is a file's place in it, less its suffix."""

    pool: Pool

    def pictures(self, wanted: Collection[str]) -> Iterator[Picture]:
        for place, entry in enumerate(self.pool.entries):
            if (uid := PurePosixPath(entry.name).with_suffix("").as_posix()) in wanted:
                yield Picture(uid, self.pool.read(place), entry.prompt)


class Everything(Collection[str]):
    """What every uid is in."""

    def __contains__(self, uid: object) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def read_picture(picture: Picture) -> torch.Tensor:
    """A picture of a source, (3, H, W) uint8.

    Raises:
        ValueError: there is none, or it cannot be read; with its uid.
    """
    if picture.data is None:
        raise ValueError(f"there is no picture file for {picture.uid}")
    try:
        return to_tensor(decode(picture.data))
    except ValueError as error:
        raise ValueError(f"the picture {picture.uid} cannot be used: {error}") from error


def digest(picture: Picture) -> str:
    """SHA-256 of a picture's file and prompt: whether it is the same picture as before."""
    return hashlib.sha256((picture.data or b"") + (picture.prompt or "").encode()).hexdigest()


def each_once(source: Source, wanted: Collection[str]) -> Iterator[Picture]:
    """A source's pictures, in its order; one that stands there twice, as in two of Pick-a-Pic's pairs, comes once."""
    seen = set()
    for picture in source.pictures(wanted):
        if picture.uid not in seen:
            seen.add(picture.uid)
            yield picture


def check_source(source: Source) -> dict[str, str]:
    """Uid -> `digest` of a source's pictures, in its order, once each of them was looked at.

    Raises:
        ValueError: there is none, one cannot be read, has no prompt, has the name of another, or a name that is no
            file's.
    """
    found: dict[str, str] = {}
    without = []
    for picture in source.pictures(Everything()):
        if picture.uid in found:
            if found[picture.uid] != digest(picture):
                raise ValueError(f"two pictures are called {picture.uid}; results go by that name, so rename one")
            continue
        _check_name(picture.uid)
        read_picture(picture)
        found[picture.uid] = digest(picture)
        if not (picture.prompt or "").strip():
            without.append(picture.uid)
    if not found:
        raise ValueError("there are no pictures; are their files .png, .jpg or .webp?")
    if without:
        more = ", ..." if len(without) > _NAMED else ""
        raise ValueError(
            f"{len(without)} of {len(found)} pictures have no prompt: {', '.join(without[:_NAMED])}{more}; give each a "
            "line in the table of prompts (its file_name and prompt), or name another by --prompts_table"
        )
    return found


def _check_name(uid: str) -> None:
    """Results are written to files of this name, which must not lead out of their folder."""
    path = PurePosixPath(uid)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in uid:
        raise ValueError(f"a picture is called {uid!r}; results go by that name, and it is no file's in their folder")
