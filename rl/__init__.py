"""Policy-gradient fine-tuning of diffusion models with dense rewards."""
