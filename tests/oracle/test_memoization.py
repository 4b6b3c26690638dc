"""The KV cache against transformers' GPT-2 with its own cache, and PyTorch's attention."""

import numpy as np
import pytest

from tinytorch.generation.kv_cache import (
    KVCache,
    LayerKVCache,
    disable_kv_cache,
    enable_kv_cache,
    multi_head_attention_with_cache,
    prefill,
)

torch = pytest.importorskip("torch")
V, E, L, H, S = 31, 24, 3, 4, 32  # as in conftest.py


def their_run(theirs, pieces):
    """Logits of each piece and the final cache of transformers, fed piece by piece."""
    cache, logits = None, []
    with torch.no_grad():
        for piece in pieces:
            output = theirs(torch.tensor(piece), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits.numpy())
    return logits, cache


def their_keys_and_values(cache, layer):
    """(B, H, S, D) of one layer, whatever this version of transformers calls it."""
    if hasattr(cache, "layers"):
        return cache.layers[layer].keys.numpy(), cache.layers[layer].values.numpy()
    return cache[layer][0].numpy(), cache[layer][1].numpy()


@pytest.mark.parametrize("sizes", [(5, 1, 1, 1), (1,) * 8, (3, 4, 1), (8,)])
def test_logits_and_the_cache_itself_equal_transformers(peers, sizes):
    ours, theirs = peers
    ids = np.random.default_rng(0).integers(0, V, (2, 8))
    edges = np.cumsum([0, *sizes])
    pieces = [ids[:, a:b] for a, b in zip(edges, edges[1:])]
    expected, their_cache = their_run(theirs, pieces)
    cache = KVCache(2, S, L, H, E // H)
    for piece, logits in zip(pieces, expected):
        got = ours(piece, cache=cache).data
        assert got.shape == logits.shape == (2, piece.shape[1], V)
        np.testing.assert_allclose(got, logits, atol=1e-4)
    for layer in range(L):
        for mine, peer in zip(cache.get(layer), their_keys_and_values(their_cache, layer)):
            assert mine.shape == peer.shape == (2, H, 8, E // H)
            np.testing.assert_allclose(mine.data, peer, atol=3e-5, err_msg=f"layer {layer}")


def test_greedy_generation_equals_transformers(peers):
    ours, theirs = peers
    prompt = [3, 14, 15, 9, 2]
    with torch.no_grad():
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0].tolist()
    assert len(expected) == 17
    cache = enable_kv_cache(ours)
    try:
        assert ours.generate(prompt, 12) == expected
    finally:
        disable_kv_cache(ours)
    assert cache.seq_pos == 16


def test_ragged_rows_equal_transformers_row_by_row(peers):
    ours, theirs = peers
    rng, lengths = np.random.default_rng(1), [5, 12, 3]
    ids = rng.integers(0, V, (3, 12))
    cache = KVCache(3, S, L, H, E // H)
    logits = prefill(ours, ids, cache, chunk=5, n_new=lengths).data
    step = ours(np.array([[7], [8], [9]]), cache=cache).data
    for row, length in enumerate(lengths):
        (first, second), _ = their_run(theirs, [ids[row : row + 1, :length], np.array([[7 + row]])])
        np.testing.assert_allclose(logits[row, :length], first[0], atol=1e-4)
        np.testing.assert_allclose(step[row], second[0], atol=1e-4)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("seq_len", [1, 3])
def test_stateless_attention_equals_pytorch(kv_heads, seq_len):
    rng, length, dim = np.random.default_rng(2), 7, 8
    x = rng.standard_normal((2, seq_len, 32), dtype=np.float32)
    w_q, w_o = rng.standard_normal((2, 32, 32), dtype=np.float32) / 6
    key, value = rng.standard_normal((2, 2, kv_heads, length, dim), dtype=np.float32)
    cache = LayerKVCache(2, 10, kv_heads, dim)
    cache.update(key, value)
    got = multi_head_attention_with_cache(x, cache, w_q, None, None, w_o)
    query = torch.tensor(x @ w_q).reshape(2, seq_len, 4, dim).transpose(1, 2)
    repeated = (torch.tensor(array).repeat_interleave(4 // kv_heads, dim=1) for array in (key, value))
    visible = torch.ones(seq_len, length, dtype=torch.bool).tril(length - seq_len)
    mixed = torch.nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=visible)
    expected = mixed.transpose(1, 2).reshape(2, seq_len, 32).numpy() @ w_o
    assert got.shape == expected.shape == (2, seq_len, 32)
    np.testing.assert_allclose(got, expected, atol=3e-5)
