"""A reward that another process answers for, over HTTP; `python -m reward.serve` is such a process.

The wire format, JSON both ways. Asked (POST):

    {"images": [PNG, ...], "prompts": [text, ...]}

B images as 8-bit RGB PNGs in base64, all of one size, and their B prompts. Answered (200):

    {"total": [number, ...],                   B numbers, higher is better
     "terms": {name: [number, ...], ...},      optional, B numbers each, for logs
     "penalties": {name: maps, ...},           optional, costs >= 0 in the units of `total`, (B, h, w), any h and w
     "word_penalties": [[number, ...], ...],   optional, for each image a cost >= 0 for each word of its prompt
     "wrong_words": [[boolean, ...], ...],     optional, for each image whether each word is misrepresented
     "heatmaps": {name: maps, ...}}            optional, what is wrong where in [0, 1], (B, h, w), to look at

Maps are either nested lists of numbers or, smaller, {"shape": [B, h, w], "float32": text}: little-endian float32 in
row-major order, in base64. What is meant by each entry: `reward.feedback.Reward`. Whoever cannot answer says so with
another status and {"error": text}.
"""

import base64
import binascii
import http.client
import io
import json
import math
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch

from reward.data import to_tensor
from reward.draw import to_image
from reward.feedback import Reward, RewardError, check_reward
from reward.pictures import decode

_TRY_AGAIN = {408, 429, *range(500, 600)}
"""Answers after which the same question may be answered yet: too busy, or broken for now."""

_QUOTED = 300  # characters of an answer that are quoted in a message


def _is_address(url: object) -> bool:
    if not isinstance(url, str) or not url.isascii():
        return False
    try:
        parts = urlsplit(url)
        (parts.hostname or "").encode("idna")
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none, a name with an empty part
        return False


