"""What is told of a run as it goes: curves, pictures, lines, seconds."""

import os

from tests.rl.outcomes import curves_of, events_of


def test_tensorboard_gets_figures_and_pictures(make_trainer):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(report_to=["tensorboard"], num_log_images=2, num_train_epochs=1)
    trainer.train()
    (run,) = os.listdir(f"{trainer.args.output_dir}/runs")
    events = EventAccumulator(f"{trainer.args.output_dir}/runs/{run}").Reload()
    tags = events.Tags()
    wanted = {"reward", "term/red", "penalty/implausibility", "ratio", "clip_fraction", "kl", "grad_norm", "diversity"}
    assert {f"train/{name}" for name in wanted} <= set(tags["scalars"])
    assert tags["images"] == ["samples"]


def test_as_many_pictures_are_looked_at_as_asked_for_however_few_are_sampled_at_once(make_trainer):
    for wanted in (3, 5, 100):
        trainer = make_trainer(num_log_images=wanted, num_train_epochs=1, per_device_rollout_batch_size=2)
        experience = trainer.collect(0)
        count = min(wanted, 8)
        assert len(experience.samples.images) == len(experience.samples.reward.total) == count
        assert experience.samples.prompts == list(experience.prompts[:count])


def test_resumed_run_shows_every_update_once_in_tensorboard(make_trainer, tmp_path):
    """Logs of updates behind the checkpoint that a run goes on from are disowned, in the same folder."""
    settings = {"report_to": ["tensorboard"], "num_log_images": 1, "save_total_limit": None}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), num_train_epochs=4, **settings)
    whole.train()
    killed = make_trainer(num_train_epochs=3, **settings)
    killed.train()
    for step in (2, 3):
        os.remove(tmp_path / f"run/checkpoint-{step}/complete.json")  # as if it had died in the second rollout
    rest = make_trainer(num_train_epochs=4, **settings)
    rest.train(resume_from_checkpoint="auto")
    assert [step for step, _ in curves_of(rest)["train/reward"]] == [1, 2, 3, 4]
    assert curves_of(rest) == curves_of(whole)
    assert [image.step for image in events_of(rest).Images("samples")] == [1, 2, 3, 4]
    assert all(path.is_file() for path in (tmp_path / "run/runs").iterdir())


def test_a_new_run_in_an_old_folder_shows_nothing_of_the_old_one(make_trainer):
    settings = {"report_to": ["tensorboard"], "save_strategy": "no"}
    make_trainer(num_train_epochs=3, **settings).train()
    anew = make_trainer(num_train_epochs=2, **settings)
    anew.train(resume_from_checkpoint="auto")
    assert [step for step, _ in curves_of(anew)["train/reward"]] == [1, 2]


def test_lines_of_the_log_that_a_checkpoint_falls_into_are_taken_up(make_trainer, tmp_path):
    """Two updates a rollout, a line every three: the checkpoint after update 4 holds a third of the second line."""
    settings = {"gradient_accumulation_steps": 2, "logging_steps": 3, "learning_rate": 0.05}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), num_train_epochs=3, **settings)
    whole.train()
    make_trainer(num_train_epochs=2, **settings).train()
    rest = make_trainer(num_train_epochs=3, **settings)
    rest.train(resume_from_checkpoint="latest")

    def lines(trainer):
        return [
            {name: value for name, value in entry.items() if not name.startswith("seconds/")}
            for entry in trainer.state.log_history
            if "loss" in entry
        ]

    assert [line["step"] for line in lines(whole)] == [3, 6]
    assert lines(rest) == lines(whole)


def test_seconds_of_a_run_are_those_of_all_its_processes(make_trainer):
    first = make_trainer(num_train_epochs=1)
    first.train()
    rest = make_trainer(num_train_epochs=1)
    rest.train(resume_from_checkpoint="latest")
    assert rest.clock.seconds["rollout"] == first.clock.seconds["rollout"]
    assert rest.train_seconds > sum(first.clock.seconds.values())
