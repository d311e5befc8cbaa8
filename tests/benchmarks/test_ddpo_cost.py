"""What a rollout costs adds up."""

import json
import time

import ddpo_cost

from rl.timing import PhaseClock


def test_only_the_wrapped_call_is_timed():
    clock = PhaseClock()
    call = ddpo_cost.timed(lambda seconds, answer: time.sleep(seconds) or answer, clock, "network")
    began = time.perf_counter()
    time.sleep(0.05)
    assert call(0.02, answer=3) == 3
    assert call(0.02, answer=4) == 4
    assert 0.04 <= clock.seconds["network"] < time.perf_counter() - began - 0.05


def test_cost_of_each_rollout_but_the_first(tmp_path, monkeypatch):
    """On the smallest settings of the real pipeline: every kind of work is seen, and none is counted twice."""
    monkeypatch.setattr(ddpo_cost, "PICTURES", 2)
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    settings = {
        "policy": "tinyworld/assets/sd", "reward": "tests.rl.toy_rewards:Redness", "use_cpu": True,
        "prompts": str(tmp_path / "prompts.txt"), "num_inference_steps": 3, "train_steps": [1], "num_generations": 2,
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(json.dumps(settings))  # JSON is YAML
    costs = ddpo_cost.measure(tmp_path / "config.yaml", 2)
    assert len(costs) == 2
    for cost in costs:
        assert all(seconds > 0 for seconds in cost.work.values())
        assert sum(cost.work.values()) <= cost.wall
