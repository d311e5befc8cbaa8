"""Whether a run of these settings can go on from a checkpoint; asked before models are loaded."""

from pathlib import Path

from safetensors import safe_open

from rl.adapter import LORA_WEIGHTS, AdapterSettings
from rl.checkpoints import MARKER, read_marker
from rl.ddpo_config import DDPOConfig
from rl.full_unet import UNET_FOLDER
from rl.policy_config import PolicyConfig
from rl.run_state import RunState

AVERAGE_UPDATES = "average_updates"
"""What a checkpoint that holds an average of the weights says of it: how many updates it is of."""


def check_goes_on(checkpoint: Path, args: PolicyConfig, updates: int) -> None:
    """Complain if a run cannot go on from `checkpoint`, as far as that shows without a model.

    Args:
        updates: of this run's, between two places where it can stop.

    Raises:
        ValueError: it was made by no whole number of such, or another one than it counted, or by another optimizer; it
            lacks an average of the weights that is wanted; it chose no steps, or more or fewer of them; what was
            trained was another part of the policy, or a LoRA of another rank.
    """
    marker = read_marker(checkpoint)
    if missing := {"rollouts", "global_step"} - set(marker):
        raise ValueError(f"{checkpoint} is no checkpoint of this trainer: {MARKER} lacks {', '.join(missing)}")
    if (optimizer := marker.get("optim", args.optim)) != args.optim:
        raise ValueError(
            f"{checkpoint} holds the state of the optimizer {optimizer}, but optim is {args.optim.value}; give it the "
            "value it had"
        )
    if marker["rollouts"] * updates != marker["global_step"]:
        raise ValueError(
            f"{checkpoint} was made by {marker['global_step']} updates in {marker['rollouts']} rollouts, but with "
            f"these settings a rollout has {updates} updates; give gradient_accumulation_steps, num_iterations, "
            "train_steps, the batch sizes and the number of processes the values they had"
        )
    if args.ema_decay is not None and AVERAGE_UPDATES not in RunState.read_facts(checkpoint):
        raise ValueError(
            f"ema_decay is {args.ema_decay}, but {checkpoint} was made without it, and holds no average to go on with; "
            "leave it out"
        )
    _check_steps(checkpoint, args)
    _check_trained(checkpoint, args)


def _check_steps(checkpoint: Path, args: PolicyConfig) -> None:
    """Complain if `args` go on choosing the steps that they train, where `checkpoint` has not begun to, or as many."""
    if not isinstance(args, DDPOConfig) or args.probed_steps is None:
        return
    facts = RunState.read_facts(checkpoint)
    if "probed" not in facts:  # of an earlier version, which did not say
        return
    if facts["probed"] is None or len(facts["train_steps"]) != args.probed_steps:
        trained = f"{len(facts['train_steps'])} steps of its own choice" if facts["probed"] else "those it was told"
        raise ValueError(
            f"train_steps is {' '.join(args.train_steps)}, but {checkpoint} was made by training {trained}; give it "
            "the value it had, or name the steps"
        )


def _check_trained(checkpoint: Path, args: PolicyConfig) -> None:
    """Complain if what was trained is not what `args` train."""
    file = checkpoint / LORA_WEIGHTS
    if args.tune != "lora":
        if not (checkpoint / UNET_FOLDER).is_dir():
            raise ValueError(f"tune is {args.tune}, but {checkpoint} holds no folder {UNET_FOLDER}; it is of a LoRA")
        return
    if not file.is_file():
        raise ValueError(f"tune is lora, but {checkpoint} holds no {LORA_WEIGHTS}; it is of a whole U-Net")
    if args.init_adapter is not None:  # its rank is the LoRA's, and is compared when that is read
        return
    with safe_open(file, framework="pt") as stored:
        names = [name for name in list(stored.keys()) if "lora_A" in name]
        ranks = {stored.get_slice(name).get_shape()[0] for name in names}
    both = args.part(AdapterSettings).starts_from_base  # then what it began as is stored beside it
    if ranks and args.lora_rank * (1 + both) not in ranks:
        raise ValueError(f"lora_rank is {args.lora_rank}, but the LoRA in {checkpoint} has the rank {min(ranks)}")
