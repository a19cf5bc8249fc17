"""Exit heads: guesses of the next token from the hidden state after a few layers, by the model's own norm and head.

Four kinds. `"final"` is the model's norm and head as they are (the logit lens); `"adapter"` adds a trained linear map
between the two; `"full"` has a head of its own per layer; `"block"` runs one more decoder layer of its own, then the
model's head. All but `"final"` are trained; the model is not.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..cache.speculative import SpeculativeCache
from ..configuration import SpeculationConfig
from ..kernels.step import Step
from .adapters import Adapter, check_model, describe, load_once, write_adapter
from .draft_model import place_layer
from .layerwise import LayerCall, Layerwise, Recording, Rows
from .vocabulary import ReducedHead


KIND = "exit_heads"
KINDS = ("final", "adapter", "full", "block")


class ExitHeads(nn.Module):
    """Exit heads of one model. What is trained are its parameters; norm and LM head are the model's, by reference.

    Args:
        model (`PreTrainedModel`): a causal language model; it stays as it is.
        layers (`list[int]`): depths that have a head, ascending: depth l is the state after l layers.
        kind (`str`): one of `KINDS`.
        vocabulary (`torch.Tensor` of shape `[F]`, int64, *optional*): ids that can be guessed; `None` for all.
        rank (`int`, *optional*): of the maps of kind `"adapter"`; `None` for full matrices.
        record (`dict`, *optional*): what is known of the heads, such as how they were trained.

    Raises:
        ValueError: for layers, a kind, a rank or a vocabulary that is not allowed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[int],
        kind: str,
        vocabulary: torch.Tensor | None = None,
        rank: int | None = None,
        record: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        parts = Layerwise(model)
        check_layers(layers, len(parts.layers), "layers")
        if kind not in KINDS:
            raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, got {kind!r}.")
        head = model.get_output_embeddings()
        width = cast(torch.Tensor, head.weight).shape[1]
        if rank is not None and (kind != "adapter" or not 1 <= rank <= width):
            raise ValueError(f"`rank` is for the kind 'adapter' and from 1 to {width}, got {rank} for {kind!r}.")
        self.config = model.config  # like a model, so that the attention of blocks can be switched like a model's
        self.layers, self.kind, self.rank, self.record = list(layers), kind, rank, record or {}
        self.reduced = None if vocabulary is None else ReducedHead(head, vocabulary)
        self.width: int = cast(torch.Tensor, head.weight).shape[0]
        self.own = nn.ModuleDict()
        if kind != "final":
            made = [self._make(place, parts, head, width) for place in range(len(layers))]
            self.own.update({str(layer): module for layer, module in zip(layers, made, strict=True)})
        weight = cast(torch.Tensor, head.weight)
        self.own.to(device=weight.device, dtype=weight.dtype)
        # not submodules: the model's own parts are no parameters of the heads
        heads = {layer: self.own[str(layer)] if kind == "full" else self.inside for layer in self.layers}
        self.__dict__.update(norm=parts.norm, tails={layer: parts.tail(head) for layer, head in heads.items()})

    def _make(self, place: int, parts: Layerwise, head: nn.Module, width: int) -> nn.Module:
        """Return what the exit at `layers[place]` has of its own."""
        if self.kind == "adapter" and self.rank is None:
            linear = nn.Linear(width, width, bias=False)
            nn.init.zeros_(linear.weight)
            return linear
        if self.kind == "adapter":
            maps = nn.Sequential(nn.Linear(width, self.rank, bias=False), nn.Linear(self.rank, width, bias=False))
            nn.init.zeros_(maps[1].weight)  # type: ignore[arg-type]
            return maps
        if self.kind == "full":
            weight = (cast(Any, head) if self.reduced is None else self.reduced).weight
            linear = nn.Linear(width, weight.shape[0], bias=False)
            linear.weight.data.copy_(weight.data)
            return linear
        # the last layer and the norm already turn states into what the head reads
        block = copy.deepcopy(parts.layers[-1])
        place_layer(block, place)
        return nn.ModuleDict({"layer": block, "norm": copy.deepcopy(parts.norm)})

    @property
    def inside(self) -> nn.Module | None:
        """The model's LM head over the words that can be guessed; `None` where that is the model's own."""
        return None if self.reduced is None else _Inside(self.reduced)

    def block(self, layer: int) -> nn.Module:
        """Return the decoder layer of an exit of kind `"block"`."""
        return cast(nn.Module, cast(nn.ModuleDict, self.own[str(layer)])["layer"])

    def deepen(self, layer: int, hidden: torch.Tensor, call: LayerCall) -> torch.Tensor:
        """Return the output `[n, m, H]` of an exit's own decoder layer for states `[n, m, H]` after `layer` layers.

        Args:
            call (`LayerCall`): what the decoder layer gets beside the states.
        """
        output = self.block(layer)(hidden, *call.args, **call.kwargs)
        return output[0] if isinstance(output, tuple) else output

    def read(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits `[..., F]` of what follows each token.

        Args:
            hidden (`torch.Tensor` of shape `[..., H]`): states after `layer` layers; for kind `"block"`, what `deepen`
                made of them.
        """
        if self.kind == "block":
            hidden = cast(nn.ModuleDict, self.own[str(layer)])["norm"](hidden)
        else:
            hidden = self.norm(hidden)
        if self.kind == "adapter":
            hidden = hidden + self.own[str(layer)](hidden)
        return self.tails[layer](hidden)

    def tokens(self, index: torch.Tensor) -> torch.Tensor:
        """Return the ids of words by their place among those that can be guessed."""
        return index if self.reduced is None else self.reduced.ids[index]

    def scatter(self, logits: torch.Tensor) -> torch.Tensor:
        """Return logits `[..., V]` of all words for logits `[..., F]`."""
        return logits if self.reduced is None else self.reduced.scatter(logits)

    def save(self, folder: str | Path, config: SpeculationConfig, model: PreTrainedModel, **notes: Any) -> None:
        """Write the heads, in bf16, to a folder that `SpecBoundConfig(adapter=folder)` and `assistant_strategy=` take.

        Args:
            config (`SpecBoundConfig`): settings to use them with.
            model (`PreTrainedModel`): that they were made for.
            notes: what else to record, such as how they were trained.
        """
        tensors = {name: value.detach().bfloat16() for name, value in self.own.named_parameters()}
        if self.reduced is not None:
            tensors["vocabulary"] = self.reduced.ids.int()
        record = {"kind": KIND, "head": self.kind, "layers": self.layers, "rank": self.rank, "model": describe(model)}
        write_adapter(folder, config, {**record, **notes}, tensors)


class _Inside(nn.Module):
    """A reduced head without the scattering."""

    def __init__(self, head: ReducedHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head.reduced(hidden)


def check_layers(layers: Sequence[int], depth: int, argument: str) -> None:
    """Raise `ValueError` unless `layers` are ascending depths from 1 to `depth`."""
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 1 or layers[-1] > depth:
        raise ValueError(f"`{argument}` must be ascending depths from 1 to {depth}, got {list(layers)}.")


def load_exit_heads(model: PreTrainedModel, name_or_path: str) -> ExitHeads:
    """Return the exit heads saved in a folder or Hub repository, for `model`, in evaluation mode.

    Raises:
        ValueError: for heads of another model, or tensors that are not what their record says.
    """

    def build(adapter: Adapter) -> ExitHeads:
        record, tensors, where = adapter.record, adapter.tensors, f"The adapter in {str(adapter.folder)!r}"
        missing = {"head", "layers", "rank", "model"} - set(record)
        if missing:
            raise ValueError(f"{where} has a record without {', '.join(sorted(missing))}.")
        check_model(model, record["model"], adapter.folder, "model")
        vocabulary = tensors.pop("vocabulary", None)
        if vocabulary is not None:
            vocabulary = vocabulary.long()
        heads = ExitHeads(model, record["layers"], record["head"], vocabulary, record["rank"], record)
        expected = {name: tuple(value.shape) for name, value in heads.own.named_parameters()}
        if {name: tuple(value.shape) for name, value in tensors.items()} != expected:
            raise ValueError(f"{where} does not hold the tensors of {record['head']!r} heads of {record['layers']}.")
        heads.own.load_state_dict(tensors, strict=False)  # buffers, if a layer has some, are as the model's
        return heads.eval().requires_grad_(False)

    return load_once(model, KIND, name_or_path, build)


class ExitReader:
    """Exit heads along one text. Blocks have keys and values of their own here, and states that they have not read.

    A block reads the states of all tokens, lazily: when it is asked about the newest one, it first reads what it
    missed. It begins with the first token that this call runs, so an earlier turn's cached tokens are not in it.

    Args:
        heads (`ExitHeads`): the heads.
        parts (`Layerwise`): the model.
        window (`int`, *optional*): sliding window of the model's last layer, of which blocks are copies.
        capacity (`int`): tokens that a text can have.
    """

    def __init__(self, heads: ExitHeads, parts: Layerwise, window: int | None, capacity: int) -> None:
        self.heads, self.parts = heads, parts
        self.cache = SpeculativeCache([window] * len(heads.layers), 1, capacity)
        # per block in use: position, states [1, m, H] and recording of what it has not read, and the end of what it has
        self.unread: dict[int, list[tuple[int, torch.Tensor, Recording]]] = {}
        self.ends: dict[int, int] = {}
        self.first = 0

    def start(self, first: int, states: dict[int, torch.Tensor], recording: Recording) -> None:
        """Take the states `[1, m, H]` of the prompt's tokens from position `first` on, by depth."""
        self.first, self.ends = first, dict.fromkeys(states, first)
        self.unread = {layer: [(first, seen, recording)] for layer, seen in states.items()}

    def note(self, layer: int, rows: Rows, first: int) -> None:
        """Take the states of the rows from the `first` on, which have just passed `layer` layers."""
        if layer in self.unread:
            for row in range(first, len(rows.depths)):
                state = rows.states[:, row : row + 1].clone()  # the buffer goes on to the next layer
                self.unread[layer].append((rows.start + row, state, rows.recordings[row]))

    def logits(self, layer: int, state: torch.Tensor) -> torch.Tensor:
        """Return float32 logits `[1, F]` of what follows the newest token, whose state is `state` `[1, 1, H]`."""
        if layer in self.unread:
            entries = self.unread[layer]
            hidden = torch.cat([states for _, states, _ in entries], dim=1)
            step = Step([self.ends[layer] - self.first], hidden.shape[1], hidden.device)
            recordings = [recording for *_, recording in entries]
            self.cache.begin(step)
            call = self.parts.join(-1, recordings, self.cache, step)
            state = self.heads.deepen(layer, hidden, call)[:, -1:]
            self.ends[layer] += hidden.shape[1]
            self.unread[layer] = []
        return self.heads.read(layer, state)[:, -1].float()

    def commit(self, end: int) -> None:
        """Forget the tokens from position `end` on."""
        for layer in self.unread:
            self.ends[layer] = min(self.ends[layer], end)
            self.unread[layer] = [entry for entry in self.unread[layer] if entry[0] < end]
