"""What a training that is finished says of itself, kept beside it for when its checkpoints are deleted."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from reward.whole_files import write_whole
from rl.checkpoints import complete_checkpoints
from rl.run_state import RunState

FACTS, CODE = "facts.json", "code.txt"


@dataclass(frozen=True)
class TrainingFacts:
    """What a finished training says of itself.

    Attributes:
        kl: to the base at its last rollout, nats a latent value; None where it was not measured.
        monitors: those of `rl.watch_limits` that were ever across their limits.
        wall_seconds: of training, whatever ran beside it.
        code: the toolkit's own code when the training was last started, as `finetune.fingerprints.code` tells it; empty
            where nobody noted it.
    """

    kl: float | None
    monitors: Sequence[str]
    wall_seconds: float
    code: str = ""

    @classmethod
    def read(cls, folder: Path) -> "TrainingFacts":
        """From a run's folder: as they were kept there, or else from its last checkpoint.

        Raises:
            ValueError: neither is there.
        """
        if (folder / FACTS).is_file():
            return cls(**json.loads((folder / FACTS).read_text(encoding="utf-8")))
        if not (checkpoints := complete_checkpoints(folder)):
            raise ValueError(
                f"{folder} holds neither {FACTS} nor a checkpoint, so what its training said of itself is lost; bring "
                "one of them back, or delete the folder and train again"
            )
        checkpoint = checkpoints[-1]
        log = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        kls = [line["kl"] for line in log if "kl" in line]
        watch = RunState.read(checkpoint).facts["watch"]
        crossed = watch.get("crossed", watch.get("over", []))
        seconds = json.loads((checkpoint / "complete.json").read_text(encoding="utf-8"))["train_seconds"]
        code = (folder / CODE).read_text(encoding="utf-8") if (folder / CODE).is_file() else ""
        return cls(kls[-1] if kls else None, crossed, seconds, code)

    def keep(self, folder: Path) -> None:
        write_whole(folder / FACTS, (json.dumps(asdict(self)) + "\n").encode())
