"""Shared n-grams: a table of what followed what, learned from all rows of a batch while they are written.

Idea      rows of one batch often say similar things, so what one has written is a guess at what another will write.
Drafts    the most frequent follower of the newest words, word by word, from counts over all rows; no model.
Verifies  losslessly, each draft being a point mass.
Trained   nothing.
Paper     none; this is the worked example of docs/adding_a_method.md.
New here  stock's prompt lookup copies a span of the row's own text; this one counts, and rows share the counts.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass

import torch

from hf_specdec import SpeculationConfig, register_strategy
from hf_specdec.generation.state import DecodingState
from hf_specdec.generation.strategy import Draft, Drafter, SpeculationStrategy


@dataclass(frozen=True)
class SharedNgramsConfig(SpeculationConfig):
    """Settings of shared n-grams.

    Args:
        num_assistant_tokens (`int`, *optional*, defaults to 5): draft tokens per round and row at most.
        context (`int`, *optional*, defaults to 3): newest words that are looked up; fewer where so many are unknown.
        min_count (`int`, *optional*, defaults to 1): how often a follower must have been seen to be drafted.
    """

    strategy = "shared_ngrams"

    context: int = 3
    min_count: int = 1

    def validate(self) -> None:
        """Raise `ValueError` for a value that is out of range."""
        for name in ("context", "min_count"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")


class SharedNgramsDrafter(Drafter):
    """Drafts by counts over the text of all rows."""

    limit: int

    def __init__(self, config: SharedNgramsConfig) -> None:
        self.limit, self.context, self.min_count = config.num_assistant_tokens, config.context, config.min_count
        self.followers: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        self.learned: dict[int, int] = {}  # per row, tokens that have been counted

    def setup(self, state: DecodingState) -> None:
        """Count the prompts."""
        self.learn(state)

    def commit(self, state: DecodingState) -> None:
        """Count what was emitted."""
        self.learn(state)
        state.stats.method["contexts"] = len(self.followers)

    def learn(self, state: DecodingState) -> None:
        """Count the followers of up to `context` words in what is new of each active row."""
        for row, length in zip(state.active, state.committed, strict=True):
            words = state.text.host[row, :length].tolist()  # on the CPU, so that no device is waited for
            for place in range(max(1, self.learned.get(row, 0)), length):
                for size in range(1, min(self.context, place) + 1):
                    self.followers[tuple(words[place - size : place])][words[place]] += 1
            self.learned[row] = length

    def propose(self, state: DecodingState) -> Draft:
        """Draft for each row until nothing is known of its newest words."""
        rows = [
            self.chain(state.text.host[row, max(0, length - self.context) : length].tolist(), room)
            for row, length, room in zip(state.active, state.committed, state.draft_room(self.limit), strict=True)
        ]
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], True)
        return Draft(tokens.to(state.device), [len(row) for row in rows])

    def chain(self, words: list[int], room: int) -> list[int]:
        """Return up to `room` tokens, each the most frequent follower of those before it."""
        begin = len(words)
        while len(words) - begin < room:
            for size in range(min(self.context, len(words)), 0, -1):
                counts = self.followers.get(tuple(words[-size:]))
                if counts and max(counts.values()) >= self.min_count:
                    words = [*words, max(reversed(counts), key=counts.__getitem__)]  # of equals the newest
                    break
            else:
                break
        return words[begin:]


@register_strategy
class SharedNgramsStrategy(SpeculationStrategy):
    """Draft by shared counts, verify losslessly."""

    config_class = SharedNgramsConfig
    presets = {"": {}, "bigrams": {"context": 1}}
    config: SharedNgramsConfig

    def make_drafter(self) -> Drafter:
        """Return the table."""
        return SharedNgramsDrafter(self.config)