class HttpReward:
    """A reward function that asks a server; not differentiable. The format is at the head of this file.

    Images are sent in 8 bits, so that a reward that is sensitive to less is not what it would be in this process.

    Args:
        url: `http://host:port/path` or `https://...`.
        timeout: seconds that one try may take, from the question to the answer's last byte, above 0.
        tries: how often a question is asked before the run is stopped, at least 1. What is tried again: no connection,
            no answer in time, a broken connection, a status of 408, 429 or 5xx. A wrong answer is not.
        backoff: seconds before the second try; before each later one twice as many.
    """

    differentiable = False
    lazy = True

    def __init__(self, url: str, timeout: float = 30.0, tries: int = 3, backoff: float = 1.0):
        if not _is_address(url):
            raise ValueError(
                f"the reward's url is {url!r}; write http://host:port/ or https://host/, in ASCII, other letters as %.."
            )
        numbers = all(isinstance(one, (int, float)) and math.isfinite(one) for one in (timeout, backoff))
        if not numbers or timeout <= 0 or not isinstance(tries, int) or tries < 1 or backoff < 0:
            raise ValueError(
                "timeout must be a number above 0, tries a whole number from 1 on and backoff a number from 0 on, not "
                f"{timeout!r}, {tries!r}, {backoff!r}"
            )
        self.url, self.timeout, self.tries, self.backoff = url, timeout, tries, backoff

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> Reward:
        """Reward `images` (B, 3, H, W) float in [0, 1] for their B `prompts`.

        Raises:
            RewardError: no answer after all tries, or one that is not of the format or not finite.
        """
        said = self._ask(json.dumps(question(images, prompts)).encode())
        try:
            reward = read_answer(said, images.device)
            check_reward(reward, prompts)
        except ValueError as error:
            raise RewardError(f"the answer of the reward at {self.url} cannot be used: {error}") from error
        return reward

    def _ask(self, body: bytes) -> bytes:
        failures = []
        for number in range(self.tries):
            if number:
                time.sleep(self.backoff * 2 ** (number - 1))
            try:
                status, said = self._post(body)
            except (OSError, http.client.HTTPException) as error:
                failures.append(_in_words(error, self.timeout))
                continue
            if status == 200:
                return said
            failures.append(f"HTTP {status}: {_explanation(said)}")
            if status not in _TRY_AGAIN:
                break
        tried = f"{len(failures)} tries" if len(failures) > 1 else "1 try"
        raise RewardError(
            f"the reward at {self.url} gave no answer in {tried}: {failures[-1]}; see whether its server runs, and go "
            "on from the last checkpoint"
        )

    def _post(self, body: bytes) -> tuple[int, bytes]:
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        deadline = time.monotonic() + self.timeout
        connection = kind(parts.hostname, parts.port, timeout=self.timeout)
        connection.response_class = lambda sock, **how: http.client.HTTPResponse(_UntilDeadline(sock, deadline), **how)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        try:
            connection.connect()
            connection.sock.settimeout(_seconds_to(deadline))
            connection.request("POST", path, body, {"Content-Type": "application/json", "Accept": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


class _UntilDeadline(io.RawIOBase):
    """What a socket receives, as `http.client` reads it. A timeout of the socket alone counts from byte to byte."""

    def __init__(self, sock: socket.socket, deadline: float):
        self._sock, self._raw, self._deadline = sock, sock.makefile("rb", buffering=0), deadline

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int | None:
        self._sock.settimeout(_seconds_to(self._deadline))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


def _seconds_to(deadline: float) -> float:
    """Seconds that are left, above 0.

    Raises:
        TimeoutError: none are.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


# ---- The format: what is asked ----


def question(images: torch.Tensor, prompts: Sequence[str]) -> dict[str, Any]:
    """B images (B, 3, H, W) in [0, 1] and their prompts, as JSON can hold them."""
    return {"images": [_as_png(image) for image in images], "prompts": list(prompts)}


def read_question(body: bytes) -> tuple[torch.Tensor, list[str]]:
    """The images (B, 3, H, W) float32 in [0, 1] and the B prompts of a question.

    Raises:
        ValueError: it is not of the format.
    """
    asked = _read_json(body, "question")
    pictures, prompts = asked.get("images"), asked.get("prompts")
    if not _is_list_of(pictures, str) or not _is_list_of(prompts, str):
        raise ValueError("`images` must be a list of PNGs in base64 and `prompts` a list of texts")
    if not pictures or len(pictures) != len(prompts):
        raise ValueError(f"there are {len(pictures)} images and {len(prompts)} prompts; give one prompt an image")
    images = [to_tensor(decode(_from_base64(picture, "an image"))).float() / 255 for picture in pictures]
    if len({image.shape for image in images}) > 1:
        raise ValueError("the images are of different sizes; ask for those of one size at a time")
    return torch.stack(images), prompts


def _as_png(image: torch.Tensor) -> str:
    buffer = io.BytesIO()
    to_image(image).save(buffer, format="PNG", compress_level=1)  # the link is fast, the run waits
    return base64.b64encode(buffer.getvalue()).decode()


# ---- The format: what is answered ----


def answer(reward: Reward) -> dict[str, Any]:
    """A reward as JSON can hold it, every float32 to the bit."""
    found = {
        "total": reward.total.tolist(),
        "terms": {name: value.tolist() for name, value in reward.terms.items()},
        "penalties": {name: _pack(maps) for name, maps in reward.penalties.items()},
        "heatmaps": {name: _pack(maps) for name, maps in reward.heatmaps.items()},
    }
    if reward.word_penalties is not None:
        found["word_penalties"] = [words.tolist() for words in reward.word_penalties]
    if reward.wrong_words is not None:
        found["wrong_words"] = [words.tolist() for words in reward.wrong_words]
    return found


def read_answer(body: bytes, device: torch.device | str = "cpu") -> Reward:
    """The reward in an answer, on `device`. Whether its shapes and numbers fit is for `check_reward` to say.

    Raises:
        ValueError: it is not of the format.
    """
    found = _read_json(body, "answer")
    if unknown := sorted(found.keys() - {"total", "terms", "penalties", "word_penalties", "wrong_words", "heatmaps"}):
        raise ValueError(f"it has the unknown entries {', '.join(unknown)}")
    if "total" not in found:
        raise ValueError(f"it has no `total`: {_quote(body)}")
    words, wrong = found.get("word_penalties"), found.get("wrong_words")
    for name, value in (("word_penalties", words), ("wrong_words", wrong)):
        if value is not None and not isinstance(value, list):
            raise ValueError(f"`{name}` must be a list with a list for each image")
    return Reward(
        total=_numbers("total", found["total"], device),
        penalties=_unpack_all("penalties", "penalty map", found, device),
        word_penalties=None if words is None else [_numbers("word_penalties", value, device) for value in words],
        terms={name: _numbers(f"term `{name}`", value, device) for name, value in _mapping(found, "terms").items()},
        wrong_words=None if wrong is None else [_numbers("wrong_words", value, device) > 0 for value in wrong],
        heatmaps=_unpack_all("heatmaps", "heatmap", found, device),
    )


def _pack(maps: torch.Tensor) -> dict[str, Any]:
    values = maps.detach().float().cpu().numpy().astype("<f4")
    return {"shape": list(values.shape), "float32": base64.b64encode(values.tobytes()).decode()}


def _unpack_all(entry: str, what: str, found: Mapping[str, Any], device: torch.device | str) -> dict[str, torch.Tensor]:
    return {name: _unpack(f"{what} `{name}`", maps, device) for name, maps in _mapping(found, entry).items()}


def _unpack(what: str, maps: Any, device: torch.device | str) -> torch.Tensor:
    if not isinstance(maps, Mapping):
        return _numbers(what, maps, device)
    shape, text = maps.get("shape"), maps.get("float32")
    if not _is_list_of(shape, int) or not isinstance(text, str) or any(side < 0 for side in shape):
        raise ValueError(f'its {what} must be nested lists, or {{"shape": [B, h, w], "float32": base64}}')
    values = np.frombuffer(_from_base64(text, what, multiple_of=4), dtype="<f4")
    if len(values) != int(np.prod(shape)):
        raise ValueError(f"its {what} has {len(values)} numbers, not those of the shape {shape}")
    return torch.from_numpy(values.astype(np.float32).reshape(shape)).to(device)


def _numbers(what: str, value: Any, device: torch.device | str) -> torch.Tensor:
    try:
        return torch.tensor(value, dtype=torch.float32, device=device)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"its {what} is no list of numbers: {_quote(json.dumps(value).encode())}") from error


# ---- What both ways share ----


def _read_json(body: bytes, what: str) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError as error:  # also: not UTF-8
        raise ValueError(f"it is not JSON: {_quote(body)}") from error
    if not isinstance(found, dict):
        raise ValueError(f"the {what} must be a JSON object, not {_quote(body)}")
    return found


def _mapping(found: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = found.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"`{name}` must be an object, name -> numbers")
    return value or {}


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _from_base64(text: str, what: str, multiple_of: int = 1) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{what} is not base64: {error}") from error
    if len(data) % multiple_of:
        raise ValueError(f"{what} has {len(data)} bytes, which is no multiple of {multiple_of}")
    return data


def _explanation(body: bytes) -> str:
    """What a server says of its failure: its `error`, or the beginning of what it said."""
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return _quote(body)


def _quote(body: bytes) -> str:
    text = body[: _QUOTED + 1].decode(errors="replace")
    return repr(text if len(text) <= _QUOTED else text[:_QUOTED] + "...")


def _in_words(error: Exception, timeout: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no whole answer within {timeout:g} s"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
