"""What the tests of training share."""

from __future__ import annotations

import hashlib

from families import build, perturbed


def weights_hash(model):
    state = hashlib.sha256()
    for name, value in model.state_dict().items():
        state.update(name.encode() + value.float().numpy().tobytes())
    return state.hexdigest()


class Letters:
    """A tokenizer of numbers: enough for prompts and rewards."""

    chat_template = None

    def __call__(self, text, **_):
        return {"input_ids": [int(part) for part in text.split()]}

    def decode(self, ids, **_):
        return " ".join(str(int(token)) for token in ids)


def training_pair():
    """Return a target of three layers that can end its text, and a noisy copy of it."""
    target = build("Llama", num_hidden_layers=3).float()
    target.generation_config.eos_token_id = 7
    return target, perturbed(target, noise=0.3)
