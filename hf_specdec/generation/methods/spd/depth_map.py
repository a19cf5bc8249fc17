"""`DepthMap`: how SPD cuts a model into pipeline stages, and which hidden states are features at which depth.

A token's *depth* is the number of stages that it has passed. Hidden state k is the output of layer k - 1, as it leaves
the layer and never normed; state 0 is the first layer's input.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise


class DepthMap:
    """Stages and features of one model.

    Args:
        layers (`int`): decoder layers of the model.
        num_stages (`int`): n.
        stage_layers (`list[int]`, *optional*): layers of each stage; equally many by default.
        feature_layers (`list[int]`, *optional*): B, hidden states that the draft module reads, ascending from 0 and
            below the model's depth. By default every stage boundary for up to 4 stages, and quarters of the depth
            for more.

    Attributes:
        bounds (`list[int]`): stage s has the layers from `bounds[s]` to before `bounds[s + 1]`.
        features (`list[int]`): B.
        types (`list[int]`): f, per depth from 0 to n how many of the features after the first a token has there.

    Raises:
        ValueError: for stages that don't cover the layers, or features that are out of place or never used.
    """

    def __init__(
        self,
        layers: int,
        num_stages: int,
        stage_layers: Sequence[int] | None = None,
        feature_layers: Sequence[int] | None = None,
    ) -> None:
        if stage_layers is None:
            if num_stages < 1 or layers % num_stages:
                valid = [n for n in range(1, layers + 1) if layers % n == 0]
                raise ValueError(
                    f"`num_stages` is {num_stages}, which does not divide the model's {layers} layers; allowed: "
                    f"{', '.join(map(str, valid))}, or any with `stage_layers`."
                )
            stage_layers = [layers // num_stages] * num_stages
        counts = list(stage_layers)
        if len(counts) != num_stages or min(counts, default=0) < 1 or sum(counts) != layers:
            raise ValueError(
                f"`stage_layers` must be {num_stages} counts of at least 1 that sum to {layers}, got {counts}."
            )
        self.layers, self.stages = layers, num_stages
        self.bounds = [0, *accumulate(counts)]
        last = layers - 1
        if feature_layers is None:
            inner = self.bounds[1:-1] if num_stages <= 4 else [round(layers * part / 4) for part in (1, 2, 3)]
            feature_layers = sorted({0, last, *(f for f in inner if f <= last)})
        self.features = features = list(feature_layers)
        if not features or features[0] != 0 or features != sorted(set(features)) or features[-1] > max(last, 0):
            raise ValueError(
                f"`feature_layers` must ascend from 0 and be at most {last} (the last layer's output is no feature), "
                f"got {features}."
            )
        self.types = [bisect_right(self.features, bound) - 1 for bound in self.bounds]
        unused = sorted(set(range(len(self.features))) - set(self.types))
        if unused:
            raise ValueError(
                f"`feature_layers` {self.features}: {', '.join(str(self.features[i]) for i in unused)} is at no depth "
                f"the last feature of a token, with stages that end after the layers {self.bounds[1:]}."
            )

    @property
    def stage_layers(self) -> list[int]:
        """Layers of each stage."""
        return [end - first for first, end in pairwise(self.bounds)]

    def produced(self, stage: int) -> list[int]:
        """Return the features that a token gains in a stage."""
        return [f for f in self.features if self.bounds[stage] < f <= self.bounds[stage + 1]]
