"""SPD with its stages on the ranks of `torch.distributed`: the text of one process, and an end to every error."""

from __future__ import annotations

import os
import random
import statistics
import time

import families
import pytest
import torch
from ranks import Died, run_ranks

import hf_specdec
from hf_specdec.generation.methods.spd.depth_map import DepthMap
from hf_specdec.generation.methods.spd.draft_module import DraftReader, PipelineDraftModule
from hf_specdec.generation.methods.spd.method import SPDConfig
from hf_specdec.generation.methods.spd.ranked_pipeline import RankedPipeline
from hf_specdec.generation.methods.spd.ranks import PipelineRankError


pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed"),
]

LAYERS = 6
PLACES = [(2, 1), (2, 2), (3, 2), (3, 3), (4, 3)]  # ranks and stages: colocated, dedicated
TIMEOUT = 40.0
NAP = 0.1
"""Seconds of sleep in each stage and in the module; a few times what five processes on two cores need for the rest."""


def build():
    """Return a model, the same in every process."""
    return families.build("Llama", seed=3, num_hidden_layers=LAYERS)


@pytest.fixture(scope="session")
def adapters(tmp_path_factory):
    """Return folders of draft modules by number of stages; one is uneven."""
    model, found = build(), {}
    for stages, counts in ((1, None), (2, None), (3, [1, 3, 2]), (4, [1, 2, 2, 1])):
        torch.manual_seed(0)
        depths = DepthMap(LAYERS, stages, counts)
        found[stages] = str(tmp_path_factory.mktemp(f"spd{stages}"))
        PipelineDraftModule(model, depths, [LAYERS - 1], torch.arange(0, 64, 2)).save(
            found[stages], SPDConfig(), model
        )
    found["other"] = str(tmp_path_factory.mktemp("spd2"))
    depths = DepthMap(LAYERS, 2)
    PipelineDraftModule(model, depths, [0], torch.arange(0, 64, 2)).save(found["other"], SPDConfig(), model)
    return found


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Return the folder of the model."""
    folder = str(tmp_path_factory.mktemp("model"))
    build().save_pretrained(folder, max_shard_size="40KB")
    return folder


def ours(model, adapter, rows=1, **kwargs):
    """Generate over the ranks; greedy unless said otherwise."""
    ids, mask = families.prompts()
    given = {"input_ids": ids[:rows], "attention_mask": mask[:rows], "max_new_tokens": 12, "do_sample": False}
    config = SPDConfig(adapter=adapter, schedule="dist", timeout=kwargs.pop("timeout", TIMEOUT))
    return model.generate(**{**given, **kwargs}, assistant_strategy=config)


def every_case(rank, adapter):
    """Return what several calls give on one rank."""
    model, found = build(), {}
    found["one"] = ours(model, adapter)
    found["rows"] = ours(model, adapter, rows=4)
    torch.manual_seed(rank)  # only the controlling rank draws
    found["sampled"] = ours(model, adapter, do_sample=True, temperature=1.3, top_k=20)
    found["chunks"] = ours(model, adapter, prefill_chunk_size=4)
    out = ours(model, adapter, output_logits=True, return_dict_in_generate=True)
    found["logits"] = None if out.logits is None else torch.stack(out.logits)
    found["stats"] = None if out.speculation is None else out.speculation.to_dict()
    found["cache"] = out.past_key_values
    eos = int(found["one"][0, -3])
    found["eos"] = ours(model, adapter, eos_token_id=[eos, 63])
    found["short"] = [ours(model, adapter, max_new_tokens=new) for new in (1, 2, 3)]
    found["token"] = ours(model, adapter, input_ids=torch.tensor([[5]]), attention_mask=torch.ones(1, 1))
    found["penalty"] = ours(model, adapter, rows=4, repetition_penalty=1.4)
    return found


@pytest.mark.parametrize("size, stages", PLACES)
def test_all_ranks_return_the_text_of_one_process(size, stages, adapters):
    found = run_ranks(size, every_case, adapters[stages])
    first, model, (ids, mask) = found[0], build(), families.prompts()
    for rank, other in enumerate(found[1:], 1):
        assert isinstance(other, dict), other
        for name in ("one", "rows", "sampled", "chunks", "eos", "token", "penalty"):
            assert torch.equal(first[name], other[name]), (rank, name)
        assert other["logits"] is None and other["stats"] is None
    kwargs = {"max_new_tokens": 12, "do_sample": False}
    plain = model.generate(ids[:1], attention_mask=mask[:1], **kwargs)
    assert torch.equal(first["one"], plain)
    assert torch.equal(first["chunks"], plain)
    assert torch.equal(first["rows"], model.generate(ids, attention_mask=mask, **kwargs))
    penalty = model.generate(ids, attention_mask=mask, **kwargs, repetition_penalty=1.4)
    assert torch.equal(first["penalty"], penalty)
    eos = [int(plain[0, -3]), 63]
    assert torch.equal(first["eos"], model.generate(ids[:1], attention_mask=mask[:1], **kwargs, eos_token_id=eos))
    assert [x.tolist() for x in first["short"]] == [plain[:, : 19 + new].tolist() for new in (1, 2, 3)]
    assert torch.equal(first["token"], model.generate(torch.tensor([[5]]), **kwargs))
    assert first["cache"] is None
    # the same ticks and, bit for bit, the same logits as in one process and as plain decoding
    options = {**kwargs, "return_dict_in_generate": True, "output_logits": True}
    config = SPDConfig(adapter=adapters[stages], schedule="serial")
    serial = model.generate(ids[:1], attention_mask=mask[:1], **options, assistant_strategy=config)
    inner = model.generate(ids[:1], attention_mask=mask[:1], **options, assistant_strategy="plain")
    assert torch.equal(first["logits"], torch.stack(serial.logits))
    assert torch.equal(first["logits"], torch.stack(inner.logits))
    assert (serial.speculation is None) is (first["stats"] is None) is (stages == 1), "one stage drafts nothing"
    if stages > 1:
        assert first["stats"]["method"] == serial.speculation.method
        assert first["stats"]["accept_lengths"] == serial.speculation.accept_lengths


def with_delays(rank, adapter):
    """Decode with stages that take unequal and changing time."""
    model, delays = build(), random.Random(rank)
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: time.sleep(delays.choice([0, 0, 0.003])))
    return [ours(model, adapter, max_new_tokens=30) for _ in range(3)]


def test_random_delays_change_nothing(adapters):
    found = run_ranks(4, with_delays, adapters[3])
    ids, _ = families.prompts()
    plain = build().generate(ids[:1], max_new_tokens=30, do_sample=False)
    for texts in found:
        assert all(torch.equal(text, plain) for text in texts)


def with_loaded_stage(rank, folder, adapter):
    """Decode with a model of which each rank holds its part; return the text and the numbers of its parameters."""
    model = hf_specdec.load_stage(folder, adapter, dtype=torch.float64)
    real = sum(p.numel() for p in model.parameters() if not p.is_meta)
    layers = [sum(not p.is_meta for p in layer.parameters()) for layer in model.model.layers]
    return ours(model, adapter), real, layers


@pytest.mark.parametrize("size, stages", [(3, 3), (4, 3)])
def test_each_rank_holds_its_own_layers_only(size, stages, saved, adapters):
    found = run_ranks(size, with_loaded_stage, saved, adapters[stages])
    model, (ids, _) = build(), families.prompts()
    plain = model.generate(ids[:1], max_new_tokens=12, do_sample=False)
    per_layer = sum(p.numel() for p in model.model.layers[0].parameters())
    outside = model.model.embed_tokens.weight.numel() + model.model.norm.weight.numel()
    bounds = [0, 1, 4, 6]
    for rank, (text, real, layers) in enumerate(found):
        assert torch.equal(text, plain)
        stage = rank - 1 if rank else None if size > stages else stages - 1
        own = range(0) if stage is None else range(bounds[stage], bounds[stage + 1])
        assert [index for index, count in enumerate(layers) if count] == list(own)
        head = model.lm_head.weight.numel() if rank == 0 else 0
        assert real == len(own) * per_layer + outside + head


def with_another_argument(rank, adapter, name, other):
    """Call `generate` with something else on rank 1, then alike."""
    model = build()
    changed = {
        "adapter": {"adapter": other},
        "inputs": {"input_ids": families.prompts(seed=9)[0][:1]},
        "generation_config": {"max_new_tokens": 9},
        "timeout": {"timeout": 41.0},
    }[name]
    try:
        ours(model, **{"adapter": adapter, **(changed if rank == 1 else {})})
    except ValueError as error:
        return str(error), ours(model, adapter)
    return None


@pytest.mark.parametrize("name", ["inputs", "generation_config", "timeout", "adapter"])
def test_different_arguments_are_an_error_on_all_ranks(name, adapters):
    plain = build().generate(families.prompts()[0][:1], max_new_tokens=12, do_sample=False)
    for message, after in run_ranks(3, with_another_argument, adapters[2], name, adapters["other"]):
        assert f"`{name}` on rank 1" in message
        assert torch.equal(after, plain)


def in_a_world_that_does_not_fit(rank, adapter):
    try:
        ours(build(), adapter)
    except ValueError as error:
        return str(error)
    return None


def test_a_world_that_fits_neither_placement_is_refused(adapters):
    for message in run_ranks(2, in_a_world_that_does_not_fit, adapters[4]):
        assert "4 stages needs 4 ranks, or 5" in message and "there are 2" in message


def failing(rank, adapter, where, at):
    """Fail once somewhere, then decode; return the first call's error, how long it took, and the second text."""
    model, left = build(), [at]

    def fail(*_):
        left[0] -= 1
        if left[0] == 0:
            raise KeyError("raised on purpose")

    handle = None
    if where == rank:
        handle = model.model.layers[-1 if rank == 0 else rank - 1].register_forward_pre_hook(fail)
    streamer = None
    if where == "streamer" and rank == 0:
        streamer = type("Failing", (), {"put": lambda self, value: fail(), "end": lambda self: None})()
    begin, message = time.monotonic(), None
    try:
        ours(model, adapter, max_new_tokens=30, streamer=streamer)
    except (PipelineRankError, KeyError) as error:
        message = f"{type(error).__name__}: {error}"
    took = time.monotonic() - begin
    if handle is not None:
        handle.remove()
    return message, took, ours(model, adapter)


