"""The real command, and its trainer, on a tiny pipeline."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from finetune import select, sft
from finetune.pool import open_pool
from finetune.run import train as run_train
from finetune.sft_config import SftConfig
from finetune.sft_data import TrainingPictures, Visit, collate, make_buckets, read_weights
from finetune.sft_trainer import SftTrainer
from reward.arguments import main_guard, parse_arguments
from reward.by_name import check_reward_name
from reward.folder_lock import FolderInUseError, check_free, taken
from rl.adapter import AdapterSettings
from rl.checkpoints import complete_checkpoints
from rl.evaluate import HeldOut
from rl.interrupt import RunInterrupted
from rl.policy import StableDiffusionPolicy
from tests.rl.conftest import make_xl_pipeline
from tinyworld.grammar import ASSETS, draw_request
from tinyworld.scenes import lay_out, render

ROOT = Path(__file__).parents[2]
LORA = "pytorch_lora_weights.safetensors"


def command(*argv):
    """Exit code of `python -m finetune.sft argv`, in this process."""
    with pytest.raises(SystemExit) as caught:
        main_guard(sft.main, [str(part) for part in argv])
    return caught.value.code


def flags(**settings):
    return [
        part
        for name, value in settings.items()
        for part in (f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value))
    ]


@pytest.fixture
def settings(pipeline_folder, write_pictures, prompt_file, tmp_path):
    return {
        "policy": pipeline_folder, "data": write_pictures(tmp_path / "pictures", overall=[0.1, 0.9] * 3),
        "output_dir": tmp_path / "run", "use_cpu": True, "max_steps": 4, "per_device_train_batch_size": 4,
        "lora_rank": 2, "learning_rate": 1e-2, "warmup_steps": 1, "logging_steps": 1, "disable_tqdm": True,
        "num_inference_steps": 2, "seed": 3, "dataloader_pin_memory": False,
    }  # fmt: skip


@pytest.fixture
def make_trainer(settings):
    def make(pipeline=None, **changes):
        given = {**settings, "report_to": "none", **changes}
        policy, data = pipeline or given["policy"], given["data"]
        _, args = parse_arguments([sft.SftArguments, SftConfig], flags(**given))
        policy = StableDiffusionPolicy.load(
            policy, seed=args.seed, **{name: getattr(args, name) for name in AdapterSettings.__dataclass_fields__}
        )
        pool = open_pool(data)
        weights = read_weights(pool, args.weight_by, args.weight_temperature)
        pictures = TrainingPictures(pool, make_buckets(policy, args.aspect_buckets), weights)
        trainer = SftTrainer(policy, pictures, args)
        if args.cache_latents:
            pictures.encode(policy, 4, 0, 1, lambda count: None)
        return trainer

    return make


def test_text_encoder_learns_too(make_trainer):
    trainer = make_trainer(train_text_encoder=True, prompt_dropout=0.5, max_steps=2)
    trainer.train()
    text = {name: weight for name, weight in trainer.policy.network.named_parameters() if name.startswith("text")}
    moved = [weight.abs().max() > 0 for name, weight in text.items() if "lora_B" in name]
    assert moved
    assert all(moved)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_from_pictures_to_a_lora_that_plain_diffusers_loads(settings, prompt_file, tmp_path, capsys):
    evaluation = {
        "eval_prompts": prompt_file, "reward": "tests.rl.toy_rewards:Redness", "reward_kwargs": {"weight": 1.0},
        "eval_rewards": {"judge": "tests.rl.toy_rewards:Plain"}, "num_before_after": 2,
    }  # fmt: skip
    assert command(*flags(**settings, **evaluation)) == 0
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert {"before", "after", "seconds", "pictures", "updates", "seed"} <= summary.keys()
    assert (summary["pictures"], summary["updates"]) == (6, 4)
    assert {"reward", "judge.satisfied", "diversity"} <= summary["before"].keys()
    assert summary["before"]["reward"] != summary["after"]["reward"]
    for name in ("before_after.png", "evaluation.json", "README.md", "runs", "run_config.json", "finished.json"):
        assert (run / name).exists(), name
    card = (run / "README.md").read_text()
    assert "supervised fine-tuning on pictures with prompts and looked at with the reward `tests.rl" in card
    said = capsys.readouterr().out
    for phrase in ("encoding 6 pictures", "evaluating before", "training on 6 pictures", "judge.satisfied"):
        assert phrase in said

    # The LoRA is the trained network's.
    pipe = StableDiffusionPipeline.from_pretrained(
        settings["policy"], safety_checker=None, requires_safety_checker=False
    )
    pipe.load_lora_weights(str(run))
    policy = StableDiffusionPolicy.load(settings["policy"], lora_rank=2)
    policy.load_adapter(run)
    source = torch.Generator().manual_seed(0)
    latents, timestep = torch.randn(1, 4, 8, 8, generator=source), torch.tensor([500])
    conditioning = policy.encode(["a red circle"])
    with torch.no_grad():
        ours = policy.predict(policy.network, latents, timestep, conditioning)
        theirs = pipe.unet(latents, timestep, conditioning.embeds).sample
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_run_that_goes_on_with_pictures_that_were_exchanged_says_so(settings, caplog):
    run = flags(**settings)
    assert command(*run, "--max_steps", "2") == 0
    pool = open_pool(settings["data"])
    Image.new("RGB", (31, 7)).save(pool.place / pool.entries[0].name)
    assert command(*run, "--max_steps", "2", "--resume_from_checkpoint", "latest") == 0
    assert "resuming with other settings than before: pictures (SHA-256 of names, prompts, sizes)" in caplog.text


def loss_of(trainer, visits):
    """The loss on these pictures, before or behind training."""
    with torch.no_grad():
        inputs = collate([trainer.pictures[visit] for visit in visits])
        return float(trainer.compute_loss(trainer.policy.network, inputs))


def test_what_is_shown_is_learnt(make_trainer, write_pictures, tmp_path):
    trainer = make_trainer(data=write_pictures(tmp_path / "one", 1), max_steps=12, lora_rank=4, save_strategy="no")
    fresh = [Visit(1000, 0, time) for time in range(32)]  # noise that training does not use
    before = loss_of(trainer, fresh)
    trainer.train()
    assert loss_of(trainer, fresh) < 0.9 * before


def test_a_pretrained_pipeline_is_at_home_with_pictures_of_its_own_world(make_trainer, tmp_path):
    """Pixels, latents, noise and target as its own training had them: anything else costs it ten times the error."""
    world, rng = tmp_path / "world", np.random.default_rng(0)
    world.mkdir()
    requests = [draw_request(rng) for _ in range(8)]
    for place, request in enumerate(requests):
        Image.fromarray(render(lay_out(request, rng).things)).save(world / f"{place}.png")
    lines = [{"file_name": f"{place}.png", "text": str(request)} for place, request in enumerate(requests)]
    (world / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    trainer = make_trainer(pipeline=str(ASSETS / "sd"), data=world, prompt_dropout=0.0)
    assert loss_of(trainer, [Visit(0, place, time) for place in range(8) for time in range(2)]) < 0.3


@pytest.mark.parametrize("lora_dropout", [0.0, 0.5])
def test_stopped_and_resumed_is_as_never_stopped(make_trainer, tmp_path, lora_dropout):
    """Six pictures in batches of 4 are two updates an epoch: the stop, behind the third, falls into one's middle."""
    shape = {"max_steps": 5, "save_strategy": "no", "lora_dropout": lora_dropout}
    whole = make_trainer(output_dir=tmp_path / "whole", **shape)
    whole.train()
    whole.save_model()

    stopped = make_trainer(output_dir=tmp_path / "stopped", **shape)
    step, begun = stopped.training_step, []

    def ask_in_the_fourth(*arguments):
        begun.append(None)
        stopped._stop.requested = len(begun) == 4
        return step(*arguments)

    stopped.training_step = ask_in_the_fourth
    with pytest.raises(RunInterrupted, match="after 3 of 5 updates"):
        stopped.train()
    assert [folder.name for folder in complete_checkpoints(tmp_path / "stopped")] == ["checkpoint-3"]
    resumed = make_trainer(output_dir=tmp_path / "stopped", **shape)
    resumed.train(resume_from_checkpoint="latest")
    resumed.save_model()
    assert losses(resumed) == losses(whole)
    first, second = (load_file(tmp_path / name / LORA) for name in ("whole", "stopped"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_accumulated_micro_batches_are_one_batch(make_trainer, tmp_path):
    """Plain gradient descent on six pictures at once, and on 3 + 3."""
    plain = {"optim": "sgd", "max_steps": 1, "save_strategy": "no", "warmup_steps": 0, "learning_rate": 1.0}
    for name, size, count in (("one", 6, 1), ("two", 3, 2)):
        trainer = make_trainer(
            output_dir=tmp_path / name, per_device_train_batch_size=size, gradient_accumulation_steps=count, **plain
        )
        trainer.train()
        trainer.save_model()
    first, second = (load_file(tmp_path / name / LORA) for name in ("one", "two"))
    moved = 0.0
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-6, rtol=1e-4)
        moved += float(first[name].abs().sum()) if "lora_B" in name or "lora.up" in name else 0.0
    assert moved > 0


@pytest.mark.timeout(600)
def test_two_ranks_are_one(make_trainer, settings, tmp_path):
    """They share every batch of four, and the pictures to encode."""
    plain = {"optim": "sgd", "learning_rate": 1.0, "warmup_steps": 0, "prompt_dropout": 0.5}
    one = make_trainer(max_steps=3, save_strategy="no", **plain)
    one.train()
    one.save_model()
    output = tmp_path / "two"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command += [Path(__file__).parent / "two_ranks_sft.py", settings["policy"], settings["data"], output]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (load_file(tmp_path / name / LORA) for name in ("run", "two"))
    moved = 0.0
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-5, rtol=1e-3)
        moved += float(first[name].abs().sum()) if "lora_B" in name or "lora.up" in name else 0.0
    assert moved > 0


