"""Storage of keys and values under every strategy."""
