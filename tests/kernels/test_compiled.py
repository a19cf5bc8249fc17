"""`compile=`: the same tokens as without, whatever is captured or compiled.

No CUDA graph can be captured here, so a tracer stands in for it: it records the operations of a forward once, with the
tensors that they read and write, and runs them again. Whatever a forward would bake in as a number, instead of reading
it from the device, is as wrong there as in a graph.
"""

from __future__ import annotations

import gc
import itertools
import weakref

import families
import pytest
import torch
from tiers import tiered
from torch.fx.experimental.proxy_tensor import make_fx

from hf_specdec import DiversedConfig, VegasConfig
from hf_specdec.cache import speculative
from hf_specdec.cache.fixed import FixedView
from hf_specdec.cache.sparse import SparseView
from hf_specdec.cache.speculative import SpeculativeCache
from hf_specdec.generation import programs
from hf_specdec.generation.methods.plain import PlainConfig
from hf_specdec.generation.methods.vegas import VegasDrafter
from hf_specdec.generation.runner import Forward, ModelRunner
from hf_specdec.kernels import choice
from hf_specdec.kernels.dispatch import register
from hf_specdec.kernels.request import ForwardRequest


COMPILED = (
    "plain",
    "assisted",
    "prompt_lookup",
    "vegas",
    "vegas:window",
    "vegas:logit",
    "vegas:per_key_head",
    "diversed",
)
BASES = [name for name in COMPILED if ":" not in name]

register()


def traced(run, rehearse):
    """Record `run` as a graph of operations; as `programs.CudaRecorder`."""
    rehearse(run)
    graph = make_fx(lambda: [tensor for tensor in run() if tensor is not None])()
    result = graph()

    def again():
        for old, new in zip(result, graph(), strict=True):
            old.copy_(new)

    return Forward(*result, *[None] * (2 - len(result))), again


@pytest.fixture
def recorded(monkeypatch):
    """Let CPUs capture, and count what is captured and how often it runs."""
    counts = {"captured": 0, "run": 0}

    def record(run, rehearse):
        result, again = traced(run, rehearse)
        counts["captured"] += 1

        def counted():
            counts["run"] += 1
            again()

        return result, counted

    monkeypatch.setitem(programs.RECORDERS, "cpu", lambda device: record)
    return counts


@pytest.fixture
def no_ties(monkeypatch):
    """Prefer later tokens a little: some random texts make all scores equal, and equals may be chosen in any order."""
    for view in (SparseView, FixedView):
        original = view.take

        def take(self, layer_idx, metric, *args, original=original):
            slope = 1e-9 * torch.arange(metric.shape[-1], dtype=metric.dtype)
            return original(self, layer_idx, metric + slope, *args)

        monkeypatch.setattr(view, "take", take)


def generate(family, strategy, inputs, compile=None, **kwargs):
    config = families.configured(strategy, kwargs.pop("tokens", 3)).override(compile=compile)
    extras = families.extras(strategy, family.assistant)
    kwargs = {"do_sample": False, "max_new_tokens": 20, "return_dict_in_generate": True, **kwargs}
    return family.model.generate(**inputs, assistant_strategy=config, **extras, **kwargs)


@pytest.mark.native
@pytest.mark.parametrize("rows, strategy", tiered(itertools.product((4, 1), COMPILED), [(4, name) for name in BASES]))
def test_captured_forwards_give_the_same_tokens(recorded, no_ties, llama, strategy, rows):
    check(recorded, llama, strategy, rows)


@pytest.mark.full
@pytest.mark.native
@pytest.mark.parametrize("strategy", ["assisted", "vegas"])
@pytest.mark.parametrize("name", ["qwen3", "mistral", "gemma2", "gemma3"])
def test_captured_forwards_of_other_families(recorded, no_ties, name, strategy):
    check(recorded, families.family(name), strategy, 4)


def check(recorded, family, strategy, rows):
    inputs = family.inputs(rows)
    expected = generate(family, strategy, inputs)
    found = generate(family, strategy, inputs, "graphs")
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.sequences, family.stock(**inputs, max_new_tokens=20))
    assert recorded["captured"] >= 1
    if found.speculation is not None:
        assert recorded["run"] >= found.speculation.target_forwards - 1  # all but the prefill's
        assert found.speculation.to_dict() == expected.speculation.to_dict()
    for layer, other in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
        torch.testing.assert_close(layer.keys, other.keys, atol=family.tolerance, rtol=0)


