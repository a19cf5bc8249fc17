"""A streamer that keeps what it gets."""

from __future__ import annotations

from transformers.generation.streamers import BaseStreamer


class Streamer(BaseStreamer):
    """Keeps what it gets, and counts `end`."""

    def __init__(self):
        self.parts, self.ended = [], 0

    def put(self, value):
        assert not self.ended, "a token after `end`"
        self.parts.append(value.clone())

    def end(self):
        self.ended += 1
