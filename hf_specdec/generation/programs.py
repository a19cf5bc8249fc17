"""Forwards without launches: captured as CUDA graphs, or compiled by inductor. Neither changes a token.

A strategy's rounds consist of few kinds of forwards: a draft of one token, a verification of fixed width.
`GraphRunner` captures each kind once, on buffers of fixed shape, and runs it again with other numbers in them; rows
that finish stay in it, idle. `InductorRunner` compiles the model around its attention. A forward of another kind runs
as always.
"""

from __future__ import annotations

import threading
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from ..cache.sparse import ChosenView
from ..cache.speculative import SpeculativeCache
from ..kernels import choice
from ..kernels.address import StaticAddress
from ..kernels.opaque import EmptyCache, Entry
from ..kernels.request import TOKENS_ONLY, ForwardRequest
from ..kernels.step import Step
from ..kernels.twin import original_of
from .runner import Forward, ModelRunner, head_input


Run = Callable[[], Forward]
Recorder = Callable[[Run, Callable[[Run], None]], "tuple[Forward, Callable[[], None]]"]

_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "repeat_interleave"}


class Waits(RuntimeError):
    """A forward asked the device for a value."""


class NoWaits(TorchDispatchMode):
    """Raises `Waits` for an operation that makes the host wait for the device, which no captured forward may."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, or raise."""
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        # a mask as an index has to be counted first
        masked = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        fetched = name == "_to_copy" and str(kwargs.get("device")) == "cpu" and args[0].device.type != "cpu"
        if name in _WAITS or masked or fetched:
            raise Waits(str(func))
        return func(*args, **kwargs)


class CudaRecorder:
    """Captures the forwards of one runner as CUDA graphs, on one stream and in one pool of memory.

    Args:
        device (`torch.device`): the model's.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def __call__(self, run: Run, rehearse: Callable[[Run], None]) -> tuple[Forward, Callable[[], None]]:
        """Return the tensors of `run`'s result, and what fills them anew; `rehearse(run)` comes first."""
        with torch.cuda.device(self.device):
            before = torch.cuda.current_stream()
            self.stream.wait_stream(before)
            try:
                with torch.cuda.stream(self.stream):
                    rehearse(run)
                before.wait_stream(self.stream)
                graph = torch.cuda.CUDAGraph()
                # other threads may go on allocating: they have streams of their own
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                    result = run()
            finally:
                torch.cuda.set_stream(before)
        return result, graph.replay


RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}
"""What captures forwards, by the type of the device."""


class Program:
    """One kind of forward, captured.

    Args:
        runner (`GraphRunner`): whose model and cache it uses.
        width (`int`): tokens per row.
        request (`ForwardRequest`): what else it does; which query is a row's last changes from run to run.
    """

    def __init__(self, runner: GraphRunner, width: int, request: ForwardRequest) -> None:
        self.runner, self.request, self.width = runner, request, width
        cache, device = runner.cache, runner.device
        self.tokens = torch.zeros(cache.rows, width, dtype=torch.int64, device=device)
        self.address = StaticAddress(cache.rows, width, cache.layers[0].capacity, device)
        self._result: Forward
        self._again: Callable[[], None] | None = None

    def _run(self) -> Forward:
        self.address.made.clear()  # a forward that is captured has to compute it itself
        step = self.runner.cache.attach(self.address, self.request)
        return self.runner.call(self.tokens, step, self.request.hidden)

    def _record(self) -> Callable[[], None]:
        try:
            self._result, again = self.runner.record(self._run, self.runner.rehearse)
        except Waits as error:
            raise ValueError(
                f"`compile='graphs'`: {type(self.runner.model).__name__}'s forward can't be captured: it waits for "
                f"the device ({error}), as experts do that run one after the other. Leave `compile` out, or choose "
                "another `experts_implementation`."
            ) from error
        return again

    def __call__(self, tokens: torch.Tensor, starts: Sequence[int], last: Sequence[int]) -> Forward:
        """Run it for the active rows' `tokens` `[n, m]`, m at most the width; arguments as for `Address`."""
        n, m = tokens.shape
        if max(starts) + self.width > self.address.high:
            raise RuntimeError(f"A forward at {max(starts)} does not fit the {self.address.high} slots of its graph.")
        self.tokens[:n, :m].copy_(tokens)
        self.address.move(starts, last)
        if self._again is None:
            self._again = self._record()
        self._again()
        # copies, because the next run writes the same memory
        logits, hidden = self._result
        return Forward(logits[:n, :m].clone(), None if hidden is None else hidden[:n, :m].clone())


class FixedWidthRunner(ModelRunner):
    """A runner whose forwards have one of a few widths; see `ModelRunner` for the other arguments.

    Args:
        widths (`list[int]`): tokens per row of the forwards that are made ready. A narrower forward is padded to the
            next of them, a wider one runs as always.
    """

    def __init__(
        self, model: PreTrainedModel, cache: SpeculativeCache, max_length: int, widths: Sequence[int]
    ) -> None:
        super().__init__(model, cache, max_length)
        self.widths = sorted(set(widths))

    def padded(self, width: int, widths: Sequence[int]) -> int | None:
        """Return the least of `widths` that holds `width` tokens; `None` if none does, or in the first forward."""
        return next((w for w in widths if w >= width), None) if self._checked else None

    def close(self) -> None:
        """Give up what forwards were made ready for; later ones run as they are."""
        super().close()
        self.widths = []


