"""Rich human feedback: its data, the RAHF predictor, the metrics, and the rewards made of it."""
