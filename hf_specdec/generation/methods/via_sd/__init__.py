"""VIA-SD."""
