"""The small models and rated pictures of `tests/reward`, for benchmarks that train on some."""

from tests.reward.conftest import make_config, model, model_folder, raw_data, tokenizer  # noqa: F401 - fixtures
