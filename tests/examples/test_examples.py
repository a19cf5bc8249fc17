"""The scripts of examples/ and examples/training, run on the tiny trained models; examples/distributed has its own."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import typer
from families import ROOT, TINY
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hf_specdec import SpeculationConfig, load_draft


EXAMPLES = ROOT / "examples"
TRAINING = EXAMPLES / "training"
TEMPLATE = (
    "{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
QUESTIONS = ["What does the with statement do? The with statement", "And what does the for statement do?"]

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not (EXAMPLES / "generate.py").is_file(), reason="without examples"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny target and its tokenizer, as a chat model."""
    path = tmp_path_factory.mktemp("chat_model")
    for file in (TINY / "target").iterdir():
        shutil.copy(file, path)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def load():
    """Return a function that imports a script, and the folder's shared module as scripts see it."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(TRAINING))

    def module(path):
        spec = importlib.util.spec_from_file_location(f"examples_{path.stem}", path)
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
        return found

    yield module
    patch.undo()
    sys.modules.pop("recipe", None)


@pytest.fixture(scope="module")
def run(load):
    """Return a function that runs a script with arguments, as its command line would, and returns what it printed."""

    def script(name, *arguments, text=None, code=0):
        app = typer.Typer()
        app.command()(load(EXAMPLES / f"{name}.py").main)
        found = CliRunner().invoke(app, [str(part) for part in arguments], input=text, catch_exceptions=False)
        assert found.exit_code == code, found.output
        return found.stdout if code == 0 else " ".join(found.stderr.replace("│", " ").split())

    return script


def stock(model, tokenizer, prompt, new_tokens):
    """Return stock's answer to one user message, and its ids."""
    chat = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True), ids