@pytest.mark.parametrize("strategy", tiered(["plain", "assisted", "vegas", "diversed:mixture"], ["vegas"]))
def test_rows_that_end_early_and_sampling(recorded, no_ties, llama, strategy):
    """Finished rows stay in the captured shape, idle; draws come in the same order."""
    for settings in ({"eos_token_id": llama.eos}, {"do_sample": True, "top_k": 20}):
        texts = []
        for mode in (None, "graphs"):
            torch.manual_seed(3)
            texts.append(generate(llama, strategy, llama.batch, mode, max_new_tokens=30, **settings).sequences)
        assert torch.equal(*texts), settings


def test_few_kinds_of_forwards_are_captured(recorded, llama):
    """Verifications that are narrower near the end of the text are padded to the captured width."""
    generate(llama, "vegas", llama.one, "graphs", tokens=5, max_new_tokens=12)
    assert recorded["captured"] == 2  # verification and draft
    generate(llama, "assisted", llama.one, "graphs", tokens=5, max_new_tokens=12)
    assert recorded["captured"] == 2 + 4  # target and assistant have two widths each


def test_a_turn_with_a_cache(recorded, no_ties, llama):
    """A later turn captures anew, on the storage of its own call."""
    for mode in (None, "graphs"):
        first = generate(llama, "vegas", llama.one, mode)
        again = torch.cat([first.sequences, llama.ids[:1]], dim=1)
        second = generate(llama, "vegas", {"input_ids": again}, mode, past_key_values=first.past_key_values)
        if mode is None:
            expected = second.sequences
    assert torch.equal(second.sequences, expected)


def test_storage_that_has_grown_is_captured_again(recorded, llama):
    """A captured forward writes memory by address: after growth it would write what is no longer the cache."""
    model = llama.model
    cache = SpeculativeCache([None, None], 1, 24)
    runner = programs.GraphRunner(model, cache, 64, widths=[1])
    plain = ModelRunner(model, SpeculativeCache([None, None], 1, 24), 64)
    tokens = llama.ids[:1]
    with torch.no_grad():
        for place in range(tokens.shape[1]):
            if place == 10:
                for layer in cache.layers:
                    layer.grow(128)
            found, expected = (each.forward(tokens[:, place : place + 1], [place]).logits for each in (runner, plain))
            torch.testing.assert_close(found, expected)
    assert recorded["captured"] == 2


@pytest.mark.parametrize("strategy", ["plain", "assisted", "vegas"])
def test_captured_forwards_while_the_storage_grows(recorded, no_ties, llama, strategy, monkeypatch):
    """Captures follow the storage and the view's buffers; finished rows keep their text for the returned cache."""
    kwargs = {"max_new_tokens": 40, "eos_token_id": llama.eos, "pad_token_id": 0}
    expected = generate(llama, strategy, llama.batch, **kwargs)
    generate(llama, strategy, llama.batch, "graphs", **kwargs)
    once = recorded["captured"]
    monkeypatch.setattr(speculative, "_COARSE", 1)
    monkeypatch.setattr(speculative, "GRAIN", 1)
    found = generate(llama, strategy, llama.batch, "graphs", **kwargs)
    assert recorded["captured"] > 2 * once
    assert torch.equal(found.sequences, expected.sequences)
    for layer, other in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
        torch.testing.assert_close(layer.keys, other.keys, atol=llama.tolerance, rtol=0)
        torch.testing.assert_close(layer.values, other.values, atol=llama.tolerance, rtol=0)


def test_a_forward_of_another_shape_runs_uncaptured(recorded, llama):
    with torch.no_grad():
        runners = [
            programs.GraphRunner(llama.model, SpeculativeCache([None, None], 1, 40), 40, widths=[1, 2]),
            ModelRunner(llama.model, SpeculativeCache([None, None], 1, 40), 40),
        ]
        for start, width in ((0, 1), (1, 3), (4, 2), (6, 1), (7, 4)):
            part = llama.ids[:1, start : start + width]
            found, expected = (runner.forward(part, [start], ForwardRequest(hidden=True)) for runner in runners)
            torch.testing.assert_close(found.logits, expected.logits)
            torch.testing.assert_close(found.hidden, expected.hidden)
    assert recorded["captured"] == 2


