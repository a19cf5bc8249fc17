"""`bench --kernels`: bytes, errors and times are what they claim, and what can't be measured is said or refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from families import ROOT
from rich.console import Console

from hf_specdec import VegasConfig
from hf_specdec.bench import cases, kernels, report, run, steps
from hf_specdec.bench.cases import Case
from hf_specdec.bench.run import make_arm, measure, prefill
from hf_specdec.commands import main as cli
from hf_specdec.kernels import explicit, reference


CPU = torch.device("cpu")
ROOM = 8 << 30
RESULTS = ROOT / "docs" / "results" / "vegas-7900.json"
VEGAS = "vegas@min_context=0"


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    """Without a GPU the other tests let Triton interpret its kernels; here they are to be left out, as for users."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def tiny_cases(dtype=torch.float32):
    return steps.kernel_cases({"tiny": steps.shape_config("tiny")}, dtype)


def of_kind(kind: str) -> Case:
    return next(case for case in tiny_cases() if case.kind == kind)


@pytest.fixture(scope="module")
def model():
    return steps.build(steps.shape_config("tiny"), torch.float32, CPU)


@pytest.fixture
def prompts():
    return torch.randint(2, 64, (2, 40), generator=torch.Generator().manual_seed(1))


# kernels


def test_bytes_are_those_counted_by_hand():
    case = Case("x", "verify", rows=2, heads=4, key_heads=2, size=8, queries=3, context=10, dtype=torch.bfloat16)
    # keys and values: 2 rows x 10 tokens x 2 heads x 8 x 2; queries and outputs: 2 rows x 4 heads x 3 x 8 x 2
    assert cases.attention_bytes(case) == 2 * (640 + 384)
    # products of two queries in 16 bits, logarithms in 32: 2 rows x 4 heads x 2
    assert cases.export_bytes(case) == 16 * (10 * 2 + 4)
    ragged = Case("x", "verify", 3, 4, 2, 8, 3, 10, ragged=True, dtype=torch.float32)
    assert ragged.lengths == [10, 8, 5] and ragged.starts == [7, 5, 2]
    assert kernels.moved_bytes(ragged) == 4 * (23 * 2 * 2 * 8 + 2 * 3 * 4 * 3 * 8)
    scored = Case("x", "scored", 2, 4, 2, 8, 3, 10)
    assert kernels.moved_bytes(scored) == cases.attention_bytes(case) + 2 * 10 * 4
    gather = Case("x", "gather", 2, 4, 2, 8, 1, 10, selected=5, layers=3)
    # 3 layers x 2 rows x 5 tokens: keys and values of 2 heads x 8 x 2 bytes, read and written, and an index
    assert cases.gather_bytes(gather) == 30 * (2 * 2 * 2 * 8 * 2 + 8)


def test_copies_have_a_rate():
    assert kernels.copy_bandwidth(CPU, 1 << 20) > 0


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_every_implementation_of_every_case_is_near_the_reference(dtype, most):
    notes: list[str] = []
    cases = tiny_cases(dtype)
    rows = kernels.measure_kernels(cases, CPU, 10.0, ROOM, notes.append)
    wanted = {
        "draft": {"explicit", "sdpa", "sdpa_dense", "reference"},
        "verify": {"explicit", "sdpa", "sdpa_dense", "reference"},
        "scored": {"explicit", "sdpa", "reference"},
        "export": set(),
        "reduce": {"explicit", "reference"},
        "gather": {"explicit", "reference"},
    }
    for case in cases:
        found = {row.implementation for row in rows if row.case == case}
        assert found == wanted[case.kind] - ({"sdpa_dense"} if case.ragged else set()), case.name
    for row in rows:
        assert row.ms > 0 and row.error <= most and row.relative_error <= most, row
        assert row.gb_per_second == pytest.approx(row.bytes / row.ms / 1e6)
        assert row.copy_share == pytest.approx(row.gb_per_second / 10)
    assert any("triton" in note and "not on cpu" in note for note in notes)
    assert any("one length only" in note for note in notes)
    assert len(set(notes)) == len(notes), "each reason once"


