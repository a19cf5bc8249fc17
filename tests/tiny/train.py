"""
Trains the tiny Llama target, its draft and their tokenizer that the tests load, on text that ships with Python.

    python tests/tiny/train.py --work-dir build/tiny

The text is the language reference of `pydoc_data.topics` and the docstrings of the standard library. Slices of the
language reference are held out and written to `heldout.txt`. 45 % of the training sequences hold spans of random
tokens that come back later, which rewards copying from far behind. The default number of steps is too small for the
models to learn that: `README.md` has the figures.

The state of a run is kept in `--work-dir`; the same command picks up an interrupted run.
"""

from __future__ import annotations

import argparse
import ast
import json
import logging
import math
import random
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


logger = logging.getLogger("tiny")

HERE = Path(__file__).resolve().parent
EOS = "<|endoftext|>"
VOCAB_SIZE = 1024
MAX_LENGTH = 4096
SEED = 0

# Slices of about `HELDOUT_CHARS` characters of these topics are held out.
HELDOUT_TOPICS = ("specialnames", "compound", "types", "formatstrings", "string-methods", "typesseq")
HELDOUT_CHARS = 10_000

# Length of a sequence -> share of the steps. Every step sees `tokens_per_step` tokens, but at least one sequence.
LENGTHS = {512: 0.73, 1024: 0.17, 2048: 0.07, 4096: 0.03}
# What a sequence holds -> share of the sequences, see `Sampler.sequence`.
KINDS = {"text": 0.55, "needle": 0.3, "period": 0.15}
IGNORE = -100


def paragraphs(text: str) -> list[str]:
    """Splits `text` at its empty lines."""
    return [part for part in text.split("\n\n") if part.strip()]


def key(paragraph: str) -> str:
    """What two copies of a paragraph share that stand at different depths of indentation."""
    return " ".join(paragraph.split())


def docstrings() -> Iterator[str]:
    """Yields the docstrings of the standard library that have more than 200 characters."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}
    for path in sorted([*root.glob("*.py"), *root.glob("*/*.py")]):
        if skipped.intersection(path.relative_to(root).parts):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text is not None and len(text) > 200:
                    yield text


def load_texts() -> tuple[list[str], list[str], str]:
    """Returns the documents of the language reference, the docstrings, and the held-out text.

    No paragraph occurs twice in what is returned, so nothing that is held out is trained on.
    """
    heldout: list[str] = []
    for name in HELDOUT_TOPICS:
        size, parts = 0, paragraphs(topics[name])
        for part in parts[len(parts) // 3 :]:
            if size >= HELDOUT_CHARS:
                break
            heldout.append(part)
            size += len(part) + 2
    seen = {key(part) for part in heldout}

    def unseen(document: str) -> str:
        kept = []
        for part in paragraphs(document):
            if key(part) not in seen:
                seen.add(key(part))
                kept.append(part)
        return "\n\n".join(kept) + "\n"

    reference = [unseen(topics[name]) for name in sorted(topics, key=lambda name: (-len(topics[name]), name))]
    library = [unseen(text) for text in docstrings()]
    return [x for x in reference if len(x) > 200], [x for x in library if len(x) > 200], "\n\n".join(heldout) + "\n"


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer whose only special token, id 0, begins, ends and pads a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def build_model(layers: int) -> LlamaForCausalLM:
    """Returns an untrained Llama of `layers` layers."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.06,  # 0.02, the default, is for models many times as wide
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


