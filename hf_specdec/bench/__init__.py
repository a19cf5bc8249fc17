"""Measurement: the embedded model, real prompts, and the benchmark of strategies against stock generation."""