@pytest.mark.parametrize("noise", [0.5, float("nan")])
@pytest.mark.parametrize("kind", ["verify", "scored"])
def test_a_broken_kernel_shows(monkeypatch, kind, noise):
    def broken(query, key, value, address, rules):
        output, metric = original(query, key, value, address, rules)
        output[-1, -1, -1, -1] += noise
        return output, metric

    original = explicit.cached_attention
    monkeypatch.setattr(explicit, "cached_attention", broken)
    rows = kernels.measure_kernels([of_kind(kind)], CPU, 1.0, ROOM)
    errors = {row.implementation: row.error for row in rows}
    assert errors["explicit"] == (pytest.approx(0.5, abs=1e-3) if noise == 0.5 else float("inf"))
    assert errors["sdpa"] < 1e-5


def test_wrong_token_scores_show(monkeypatch):
    original = explicit.token_scores
    monkeypatch.setattr(explicit, "token_scores", lambda *arguments: original(*arguments) * 1.5)
    for kind in ("reduce", "scored"):
        rows = kernels.measure_kernels([of_kind(kind)], CPU, 1.0, ROOM)
        found = {row.implementation: row.relative_error for row in rows}
        assert found["explicit"] == pytest.approx(0.5, abs=1e-3) and found["reference"] < 1e-5, kind


def test_a_gather_that_copies_nothing_shows(monkeypatch):
    monkeypatch.setattr(kernels, "gather_slots", lambda *arguments: None)
    rows = kernels.measure_kernels([of_kind("gather")], CPU, 1.0, ROOM)
    # the reference runs last, on the same targets: had it run first, its copies would not have counted
    assert {row.implementation: row.relative_error for row in rows} == {"explicit": 1.0, "reference": 0.0}
    backwards = dict(reversed(kernels.IMPLEMENTATIONS["gather"].items()))
    monkeypatch.setitem(kernels.IMPLEMENTATIONS, "gather", backwards)
    rows = kernels.measure_kernels([of_kind("gather")], CPU, 1.0, ROOM)
    assert {row.implementation: row.relative_error for row in rows} == {"explicit": 1.0, "reference": 0.0}


def test_the_float32_reference_is_the_whole_reference():
    case = next(case for case in tiny_cases() if case.ragged)
    inputs = kernels.make_inputs(case, CPU)
    wanted = reference.attention(*inputs, torch.tensor(case.starts), scaling=case.scaling)
    torch.testing.assert_close(kernels.expected(case, inputs)[0], wanted)


def test_cases_that_do_not_fit_are_left_out():
    notes: list[str] = []
    assert kernels.measure_kernels(tiny_cases(), CPU, 1.0, 1000, notes.append) == []
    assert len(notes) == len(tiny_cases()) and "of 0.0000" in notes[0]


def test_shapes_of_equal_attention_are_measured_once():
    names = ["llama-3.1-8b", "qwen3-8b", "qwen3-0.6b"]
    cases = steps.kernel_cases({name: steps.shape_config(name) for name in names}, torch.bfloat16)
    assert {(case.heads, case.key_heads, case.size) for case in cases} == {(32, 8, 128), (16, 8, 128)}
    assert [case.layers for case in cases if case.kind == "gather"] == [36, 28]
    assert len(cases) == len(set(cases))


