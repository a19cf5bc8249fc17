"""The Triton kernels on a device: long rows, large storage and a captured graph."""

from __future__ import annotations

import pytest
import torch
from triton_cases import CUDA, DEVICE, assert_no_worse, check, exact, inputs, plain, vector

from hf_specdec.kernels import triton_attention as attention
from hf_specdec.kernels import triton_select as select


pytestmark = pytest.mark.native


# natively only


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("m", [1, 6, 17, 300])
def test_long_rows(dtype, d, m):
    """With the number of parts that the device is given."""
    check([3000, 9, 4777], m, dtype, groups=4, key_heads=2, d=d)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("inside", [False, True])
def test_storage_of_more_than_2_to_the_31_elements(inside):
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free device memory")
    length = 70_000
    shape = (2, length, 128, 128) if inside else (2, 128, length, 128)
    storage = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
    storage = storage.transpose(1, 2) if inside else storage
    storage[:, -1] = torch.randn(2, length, 128, device=DEVICE)
    query = torch.randn(2, 128, 1, 128, dtype=torch.bfloat16, device=DEVICE)
    storage[:, :-1, -64:] = 0
    starts = vector([length - 1] * 2)
    output, _ = attention.attend_cache(query, storage, storage, starts, longest=length, scaling=0.1, window=64)
    last = query[:, -1:], storage[:, -1:, -64:], storage[:, -1:, -64:]
    wanted = exact(*last, [63, 63], scaling=0.1)
    assert_no_worse(output[:, -1:], plain(*last, [63, 63], scaling=0.1)[0], wanted, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_a_captured_graph_serves_other_lengths():
    query, key, value = (tensor.nan_to_num() for tensor in inputs([2040, 2040], 4, torch.bfloat16, d=64))
    starts, last = vector([7, 30]), vector([3, 1])
    targets = [key.new_zeros(2, 2, 5, 64) for _ in range(2)]
    table = select.addresses([key, value], targets)
    rules = {"scaling": 0.125}

    def step():
        output, scores = attention.attend_cache(query, key, value, starts, longest=2044, last=last, **rules)
        tokens = select.token_scores(scores, starts, last, length=2044, **rules)
        index = tokens.topk(5).indices[None]
        select.gather_layers([key, value], targets, index, heads=2, table=table)
        return output, tokens, index

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for now in ([7, 30], [2040, 0], [600, 1999]):
        starts.copy_(vector(now))
        graph.replay()
        gathered = [target.clone() for target in targets]
        output, tokens, index = (tensor.clone() for tensor in captured)
        again = step()
        for found, wanted in zip((output, tokens, index, *gathered), (*again, *targets), strict=True):
            assert torch.equal(found, wanted)
        wanted = exact(query, key, value, now, **rules)
        assert_no_worse(output, plain(query, key, value, now, **rules)[0], wanted, torch.bfloat16)