class GraphRunner(FixedWidthRunner):
    """Runs `model` over `cache` by captured forwards; those that score are padded to the widest of the `widths`."""

    fixed = True

    def __init__(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.programs: dict[Any, Program] = {}
        self.record = RECORDERS[self.device.type](self.device)
        self.cache.spare = self.widths[-1]  # where rows that have finished write
        self._storage: list[int] = []

    def rehearse(self, run: Run) -> None:
        """Run what is to be captured twice: so that all is allocated and chosen, and to see that it never waits.

        A capture that fails leaves PyTorch's allocator and streams in disorder, so it is not tried in vain.
        """
        run()
        with NoWaits():
            run()

    def close(self) -> None:
        """Let go of the captured forwards: they and the runner hold each other, and so the storage."""
        super().close()
        self.programs.clear()

    def forward(self, tokens: torch.Tensor, starts: Sequence[int], request: ForwardRequest = TOKENS_ONLY) -> Forward:
        """Feed `tokens` `[n, m]`; as `ModelRunner.forward`, by a captured forward of this kind where there may be one.

        The first forward runs uncaptured, since it makes the storage.
        """
        m, score = tokens.shape[1], request.score
        self.cache.reserve(max(starts) + max([m, *self.widths]))  # before anything knows the storage's width
        width = self.padded(m, self.widths if score is None else self.widths[-1:])
        if width is None:
            return super().forward(tokens, starts, request)
        last = request.last or [m - 1] * len(starts)
        if score is not None:
            score.begin(starts, last)
        return self._program(width, request)(tokens, starts, last)

    def _program(self, width: int, request: ForwardRequest) -> Program:
        layers = self.cache.layers
        storage = [layers[0].capacity, *(layer.keys.data_ptr() for layer in layers if layer.is_initialized)]
        if storage != self._storage:  # it has grown: what was captured writes memory that is no longer ours
            self.programs.clear()
            self.record, self._storage = RECORDERS[self.device.type](self.device), storage
        view = request.score if request.view is None else request.view
        # the buffers of a view are as wide as what it selects
        selected = view.selected if isinstance(view, ChosenView) else None
        key = (width, request.hidden, request.score is not None, request.view is not None, selected)
        if key not in self.programs:
            self.programs[key] = Program(self, width, request)
        return self.programs[key]

    def warm_up(self, tokens: torch.Tensor, starts: Sequence[int], request: ForwardRequest = TOKENS_ONLY) -> None:
        """Capture the forwards of a round by feeding `tokens` `[n, 1]` again, so that no round has to wait for it."""
        if not self._checked:
            self.forward(tokens, starts, ForwardRequest(hidden=request.hidden))
        zeros, view = [0] * len(starts), request.score
        for width in self.widths if view is None else self.widths[-1:]:
            self._program(width, request)(tokens, starts, zeros)
        if isinstance(view, ChosenView):  # drafts read what it has chosen, from the next position on
            following = [start + 1 for start in starts]
            view.place(following)
            self._program(self.widths[0], ForwardRequest(view=view))(tokens, following, zeros)


class InductorRunner(FixedWidthRunner):
    """Runs `model` over `cache`, compiled by inductor around the attention.

    Compiled code is made for a shape: tokens are padded to all rows of the batch and to one of the `widths`, and what
    was padded is cut off again before it attends.
    """

    def __init__(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.entry = Entry(self.cache)
        self.windows: dict[int, int | None] = {}
        self.compiled = compiled(original_of(self.model))

    def run_model(self, tokens: torch.Tensor, step: Step, hidden: bool) -> Forward:
        """Run the compiled model; the first time the model as it is, to learn the layers' windows."""
        n, m = tokens.shape
        width = self.padded(m, self.widths)
        if width is None:
            result = super().run_model(tokens, step, hidden)
            self.windows = dict(step.windows)
            return result
        self.entry.step, step.windows = step, self.windows
        inputs = self.inputs(tokens, step)
        padding = (0, width - m, 0, self.cache.rows - n)
        ids, positions = (torch.nn.functional.pad(inputs[name], padding) for name in ("input_ids", "position_ids"))
        cache = EmptyCache(self.cache.windows)
        logits, states = self.compiled(self.twin, ids, positions, cache, self.entry.number, hidden)
        return Forward(logits[:n, :m], None if states is None else states[:n, :m])

    def warm_up(self, tokens: torch.Tensor, starts: Sequence[int], request: ForwardRequest = TOKENS_ONLY) -> None:
        """Compile the forwards of a round by feeding `tokens` `[n, 1]` again."""
        if not self._checked:
            self.forward(tokens, starts, ForwardRequest(hidden=request.hidden))
        for width in self.widths:
            self.forward(tokens.expand(-1, width), starts, ForwardRequest(hidden=request.hidden))


class CompiledGraphRunner(GraphRunner, InductorRunner):
    """Captures forwards that inductor has compiled: fewer and larger kernels, and no launches."""

    def rehearse(self, run: Run) -> None:
        """Run what is to be captured twice; what is compiled as one graph does not wait."""
        run()
        run()


_SHAPES = 256
"""Shapes that one model's forward may be compiled for; dynamo's own limit of 8 is for code that should not vary."""

# a hook that is added later must not be left out in silence
_DYNAMO = {"recompile_limit": _SHAPES, "accumulated_recompile_limit": _SHAPES, "skip_nnmodule_hook_guards": False}
_OPTIONS: dict[str, dict[str, Any]] = {"cpu": {"freezing": True, "cpp_wrapper": True}}


class Compiled:
    """One model's compiled forwards, with and without the LM head's input; they serve each of its twins.

    Args:
        device (`torch.device`): the model's.
        weights (`int`, *optional*): the sum of its weights, where they are frozen into the code.
    """

    def __init__(self, device: torch.device, weights: int | None) -> None:
        self.weights = weights

        def run(
            twin: PreTrainedModel,
            ids: torch.Tensor,
            positions: torch.Tensor,
            cache: EmptyCache,
            number: torch.Tensor,
            hidden: bool,
        ) -> Any:
            with head_input(twin, hidden) as seen:
                output = twin(
                    input_ids=ids,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    specdec_step=number,
                    return_dict=True,
                )
            return output.logits, seen[0] if hidden else None

        # compiled code is found by the code object, so every model, and every state of its weights, needs its own
        own = types.FunctionType(run.__code__.replace(), run.__globals__, "run", run.__defaults__, run.__closure__)
        self._run = torch.compile(own, fullgraph=True, dynamic=False, options=_OPTIONS.get(device.type))

    def __call__(self, *inputs: Any) -> Forward:
        """Run it on a twin, ids `[n, m]`, their positions, an `EmptyCache`, an entry's number, and `hidden`."""
        with _lock, torch._dynamo.config.patch(_DYNAMO):
            return Forward(*self._run(*inputs))


_lock = threading.Lock()
"""Dynamo's settings are the process's: threads that compile, or may have to, take turns."""

_compiled: weakref.WeakKeyDictionary[PreTrainedModel, Compiled] = weakref.WeakKeyDictionary()


def compiled(model: PreTrainedModel) -> Compiled:
    """Return `model`'s compiled forwards: made once, and anew when weights that are frozen into them have changed."""
    weights = sum_of_weights(model) if _OPTIONS.get(model.device.type, {}).get("freezing") else None
    if model not in _compiled or _compiled[model].weights != weights:
        _compiled[model] = Compiled(model.device, weights)
    return _compiled[model]


def sum_of_weights(model: torch.nn.Module) -> int:
    """Return a number that changes when a weight does; reading all of them takes about as long as a token."""
    sums = []
    for tensor in (*model.parameters(), *model.buffers()):
        words = tensor.detach().reshape(-1).view(torch.uint8)
        whole = len(words) // 8 * 8
        if words.storage_offset() % 8:
            words = words.clone()
        # eight bytes at a time: ten times as fast as summing the numbers
        sums.append((int(words[:whole].view(torch.int64).sum()), int(words[whole:].sum()), tensor.data_ptr()))
    return hash(tuple(sums))


_RUNNERS: dict[str, type[FixedWidthRunner]] = {
    "graphs": GraphRunner,
    "inductor": InductorRunner,
    "graphs+inductor": CompiledGraphRunner,
}


def make_runner(
    mode: str | None, model: PreTrainedModel, cache: SpeculativeCache, max_length: int, widths: Sequence[int]
) -> ModelRunner:
    """Return the runner for a config's `compile`; arguments as for `FixedWidthRunner`."""
    if mode is None:
        return ModelRunner(model, cache, max_length)
    return _RUNNERS[mode](model, cache, max_length, widths)


def check(mode: str | None, kernels: str, model: PreTrainedModel, argument: str = "model") -> None:
    """Raise `ValueError` if `model`'s forwards can't be compiled or attend as a config asks for; runs nothing.

    `mode` is the config's `compile`, `argument` what the caller calls the model, for the message.
    """
    devices = {parameter.device for parameter in model.parameters()}
    where = ", ".join(sorted(map(str, devices)))
    if mode in ("graphs", "graphs+inductor") and (
        {device.type for device in devices} - set(RECORDERS) or len(devices) > 1
    ):
        raise ValueError(
            f"`compile={mode!r}` captures CUDA graphs, so `{argument}` must be on one CUDA device; it is on {where}. "
            "Allowed there: None, or 'inductor'."
        )
    if mode == "inductor" and len(devices) > 1:
        raise ValueError(f"`compile='inductor'` needs `{argument}` on one device; it is on {where}. Allowed: None.")
    if kernels != "auto":
        config = model.config.get_text_config(decoder=True)
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        softcap = getattr(config, "attn_logit_softcapping", None) is not None
        choice.check(kernels, choice.Request(model.device.type, model.dtype, size, size, softcap=softcap))