# a stage during the prompt (2 blocks) and in a tick; the controlling rank's own stage; its streamer
@pytest.mark.parametrize("where, at", [(1, 2), (1, 9), (2, 5), (0, 7), ("streamer", 4)])
def test_an_error_on_one_rank_is_an_error_on_all(where, at, adapters):
    found = run_ranks(3, failing, adapters[3], where, at)
    plain = build().generate(families.prompts()[0][:1], max_new_tokens=12, do_sample=False)
    for rank, (message, took, after) in enumerate(found):
        assert message is not None, f"rank {rank} did not notice"
        assert took < TIMEOUT / 2
        assert torch.equal(after, plain), "the next call must work"
    own = where if where != "streamer" else 0
    in_tick = at > 2
    if in_tick:
        assert all("raised on purpose" in message for message, *_ in found)
        others = [message for rank, (message, *_) in enumerate(found) if rank != own]
        assert all(message.startswith("PipelineRankError") and f"rank {own}" in message for message in others)


def dying(rank, adapter, victim):
    """Be killed in the middle of a generation, or see another one be."""
    model, left = build(), [12]

    def die(*_):
        left[0] -= 1
        if left[0] == 0:
            os._exit(9)

    if rank == victim:
        layer = 0 if rank else -1
        model.model.layers[layer].register_forward_pre_hook(die)
    begin = time.monotonic()
    try:
        ours(model, adapter, max_new_tokens=40, timeout=15.0)
    except PipelineRankError as error:
        return str(error), time.monotonic() - begin
    return None


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_an_error_on_the_others_in_time(victim, adapters):
    found = run_ranks(3, dying, adapters[3], victim)
    assert isinstance(found.pop(victim), Died)
    for message, took in found:
        assert "waited for rank" in message
        assert took < 2 * 15.0


