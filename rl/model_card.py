"""The model card of a run, `README.md` in its folder, and the curves that it shows."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.figure
import yaml
from huggingface_hub import ModelCard, ModelCardData

from rl.checkpoints import written_beside
from rl.evaluate import Evaluation
from rl.full_unet import FullUnet
from rl.lora import Lora
from rl.pipelines import pipeline_file
from rl.report import paired_change

_FILE_ON_HUB = re.compile(r"([\w.-]+/[\w.-]+)/[\w.+-]+\.\w+")
"""owner/name/file, as rewards name their weights (`reward.others.files`)."""

CURVES = {
    "reward": "reward of the rollouts",
    "kl": "KL divergence to the base, nats a latent value",
    "grad_norm": "norm of the gradient",
    "watch/drawn": "edges drawn, against the start",
}


@dataclass(frozen=True)
class Method:
    """How a policy was trained.

    Attributes:
        name: what it is called, with its source; goes behind "fine-tuned by".
        tags: for the hub.
        reward_is: what the reward was to it; the reward's name follows.
        curves: four names of what is logged -> their titles.
    """

    name: str
    tags: Sequence[str]
    reward_is: str = "with the reward"
    curves: Mapping[str, str] = field(default_factory=lambda: CURVES)


DDPO = Method("DDPO (Black et al. 2023, arXiv 2305.13301)", ("ddpo", "reinforcement-learning"))


def licence_of(place: str | Path) -> str:
    """What the model card in a folder, or of a name on the hub, says of its licence; else where to look for it.

    The front matter of `README.md` is read, as the hub writes it.

    Args:
        place: a folder, the hub's owner/name, or one file on the hub, owner/name/file.
    """
    of_file = _FILE_ON_HUB.fullmatch(str(place))
    model = str(place) if of_file is None or Path(of_file[1]).exists() else of_file[1]
    try:
        card = pipeline_file(model, "README.md")
        licence = ModelCard.load(card).data.get("license") if card.is_file() else None
    except (ValueError, yaml.YAMLError):  # the hub does not give it, or its front matter is none
        licence = None
    return str(licence or f"unknown here; see {place}")


def write_model_card(
    folder: str | Path,
    settings: Mapping[str, Any],
    history: Sequence[Mapping[str, float]],
    figures: tuple[Evaluation, Evaluation] | None = None,
    method: Method = DDPO,
) -> dict[str, Path]:
    """Write `README.md` and `curves.png`, or, after an error, neither.

    Args:
        settings: of the run, as its folder keeps them; `policy` and `reward` name base and reward.
        history: what was logged, the Trainer's `log_history`.
        figures: before and after, on the same prompts and noise.

    Returns:
        What each file is -> its path.
    """
    base = settings["policy"]
    reward = settings.get("reward") or ("a sum of rewards, see below" if settings.get("rewards") else None)
    tags = ["text-to-image", "diffusers", *(["lora"] if _is_lora(settings) else []), *method.tags]
    on_hub = None if Path(base).exists() else str(base)  # the hub refuses a card whose base is none of its models
    data = ModelCardData(base_model=on_hub, library_name="diffusers", pipeline_tag="text-to-image", tags=tags)
    lines = [
        "---", data.to_yaml(), "---", "",
        f"# {Path(folder).name}", "",
        f"`{base}`, fine-tuned by {method.name}{f' {method.reward_is} `{reward}`' if reward else ''}. "
        f"What was trained is {_what(settings)}.", "",
        "```python", *_usage(settings, folder), "```", "",
        f"Licences: {'; '.join(_licences(settings))}.", "",
    ]  # fmt: skip
    if figures is not None:
        lines += _figures(*figures)
    lines += ["## Curves", "", "![Curves of the run](curves.png)", "", "## Settings", "", "```json"]
    lines += [json.dumps(settings, indent=1, sort_keys=True, default=str), "```", ""]
    with written_beside(Path(folder)) as beside:
        (beside / "README.md").write_text("\n".join(lines), encoding="utf-8")
        _draw_curves(history, method.curves, beside / "curves.png")
    return {"model card": Path(folder) / "README.md"}


def _licences(settings: Mapping[str, Any]) -> list[str]:
    """What is known of the base's and each reward's."""
    found = [f"base: {licence_of(settings['policy'])}"]
    rewards = {f"reward {name}": entry for name, entry in (settings.get("rewards") or {}).items()}
    if not rewards and settings.get("reward"):
        rewards = {"reward": {"kwargs": settings.get("reward_kwargs")}}
    for name, entry in rewards.items():
        kwargs = entry.get("kwargs") if isinstance(entry, Mapping) else None  # a reward's name alone is an entry too
        model = (kwargs or {}).get("model")
        found.append(f"{name}: {licence_of(model) if model else 'see its code'}")
    return found


def _is_lora(settings: Mapping[str, Any]) -> bool:
    return settings.get("tune", "lora") == "lora"


def _what(settings: Mapping[str, Any]) -> str:
    if not _is_lora(settings):
        return "the U-Net"
    return f"a LoRA on the U-Net{' and the text encoders' if settings.get('train_text_encoder') else ''}"


def _usage(settings: Mapping[str, Any], folder: str | Path) -> list[str]:
    """Lines of Python that make the pipeline with what was trained."""
    place = (settings.get("push_to_hub") and settings.get("hub_model_id")) or folder
    kind = Lora if _is_lora(settings) else FullUnet
    lines = [f"from diffusers import DiffusionPipeline{'' if kind is Lora else ', UNet2DConditionModel'}", ""]
    lines.append(f'pipe = DiffusionPipeline.from_pretrained("{settings["policy"]}")')
    for base_adapter in settings.get("base_adapters") or ():
        lines += [Lora.usage(base_adapter), "pipe.fuse_lora()", "pipe.unload_lora_weights()"]
    return [*lines, kind.usage(place)]


def _figures(before: Evaluation, after: Evaluation) -> list[str]:
    lines = [
        f"## Before and after, on {len(before.prompts)} held-out prompts", "",
        "![The same prompts and noise before and after](before_after.png)", "",
        "| | before | after | change (95% interval over prompts) |", "|---|---|---|---|",
    ]  # fmt: skip
    for name, old in sorted(before.values.items()):
        change, half = paired_change(old, after.values[name])
        lines.append(f"| {name} | {old.mean():.4f} | {after.values[name].mean():.4f} | {change:+.4f} +- {half:.4f} |")
    return [*lines, ""]


def _draw_curves(history: Sequence[Mapping[str, float]], curves: Mapping[str, str], file: Path) -> None:
    figure = matplotlib.figure.Figure(figsize=(9, 5), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 2).flat, curves.items(), strict=True):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        axes.plot(*zip(*points, strict=True) if points else ([], []))
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("updates", fontsize=8)
    figure.savefig(file, dpi=100, metadata={"Software": None})