def test_the_fixed_view_reads_what_the_growing_one_reads(recorded, no_ties, llama):
    """Round by round: the same drafts, from as many candidates and chosen tokens."""
    found = []
    for mode in (None, "graphs"):
        counts = []

        def propose(self, state, mode=mode, counts=counts, original=VegasDrafter.propose):
            draft = original(self, state)
            counts.append((draft.tokens.tolist(), draft.counts, list(self.view.valid), list(self.view.counts)))
            return draft

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(VegasDrafter, "propose", propose)
            generate(llama, "vegas", llama.batch, mode)
        found.append([entry[0] for entry in counts])
    assert found[0] == [[row[: len(found[0][i][j])] for j, row in enumerate(rows)] for i, rows in enumerate(found[1])]


@pytest.mark.parametrize("mode", [None, "graphs", "inductor"])
@pytest.mark.parametrize("strategy", ["plain", "assisted", "vegas", "diversed"])
def test_storage_is_free_when_a_call_ends(recorded, monkeypatch, llama, strategy, mode):
    """Reference counts alone free it: the collector may come much later, and on a GPU the next call needs the room."""
    if mode == "inductor":  # what is compiled does not matter here
        monkeypatch.setattr(programs.torch, "compile", lambda function, **options: function)
    caches, original = [], SpeculativeCache.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        caches.append(weakref.ref(self))

    monkeypatch.setattr(SpeculativeCache, "__init__", init)
    gc.collect()
    gc.disable()
    try:
        generate(llama, strategy, llama.batch, mode, max_new_tokens=6)
        assert caches and not [cache for cache in caches if cache() is not None]
    finally:
        gc.enable()


# bad input


def test_what_cannot_be_captured_is_refused(llama):
    with pytest.raises(ValueError, match="`compile='graphs'` captures CUDA graphs, so `model` must be on one CUDA"):
        generate(llama, "plain", llama.one, "graphs")
    for strategy in ("specbound", "via_sd", "spd"):
        with pytest.raises(TypeError, match="unexpected keyword argument 'compile'"):
            generate(llama, strategy, llama.one, "inductor")
    slim = DiversedConfig(weight=1.0, drafter=families.configured("via_sd:slim"), compile="inductor")
    with pytest.raises(ValueError, match="`compile='inductor'` is not available for the strategy 'diversed'"):
        generate_with(llama, slim)
    with pytest.raises(ValueError, match="`drafter.compile='inductor'`: 'via_sd' has no `compile`"):
        generate_with(llama, families.configured("via_sd").override(drafter=VegasConfig(compile="inductor")))
    with pytest.raises(
        ValueError, match="`compile` must be one of None, 'graphs', 'inductor', 'graphs.inductor', got 'fast'"
    ):
        VegasConfig(compile="fast")
    with pytest.raises(ValueError, match="`kernels` must be one of 'auto', .*, got 'cuda'"):
        VegasConfig(kernels="cuda")
    with pytest.raises(ValueError, match="set `compile` beside `drafter`"):
        generate_with(llama, DiversedConfig(weight=1.0, drafter=VegasConfig(compile="inductor")))


def test_a_kernel_that_is_asked_for_by_name_and_cannot_run_is_refused(llama):
    with pytest.raises(
        ValueError, match="`kernels='triton'` can't be used here: .*allowed: 'auto', 'explicit', 'sdpa'"
    ):
        generate_with(llama, VegasConfig(kernels="triton"))
    with pytest.raises(ValueError, match="`kernels='flash'` can't be used here: .*flash-attn"):
        generate_with(llama, VegasConfig(kernels="flash"))
    with pytest.raises(ValueError, match="`kernels='sdpa'` can't be used here: it has no soft-cap"):
        generate_with(families.family("gemma2"), VegasConfig(kernels="sdpa"))


def generate_with(family, config):
    return family.model.generate(**family.one, assistant_strategy=config, do_sample=False, max_new_tokens=4)


@pytest.mark.parametrize("kernels", ["sdpa", "explicit"])
def test_a_kernel_that_is_asked_for_is_used(llama, monkeypatch, kernels):
    asked = []
    original = choice._ATTENTIONS[kernels]
    monkeypatch.setitem(choice._ATTENTIONS, kernels, lambda *a, **k: asked.append(1) or original(*a, **k))
    config = families.configured("vegas").override(kernels=kernels)
    found = llama.model.generate(**llama.batch, assistant_strategy=config, do_sample=False, max_new_tokens=9)
    assert asked and torch.equal(found, llama.stock(**llama.batch, max_new_tokens=9))