class Sampler:
    """
    Draws training batches.

    Args:
        reference (`torch.Tensor`):
            Tokens of the language reference.
        library (`torch.Tensor`):
            Tokens of the docstrings.
    """

    def __init__(self, reference: torch.Tensor, library: torch.Tensor) -> None:
        self.sources = (reference, library)

    def text(self, rng: random.Random, length: int) -> torch.Tensor:
        """Draws `length` tokens that follow each other; both sources are drawn equally often."""
        source = self.sources[rng.random() < 0.5]
        start = rng.randrange(len(source) - length)
        return source[start : start + length].clone()

    def sequence(self, rng: random.Random, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Draws a sequence and its labels, which are `IGNORE` where a token cannot be known.

        - `text` is plain text.
        - `needle` is plain text with spans of random tokens, each of which stands in it twice, far apart.
        - `period` is one span of random tokens, over and over.
        """
        (kind,) = rng.choices(list(KINDS), list(KINDS.values()))
        noise = torch.Generator().manual_seed(rng.getrandbits(60))
        if kind == "period":
            span = rng.randint(16, length // 2)
            tokens = torch.randint(1, VOCAB_SIZE, (span,), generator=noise).repeat(length // span + 1)[:length]
            labels = tokens.clone()
            labels[: span + 1] = IGNORE
            return tokens, labels
        tokens = self.text(rng, length)
        labels = tokens.clone()
        if kind == "needle":
            places = length // 64
            free = list(range(places))
            rng.shuffle(free)
            for _ in range(max(2, places // 6)):
                first, second = sorted((free.pop(), free.pop()))
                span = rng.randint(16, 48)
                needle = torch.randint(1, VOCAB_SIZE, (span,), generator=noise)
                tokens[first * 64 : first * 64 + span] = needle
                tokens[second * 64 : second * 64 + span] = needle
                labels[first * 64 : first * 64 + span + 1] = IGNORE
                labels[second * 64 : second * 64 + span] = needle
                labels[second * 64] = IGNORE
                if second * 64 + span < length:
                    labels[second * 64 + span] = IGNORE
        return tokens, labels

    def batch(self, seed: int, tokens_per_step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws the batch of `seed`: token ids and labels, both `[batch, length]`."""
        rng = random.Random(seed)
        (length,) = rng.choices(list(LENGTHS), list(LENGTHS.values()))
        rows = [self.sequence(rng, length) for _ in range(max(1, tokens_per_step // length))]
        return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Cosine from `peak` to 2 % of it, after a short linear warm-up."""
    warmup = max(1, steps // 25)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def distillation_loss(logits: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """KL divergence from the target's to the draft's distribution, with a little of the usual loss."""
    known = labels != IGNORE
    logits, teacher, labels = logits[known].float(), teacher[known].float(), labels[known]
    divergence = F.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean")
    return 0.9 * divergence + 0.1 * F.cross_entropy(logits, labels)


def train(
    name: str,
    model: LlamaForCausalLM,
    sampler: Sampler,
    args: argparse.Namespace,
    steps: int,
    teacher: LlamaForCausalLM | None = None,
) -> None:
    """Trains `model` in place, from the checkpoint of `name` on if there is one."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    checkpoint, first = args.work_dir / f"{name}.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    model.train()
    started, mean = time.perf_counter(), None
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, args.learning_rate)
        inputs, labels = sampler.batch(SEED + step + (0 if teacher is None else 10**6), args.tokens_per_step)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=inputs, use_cache=False).logits[:, :-1]
            if teacher is not None:
                with torch.no_grad():
                    wanted = teacher(input_ids=inputs, use_cache=False).logits[:, :-1]
        labels = labels[:, 1:]
        if teacher is None:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE)
        else:
            loss = distillation_loss(logits, wanted, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            elapsed = time.perf_counter() - started
            logger.info("%s step %d/%d loss %.3f after %.0f s", name, step + 1, steps, mean, elapsed)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
    model.eval()


def save(model: LlamaForCausalLM, folder: Path) -> LlamaForCausalLM:
    """Writes `model` in bfloat16 to `folder` and returns what is read back from there, in float32."""
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def evaluate(target: LlamaForCausalLM, draft: LlamaForCausalLM, tokens: torch.Tensor) -> dict[str, float]:
    """Measures both models on the held-out `tokens` in windows of 512, and how well they copy from how far."""
    windows = tokens[: len(tokens) // 512 * 512].view(-1, 512)
    logits = {"target": [], "draft": []}
    for window in windows.split(8):
        logits["target"].append(target(input_ids=window, use_cache=False).logits[:, :-1])
        logits["draft"].append(draft(input_ids=window, use_cache=False).logits[:, :-1])
    labels = windows[:, 1:].flatten()
    figures: dict[str, float] = {"heldout positions": labels.numel()}
    tops = {}
    for name, parts in logits.items():
        flat = torch.cat(parts).flatten(0, 1)
        tops[name] = flat.argmax(-1)
        figures[f"{name} loss"] = F.cross_entropy(flat, labels).item()
        figures[f"{name} accuracy"] = (tops[name] == labels).float().mean().item()
    figures["agreement"] = (tops["target"] == tops["draft"]).float().mean().item()

    generator = torch.Generator().manual_seed(SEED)
    for distance in (256, 1024, 3000):
        hits = {"target": [], "draft": []}
        for _ in range(16):
            needle = torch.randint(1, VOCAB_SIZE, (32,), generator=generator)
            start = int(torch.randint(0, len(tokens) - distance, (1,), generator=generator))
            row = torch.cat([needle, tokens[start : start + distance - 32], needle])[None]
            for name, model in (("target", target), ("draft", draft)):
                top = model(input_ids=row, use_cache=False).logits[0, -33:-1].argmax(-1)
                # the first two tokens of the copy are only the cue
                hits[name].append((top == needle)[2:].float().mean().item())
        for name, values in hits.items():
            figures[f"{name} copies at distance {distance}"] = sum(values) / len(values)
    return figures


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Trains the tiny models of the tests.")
    parser.add_argument("--work-dir", type=Path, required=True, help="where checkpoints and the log are kept")
    parser.add_argument("--output-dir", type=Path, default=HERE, help="where the models are written")
    parser.add_argument("--target-steps", type=int, default=3000)
    parser.add_argument("--draft-steps", type=int, default=1600)
    parser.add_argument("--tokens-per-step", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Builds the tokenizer, trains both models, writes and measures them."""
    args = parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    handlers = [logging.StreamHandler(sys.stdout), logging.FileHandler(args.work_dir / "train.log")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers)
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)

    reference, library, heldout = load_texts()
    (args.output_dir / "heldout.txt").write_text(heldout, encoding="utf-8")
    tokenizer = build_tokenizer(reference + library)
    tokenizer.save_pretrained(args.output_dir)

    def encode(documents: list[str]) -> torch.Tensor:
        return torch.tensor([i for text in documents for i in [0, *tokenizer(text, verbose=False)["input_ids"]]])

    sampler = Sampler(encode(reference), encode(library))
    test = encode([heldout])
    for name, texts, tokens in (
        ("reference", reference, sampler.sources[0]),
        ("library", library, sampler.sources[1]),
        ("heldout", [heldout], test),
    ):
        logger.info("%s: %d characters, %d tokens", name, sum(map(len, texts)), len(tokens))

    target = build_model(8)
    logger.info("target: %d parameters", target.num_parameters())
    train("target", target, sampler, args, args.target_steps)
    target = save(target, args.output_dir / "target")

    draft = build_model(2)
    logger.info("draft: %d parameters", draft.num_parameters())
    draft.model.embed_tokens.load_state_dict(target.model.embed_tokens.state_dict())
    draft.model.norm.load_state_dict(target.model.norm.state_dict())
    for mine, theirs in zip(draft.model.layers, (target.model.layers[0], target.model.layers[-1]), strict=True):
        mine.load_state_dict(theirs.state_dict())
    train("draft", draft, sampler, args, args.draft_steps, teacher=target)
    draft = save(draft, args.output_dir / "draft")

    logger.info(json.dumps(evaluate(target, draft, test), indent=2))
    prompt = tokenizer("The for statement is used to", return_tensors="pt")
    logger.info(tokenizer.decode(target.generate(**prompt, max_new_tokens=96, do_sample=False)[0]))


if __name__ == "__main__":
    main()