def refusals(rank, adapter):
    """Return the errors of calls that need a whole model on one rank."""
    model, found = build(), []
    for wrong in (
        {"past_key_values": __import__("transformers").DynamicCache(config=model.config)},
        {"rows": 4, "output_scores": True, "return_dict_in_generate": True},
    ):
        try:
            ours(model, adapter, **wrong)
        except ValueError as error:
            found.append(str(error))
    return found


def test_what_needs_a_whole_model_is_refused(adapters):
    for messages in run_ranks(2, refusals, adapters[2]):
        assert [message.split("`")[1] for message in messages] == ["past_key_values", "output_scores=True"]


def overlapping(rank, adapter):
    """Return the seconds of ticks in which all stages are busy, with a nap in every stage and in the module."""
    model, took = build(), []
    bounds = [0, 1, 3, 5, 6]
    if rank:
        model.model.layers[bounds[rank - 1]].register_forward_pre_hook(lambda *_: time.sleep(NAP))
    else:
        draft, tick = DraftReader.draft, RankedPipeline.tick

        def slow_draft(self, *args):
            time.sleep(NAP)
            return draft(self, *args)

        def timed_tick(self, job):
            full, begin = job is not None and None not in self.order.positions, time.monotonic()
            found = tick(self, job)
            if full:
                took.append(time.monotonic() - begin)
            return found

        DraftReader.draft, RankedPipeline.tick = slow_draft, timed_tick
    ours(model, adapter, max_new_tokens=16)
    return took


def test_stages_and_module_work_at_the_same_time(adapters):
    took = run_ranks(5, overlapping, adapters[4])[0]
    middle = statistics.median(took)  # a machine that does other work as well delays some ticks by any amount
    print(f"{1000 * middle:.1f} ms per full tick, {1000 * NAP:.0f} of them asleep in 4 stages and the module at once")
    assert len(took) >= 10
    assert middle < 1.5 * NAP, "one after the other they take five naps"


def test_schedule_dist_needs_ranks(adapters):
    with pytest.raises(ValueError, match="init_process_group"):
        ours(build(), adapters[2])
