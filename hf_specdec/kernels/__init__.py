"""Attention over the package's own storage: the reference, the implementations, and the choice among them."""
