"""`StageCache`: the part of a cache that belongs to one pipeline stage.

SPD keeps tokens of one text at different depths, so the stages of a model hold different numbers of tokens: a
staircase. Storage and layer indices are the whole cache's; the step in progress and the length are the stage's own.
"""

from __future__ import annotations

from transformers.cache_utils import Cache

from .speculative import SpeculativeCache


class StageCache(SpeculativeCache):
    """The layers `[first, end)` of a cache of one row, for forwards that run no other layer.

    Args:
        whole (`SpeculativeCache`): whose storage it shares.
        first (`int`): first layer of the stage.
        end (`int`): layer after its last.
    """

    def __init__(self, whole: SpeculativeCache, first: int, end: int) -> None:
        Cache.__init__(self, layers=[*whole.layers])
        self.rows, self.step, self.exact_slices, self.kernels = whole.rows, None, False, whole.kernels
        self.own, self.limit, self.coarse, self.spare = whole.layers[first:end], whole.limit, whole.coarse, whole.spare

    @property
    def length(self) -> int:
        """Tokens that the stage holds."""
        return self.get_seq_length()

    def rewind(self, length: int) -> None:
        """Make every layer of the stage hold `length` tokens: an absolute length, not a count to remove."""
        for layer in self.own:
            layer.lengths, layer.longest = layer.lengths.new_full((1,), length), length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the tokens that the stage holds, whatever layer stock code names: it means the model's first."""
        return self.own[0].get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return (keys, offset of the first key) of a mask for the stage."""
        return self.own[0].get_mask_sizes(query_length)
