"""Fine-tuning inside `apply_skip_vision`, on Hugging Face Trainer and accelerate."""
