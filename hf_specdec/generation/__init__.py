"""The decoding loop, its parts, and one file per method."""
