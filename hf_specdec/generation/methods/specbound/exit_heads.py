"""Exit heads: guesses of the next token from the hidden state after a few layers, by the model's own norm and head.

Four kinds. `"final"` is the model's norm and head as they are (the logit lens); `"adapter"` adds a trained linear map
between the two; `"full"` has a head of its own per layer; `"block"` runs one more decoder layer of its own, which also
reads the LM head's input at the token before, and then the model's head. All but `"final"` are trained.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ....cache.speculative import SpeculativeCache
from ....configuration import SpeculationConfig
from ....kernels.address import Address
from ....kernels.twin import Proxy
from ...models.adapters import Adapter, AdapterKind, describe, load_adapter, write_adapter
from ...models.layerwise import LayerCall, Layerwise, Recording, Staircase, run_layer
from ...models.surgery import place_layer
from ...models.vocabulary import ReducedHead, head_weight, vocabulary_width


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

    norm: nn.Module
    tails: dict[int, Callable[[torch.Tensor], torch.Tensor]]

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
        self.width, width = vocabulary_width(model), model.config.get_text_config(decoder=True).hidden_size
        if rank is not None and (kind != "adapter" or not 1 <= rank <= width):
            raise ValueError(f"`rank` is for the kind 'adapter' and from 1 to {width}, got {rank} for {kind!r}.")
        self.layers, self.kind, self.rank, self.record = list(layers), kind, rank, record or {}
        self.reduced = None if vocabulary is None else ReducedHead(head, vocabulary)
        self.own = nn.ModuleDict()
        if kind != "final":
            made = [self._make(index, parts, head, width) for index in range(len(layers))]
            self.own.update({str(layer): module for layer, module in zip(layers, made, strict=True)})
            weight = head_weight(head)
            self.own.to(device=weight.device, dtype=weight.dtype)
        # not submodules: the model's own parts are no parameters of the heads
        heads = {layer: self.own[str(layer)] if kind == "full" else self.inside for layer in self.layers}
        self.__dict__.update(norm=parts.norm, tails={layer: parts.tail(head) for layer, head in heads.items()})

    def _make(self, index: int, parts: Layerwise, head: nn.Module, width: int) -> nn.Module:
        """Return what the exit at `layers[index]` has of its own."""
        if self.kind == "adapter":
            # the last map is zero, so that training begins at the model's own norm and head
            last = nn.Linear(width if self.rank is None else self.rank, width, bias=False)
            nn.init.zeros_(last.weight)
            return last if self.rank is None else nn.Sequential(nn.Linear(width, self.rank, bias=False), last)
        if self.kind == "full":
            weight = head_weight(head) if self.reduced is None else self.reduced.weight
            linear = nn.Linear(width, weight.shape[0], bias=False)
            linear.weight.data.copy_(weight.data)
            return linear
        return _Block(copy.deepcopy(parts.layers[-1]), copy.deepcopy(parts.norm), index, width)

    @property
    def inside(self) -> nn.Module | None:
        """The model's LM head over the tokens that can be guessed; `None` where that is the model's own."""
        return None if self.reduced is None else Proxy(self.reduced, ReducedHead.reduced)

    def deepen(self, layer: int, hidden: torch.Tensor, before: torch.Tensor, call: LayerCall) -> torch.Tensor:
        """Return the output `[n, m, H]` of an exit's block for states `[n, m, H]` after `layer` layers.

        `before` `[n, m, H]` is the LM head's input at the token before each, `call` what the block's decoder layer
        gets beside the states.
        """
        return cast(_Block, self.own[str(layer)])(hidden, before, call)

    def head_input(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return what the LM head gets, `[..., H]`, for states `[..., H]` after `layer` layers.

        For the kind `"block"` the states are what `deepen` made of them.
        """
        if self.kind == "block":
            return cast(torch.Tensor, cast(_Block, self.own[str(layer)]).norm(hidden))
        hidden = self.norm(hidden)
        return hidden + self.own[str(layer)](hidden) if self.kind == "adapter" else hidden

    def score(self, layer: int, inputs: torch.Tensor) -> torch.Tensor:
        """Return logits `[..., F]` of what follows each token, for what `head_input` returned."""
        return self.tails[layer](inputs)

    def read(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return `score` of `head_input`."""
        return self.score(layer, self.head_input(layer, hidden))

    def tokens(self, index: torch.Tensor) -> torch.Tensor:
        """Return the ids of tokens by their index among those that can be guessed."""
        return index if self.reduced is None else self.reduced.ids[index]

    def scatter(self, logits: torch.Tensor) -> torch.Tensor:
        """Return logits `[..., V]` of all tokens for logits `[..., F]`."""
        return logits if self.reduced is None else self.reduced.scatter(logits)

    def save(self, folder: str | Path, config: SpeculationConfig, model: PreTrainedModel, **notes: Any) -> None:
        """Write the heads, in bf16, to a folder that `SpecBoundConfig(adapter=folder)` and `assistant_strategy=` take.

        They are for use with `config` and `model`; `notes` are recorded too, such as how they were trained.
        """
        tensors = {name: value.detach().bfloat16() for name, value in self.own.named_parameters()}
        if self.reduced is not None:
            tensors["vocabulary"] = self.reduced.ids.int()
        record = {"kind": KIND, "head": self.kind, "layers": self.layers, "rank": self.rank, "model": describe(model)}
        write_adapter(folder, config, {**record, **notes}, tensors)


class _Block(nn.Module):
    """A decoder layer of its own for one exit, which also reads the LM head's input at the token before.

    It begins as a copy of the model's last layer and norm, which already turn states into what the head reads.
    """

    def __init__(self, layer: nn.Module, norm: nn.Module, index: int, width: int) -> None:
        super().__init__()
        place_layer(layer, index)
        self.fuse = nn.Linear(2 * width, width, bias=False)
        self.layer, self.norm = layer, norm
        with torch.no_grad():
            self.fuse.weight.copy_(torch.eye(width, 2 * width))

    def forward(self, hidden: torch.Tensor, before: torch.Tensor, call: LayerCall) -> torch.Tensor:
        """Return the decoder layer's output; see `ExitHeads.deepen`."""
        return run_layer(self.layer, self.fuse(torch.cat([hidden, before], dim=-1)), call)


def before_each(inputs: torch.Tensor) -> torch.Tensor:
    """Return, at each token, the LM head's input at the token before; both `[n, m, H]`, before the first is 0."""
    return nn.functional.pad(inputs[:, :-1], (0, 0, 1, 0))


def check_layers(layers: Sequence[int], depth: int, argument: str) -> None:
    """Raise `ValueError` unless `layers` are ascending depths from 1 to `depth`."""
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 1 or layers[-1] > depth:
        raise ValueError(f"`{argument}` must be ascending depths from 1 to {depth}, got {list(layers)}.")


def load_exit_heads(model: PreTrainedModel, name_or_path: str) -> ExitHeads:
    """Return the exit heads saved in a folder or Hub repository, for `model`, in evaluation mode.

    Raises:
        ValueError: for heads of another model, or tensors that are not what their record says.
    """
    return load_adapter(model, _HEADS, name_or_path)


def _build(model: PreTrainedModel, adapter: Adapter) -> ExitHeads:
    record = adapter.record
    heads = ExitHeads(model, record["layers"], record["head"], adapter.take_vocabulary(), record["rank"], record)
    own = dict(heads.own.named_parameters())
    adapter.fill(heads.own, own, f"the tensors of {record['head']!r} heads of {record['layers']}")
    return heads.eval().requires_grad_(False)


_HEADS = AdapterKind(KIND, _build, needs=("head", "layers", "rank"), model="model", moves=True)


class _BlockText:
    """What one block knows of a text: how many tokens it has read for good, what it has not, the round's tokens."""

    def __init__(self, states: torch.Tensor, before: torch.Tensor, recording: Recording) -> None:
        self.end = self.read = 0
        self.unread = [(states, before, recording)]
        self.states: list[torch.Tensor] = []  # of the round's tokens

    def take(
        self, before: Sequence[torch.Tensor], recordings: Sequence[Recording]
    ) -> tuple[int, list[tuple[torch.Tensor, torch.Tensor, Recording]]]:
        """Return the first slot of, and all that has not been read; what belongs to the round is read for now only."""
        newest = list(zip(self.states, before, recordings, strict=True))
        start, entries = self.end + self.read, [*self.unread, *newest[self.read :]]
        self.end += sum(entry[0].shape[1] for entry in self.unread)
        self.unread, self.read = [], len(newest)
        return start, entries

    def commit(self, before: Sequence[torch.Tensor], recordings: Sequence[Recording]) -> None:
        """End the round, of which as many tokens were kept as `before` is long; they are to be read again."""
        kept = len(before)
        self.unread += list(zip(self.states[:kept], before, recordings[:kept], strict=True))
        self.states, self.read = [], 0


class ExitReader:
    """Exit heads along one text. Blocks have keys and values of their own here, and states that they have not read.

    A block reads the states of all tokens, lazily: asked about the newest one, it first reads what it missed. It reads
    tokens of the round in progress with a guess of the LM head's input before them; once verified, they are read again
    with the true one. It begins with the first token that this call runs: an earlier turn's cached ones are not in it.
    `window` is the sliding window of the model's last layer, of which blocks are copies.
    """

    def __init__(self, heads: ExitHeads, parts: Layerwise, window: int | None, capacity: int) -> None:
        self.heads, self.parts = heads, parts
        self.cache = SpeculativeCache([window] * len(heads.layers), 1, capacity)
        self.blocks: dict[int, _BlockText] = {}
        # the LM head's input before each token of the round: the first is true, the others are guesses
        self.before: list[torch.Tensor] = []
        self.guess: torch.Tensor | None = None

    def start(self, states: dict[int, torch.Tensor], inputs: torch.Tensor, recording: Recording) -> None:
        """Take the prompt's tokens that were run: their states `[1, m, H]` by depth, and the LM head's inputs."""
        before = before_each(inputs)
        self.blocks = {layer: _BlockText(seen, before, recording) for layer, seen in states.items()}
        self.before = [inputs[:, -1:]]

    def note(self, layer: int, staircase: Staircase, first: int) -> None:
        """Take the states of the tokens from the `first` on, which have just passed `layer` layers."""
        if layer in self.blocks:
            # a copy: the buffer goes on to the next layer
            states = staircase.states[:, first : len(staircase.depths)].clone()
            self.blocks[layer].states += states.split(1, dim=1)

    def logits(self, layer: int, staircase: Staircase) -> torch.Tensor:
        """Return float32 logits `[1, F]` of what follows the newest token, which has passed `layer` layers."""
        newest = len(staircase.depths) - 1
        state = staircase.states[:, newest : newest + 1]
        if layer in self.blocks:
            if len(self.before) == newest:
                self.before.append(cast(torch.Tensor, self.guess))
            slot, entries = self.blocks[layer].take(self.before, staircase.recordings)
            hidden = torch.cat([states for states, _, _ in entries], dim=1)
            before = torch.cat([inputs for _, inputs, _ in entries], dim=1)
            step = self.cache.begin(Address([slot], hidden.shape[1]))
            call = self.parts.join(-1, [entry[2] for entry in entries], self.cache, step)
            state = self.heads.deepen(layer, hidden, before, call)[:, -1:]
        self.guess = self.heads.head_input(layer, state)
        return self.heads.score(layer, self.guess)[:, -1].float()

    def commit(self, kept: int, staircase: Staircase, inputs: torch.Tensor) -> None:
        """End the round, of which `kept` tokens stay; `inputs` `[1, R, H]` are the LM head's true ones."""
        if self.blocks and kept:
            true = [self.before[0], *inputs.split(1, dim=1)]
            for block in self.blocks.values():
                block.commit(true[:kept], staircase.recordings)
            self.before = [true[kept]]
