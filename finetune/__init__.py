"""Every other use of the predictor; the first commands are still to come."""
