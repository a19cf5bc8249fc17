"""The contract on statistics: they add up, and count the forwards that ran."""

from __future__ import annotations

from contract_cases import alternating, check_statistics, counted, every_base, every_preset, new_tokens

from hf_specdec.generation.models.surgery import decoder_layers
from hf_specdec.generation.strategy import SpeculationStrategy
from hf_specdec.registry import strategy_class


@alternating(
    "rows, new, sample",
    [(1, 40, False), (4, 40, True), (4, 1, False), (1, 2, True)],
    [(1, 40, True), (4, 40, False), (1, 1, True), (4, 2, False)],
    variants=[(4, 40, True)],
)
def test_statistics_add_up(strategy, rows, new, sample, llama):
    out, stats = counted(llama, strategy, **llama.inputs(rows), max_new_tokens=new, do_sample=sample)
    check_statistics(out, stats, llama, rows)


@every_base
def test_statistics_count_up_to_eos(strategy, llama):
    out, stats = counted(llama, strategy, **llama.batch, max_new_tokens=40, eos_token_id=llama.eos, tokens=5)
    check_statistics(out, stats, llama, 4, exact_rows=False)
    kept = new_tokens(out.sequences, llama.ids.shape[1], llama.eos)
    assert [sum(row) + 1 for row in stats.accept_lengths] == [len(row) for row in kept]


@every_preset
def test_forwards_are_those_that_ran(strategy, llama):
    """Every pass through all layers is counted, also drafts by the whole model, and one more for the prompt's head."""
    calls, cls = [], strategy_class(strategy.partition(":")[0])
    handle = decoder_layers(llama.model)[-1].register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        llama.ours(strategy, **llama.one, max_new_tokens=30)
        calls.clear()
        _, stats = counted(llama, strategy, **llama.one, max_new_tokens=30)
    finally:
        handle.remove()
    drafts_itself = cls.make_drafter is not SpeculationStrategy.make_drafter and not cls.needs_assistant
    own = stats.draft_forwards if drafts_itself else 0
    own += stats.method.get("slim_forwards", 0)  # the last layer always stays
    prompt = len(calls) - stats.target_forwards - own
    assert prompt in (1, 2)
