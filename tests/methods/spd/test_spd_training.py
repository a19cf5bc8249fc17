"""SPD's draft module: what it reads, that training and decoding compute the same, its training and its files."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from spd_cases import QUICK, UNEVEN, Module, prompt, raw_states, small, spd, stock, target, texts, twin
from spd_cases import ids_of as words_in

from hf_specdec.generation.methods.spd.depth_map import DepthMap
from hf_specdec.training import spd as training
from hf_specdec.training.spd import Layout, ModuleTraining, Student, train_draft_module


# stages, layers of each, features
CUTS = [(4, None, None), (4, UNEVEN, None), (8, None, [0, 2, 4, 6, 7]), (2, None, [0, 3, 7]), (4, UNEVEN, [0, 2, 7])]
every_cut = pytest.mark.parametrize("cut", CUTS, ids=str)


def random_module(model, cut, **options):
    return Module(model, cut[0], stage_layers=cut[1], features=cut[2], **options)


@torch.no_grad()
def from_scratch(model, module, states, depths, first=0):
    """Return logits after the last of tokens at given depths: plain causal layers of a stock model, in one forward.

    Args:
        states: hidden states of all tokens, by index.
        depths: stages that each token has passed.
        first: position of the first token.
    """
    bounds, features = module.depths.bounds, module.depths.features
    rows = []
    for place, depth in enumerate(depths):
        seen = [f for f in features if f <= bounds[depth]]
        parts = torch.cat([states[f][:, place : place + 1] for f in seen], dim=-1)
        rows.append(parts @ module.feature_proj[len(seen) - 1].weight.T)
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(module.layers)
    config._attn_implementation = "sdpa"  # eager takes its softmax in float32
    plain = type(model)(config).to(rows[0].dtype).eval()
    for mine, layer in zip(plain.model.layers, module.layers, strict=True):
        mine.load_state_dict(layer.state_dict())
    plain.model.norm.load_state_dict(model.model.norm.state_dict())
    place = torch.arange(len(rows))
    back = place[:, None] - place
    hidden = (back < 0) | (back >= (module.span or 10**6))
    mask = torch.zeros(1, 1, *hidden.shape, dtype=rows[0].dtype).masked_fill(hidden, torch.finfo(rows[0].dtype).min)
    options = {"attention_mask": mask, "position_ids": place[None] + first, "use_cache": False}
    hidden = plain.model(inputs_embeds=torch.cat(rows, dim=1), **options).last_hidden_state
    return hidden[:, -1] @ module.lm_head.weight.T


def check_call(model, module, call, text, first=0):
    """Compare one guess, and everything that it was made from, with stock forwards; return how many are in flight."""
    rows, finished, flying, logits = call
    ids = words_in(model, rows)
    depths = [depth for depth, _ in flying]
    assert depths == list(range(len(flying)))[::-1], "one token in each of the first stages, the newest not yet in any"
    assert len(finished) <= 1 or depths == [0]
    done = len(ids) - len(flying)
    assert ids[: done + 1] == text[first : first + done + 1]
    # the text before `first` lies in a cache and is part of what the states depend on
    states = [state[:, first:] for state in raw_states(twin(model), torch.tensor([text[:first] + ids]))]
    allowed = [(module.depths.stages, features) for features in finished] + list(flying)
    for place, (depth, features) in enumerate(allowed, start=len(ids) - len(allowed)):
        assert sorted(features) == [f for f in module.depths.features if f <= module.depths.bounds[depth]]
        for index, state in features.items():
            torch.testing.assert_close(state, states[index][:, place : place + 1], rtol=0, atol=1e-9)
    expected = from_scratch(twin(model), module, states, [module.depths.stages] * done + depths, first)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-8)
    return len(flying)


@every_cut
@pytest.mark.parametrize("length, span, name", [(1, None, "llama"), (9, 6, "llama"), (5, None, "qwen3")])
def test_guesses_equal_a_forward_from_scratch(cut, length, span, name):
    """At every tick: raw states, no deeper than the token has come, at true positions, and nothing stale."""
    model, ids, new = target(name), prompt(length), 11
    module = random_module(model, cut, span=span)
    out = spd(model, module, ids, new)
    text = out.sequences[0].tolist()
    # what the prompt gave is what decoding the same tokens gives
    states = raw_states(twin(model), ids)
    assert sorted(module.prompts[0]) == module.depths.features
    for index, state in module.prompts[0].items():
        torch.testing.assert_close(state, states[index], rtol=0, atol=1e-9)
    flights = [check_call(model, module, call, text) for call in module.calls]
    assert flights[: cut[0]] == list(range(1, cut[0] + 1)), "the pipeline fills up"
    assert out.speculation.method["rejections"] > 2 and flights.count(1) > 2


@pytest.mark.parametrize("schedule", ["serial", "threads"])
def test_guesses_of_right_and_late_tokens(schedule):
    """The same where guesses are right, so that the pipeline stays full, and in a second turn."""
    model = target()
    module = random_module(model, CUTS[1], span=12)
    ids, new = prompt(6), 14
    text = stock(model, ids, new)

    def right(logits, place):
        known = torch.zeros_like(logits)
        known[0, text[0, min(place, text.shape[1] - 1)]] = 100.0
        return known if place % 7 else logits

    reader = module.reader

    def steered(model, capacity):
        noted = reader(model, capacity)
        draft = noted.draft
        noted.draft = lambda finished, flying: right(
            draft(finished, flying), noted.first + noted.rows.shape[1] + len(flying)
        )
        return noted

    module.reader = steered
    out = spd(model, module, ids, new, schedule=schedule)
    assert torch.equal(out.sequences, text)
    flights = [check_call(model, module, call, text[0].tolist()) for call in module.calls]
    assert flights.count(4) >= 4 and out.speculation.method["rejections"] > 0
    module.calls.clear()
    ids = torch.cat([text, prompt(3, seed=9)], dim=1)
    text = stock(model, ids, 10)
    again = spd(model, module, ids, 10, schedule=schedule, past_key_values=out.past_key_values)
    assert torch.equal(again.sequences, text)
    # all but the first turn's last token were cached, and gave no states
    flights = [check_call(model, module, call, text[0].tolist(), first=19) for call in module.calls]
    assert len(flights) > 5


def test_every_weight_of_the_module_matters():
    model, ids, seen = target(), prompt(6), {}
    for name in ["", *(name for name, _ in random_module(model, CUTS[0]).named_parameters())]:
        module = random_module(model, CUTS[0])
        for own, parameter in module.named_parameters():
            if own == name:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double()
                parameter.data += (0.3 * parameter.std() + 0.1) * noise
        out = spd(model, module, ids, 8)
        assert torch.equal(out.sequences, stock(model, ids, 8))
        seen[name] = [call[3] for call in module.calls]
    base = seen.pop("")
    assert len(seen) > 20
    for name, logits in seen.items():
        assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(base, logits, strict=False)), name
    changed = sum(
        [int(one.argmax()) for one in logits] != [int(one.argmax()) for one in base] for logits in seen.values()
    )
    assert changed > len(seen) // 2  # not the logits alone


# training computes what decoding does


@every_cut
@pytest.mark.parametrize("layout", ["exact", "shared"])
def test_training_rows_equal_decoding(cut, layout):
    """For every fill and place: the newest tokens in a staircase, everything F and more behind finished."""
    model, ids = twin(target()), prompt(11)
    module = random_module(model, cut)
    stages, count = cut[0], len(module.depths.features)
    if layout == "shared" and count < stages + 1:
        return  # an approximation
    states = raw_states(model, ids)
    student = Student(model, copy.deepcopy(module))
    for fill in range(1, stages + 1):
        rows = Layout(module.depths, layout, fill)
        with torch.no_grad():
            features = {index: states[index] for index in module.depths.features}
            found = student(features, rows, student.calls(rows, ids.shape[1], states[0]))
            # texts of a batch don't see each other, nor the padding on the right
            two = {index: torch.cat([state, state.flip(1)]) for index, state in features.items()}
            both = student(two, rows, student.calls(rows, ids.shape[1], states[0]))
        torch.testing.assert_close(both[:1], found, rtol=0, atol=1e-9)
        assert found.shape == (1, ids.shape[1], module.lm_head.weight.shape[0])
        for place in range(ids.shape[1]):
            back = range(place, -1, -1)
            depths = [stages if fill < stages and b >= fill else min(b, stages) for b in back]
            expected = from_scratch(model, module, [s[:, : place + 1] for s in states], depths)
            torch.testing.assert_close(found[:, place], expected, rtol=0, atol=1e-8)


def test_the_shared_layout_has_fewer_rows_and_the_rule_of_its_types():
    depths = DepthMap(32, 8)
    blocks = Layout(depths, "shared", 8).blocks
    assert blocks == [(4, 8), (3, 6), (2, 4), (1, 2), (0, 0)]
    assert len(Layout(depths, "exact", 8).blocks) == 9
    for fill in range(1, 9):
        layout, width = Layout(depths, "shared", fill), 12
        mask = layout.mask(width, torch.device("cpu"))[0, 0].view(len(layout.blocks), width, len(layout.blocks), width)
        for i, (_, depth) in enumerate(layout.blocks):
            for t in range(width):
                for j, (kind, _) in enumerate(layout.blocks):
                    for at in range(width):
                        far = depth + t - at
                        wanted = 4 if fill < 8 and far >= fill else depths.types[min(8, far)] if far >= 0 else None
                        assert bool(mask[i, t, j, at]) is (at <= t and kind == wanted), (fill, i, t, j, at)


# training


def test_what_is_learned_by_heart_is_served(tmp_path):
    before = {name: value.clone() for name, value in small().state_dict().items()}
    losses = []
    change = {"num_draft_layers": 2, "batch_tokens": 200, "learning_rate": 1e-2}
    settings = ModuleTraining(**{**QUICK, **change}, steps=300, save_every=1000)
    figures = train_draft_module(
        small(), texts(), tmp_path, settings, report=lambda found: losses.append(found.get("loss", 0.0))
    )
    assert all(torch.equal(value, before[name]) for name, value in small().state_dict().items())
    assert sum(losses[-20:]) < 0.1 * sum(losses[:20])
    assert figures["agreement"] >= 0.95 and figures["after_rejection"]["agreement"] >= 0.85
    judged = accepted = ticks = tokens = 0
    options = {"assistant_strategy": str(tmp_path), "return_dict_in_generate": True, "max_new_tokens": 20}
    for text in texts()[1:]:
        out = small().generate(text.ids[None, :4], do_sample=False, **options)
        assert torch.equal(out.sequences[0], text.ids)
        judged += out.speculation.num_draft_tokens
        accepted += out.speculation.num_accepted_tokens
        ticks += out.speculation.method["ticks"]
        tokens += 20
    assert accepted / judged > 0.95
    assert 4 * tokens / ticks > 3.2  # with right guesses alone it were 4 * 20 / 22


def test_a_resumed_run_ends_where_the_whole_one_does(tmp_path):
    settings = ModuleTraining(**QUICK, steps=24, save_every=8)
    train_draft_module(small(), texts(), tmp_path / "whole", settings)

    def stop(figures):
        if figures["step"] == 12 and "loss" in figures:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_draft_module(small(), texts(), tmp_path / "part", settings, report=stop)
    train_draft_module(small(), texts(), tmp_path / "part", settings, resume=True)
    whole, part = (load_file(tmp_path / name / "specdec_adapter.safetensors") for name in ("whole", "part"))
    for name, value in whole.items():
        torch.testing.assert_close(part[name].float(), value.float(), atol=2e-3, rtol=1e-2)
    with pytest.raises(ValueError, match="other settings"):
        other = ModuleTraining(**{**QUICK, "num_stages": 2}, steps=24, save_every=8)
        train_draft_module(small(), texts(), tmp_path / "part", other, resume=True)
    with pytest.raises(FileNotFoundError):
        train_draft_module(small(), texts(), tmp_path / "none", settings, resume=True)


def test_half_of_the_steps_simulate_a_pipeline_that_fills_up(tmp_path, monkeypatch):
    fills = []

    def layout(depths, kind, fill):
        fills.append((kind, fill))
        return Layout(depths, kind, fill)

    monkeypatch.setattr(training, "Layout", layout)
    train_draft_module(small(), texts(), tmp_path, ModuleTraining(**QUICK, steps=60, save_every=1000))
    steps = fills[:60]
    assert {kind for kind, _ in steps} == {"exact"}
    counts = [sum(fill == wanted for _, fill in steps) for wanted in range(1, 5)]
    assert sum(counts) == 60 and min(counts) >= 4 and 20 <= counts[3] <= 40


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_stages": 1}, "`num_stages` must be at least 2, got 1"),
        ({"num_stages": 3}, "`num_stages` is 3.*4 layers; allowed: 1, 2, 4"),
        ({"stage_layers": (1, 3)}, "`stage_layers` must be 4 counts"),
        ({"feature_layers": (0, 4)}, "`feature_layers`.*at most 3"),
        ({"num_draft_layers": 0}, "`num_draft_layers` must be at least 1, got 0"),
        ({"templates": (1, 2)}, "`templates`.*1 layers"),
        ({"templates": (4,)}, "`templates` must be layers below 4.*4"),
        ({"layout": "dense"}, "`layout` must be one of exact, shared, got 'dense'"),
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
    ],
    ids=str,
)
def test_training_settings_out_of_range_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        train_draft_module(small(), texts(), tmp_path, ModuleTraining(**{**QUICK, "steps": 2, **change}))
    assert not list(tmp_path.iterdir())
