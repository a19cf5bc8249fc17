"""What every process of `ranks.run_ranks` needs; the fork server imports it once."""

import families  # noqa: F401
import torch
import torch.distributed  # noqa: F401

import hf_specdec.generation.loop
import hf_specdec.generation.methods.spd.method  # noqa: F401


torch.set_num_threads(1)
