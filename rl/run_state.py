"""What a run remembers besides weights, optimizer and schedule: two files in each checkpoint."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

FACTS, TENSORS = "run_state.json", "run_state.safetensors"


@dataclass(frozen=True)
class RunState:
    """As it was at a rollout boundary.

    Attributes:
        facts: what JSON can hold; numbers come back to the bit.
        tensors: name -> tensor.
    """

    facts: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        (folder / FACTS).write_text(json.dumps(dict(self.facts)) + "\n", encoding="utf-8")
        if self.tensors:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
            save_file(tensors, folder / TENSORS)

    @staticmethod
    def read_facts(folder: Path) -> dict[str, Any]:
        """The facts alone."""
        return json.loads((folder / FACTS).read_text(encoding="utf-8"))

    @classmethod
    def read(cls, folder: Path) -> "RunState":
        facts = cls.read_facts(folder)
        return cls(facts, load_file(folder / TENSORS) if (folder / TENSORS).exists() else {})

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors whose name begins with `prefix` and a dot, without it."""
        return {
            name.removeprefix(f"{prefix}."): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(f"{prefix}.")
        }