def test_latents_kept_or_encoded_each_time_teach_the_same(make_trainer, tmp_path):
    runs = [
        make_trainer(output_dir=tmp_path / str(kept), cache_latents=kept, max_steps=2, save_strategy="no")
        for kept in (True, False)
    ]
    for trainer in runs:
        trainer.train()
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-4)


def test_weights_min_snr_noise_offset_and_dropout_change_the_loss(make_trainer):
    visits = [Visit(0, place, 0) for place in range(6)]

    def loss(**changes):
        return loss_of(make_trainer(**{"prompt_dropout": 0.0, **changes}), visits)

    plain = loss()
    assert loss(weight_by={"overall": 1.0}, weight_temperature=1e6) == pytest.approx(plain, rel=1e-4)
    for changes in ({"weight_by": {"overall": 1.0}}, {"snr_gamma": 5.0}, {"noise_offset": 0.5}):
        assert abs(loss(**changes) - plain) > 1e-4, changes
    assert loss(prompt_dropout=1.0) != plain


def test_xl_is_told_how_each_picture_was_cut(make_trainer, write_pictures, tmp_path):
    data = write_pictures(tmp_path / "wide", 4, sizes=((24, 48), (20, 20)))
    trainer = make_trainer(
        pipeline=make_xl_pipeline(tmp_path / "xl"), data=data, aspect_buckets=True, max_steps=2, save_strategy="no",
        per_device_train_batch_size=2, prompt_dropout=0.5,
    )  # fmt: skip
    told = []
    predict = trainer.policy.predict

    def listen(model, latents, timesteps, conditioning, *more):
        told.append((tuple(latents.shape[2:]), conditioning.time_ids.tolist()))
        return predict(model, latents, timesteps, conditioning, *more)

    trainer.policy.predict = listen
    trainer.train()
    assert sorted(told) == [((6, 12), [[24, 48, 0, 0, 12, 24]] * 2), ((8, 8), [[20, 20, 0, 0, 16, 16]] * 2)]


