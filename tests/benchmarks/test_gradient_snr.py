import numpy as np
import pytest
from gradient_snr import gain, jackknife, signal_to_noise, table


def test_the_ratio_is_that_of_the_gradients_drawn():
    """Chunks g = s + noise, |s| = 3, noise of variance 1 in each of 400 directions: 3 / 20, within the interval."""
    rng = np.random.default_rng(0)
    signal = np.zeros(400)
    signal[0] = 3.0
    found = []
    for _ in range(60):
        chunks = signal + rng.normal(size=(16, 400))
        gram = chunks @ chunks.T
        value, low, high = jackknife(lambda who, gram=gram: signal_to_noise(gram[np.ix_(who, who)]), len(gram))
        found.append((value, low <= 0.15 <= high))
    values, covered = zip(*found, strict=True)
    assert np.mean(values) == pytest.approx(0.15, abs=0.01)
    assert np.mean(covered) > 0.85


def test_without_signal_the_ratio_is_about_zero_and_of_either_sign():
    rng = np.random.default_rng(1)
    values = [signal_to_noise(chunks @ chunks.T) for chunks in rng.normal(size=(60, 16, 400))]
    assert abs(np.mean(values)) < 0.03
    assert 0.2 < np.mean(np.array(values) < 0) < 0.8


def test_gain_is_by_hand():
    """g = (3, 4) and f = (1, 0) in both chunks: <g, f> = 3, |g| = 5, and the diagonal plays no part."""
    assert gain(np.array([[99.0, 3.0], [3.0, -99.0]]), np.array([25.0, 25.0])) == pytest.approx(600)


def test_a_kind_of_credit_without_noise_gains_more():
    rng = np.random.default_rng(2)
    signal, noise = np.ones((1, 1, 50)), rng.normal(size=(24, 1, 50))
    rows = {row.name: row for row in table([4], {"image": signal + 3 * noise, "calm": signal + 0.1 * noise})}
    assert rows["step 4, calm: signal to noise"].value > 5 * rows["step 4, image: signal to noise"].value
    assert rows["step 4, calm: gain less image's"].low > 0
    assert "step 4, image: gain less image's" not in rows