@pytest.mark.full
def test_triton_rows_by_the_interpreter():
    """The calls fit the kernels; how fast they are, a CPU can't tell."""
    pytest.importorskip("triton")
    code = (
        "import torch; from hf_specdec.bench import kernels, steps\n"
        "kernels.timed = lambda *arguments: 1.0\n"
        "cases = steps.kernel_cases({'tiny': steps.shape_config('tiny')}, torch.float32)\n"
        "rows = kernels.measure_kernels(cases, torch.device('cpu'), 1.0, 8 << 30)\n"
        "print({r.case.name: r.relative_error for r in rows if r.implementation == 'triton'})"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    found = eval(done.stdout.strip().splitlines()[-1])
    assert set(found) == {case.name for case in tiny_cases()}
    assert max(found.values()) < 1e-4, found


# shapes


@pytest.mark.parametrize(
    ("name", "parameters", "table", "per_token"),
    [
        ("llama-3.1-8b", 8_030_261_248, 128256 * 4096, 131072),
        ("qwen3-8b", 8_190_735_360, 151936 * 4096, 147456),
        ("qwen3-0.6b", 596_049_920, 0, 114688),
    ],
)
def test_shapes_have_the_sizes_of_their_models(name, parameters, table, per_token):
    config = steps.shape_config(name)
    model = steps.build(config, torch.bfloat16, torch.device("meta"))
    assert steps.weight_bytes(model) == (2 * parameters, 2 * (parameters - table))
    assert steps.kv_bytes(config, torch.bfloat16) == per_token
    assert config.max_position_embeddings >= 131072
    wanted = 16 if name == "qwen3-0.6b" else 32
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (wanted, 8, 128)


@pytest.mark.parametrize("name", ["tiny", "llama-3.1-8b", "qwen3-0.6b"])
def test_built_models_answer_with_finite_logits(name, prompts):
    """The real shapes with fewer and thinner layers: what counts is how weights and rotary tables come about."""
    config = steps.shape_config(name)
    if name != "tiny":
        config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.vocab_size = 64, 96, 2, 64
        config.num_attention_heads = 8
        if hasattr(config, "layer_types"):
            config.layer_types = config.layer_types[:2]
    model = steps.build(config, torch.bfloat16, CPU)
    logits = model(prompts).logits.detach()
    assert bool(torch.isfinite(logits).all()) and float(logits.float().std()) > 0
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    table = model.model.rotary_emb.inv_freq
    assert table.dtype == torch.float32 and float(table[0]) == 1.0 and bool((table.diff() < 0).all())
    if name == "llama-3.1-8b":  # the slowest ones are slowed down 8 times more, by its rule for long contexts
        plain = 5e5 ** (-126 / 128)
        assert float(table[-1]) == pytest.approx(plain / 8, rel=1e-4)
    assert not model.training


def test_random_caches_stand_in_for_a_prefill(model, prompts):
    cache = steps.random_cache(model, 2, 39)
    real, _ = prefill(model, prompts)
    assert [layer.keys.shape for layer in cache.layers] == [layer.keys.shape for layer in real.layers]
    before = [layer.keys.clone() for layer in cache.layers]
    arms = [make_arm(name, None) for name in ("default", "static", "plain", VEGAS)]
    found = measure(model, prompts, arms, 6, 1, cache=cache)
    assert [m.same_tokens for m in found] == [1.0] * 4, "all arms continue from the same cache"
    for layer, keys in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
    assert measure(model, prompts, arms[:1], 6, 1, cache=real)[0].context == 40
    with pytest.raises(ValueError, match="must hold 29 tokens per row, but holds 39"):
        measure(model, prompts[:, :30], arms, 6, 1, cache=cache)


def test_static_runs_share_their_storage(model, prompts):
    cache, _ = prefill(model, prompts)
    starts = run._Starts(model, prompts, 10, cache)
    first = starts.static()
    place, content = first.layers[0].keys.data_ptr(), first.layers[0].keys.clone()
    first.layers[0].keys.add_(1)
    again = starts.static()
    assert again.layers[0].keys.data_ptr() == place and torch.equal(again.layers[0].keys, content)
    assert int(again.get_seq_length()) == 39


# steps


def steps_of(sizes, arms=("static", "plain", VEGAS), memory=ROOM, acceptance=(), notes=None):
    made = [make_arm(name, None) for name in arms]
    note = (lambda _: None) if notes is None else notes.append
    return [
        row
        for rows in steps.measure_shape(
            "tiny", CPU, torch.float32, sizes, made, 10.0, memory, 10, 2, acceptance, note=note
        )
        for row in rows
    ]


def test_steps_of_all_arms_and_the_modelled_figure_by_hand():
    table = steps.read_acceptance(RESULTS)
    rows = steps_of([(24, 1), (40, 3)], acceptance=table)
    assert [(r.name, r.context, r.batch) for r in rows] == [
        (name, *size) for size in ((24, 1), (40, 3)) for name in ("static", "plain", VEGAS)
    ]
    for static, plain, vegas in (rows[:3], rows[3:]):
        assert static.compiled is False and plain.compiled is None
        assert static.ms_per_token > 0 and plain.ms_per_token > 0
        assert static.modelled is None and plain.modelled is None and plain.draft_ms is None
        assert vegas.draft_ms > 0 and vegas.verify_ms > 0 and vegas.rest_ms >= 0 and 0 < vegas.drafts <= 6
        assert vegas.num_assistant_tokens == 6
        spent = 6 * vegas.draft_ms + vegas.verify_ms + vegas.rest_ms
        assert vegas.modelled == pytest.approx(vegas.tokens_per_step * static.ms_per_token / spent)
        for row in (static, plain, vegas):
            # llama, tiny: the table of 64 x 32 embeddings is not read whole
            layer = 2 * 32 * 64 + 2 * 32 * 32 + 3 * 32 * 48 + 2 * 32
            assert row.weights_ms == pytest.approx(4 * (2 * layer + 32 + 64 * 32) / 10e6)
            assert row.kv_ms == pytest.approx(row.batch * row.context * 2 * 2 * 2 * 16 * 4 / 10e6)
    assert rows[2].tokens_per_step == pytest.approx(5.588235294117647)
    assert rows[2].measured_at == {"file": RESULTS.name, "context": 7900, "batch": 1}
    assert rows[5].measured_at["batch"] == 4, "the nearer batch"


def test_without_acceptance_nothing_is_modelled():
    rows = steps_of([(24, 1)])
    assert all(row.modelled is None and row.tokens_per_step is None for row in rows)
    console = Console(record=True, width=200)
    console.print(report.step_table(rows))
    text = console.export_text()
    assert "modelled" not in text and "verify ms" in text and "weights ms" in text


def test_combinations_that_do_not_fit_are_left_out():
    notes: list[str] = []
    probe = steps.build(steps.shape_config("tiny"), torch.float32, torch.device("meta"))
    memory = steps.required_bytes(probe, 24, 1, 10)
    rows = steps_of([(24, 1), (400, 8)], arms=("static",), memory=memory, notes=notes)
    assert [(row.context, row.batch) for row in rows] == [(24, 1)]
    assert len(notes) == 1 and "400 tokens x 8" in notes[0]
    # weights, and 3.2 times what the tokens take
    large = steps.build(steps.shape_config("qwen3-8b"), torch.bfloat16, torch.device("meta"))
    needed = steps.required_bytes(large, 32768, 8, 64)
    assert 2 * 8_190_735_360 + 3 * 8 * 32768 * 147456 < needed < 150e9


def test_acceptance_is_matched_by_settings():
    table = [
        steps.Acceptance("f", name, float(value), context, batch)
        for value, (name, context, batch) in enumerate(
            [
                ("vegas", 8000, 1),
                ("vegas", 2000, 4),
                ("vegas:window", 8000, 1),
                ("vegas@num_assistant_tokens=4,min_context=0", 8000, 1),
                ("vegas@no_such_field=1", 8000, 1),
                ("default", 8000, 1),
                ("some/folder", 8000, 1),
            ]
        )
    ]

    def tau(name: str, context: int = 8000, batch: int = 1) -> float | None:
        found = steps.find_acceptance(table, name, context, batch)
        return None if found is None else found.tokens_per_step

    assert tau(VEGAS) == 0 and tau(VEGAS, 2500) == 1 and tau("vegas", 10**6, 32) == 0
    assert tau("vegas@num_assistant_tokens=4") == 3 and tau("vegas:window@min_context=0") == 2
    assert tau("vegas@num_assistant_tokens=5") is None and tau("vegas@kv_ratio=0.1") is None
    assert tau("plain") is None and tau("default") is None
    if hasattr(VegasConfig(), "compile"):
        assert tau("vegas@compile=graphs,min_context=0") == 0


@pytest.mark.parametrize(
    "text", ["[1]", "{", '{"measurements": [{"name": "x", "tokens_per_step": 2}]}', '{"measurements": 3}']
)
def test_files_without_acceptance_are_refused(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="hf-specdec bench --json"):
        steps.read_acceptance(path)
    path.write_text('{"measurements": [{"name": "static", "tokens_per_step": null}]}')
    with pytest.raises(ValueError, match=r"x\.json has tokens per step"):
        steps.read_acceptance(path)


# the command


def call(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["hf-specdec", "bench", *arguments])
    cli.app(list(sys.argv[1:]), standalone_mode=False)


def test_the_command_writes_what_it_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(kernels._COPIED, "cpu", 1 << 20)
    monkeypatch.setattr(cli.console, "width", 200)
    path = tmp_path / "out.json"
    call(
        monkeypatch, "--kernels", "--shapes", "tiny", "--context", "24,48", "--batch", "1,2", "--new-tokens", "8",
        "--repeats", "1", "--dtype", "float32", "--json", str(path), "--acceptance", str(RESULTS),
    )  # fmt: skip
    values = json.loads(path.read_text())
    kinds = [row["kind"] for row in values["measurements"]]
    assert kinds.count("bandwidth") == 1 and kinds.count("step") == 12 and kinds.count("note") >= 2
    kernel = next(row for row in values["measurements"] if row["kind"] == "kernel")
    assert kernel["task"] == "draft" and kernel["dtype"] == "float32" and kernel["heads"] == 4 and kernel["ms"] > 0
    step = [row for row in values["measurements"] if row["kind"] == "step"][2]
    assert step["name"] == VEGAS and step["modelled"] > 0 and step["measured_at"]["file"] == RESULTS.name
    fields = {key: value for key, value in step.items() if key != "kind"}
    assert steps.StepRow(**fields).to_json() == step, "the file gives the row back"
    assert "environment" in values and "--kernels" in values["command"]
    printed = capsys.readouterr().out
    assert "modelled" in printed and "left out: triton" in printed and "copy" in printed


def test_what_was_measured_before_an_error_is_kept(monkeypatch, tmp_path):
    monkeypatch.setitem(kernels._COPIED, "cpu", 1 << 20)
    monkeypatch.setattr(steps, "measure", lambda *arguments, **options: 1 / 0)
    path = tmp_path / "out.json"
    with pytest.raises(ZeroDivisionError):
        call(monkeypatch, "--kernels", "--shapes", "tiny", "--context", "24", "--batch", "1", "--json", str(path))
    assert {row["kind"] for row in json.loads(path.read_text())["measurements"]} == {"bandwidth", "kernel", "note"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernels", "--prompts", "x.jsonl", "--model", "y"], r"can't take --prompts, --model"),
        (["--kernels", "--limit", "3", "--ablate", "specbound", "--assistant", "z"], "--limit, --ablate, --assistant"),
        (["--shapes", "tiny"], r"--shapes can't be given without `--kernels`"),
        (["--acceptance", "x", "--memory", "3"], "--acceptance, --memory can't be given"),
        (["--kernels", "--shapes", "tiny,gpt-5"], r"llama-3\.1-8b, qwen3-8b, qwen3-0\.6b, tiny, got 'gpt-5'"),
        (["--kernels", "--device", "tpu"], "--device"),
        (["--kernels", "--device", "meta"], "cpu and cuda"),
        (["--kernels", "--dtype", "int8"], "bfloat16, float16, float32"),
        (["--kernels", "--shapes", "tiny", "--context", "1"], "--context` must be at least 2"),
        (["--kernels", "--shapes", "tiny", "--new-tokens", "1"], "--new-tokens` must be at least 2"),
        (["--kernels", "--shapes", "tiny", "--repeats", "0"], "--repeats` must be at least 1"),
        (["--kernels", "--shapes", "tiny", "--memory", "0"], "--memory` must be above 0"),
        (["--kernels", "--shapes", "tiny", "--strategies", "vegas@x=1"], "no field"),
        (["--kernels", "--shapes", "tiny", "--batch", "x"], "--batch"),
    ],
)
def test_bad_input_is_refused_before_any_work(monkeypatch, arguments, message):
    monkeypatch.setattr(kernels, "copy_bandwidth", lambda *arguments: pytest.fail("work before the check"))
    with pytest.raises(ValueError, match=message):
        call(monkeypatch, *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_is_asked_for_where_there_is_none(monkeypatch):
    with pytest.raises(ValueError, match="sees 0 CUDA devices"):
        call(monkeypatch, "--kernels", "--device", "cuda")


@pytest.mark.gpu
@pytest.mark.native
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_static_arm_compiles_on_cuda():
    made = [make_arm(name, None) for name in steps.default_arms(torch.device("cuda"))]
    rows = next(steps.measure_shape("tiny", torch.device("cuda"), torch.bfloat16, [(256, 2)], made, 1.0, ROOM, 32, 2))
    assert [row.name for row in rows] == [
        "static",
        "plain@compile=graphs+inductor",
        "vegas@compile=graphs+inductor,min_context=0",
    ]
    assert rows[0].compiled


@pytest.mark.gpu
@pytest.mark.native
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_kernels_are_near_the_reference_on_cuda():
    device = torch.device("cuda")
    rows = kernels.measure_kernels(tiny_cases(torch.bfloat16), device, kernels.copy_bandwidth(device), ROOM)
    assert {row.case.name for row in rows if row.implementation == "triton"} == {case.name for case in tiny_cases()}
    assert max(row.relative_error for row in rows) < 2e-2
