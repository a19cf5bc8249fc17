"""Speculative pipeline decoding."""
