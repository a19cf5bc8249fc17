"""Where early exits pay: a model whose later layers change little.

Random weights in the shape of a small decoder (24 layers, 1 024 wide, 16 384 words), with the later layers' output
scaled down to a hundredth, so that the LM head can read most next tokens after 4 layers. No training is needed then.
Prints a table of SpecBound against stock decoding, and layer calls per token. It shows what the method's bookkeeping
costs and saves on a machine; it says nothing about real models.

    python examples/converged_early.py
"""

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from hf_specdec.bench.report import table
from hf_specdec.bench.run import make_arm, measure
from hf_specdec.generation.stats import on_speculation


EXIT = 4


def build() -> LlamaForCausalLM:
    """Return the model, in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16384,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=1024,
    )
    model = LlamaForCausalLM(config).bfloat16().eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(12.0)  # so that the most likely word stands out
        for layer in model.model.layers[EXIT:]:
            layer.self_attn.o_proj.weight.mul_(0.01)
            layer.mlp.down_proj.weight.mul_(0.01)
    return model


def main() -> None:
    """Measure and print."""
    model, prompt = build(), torch.randint(3, 16384, (1, 64))
    names = ["default", "static", "plain", f"specbound@exit_layers=[{EXIT}],max_depth={EXIT},tau=0.3,alpha=0.0"]
    names += [f"stock_early_exit@layer={EXIT}"]
    stats = []
    with on_speculation(stats.append):
        found = measure(model, prompt, [make_arm(name, None) for name in names], 96, 3)
    console = Console(width=200)
    console.print(table(found))
    last = [run for run in stats if run.strategy == "specbound"][-1]
    tokens = sum(map(sum, last.accept_lengths))
    console.print(f"layer calls per token: {last.method['layer_calls'] / tokens:.1f} of 24; {last.method}")


if __name__ == "__main__":
    main()
