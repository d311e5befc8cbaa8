"""Every other use of the predictor, each a command: `python -m finetune.<name>`."""