def test_without_a_reward_there_are_pictures_all_the_same(settings, prompt_file, tmp_path, capsys):
    how = {
        "eval_prompts": prompt_file, "eval_generations": 1, "num_before_after": 2, "eval_strategy": "steps",
        "eval_steps": 2, "save_strategy": "no",
    }  # fmt: skip
    assert command(*flags(**settings, **how)) == 0
    run = tmp_path / "run"
    with Image.open(run / "before_after.png") as sheet:
        assert sheet.width > 2 * 128  # two pictures beside each other
    assert sorted(file.name for file in (run / "samples").iterdir()) == ["rollout-000002.png", "rollout-000004.png"]
    before = json.loads((run / "summary.json").read_text())["before"]
    assert before.keys() == {"edge_energy", "diversity", "n", "generations"}
    assert "looked at with" not in (run / "README.md").read_text()
    assert "evaluating after" in capsys.readouterr().out

    how |= {"eval_rewards": {"judge": "tests.rl.toy_rewards:Plain"}, "overwrite_output_dir": True}
    assert command(*flags(**settings, **how)) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert "judge.satisfied" in summary["after"]
    assert "reward" not in summary["after"]


def test_pictures_weighed_instead_of_chosen(settings, write_pictures, model_folder, tmp_path, monkeypatch):
    """From a table of people's ratings, through a selection that keeps all, to a training in which they count."""
    rated = write_pictures(tmp_path / "rated", rating=[1, 2, 3, 4, 5, 9], uid=list("abcdef"))
    chosen = {"pictures": rated, "model": model_folder, "output_dir": tmp_path / "chosen", "use_cpu": True, "rules": {}}
    with pytest.raises(SystemExit) as caught:
        main_guard(select.main, flags(**chosen))
    assert caught.value.code == 0
    trained = []
    monkeypatch.setattr(sft, "train", lambda trainer, *rest: trained.append(trainer) or run_train(trainer, *rest))
    settings |= {"data": tmp_path / "chosen" / "data", "max_steps": 1, "weight_by": {"rating": 1.0}}
    assert command(*flags(**settings)) == 0
    pictures = trained[0].pictures
    assert [entry.columns["uid"] for entry in pictures.pool.entries] == list("abcdef")
    assert pictures.weights.tolist() == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.25, 2.25])


