"""Running bundles and models: backends, the generation loop, prompts, data."""