def test_generate_as_a_program_prints_stocks_text_and_statistics(folder, model, tokenizer):
    arguments = ["--model", folder, "--prompt", QUESTIONS[0], "--new-tokens", "20", "--dtype", "float32"]
    vegas = ["--strategy", "vegas", "--settings", '{"min_context": 0, "min_tokens": 8}']
    found = subprocess.run(
        [sys.executable, str(EXAMPLES / "generate.py"), *arguments, *vegas],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    text, _, rest = found.stdout.partition("\n\n")
    assert found.stdout.startswith(stock(model, tokenizer, QUESTIONS[0], 20)[0])
    stats = json.loads(found.stdout.strip().splitlines()[-1])
    assert stats["strategy"] == "vegas" and stats["num_draft_tokens"] > 0 and stats["target_forwards"] > 0


def test_generate_takes_an_assistant_sampling_and_no_strategy(run, folder, model, tokenizer, tmp_path):
    arguments = ["--model", folder, "--prompt", QUESTIONS[0], "--new-tokens", 20, "--dtype", "float32"]
    text = stock(model, tokenizer, QUESTIONS[0], 20)[0]
    for file in [*(TINY / "draft").iterdir(), *TINY.glob("tokenizer*")]:
        shutil.copy(file, tmp_path)
    out = run("generate", *arguments, "--strategy", "assisted", "--assistant", tmp_path)
    assert out.startswith(text) and json.loads(out.splitlines()[-1])["num_accepted_tokens"] > 0
    out = run("generate", *arguments, "--strategy", "off")
    assert out.startswith(text) and "no statistics" in out
    sampled = [run("generate", *arguments, "--temperature", 1.5, "--seed", seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.parametrize(
    ("strategy", "settings"), [("prompt_lookup", {}), ("vegas", {"min_context": 0, "min_tokens": 8}), ("off", {})]
)
def test_a_chats_second_turn_is_that_of_a_run_without_a_cache(load, model, tokenizer, strategy, settings):
    options = {"assistant_strategy": strategy, "max_new_tokens": 20, "do_sample": False}
    if settings:
        options["assistant_strategy_config"] = settings
    chat = load(EXAMPLES / "streaming_chat.py").Chat(model, tokenizer, options)
    cached = 0
    for turn, question in enumerate(QUESTIONS):
        widths = []
        hook = model.register_forward_pre_hook(
            lambda _, args, keywords, to=widths: to.append(keywords["input_ids"].shape[1]), with_kwargs=True
        )
        text, stats = chat.answer(question)
        hook.remove()
        prompt = chat.ids[:, : chat.prompt_length]
        expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
        assert torch.equal(chat.ids, expected)
        assert text == tokenizer.decode(expected[0, chat.prompt_length :])
        assert (stats is None) == (strategy == "off")
        assert len(chat.messages) == 2 * turn + 2
        assert chat.read_before == cached and (cached > 0) == (turn > 0)
        # the prompt is read by the first two forwards, whose second may take the last token: no more than is new
        new = chat.prompt_length - cached
        assert new in (widths[0], widths[0] + widths[1]) and chat.cache.get_seq_length() == chat.ids.shape[1] - 1
        cached = chat.cache.get_seq_length()
    whole = tokenizer.apply_chat_template(chat.messages[:3], add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(prompt[0]) == whole, "the ids are those of the conversation"


def test_a_chat_continues_after_an_answer_that_ended(load, model, tokenizer):
    """The token that ends an answer is written by the template, not twice."""
    options = {"assistant_strategy": "prompt_lookup", "max_new_tokens": 20, "do_sample": False}
    chat = load(EXAMPLES / "streaming_chat.py").Chat(model, tokenizer, options)
    end = model.generation_config.eos_token_id
    answer = stock(model, tokenizer, QUESTIONS[0], 20)[1].tolist()
    try:
        model.generation_config.eos_token_id = [end, answer[7]]
        chat.answer(QUESTIONS[0])
        assert len(chat.ids[0]) == chat.prompt_length + answer.index(answer[7]) < chat.prompt_length + 20
        assert chat.cache.get_seq_length() == len(chat.ids[0])
        chat.answer(QUESTIONS[1])
        prompt = chat.ids[:, : chat.prompt_length]
        expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
        assert torch.equal(expected[:, : chat.ids.shape[1]], chat.ids)
    finally:
        model.generation_config.eos_token_id = end
    whole = tokenizer.apply_chat_template(chat.messages[:3], add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(prompt[0]) == whole


def test_a_template_that_rewrites_earlier_turns_is_read_again(load, model, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ messages[-1].content }}\nassistant:"  # forgets all but the last message
    options = {"assistant_strategy": "plain", "max_new_tokens": 8, "do_sample": False}
    chat = load(EXAMPLES / "streaming_chat.py").Chat(model, tokenizer, options)
    chat.answer(QUESTIONS[0])
    chat.answer(QUESTIONS[1])
    assert chat.read_before == 0
    expected = tokenizer(f"{QUESTIONS[1]}\nassistant:", add_special_tokens=False)["input_ids"]
    assert chat.ids[0, : chat.prompt_length].tolist() == expected


def test_the_chat_program_streams_answers_and_ends(run, folder, model, tokenizer):
    lines = "\n".join([QUESTIONS[0], "", QUESTIONS[1], "/new", QUESTIONS[0], "/quit", "never read"])
    out = run("streaming_chat", "--model", folder, "--dtype", "float32", "--new-tokens", 20, text=lines)
    assert out.count(stock(model, tokenizer, QUESTIONS[0], 20)[0].strip()) >= 2, "before and after /new"
    reports = [line for line in out.splitlines() if "tokens per step" in line]
    assert len(reports) == 3 and "drafts accepted" in reports[0]
    assert [" 0 kept" in line for line in reports] == [True, False, True]
    short = run("streaming_chat", "--model", folder, "--new-tokens", 2, text=QUESTIONS[0])
    assert "tokens read" in short and "tokens per step" not in short  # there is no room for a draft


def test_a_model_without_a_template_is_no_chat_model(run, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    assert "no chat template" in run("streaming_chat", "--model", tmp_path / "base", text="", code=2)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Seven prompts of very different lengths."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    text = (TINY / "heldout.txt").read_text(encoding="utf-8")
    lines = [{"prompt": text[700 * i : 700 * i + 20 * (i * 3 % 7 + 1)]} for i in range(7)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_a_batch_job_answers_all_in_order_and_goes_on_where_it_stopped(
    run, load, folder, model, tokenizer, prompts, tmp_path
):
    out = tmp_path / "answers.jsonl"
    arguments = [prompts, out, "--model", folder, "--dtype", "float32", "--new-tokens", 16, "--batch-size", 3]
    printed = run("batch_job", *arguments)
    answers = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    asked = [json.loads(line)["prompt"] for line in prompts.read_text(encoding="utf-8").splitlines()]
    assert [answer["prompt"] for answer in answers] == asked
    for answer in answers:
        text, ids = stock(model, tokenizer, answer["prompt"], 16)
        assert (answer["answer"], answer["tokens"]) == (text, len(ids))
    assert "7 answers, 7 of them now" in printed and "tokens/s" in printed and "tokens per step" in printed
    assert f"{sum(answer['tokens'] for answer in answers)} tokens in" in printed
    assert list(tmp_path.iterdir()) == [out]

    assert "is there already" in run("batch_job", *arguments, code=2)
    whole = out.read_text(encoding="utf-8")
    out.unlink()
    settings = {"prompts": asked, "model": folder, "strategy": "prompt_lookup", "new_tokens": 16}
    part = tmp_path / "answers.jsonl.part"
    kept = whole.splitlines(keepends=True)
    # as a kill in the middle of a line leaves it
    part.write_text(json.dumps(settings) + "\n" + kept[5] + kept[2] + kept[3][:30], encoding="utf-8")
    before = part.read_text(encoding="utf-8")
    changed = run("batch_job", *arguments, "--strategy", "plain", code=2)
    assert "other prompts or settings" in changed
    assert part.read_text(encoding="utf-8") == before and not out.exists()
    assert "7 answers, 5 of them now" in run("batch_job", *arguments)
    assert out.read_text(encoding="utf-8") == whole


def test_a_pipeline_gives_stocks_text_and_reports_every_batch(run, folder, model, tokenizer):
    asked = [*QUESTIONS, "Explain the return statement."]
    options = [part for question in asked for part in ("--prompt", question)]
    out = run("pipeline_example", *options, "--model", folder, "--dtype", "float32", "--new-tokens", 16)
    for question in asked:
        assert f"> {question}\n{stock(model, tokenizer, question, 16)[0]}\n" in out
    reports = [line for line in out.splitlines() if "tokens per step" in line]
    assert [line[:6] for line in reports] == ["2 rows", "1 rows"]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks by the old name
def test_a_lora_is_part_of_the_target_and_goes_off_and_on(run, folder, model, tokenizer):
    out = run("peft_example", "--model", folder, "--prompt", QUESTIONS[0], "--new-tokens", 16)
    lines = out.splitlines()
    on, off, again = (next(line for line in lines if line.startswith(f"{name}: ")) for name in (
        "adapter on", "adapter off", "adapter on again"
    ))  # fmt: skip
    assert on.split(": ", 1)[1] == again.split(": ", 1)[1] != off.split(": ", 1)[1]
    ids = model.generate(**tokenizer(QUESTIONS[0], return_tensors="pt"), max_new_tokens=16, do_sample=False)
    assert off == f"adapter off: {tokenizer.decode(ids[0], skip_special_tokens=True)!r}"
    assert out.count("stock's text: yes") == 3 and out.count("accepted") == 3


SHORT = ["--dtype", "float32", "--minutes", 0, "--steps", 4, "--texts", 8, "--new-tokens", 24]
RECIPES = {
    "draft": ("draft", "assisted", []),
    "specbound": ("heads", "specbound", ["--prompts", 2]),
    "via_sd": ("slim", "via_sd", ["--search-steps", 5, "--search-texts", 2]),
    "spd": ("module", "spd", []),
    "diversed": ("head", "diversed", ["--updates", 1, "--items", 8, "--tests", 4, "--new-tokens", 12]),
}


@pytest.fixture(scope="module")
def trained(run, folder, tmp_path_factory):
    """Return a function that runs a recipe once; returns its folder and what it printed."""
    found = {}

    def recipe(name):
        if name not in found:
            out = tmp_path_factory.mktemp(name)
            found[name] = out, run(f"training/train_{name}", out, "--model", folder, *SHORT, *RECIPES[name][2])
        return found[name]

    return recipe


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_leaves_a_folder_that_is_a_strategy(trained, model, tokenizer, name):
    adapter, strategy, _ = RECIPES[name]
    out, printed = trained(name)
    assert f"$ hf-specdec train {name} " in printed
    result = json.loads(printed.splitlines()[-1])
    assert result["strategy"] == strategy and result["tokens_per_step"] > 0
    if strategy != "diversed":
        assert result["texts_like_stock"] == 1
    config = SpeculationConfig.from_pretrained(out / adapter)
    assert config.strategy == strategy and config.adapter == str(out / adapter)
    options = {"assistant_strategy": str(out / adapter), "return_dict_in_generate": True, "max_new_tokens": 16}
    if strategy == "via_sd":
        options["assistant_strategy_config"] = {"drafter": "prompt_lookup"}
    if strategy == "diversed":
        options["assistant_model"] = load_draft(model, str(out / "draft"))
    inputs = tokenizer(QUESTIONS[0], return_tensors="pt")
    found = model.generate(**inputs, do_sample=False, **options)
    assert found.speculation.num_draft_tokens > 0
    if strategy != "diversed":
        assert torch.equal(found.sequences, model.generate(**inputs, do_sample=False, max_new_tokens=16))


def test_prompts_for_training_and_trial_are_apart(trained):
    out, _ = trained("draft")
    both = [(out / name).read_text(encoding="utf-8").splitlines() for name in ("prompts.jsonl", "held_out.jsonl")]
    assert [len(lines) for lines in both] == [8, 4] and not set(both[0]) & set(both[1])


def test_a_dry_run_of_publishing_writes_what_would_be_uploaded(run, trained, model, tokenizer, tmp_path):
    source = trained("draft")[0] / "draft"
    out = run("publish_adapter", source, "somebody/draft", "--dry-run", tmp_path / "repo")
    names = {line.partition(":")[0] for line in out.splitlines()}
    assert {"specdec_config.json", "specdec_adapter.safetensors", "README.md"} <= names
    inputs = tokenizer(QUESTIONS[0], return_tensors="pt")
    shutil.move(source, tmp_path / "elsewhere")  # the copy stands on its own
    try:
        found, expected = (
            model.generate(**inputs, max_new_tokens=16, do_sample=False, assistant_strategy=str(strategy))
            for strategy in (tmp_path / "repo", "off")
        )
    finally:
        shutil.move(tmp_path / "elsewhere", source)
    assert torch.equal(found, expected)


def test_a_published_adapter_is_used_by_its_repositorys_name(trained, folder, tmp_path):
    from hub_server import WRITE, Hub

    hub = Hub()
    arguments = [str(trained("draft")[0] / "draft"), "somebody/draft", "--model", folder, "--private"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITE, "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1,localhost"}
    found = subprocess.run(
        [sys.executable, str(EXAMPLES / "publish_adapter.py"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    repo = hub.repos["somebody/draft"]
    assert repo.private
    assert {"specdec_config.json", "specdec_adapter.safetensors", "README.md"} <= set(repo.files())
    assert "assisted: " in found.stdout and "% of drafts accepted" in found.stdout


def test_every_script_is_in_the_table():
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    paths = [path for path in EXAMPLES.rglob("*") if path.suffix in (".py", ".ipynb") and path.stem != "recipe"]
    missing = [path.relative_to(EXAMPLES).as_posix() for path in paths if path.name not in table]
    assert not missing
