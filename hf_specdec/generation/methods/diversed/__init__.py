"""DIVERSED."""
