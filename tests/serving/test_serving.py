"""`hf-specdec serve`: the real command in a process of its own, a real OpenAI client, and what is counted."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from families import TINY
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.import_utils import is_serve_available

import hf_specdec
from hf_specdec import SpeculationStats, _compat
from hf_specdec.commands.main import main
from hf_specdec.serving import SpeculationMetrics, serve


needs_extras = pytest.mark.skipif(
    not is_serve_available(), reason="the serving extras are missing: pip install 'hf-specdec[serve]'"
)
SETTINGS = {"min_context": 0, "min_tokens": 16, "kv_ratio": 0.2}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
TOKENS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose generation config names Vegas, with settings that make it speculate on short prompts."""
    path = tmp_path_factory.mktemp("served") / "model"
    shutil.copytree(TINY / "target", path)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.generation_config.assistant_strategy = "vegas"
    model.generation_config.assistant_strategy_config = SETTINGS
    hf_specdec.save_strategy(model, path)
    return path


@pytest.fixture(scope="module")
def messages():
    return [{"role": "user", "content": (TINY / "heldout.txt").read_text(encoding="utf-8")[5000:5600]}]


@pytest.fixture(scope="module")
def expected(folder, messages):
    """What stock decoding answers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, assistant_strategy="off")
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@dataclass
class Server:
    """A running `hf-specdec serve`."""

    url: str
    name: str
    log: Path

    def client(self):
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def ask(self, messages, **kwargs):
        kwargs = {"max_tokens": TOKENS, **kwargs}
        return self.client().chat.completions.create(model=self.name, messages=messages, **kwargs)

    def metrics(self):
        """Return the figures by name and strategy, and what kind each name is."""
        with urllib.request.urlopen(f"{self.url}/metrics") as response:
            assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
            return parse(response.read().decode())


def parse(text):
    """Read Prometheus' text format, which must be well-formed: each sample under the head of its name."""
    kinds, values = {}, {}
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            name, kind = line.removeprefix("# TYPE ").split()
            assert name not in kinds
            kinds[name] = kind
        elif not line.startswith("# HELP "):
            found = re.fullmatch(r'(\w+)\{strategy="(\w+)"\} (\S+)', line)
            assert found[1] == list(kinds)[-1]
            values[found[1].removeprefix("hf_specdec_"), found[2]] = float(found[3])
    return values, kinds