def test_where_sampling_starts_is_nothing_to_training(make_trainer, tmp_path):
    """Of the many draws some are above the start; and the same pictures are noised alike."""
    visits = [Visit(0, place, time) for place in range(6) for time in range(8)]
    whole, cut = (
        make_trainer(output_dir=tmp_path / str(start), **({} if start is None else {"start_timestep": start}))
        for start in (None, 499)
    )
    assert cut.scheduler.config.num_train_timesteps == 500
    drawn = cut._draws(visits, torch.Size([len(visits), 4, 8, 8]))["timestep"]
    assert drawn.max() > 900
    assert drawn.min() < 100
    first = [Visit(0, place, 0) for place in range(6)]
    assert loss_of(cut, first) == loss_of(whole, first)


def test_dropout_depends_on_the_picture_only_and_there_is_none_where_it_draws(make_trainer, prompt_file):
    trainer = make_trainer(lora_dropout=0.5, max_steps=2, save_strategy="no")
    trainer.train()
    trainer.policy.rounded = True  # so that the LoRA is not folded, and would drop if it could
    visits = [Visit(9, place, 0) for place in range(4)]

    def loss(visits, seed=0):
        torch.manual_seed(seed)  # torch's own draws are asked for nothing
        return loss_of(trainer, visits)

    alone = [loss([visit]) for visit in visits]
    assert loss(visits, 1) == loss(visits, 2) == pytest.approx(sum(alone) / len(alone), rel=1e-4)

    def draw():
        _, samples = trainer.judge(HeldOut(prompt_file.read_text().splitlines(), {}, generations=1))
        return samples.images

    images = draw()
    trainer.policy.trained.dropout = None
    assert loss(visits) != pytest.approx(sum(alone) / len(alone), rel=1e-4)
    assert torch.equal(images, draw())


def test_what_is_dropped_is_dropped_again_where_activations_are_computed_anew(make_trainer, tmp_path):
    found = []
    for again in (False, True):
        trainer = make_trainer(
            output_dir=tmp_path / str(again), lora_dropout=0.5, activation_checkpointing=again, max_steps=3,
            save_strategy="no", optim="sgd", learning_rate=1.0,
        )  # fmt: skip
        trainer.train()
        found.append([weight.detach().clone() for weight in trainer.trained_weights()])
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-4)


def test_a_lora_that_was_trained_with_dropout_is_drawn_without(make_trainer, settings, tmp_path):
    trainer = make_trainer(lora_dropout=0.5, max_steps=2, save_strategy="no")
    trainer.train()
    trainer.save_model()
    pipe = StableDiffusionPipeline.from_pretrained(
        settings["policy"], safety_checker=None, requires_safety_checker=False
    )
    pipe.load_lora_weights(str(tmp_path / "run"))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    embeds = trainer.policy.encode(["a red circle"]).embeds
    with torch.no_grad():
        first, second = (pipe.unet(latents, torch.tensor([500]), embeds).sample for _ in range(2))
    assert torch.equal(first, second)
    again = make_trainer(lora_dropout=0.25, init_adapter=tmp_path / "run", lora_rank=8, output_dir=tmp_path / "again")
    assert 0.7 < float(again.policy.trained.dropout.draw([(0,)]).float().mean()) < 0.8


