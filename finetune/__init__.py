"""Every other use of the predictor, and what the commands that train a policy share."""
