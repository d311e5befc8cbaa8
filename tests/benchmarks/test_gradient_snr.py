import numpy as np
import pytest
from gradient_snr import jackknife, signal_to_noise


def test_the_ratio_is_that_of_the_gradients_drawn():
    """Chunks g = s + noise, |s| = 3, noise of variance 1 in each of 400 directions: 3 / 20, within the interval."""
    rng = np.random.default_rng(0)
    signal = np.zeros(400)
    signal[0] = 3.0
    found = []
    for _ in range(60):
        chunks = signal + rng.normal(size=(16, 400))
        value, low, high = jackknife(chunks @ chunks.T)
        found.append((value, low <= 0.15 <= high))
    values, covered = zip(*found, strict=True)
    assert np.mean(values) == pytest.approx(0.15, abs=0.01)
    assert np.mean(covered) > 0.85


def test_without_signal_the_ratio_is_about_zero_and_of_either_sign():
    rng = np.random.default_rng(1)
    values = [signal_to_noise(chunks @ chunks.T) for chunks in rng.normal(size=(60, 16, 400))]
    assert abs(np.mean(values)) < 0.03
    assert 0.2 < np.mean(np.array(values) < 0) < 0.8
