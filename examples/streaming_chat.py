"""A chat in the terminal: answers are streamed, and the cache is kept, so that a turn reads only what is new.

    python examples/streaming_chat.py
    python examples/streaming_chat.py --strategy examples/adapters/specbound

`/new` begins another conversation, `/quit` (or the end of the input) ends the program.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, TextStreamer

import hf_specdec  # noqa: F401  adds assistant_strategy= to generate()


class Chat:
    """A conversation and the cache of what the model has read of it.

    Args:
        model (`PreTrainedModel`): the chat model.
        tokenizer (`PreTrainedTokenizerBase`): with a chat template.
        options (`dict`): keywords of `generate()`, the strategy among them.

    Attributes:
        ids (`torch.Tensor` of shape `[1, n]`): prompt and answer of the last turn, without the token that ended it.
        prompt_length (`int`): tokens of that prompt, all earlier turns included.
        read_before (`int`): tokens of it that the cache held already.
    """

    def __init__(self, model: Any, tokenizer: Any, options: dict[str, Any]) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.reset()

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages: list[dict[str, str]] = []
        self.ids = torch.empty(1, 0, dtype=torch.long)
        self.prompt_length = self.read_before = 0
        self.cache: Any = DynamicCache(config=self.model.config)

    def answer(self, message: str, streamer: Any = None) -> tuple[str, Any]:
        """Return the answer to a message, and the statistics (`None` without a strategy)."""
        ids = self._prompt(message).to(self.model.device)
        self.prompt_length, self.read_before = ids.shape[1], self.cache.get_seq_length()
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=self.cache,  # updated in place
            streamer=streamer,
            return_dict_in_generate=True,
            **self.options,
        )
        eos = self.model.generation_config.eos_token_id
        ended = int(out.sequences[0, -1]) in (eos if isinstance(eos, list) else [eos])
        self.ids = out.sequences[:, :-1] if ended else out.sequences
        text = self.tokenizer.decode(self.ids[0, self.prompt_length :], skip_special_tokens=True)
        self.messages += [{"role": "user", "content": message}, {"role": "assistant", "content": text}]
        return text, getattr(out, "speculation", None)

    def _prompt(self, message: str) -> torch.Tensor:
        """Return the ids of the conversation with a new message, continuing those that the cache stands for.

        Tokenizing the whole text again could split an answer in other places than the model did, so only what the
        template writes behind the last answer is tokenized.
        """
        whole = self._render([*self.messages, {"role": "user", "content": message}])
        if self.messages:
            before = self._render(self.messages[:-1]) + self.messages[-1]["content"]
            if whole.startswith(before):
                return torch.cat([self.ids, self._encode(whole[len(before) :]).to(self.ids.device)], dim=1)
            # this template rewrites earlier turns (some leave thoughts out): the model has to read them again
            self.cache = DynamicCache(config=self.model.config)
        return self._encode(whole)

    def _render(self, messages: list[dict[str, str]]) -> str:
        return str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    def _encode(self, text: str) -> torch.Tensor:
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]


def report(chat: Chat, stats: Any) -> str:
    """Return the line below an answer."""
    line = f"{chat.prompt_length - chat.read_before} tokens read, {chat.read_before} kept"
    if stats is not None:
        line += f"; {stats.mean_tokens_per_step:.2f} tokens per step, {stats.acceptance_rate:.0%} of drafts accepted"
    return f"[{line}]"


def main(
    model: Annotated[str, typer.Option(help="Folder or Hub name.")] = "HuggingFaceTB/SmolLM2-135M-Instruct",
    strategy: Annotated[str, typer.Option(help="Name, folder or Hub name of the strategy; off for none.")] = (
        "prompt_lookup"
    ),
    settings: Annotated[str, typer.Option(help="Fields of its config to change, as JSON.")] = "{}",
    new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 256,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Chat with a model."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.chat_template is None:
        raise typer.BadParameter(f"{model!r} has no chat template; take a model that was trained for chats.")
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, device_map=device)
    options: dict[str, Any] = {"assistant_strategy": strategy, "max_new_tokens": new_tokens, "do_sample": False}
    if changes := json.loads(settings):
        options["assistant_strategy_config"] = changes
    chat = Chat(loaded, tokenizer, options)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    while True:
        try:
            message = input("> ").strip()
        except EOFError:
            break
        if message == "/quit":
            break
        if message == "/new":
            chat.reset()
        elif message:
            typer.echo(report(chat, chat.answer(message, streamer)[1]))


if __name__ == "__main__":
    typer.run(main)