def test_a_forward_that_waits_for_the_device_says_so(recorded):
    """Experts that run one after the other ask the device which ones: no graph can hold that."""
    with pytest.raises(ValueError, match="`compile='graphs'`: GptOssForCausalLM.*can't be captured"):
        family = families.family("gpt_oss")
        generate(family, "plain", family.one, "graphs")


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: bool(x.any()),
    ],
    ids=["item", "mask", "nonzero", "bool"],
)
def test_what_waits_is_seen(wait):
    with programs.NoWaits():
        x = torch.arange(4.0)
        x[torch.tensor([1, 2])] += x.topk(2).values
        with pytest.raises(programs.Waits):
            wait(x)


def test_a_kernel_that_serves_some_forwards_only_says_so(caplog):
    choice.choose.cache_clear()
    request = choice.Request("cpu", torch.float32, 64, 64, 17)
    with caplog.at_level("WARNING", logger="hf_specdec.kernels.choice"):
        assert choice.choose("explicit", request) == "sdpa"
        assert choice.choose("sdpa", request._replace(queries=1, sinks=True)) == "explicit"
        assert choice.choose("auto", request) == "sdpa"
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "`kernels='explicit'` can't serve every forward" in said[0]


# inductor


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.native
@pytest.mark.parametrize("strategy", ["vegas", "diversed"])
def test_compiled_forwards_give_the_same_tokens(llama, strategy):
    expected = generate(llama, strategy, llama.batch, eos_token_id=llama.eos)
    found = generate(llama, strategy, llama.batch, "inductor", eos_token_id=llama.eos)
    assert torch.equal(found.sequences, expected.sequences)
    ours, theirs = found.speculation.to_dict(), expected.speculation.to_dict()
    assert ours.pop("method") == pytest.approx(theirs.pop("method"))
    assert ours == theirs


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.native
def test_captured_compiled_forwards_give_the_same_tokens(monkeypatch, no_ties, llama):
    """Compiled code can't be traced, so that its forwards are run again with the numbers of a capture."""
    monkeypatch.setitem(programs.RECORDERS, "cpu", lambda device: rerun)
    for strategy in ("vegas", "assisted"):
        expected = generate(llama, strategy, llama.batch, eos_token_id=llama.eos)
        found = generate(llama, strategy, llama.batch, "graphs+inductor", eos_token_id=llama.eos)
        assert torch.equal(found.sequences, expected.sequences)
        assert found.speculation.to_dict() == expected.speculation.to_dict()


@pytest.mark.full
@pytest.mark.slow
def test_weights_that_change_are_compiled_again(llama):
    """On CPU the weights are frozen into the code; a merged adapter writes to `.data`, which no version counts."""
    model = families.build("Llama", seed=4)
    inputs = {"max_new_tokens": 8, "do_sample": False}
    texts = []
    for _ in range(2):
        found = model.generate(llama.ids[:1], assistant_strategy=PlainConfig(compile="inductor"), **inputs)
        assert torch.equal(found, model.generate(llama.ids[:1], **inputs))
        texts.append(found)
        model.model.layers[1].mlp.down_proj.weight.data *= -3
    assert not torch.equal(*texts)


def test_the_sum_of_weights_sees_any_change():
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 1)).bfloat16()
    seen = {programs.sum_of_weights(model)}
    for parameter in model.parameters():
        for place in range(parameter.numel()):
            parameter.data.view(-1)[place] += 1
            seen.add(programs.sum_of_weights(model))
    assert len(seen) == 1 + sum(parameter.numel() for parameter in model.parameters())


# the Triton kernels inside generate()


@pytest.mark.full
@pytest.mark.native
@pytest.mark.parametrize("mode", [None, "graphs"])
@pytest.mark.parametrize("strategy", ["plain", "vegas", "vegas:per_key_head"])
def test_triton_kernels_give_the_same_tokens(recorded, monkeypatch, strategy, mode):
    """In Triton's interpreter, or on the GPU: attention, exported scores and gather, through a whole call."""
    pytest.importorskip("triton")
    model = families.build("Llama", seed=3, head_dim=16).float()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setitem(
        programs.RECORDERS, "cpu", lambda device: rerun
    )  # the interpreter's loads and stores can't be traced
    ids, mask = (tensor.to(model.device) for tensor in families.prompts())
    config = families.configured(strategy).override(kernels="triton", compile=mode)
    found, expected = (
        model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=5, **options)
        for options in ({"assistant_strategy": config}, {})
    )
    assert torch.equal(found, expected)


def rerun(run, rehearse):
    """Stand in for a capture by running the forward itself again, with the numbers on the device."""
    rehearse(run)
    result = run()

    def again():
        for old, new in zip(result, run(), strict=True):
            if old is not None:
                old.copy_(new)

    return result, again
