"""What a run would cost, from one batch of it: weights, memory, rows, pictures, time.

Shapes: B pictures of a batch.
"""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table

from rl.experience import rollout_noise, sample_and_score
from rl.gradient_sketch import BYTES_A_WEIGHT
from rl.rollout import Trajectory, shared_places
from rl.timing import PhaseClock

if TYPE_CHECKING:
    from rl.ddpo import DDPOTrainer

MIB = 2**20


def measure(trainer: "DDPOTrainer") -> dict[str, float]:
    """Run one batch of a rollout and a micro-batch of its update, on this process, and extrapolate.

    Nothing is written, no weight is changed. Each is run twice, the second time counts; of the update, a micro-batch of
    the first trained step and one of the last, for what a group shares (`rl.trunks`) makes the first one cheaper. The
    network is the policy's own: what an engine of several processes adds (waiting, gathering) is not in it, and what it
    shards not taken off. With `train_steps: auto` it is a rollout that trains the first window.

    Returns:
        name -> number; names that end in `_mib` are memory, in `seconds` time. `activations_mib` is what autograd keeps
        of one micro-batch from forward to backward, with `activation_checkpointing` what its blocks are computed again
        from; on a GPU `peak_mib` is the most that was allocated, models and the block that is computed again included.
    """
    args, policy, plan = trainer.args, trainer.policy, trainer.plan
    size = args.per_device_rollout_batch_size or args.per_device_train_batch_size
    steps, micro_batches = len(trainer.schedule), plan.micro_batches * args.num_iterations
    pictures, group, kept = range(size), args.num_generations, trainer.train_steps[: plan.train_steps]
    prompts = [trainer.prompts[picture // group % len(trainer.prompts)] for picture in pictures]
    shared = shared_places(args.share_noise, kept, steps)
    noise = rollout_noise(policy, trainer.schedule, args.seed, "dry run", pictures, group, shared)
    policy.network.train()
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(args.device)
    for _ in range(2):
        clock = PhaseClock()
        with trainer.accelerator.autocast():  # the Trainer's own context has none: it leaves that to `prepare`
            batch = sample_and_score(
                policy, policy.network, trainer.reward_fn, prompts, noise, trainer.schedule, kept, args, clock, 0,
                held_out=trainer.held_out, trunks=trainer.trunks(pictures),
                dropout_keys=trainer.dropout_keys(0, pictures),
            )  # fmt: skip
        updates = [_update(trainer, batch.trajectory, prompts, k) for k in sorted({0, plan.train_steps - 1})]
    (first, _), (other, _) = updates[0], updates[-1]
    update, activations = first + (other - first) * (1 - 1 / plan.train_steps), max(mib for _, mib in updates)
    batches = plan.pictures_per_rank / size
    phases = {name: seconds * batches for name, seconds in clock.seconds.items()} | {"update": update * micro_batches}
    trained = sum(weight.numel() for weight in trainer.trained_weights())
    everything = {
        name: sum(weight.numel() * weight.element_size() for weight in part.parameters()) / MIB
        for name, part in policy.pipeline.components.items()
        if isinstance(part, torch.nn.Module)
    }
    row = noise[0, 0].numel() * 4 * 2 + noise[0, 0, 0].numel() * 4  # two latents and a map of log-probs
    unet = sum(weight.numel() for weight in policy.pipeline.unet.parameters() if weight.requires_grad)
    return {
        "trained_weights": trained,
        **({"trained_weights_of_text_encoders": trained - unet} if policy.trained.trains_text else {}),
        **{f"weights_{name}_mib": size for name, size in everything.items()},
        "gradients_and_optimizer_mib": trained * 4 * 3 / MIB,
        **({"gradient_sketch_mib": trained * BYTES_A_WEIGHT / MIB} if trainer.probe else {}),
        "activations_mib": activations,
        **({"peak_mib": torch.cuda.max_memory_allocated(args.device) / MIB} if args.device.type == "cuda" else {}),
        "buffer_mib": plan.pictures_per_rank * plan.train_steps * row / MIB,
        "sampling_steps": steps,
        "trained_steps": plan.train_steps,
        "pictures_per_rollout": plan.pictures,
        "rows_per_rollout": plan.pictures * plan.train_steps,
        "updates_per_rollout": plan.updates,
        "rollouts": trainer.total_rollouts,
        "pictures": plan.pictures * trainer.total_rollouts,
        **{f"rollout_{name}_seconds": seconds for name, seconds in phases.items()},
        "seconds": sum(phases.values()) * trainer.total_rollouts,
    }


def _update(trainer: "DDPOTrainer", trajectory: Trajectory, prompts: list[str], k: int) -> tuple[float, float]:
    """Of one micro-batch of the `k`-th trained step, forward and backward: seconds, and MiB that autograd keeps."""
    count = trainer.args.per_device_train_batch_size
    rows = [picture % len(prompts) for picture in range(count)]  # a batch of the rollout may be smaller
    inputs = {
        "latents": trajectory.latents[k, rows],
        "next_latents": trajectory.next_latents[k, rows],
        "old_log_probs": trajectory.log_probs[k, rows],
        "step": int(trajectory.steps[k]),
        "loss_weight": 1.0,
        "advantages": torch.linspace(-1, 1, count, device=trajectory.latents.device),
        "weights": torch.ones_like(trajectory.log_probs[k, rows]),
        "prompts": [prompts[row] for row in rows],
        "dropout_keys": trainer.dropout_keys(0, range(count)),
        "trunks": trainer.trunks(range(count)) if k == 0 else None,
        "measure_kl": trainer.args.beta > 0,
    }
    unet = trainer.policy.pipeline.unet
    weights = {weight.data_ptr() for weight in trainer.policy.network.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def checkpointed(block: torch.nn.Module, *inputs):
        for one in inputs:
            if isinstance(one, torch.Tensor):
                note(one)
        return trainer.policy.trained.run_and_run_again(block, *inputs)

    if trainer.args.activation_checkpointing:  # as the Trainer does when it begins
        unet.enable_gradient_checkpointing(checkpointed)
    start = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), trainer.accelerator.autocast():
        loss = trainer.compute_loss(trainer.policy.network, inputs)
    torch.autograd.grad(loss, trainer.trained_weights())
    if loss.is_cuda:
        torch.cuda.synchronize()
    trainer.forget_metrics()
    return time.perf_counter() - start, sum(saved.values()) / MIB


def print_costs(console: Console, costs: Mapping[str, float]) -> None:
    """The table of a dry run."""
    table = Table(title="a dry run: one batch was measured, nothing was written")
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in costs.items():
        shown = f"{value:,.1f}" if name.endswith(("_mib", "seconds")) else f"{value:,.0f}"
        unit = " MiB" if name.endswith("_mib") else " s" if name.endswith("seconds") else ""
        table.add_row(
            name.removesuffix("_mib").removesuffix("seconds").replace("_", " ").strip() or "all", shown + unit
        )
    console.print(table)
    hours, minutes = divmod(round(costs["seconds"] / 60), 60)
    console.print(f"the whole run: about {hours} h {minutes} min on each process")