def run(log, *arguments):
    """Start the command on a free port and return the process and its address once it answers."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    url = f"http://localhost:{port}"
    command = [sys.executable, "-c", "from hf_specdec.commands.main import main; main()", "serve", *arguments]
    options = ["--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *options],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
    while process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health"):
                return process, url
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"the server ended: {log.read_text()}")


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "server.log"
    process, url = run(log, str(folder))
    yield Server(url, str(folder), log)
    process.terminate()
    process.wait(timeout=30)


# a server


@pytest.mark.full
@needs_extras
def test_answers_are_stocks_whole_and_streamed(server, messages, expected):
    before, _ = server.metrics()
    whole = server.ask(messages)
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == TOKENS
    parts = [chunk.choices[0].delta.content for chunk in server.ask(messages, stream=True)]
    assert "".join(part or "" for part in parts) == expected
    assert sum(map(bool, parts)) > 5, "the text comes in parts"
    after, kinds = server.metrics()

    def grown(name):
        return after[name, "vegas"] - before.get((name, "vegas"), 0)

    assert grown("calls_total") == 2
    assert grown("emitted_tokens_total") == 2 * (TOKENS - 1), "the first token of an answer is the prefill's"
    assert 0 < grown("accepted_tokens_total") <= grown("draft_tokens_total")
    assert grown("target_forwards_total") == grown("steps_total") < 2 * (TOKENS - 1)
    assert grown("draft_forwards_total") > 0
    assert 0.5 < after["acceptance_rate", "vegas"] <= 1
    assert after["mean_tokens_per_step", "vegas"] > 1
    assert kinds["hf_specdec_calls_total"] == "counter"
    assert kinds["hf_specdec_acceptance_rate"] == "gauge"


@pytest.mark.full
@needs_extras
def test_stop_and_sampling_reach_generate(server, messages, expected):
    stop = expected.split()[3]
    found = server.ask(messages, stop=[stop])
    assert found.choices[0].finish_reason == "stop"
    assert found.choices[0].message.content == expected[: expected.index(stop) + len(stop)]
    sampled = [
        server.ask(messages, seed=5, extra_body={"generation_config": json.dumps({"do_sample": True})})
        for _ in range(2)
    ]
    texts = {answer.choices[0].message.content for answer in sampled}
    assert len(texts) == 1
    assert expected not in texts


@pytest.mark.full
@needs_extras
def test_what_the_strategy_refuses_is_an_error_with_our_message(server, messages):
    import openai

    settings = {"assistant_strategy": "vegas", "assistant_strategy_config": {"kv_ratio": 7.0}}
    body = {"generation_config": json.dumps(settings)}
    with pytest.raises(openai.BadRequestError, match="kv_ratio.*7.0") as caught:
        server.ask(messages, extra_body=body)
    assert caught.value.body["type"] == "invalid_request_error"
    with pytest.raises(openai.APIError) as caught:  # after the stream has begun, so no status says it
        list(server.ask(messages, extra_body=body, stream=True))
    assert re.search("kv_ratio.*7.0", str(caught.value.body))
    settings = {"assistant_strategy": "vegas", "num_beams": 2}
    with pytest.raises(openai.BadRequestError, match="assistant_strategy='vegas'.*num_beams=2"):
        server.ask(messages, extra_body={"generation_config": json.dumps(settings)})
    assert "kv_ratio" in server.log.read_text()
    assert server.ask(messages).choices[0].message.content, "it goes on answering"


@pytest.mark.full
@needs_extras
def test_a_model_that_is_loaded_again_has_its_strategy(server, messages, expected):
    before, _ = server.metrics()
    urllib.request.urlopen(urllib.request.Request(f"{server.url}/reset", method="POST")).close()
    assert server.ask(messages).choices[0].message.content == expected
    after, _ = server.metrics()
    assert after["draft_tokens_total", "vegas"] > before["draft_tokens_total", "vegas"]


@pytest.mark.full
@needs_extras
def test_a_strategy_and_an_assistant_of_the_command(folder, messages, expected, tmp_path):
    """They replace what the folder names; the folder stays as it is."""
    config = (folder / "generation_config.json").read_text()
    options = ["--strategy", "assisted", "--strategy-config", '{"num_assistant_tokens": 3}']
    process, url = run(tmp_path / "log", str(folder), *options, "--assistant", str(TINY / "draft"))
    try:
        server = Server(url, str(folder), tmp_path / "log")
        texts: list[str] = []
        threads = [
            threading.Thread(target=lambda: texts.append(server.ask(messages).choices[0].message.content))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert texts == [expected] * 3
        values, _ = server.metrics()
        assert values["calls_total", "assisted"] == 3
        assert values["draft_tokens_total", "assisted"] <= 3 * values["steps_total", "assisted"]
        assert {strategy for _, strategy in values} == {"assisted"}
    finally:
        process.terminate()
        process.wait(timeout=30)
    assert (folder / "generation_config.json").read_text() == config


# before a server runs


@needs_extras
@pytest.mark.parametrize(
    "options, message",
    [
        ({"strategy": "vegsa"}, "vegsa.*vegas"),
        ({"strategy": "vegas", "strategy_config": {"kv_ratio": 7.0}}, "kv_ratio.*7.0"),
        ({"strategy_config": {"kv_ratio": 0.5}}, "without `strategy`"),
        ({"no_such_option": 1}, "no option no_such_option.*port"),
        ({"continuous_batching": True}, "continuous_batching"),
        ({"compile": True}, "compile"),
    ],
)
def test_wrong_options_are_refused_before_a_model_is_loaded(options, message):
    with pytest.raises(ValueError, match=message):
        serve("no/such-model", **options)


@needs_extras
@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "names no `assistant_strategy`.*--strategy"),
        ({"strategy": "assisted"}, "assistant_model"),
        ({"strategy": "spd"}, "adapter"),
    ],
)
def test_what_cannot_decode_is_refused_before_the_server_runs(options, message, folder, tmp_path, monkeypatch):
    from transformers.cli.serving import server

    shutil.copytree(folder, tmp_path / "model")
    shutil.copy(TINY / "target" / "generation_config.json", tmp_path / "model")
    build = server.build_server
    with pytest.raises(ValueError, match=message):
        serve(str(tmp_path / "model"), device="cpu", dtype="float32", **options)
    assert server.build_server is build


def test_missing_extras_are_named(monkeypatch, capsys):
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    with pytest.raises(ImportError, match=r"pip install 'hf-specdec\[serve\]'"):
        _compat.serve_command()
    with pytest.raises(ImportError, match=r"pip install 'hf-specdec\[serve\]'"):
        serve("no/such-model")
    monkeypatch.setattr(sys, "argv", ["hf-specdec", "serve", "no/such-model"])
    with pytest.raises(SystemExit):
        main()
    assert "pip install 'hf-specdec[serve]'" in " ".join(capsys.readouterr().err.split())


# figures


def stats(strategy="vegas", drafted=4, accepted=3, lengths=((4,),)):
    return SpeculationStats(
        strategy=strategy,
        num_draft_tokens=drafted,
        num_accepted_tokens=accepted,
        accept_lengths=[list(row) for row in lengths],
        target_forwards=max(map(len, lengths)),
        draft_forwards=drafted,
    )


def test_totals_grow_and_rates_are_of_the_last_answers():
    metrics = SpeculationMetrics(window=2)
    assert parse(metrics.render())[0] == {}
    metrics.record(stats(drafted=4, accepted=0, lengths=[[1], [1, 1]]))
    metrics.record(stats(drafted=4, accepted=4, lengths=[[5]]))
    metrics.record(stats(drafted=12, accepted=8, lengths=[[5, 5]]))
    metrics.record(stats(strategy="plain", drafted=0, accepted=0, lengths=[[1, 1, 1]]))
    values, _ = parse(metrics.render())
    assert values["calls_total", "vegas"] == 3
    assert values["draft_tokens_total", "vegas"] == 20
    assert values["accepted_tokens_total", "vegas"] == 12
    assert values["emitted_tokens_total", "vegas"] == 18
    assert values["steps_total", "vegas"] == 6
    assert values["target_forwards_total", "vegas"] == 5
    assert values["acceptance_rate", "vegas"] == pytest.approx(12 / 16)
    assert values["mean_tokens_per_step", "vegas"] == pytest.approx(15 / 3)
    assert values["mean_tokens_per_step", "plain"] == 1
    assert ("acceptance_rate", "plain") not in values, "nothing was drafted"
    with pytest.raises(ValueError, match="window.*0"):
        SpeculationMetrics(window=0)


def test_threads_lose_no_count():
    metrics = SpeculationMetrics()
    workers = [
        threading.Thread(target=lambda: [(metrics.record(stats()), metrics.render()) for _ in range(200)])
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert parse(metrics.render())[0]["draft_tokens_total", "vegas"] == 4 * 200 * 4