def test_sizes_that_only_the_evaluation_is_told_are_warned_of(tmp_path, caplog):
    SftConfig(output_dir=str(tmp_path), use_cpu=True)
    assert "size" not in caplog.text
    SftConfig(output_dir=str(tmp_path), use_cpu=True, target_size=[16, 16], crops_coords_top_left=[0, 4])
    for setting in ("target_size=[16, 16]", "crops_coords_top_left=[0, 4]"):
        assert f"{setting} is ignored: XL is told of each picture how it was cut" in caplog.text


def test_it_is_judged_in_the_midst_too(settings, prompt_file, tmp_path):
    how = {
        "eval_prompts": prompt_file, "reward": "tests.rl.toy_rewards:Redness", "reward_kwargs": {"weight": 1.0},
        "eval_generations": 1, "num_before_after": 2, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no",
    }  # fmt: skip
    assert command(*flags(**settings, **how)) == 0
    assert sorted(file.name for file in (tmp_path / "run/samples").iterdir()) == [
        "rollout-000002.png", "rollout-000004.png",
    ]  # fmt: skip


def test_nobody_else_may_write_where_it_trains(settings, tmp_path, monkeypatch, capsys):
    with taken(tmp_path / "run"):
        assert command(*flags(**settings)) == 2
    assert "is in use by another run" in capsys.readouterr().err

    def train(trainer, checkpoint, console):
        with pytest.raises(FolderInUseError):
            check_free(trainer.args.output_dir)
        trainer.save_model()

    monkeypatch.setattr(sft, "train", train)
    assert command(*flags(**settings)) == 0


def test_the_whole_unet_can_be_trained(make_trainer, tmp_path):
    trainer = make_trainer(tune="full", max_steps=1, learning_rate=1e-3, save_strategy="no")
    before = {name: weight.clone() for name, weight in trainer.policy.network.state_dict().items()}
    trainer.train()
    after = trainer.policy.network.state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before if "conv_in" in name)


def test_mistakes(settings, tmp_path, capsys):
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux" / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    for changes, message in (
        ({"colour": 1}, "unknown setting on the command line: `--colour`"),
        ({"data": tmp_path / "none"}, "there is no folder of pictures"),
        ({"weight_by": {"overal": 1.0}}, "(nearest name: `overall`)"),
        ({"policy": tmp_path / "flux"}, "is a FluxPipeline; what works here is StableDiffusionPipeline"),
        ({"eval_strategy": "epoch"}, "eval_strategy is epoch, but there are no eval_prompts to evaluate on"),
        ({"prompt_dropout": 2}, "prompt_dropout is 2.0; it must lie in [0, 1]"),
        ({"snr_gamma": 0}, "snr_gamma is 0.0; it must be above 0"),
        ({"noise_offset": -1}, "noise_offset is -1.0; it must not be negative"),
        ({"eta": 2}, "eta is 2.0; it must lie in [0, 1]"),
        ({"weight_by": '{"overall": "much"}'}, "weight_by: the factor of overall is 'much'; it must be a number"),
    ):
        assert command(*flags(**{**settings, **changes})) == 2
        assert message in capsys.readouterr().err
    (settings["data"] / "1.png").write_bytes(b"no picture")
    assert command(*flags(**settings)) == 2
    assert "the picture 1.png of" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["tinyworld", "sd15", "sdxl"])
def test_presets_are_valid(name, monkeypatch):
    path = ROOT / f"configs/sft_{name}.yaml"
    lines = path.read_text().splitlines()
    assert all(line.startswith("# ") for line in lines[:3])
    assert f"--config configs/sft_{name}.yaml" in lines[0]
    run, args = parse_arguments([sft.SftArguments, SftConfig], ["--config", str(path), "--use_cpu", "true"])
    assert run.data == f"outputs/select_{name}/data"
    assert run.eval_prompts, "who follows it sees pictures"
    run.check_eval_strategy(args.eval_strategy.value)
    check_reward_name(run.reward, run.reward_kwargs)
    assert args.max_steps > 0


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_in_bfloat16_it_learns_as_in_float32(make_trainer, tune, tmp_path):
    found = []
    for bf16 in (False, True):
        place = str(tmp_path / f"bf16_{bf16}")
        trainer = make_trainer(tune=tune, bf16=bf16, max_steps=6, save_strategy="no", output_dir=place)
        trainer.train()
        assert {weight.dtype for weight in trainer.trained_weights()} == {torch.float32}
        found.append(losses(trainer))
    exact, rounded = found
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)
