"""SpecBound."""
