"""Loaded checkpoints against transformers' eager models: chunks, rows, generation, beams, and what the caches hold."""

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from tinytorch.core.losses import cross_entropy  # noqa: E402
from tinytorch.core.optimizers import AdamW  # noqa: E402
from tinytorch.generation.cache_compression import SlidingWindowKVCache  # noqa: E402
from tinytorch.generation.kv_cache import create_kv_cache, prefill, stored_heads  # noqa: E402
from tinytorch.generation.paged import PagedModelKVCache, Request, Scheduler, paged_kv_cache  # noqa: E402
from tinytorch.generation.speculative import beam_search  # noqa: E402
from tinytorch.models.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402

V, S, PAD = 53, 64, 0  # as in conftest.py
MEMBERS = {
    "plain": (create_kv_cache, {}),
    "growing": (create_kv_cache, {"grow": True}),
    "paged": (paged_kv_cache, {"block_size": 4}),
    "wide window": (SlidingWindowKVCache, {"window": S, "spare": 8}),
}
PROMPTS = [[3, 14, 15, 9, 2, 6, 5], [35, 8, 9], [7], [9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3]]


@pytest.fixture(scope="module", params=["gpt2", "llama", "llama 3", "qwen2"])
def pair(request, their_model, tmp_path_factory):
    """(ours, theirs): transformers saved it, load_checkpoint read it."""
    return saved_and_loaded(their_model(request.param), tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(params=MEMBERS)
def make_cache(request):
    """A function (model, batch_size) -> an empty cache for it."""
    factory, options = MEMBERS[request.param]
    return lambda model, batch_size: factory(batch_size, S, model.num_layers, *stored_heads(model), **options)


def saved_and_loaded(theirs, folder):
    theirs.save_pretrained(folder)
    return load_checkpoint(folder), theirs


def tokens(*shape, seed=0, vocab=V):
    return np.random.default_rng(seed).integers(0, vocab, shape)


def their_logits(theirs, ids, **options):
    with torch.no_grad():
        return theirs(torch.as_tensor(ids), **options).logits.numpy()


def their_cache(theirs, ids):
    """(key, value) of each layer after ids (B, T): arrays (B, H_kv, T, D)."""
    with torch.no_grad():
        cache = theirs(torch.tensor(ids), use_cache=True).past_key_values
    return [(layer.keys.numpy(), layer.values.numpy()) for layer in cache.layers]


def padded_left(rows):
    """ids, attention mask and positions of ragged rows, as transformers wants them: three tensors (B, T)."""
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def run_in_pieces(ours, ids, cache, sizes):
    """The logits (B, T, V) of ids, run in chunks of these sizes."""
    edges = np.cumsum([0, *sizes])
    return np.concatenate([ours(ids[:, a:b], cache=cache).numpy() for a, b in zip(edges, edges[1:])], axis=1)


def assert_close(got, expected, shape, atol=1e-4, message=""):
    assert got.shape == expected.shape == shape, message
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol, err_msg=message)


def assert_same_contents(cache, expected, rows=slice(None)):
    for layer, (key, value) in enumerate(expected):
        for name, mine, theirs in zip(("keys", "values"), cache.get(layer), (key, value)):
            mine = mine.numpy()[rows][:, :, : theirs.shape[2]]
            assert_close(mine, theirs, theirs.shape, atol=3e-5, message=f"{name} of layer {layer}")


def compositions(total):
    """All ways to cut a text of so many tokens into chunks, as lists of their sizes."""
    for cuts in itertools.product((False, True), repeat=total - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), total]
        yield [b - a for a, b in zip(edges, edges[1:])]


def test_every_chunking_of_a_short_text(pair, make_cache):
    ours, theirs = pair
    ids = tokens(2, 6)
    expected, contents = their_logits(theirs, ids), their_cache(theirs, ids)
    assert len(list(compositions(6))) == 32 and expected.std() > 0.3
    for sizes in compositions(6):
        cache = make_cache(ours, 2)
        assert_close(run_in_pieces(ours, ids, cache, sizes), expected, (2, 6, V), message=f"chunks of {sizes}")
        assert cache.seq_lens == [6, 6]
        assert_same_contents(cache, contents)


@pytest.mark.parametrize("sizes", [(1,) * S, (17, 1, 1, 30, 15), (S - 1, 1)])
def test_chunkings_of_a_text_that_fills_the_context(pair, make_cache, sizes):
    ours, theirs = pair
    ids, cache = tokens(2, S, seed=1), make_cache(ours, 2)
    assert_close(run_in_pieces(ours, ids, cache, sizes), their_logits(theirs, ids), (2, S, V))
    assert_same_contents(cache, their_cache(theirs, ids))


def test_rows_of_different_length_are_left_padded_rows(pair, make_cache):
    """Ours are padded on the right, theirs on the left; some chunks bring nothing to a row, one row has nothing yet."""
    ours, theirs = pair
    lengths, ids = [5, 12, 1, 0, 9], tokens(5, 12, seed=2)
    cache = make_cache(ours, 5)
    got = prefill(ours, ids, cache, chunk=4, n_new=lengths).numpy()
    left, mask, positions = padded_left([row[:length] for row, length in zip(ids, lengths) if length])
    expected = iter(their_logits(theirs, left, attention_mask=mask, position_ids=positions))
    for row, length in enumerate(lengths):
        if length:
            assert_close(got[row, :length], next(expected)[-length:], (length, V), message=f"row {row}")
    step, more = ours(np.full((5, 2), 7), cache=cache).numpy(), [[*row[:n], 7, 7] for row, n in zip(ids, lengths)]
    left, mask, positions = padded_left(more)
    assert_close(step, their_logits(theirs, left, attention_mask=mask, position_ids=positions)[:, -2:], (5, 2, V))
    for row, text in enumerate(more):
        assert_same_contents(cache, their_cache(theirs, [text]), slice(row, row + 1))


def test_the_cache_after_rollback_and_going_on(pair, make_cache):
    ours, theirs = pair
    ids, others, cache = tokens(3, 14, seed=3), tokens(3, 6, seed=4), make_cache(ours, 3)
    run_in_pieces(ours, ids, cache, (9, 1, 4))
    cache.rollback([6, 0, 2])
    texts = [ids[0, :8], ids[1], ids[2, :12]]
    for row, text in enumerate(texts):
        assert_same_contents(cache, their_cache(theirs, text[None]), slice(row, row + 1))
    got = run_in_pieces(ours, others, cache, (1, 4, 1))
    for row, text in enumerate(texts):
        text = np.concatenate([text, others[row]])[None]
        assert_close(got[[row]], their_logits(theirs, text)[:, -6:], (1, 6, V), message=f"row {row}")
        assert_same_contents(cache, their_cache(theirs, text), slice(row, row + 1))


def their_texts(theirs, prompts, count, stop=None):
    """Greedy texts by transformers' generate, from a batch that is padded on the left; each ends at its stop token."""
    ids, mask, _ = padded_left(prompts)
    with torch.no_grad():
        found = theirs.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, eos_token_id=stop,
                                pad_token_id=PAD)[:, ids.shape[1] :].tolist()  # fmt: skip
    return [prompt + new[: new.index(stop) + 1 if stop in new else count] for prompt, new in zip(prompts, found)]


@pytest.mark.parametrize("prompts", [PROMPTS[:1], [row[-3:] for row in PROMPTS if len(row) > 2], PROMPTS],
                         ids=["one", "even", "ragged"])  # fmt: skip
def test_greedy_texts(pair, make_cache, prompts):
    ours, theirs = pair
    expected = their_texts(theirs, prompts, 20)
    assert [len(text) for text in expected] == [len(prompt) + 20 for prompt in prompts]
    for cache in (None, make_cache(ours, len(prompts))):
        assert ours.generate(prompts, 20, cache=cache) == expected


def test_greedy_texts_that_stop(pair, make_cache):
    """At the first token of one row, in the middle of another, at the last of a third."""
    ours, theirs = pair
    endless = their_texts(theirs, PROMPTS, 20)
    for stop in (endless[0][-20], endless[1][-10], endless[3][-1]):
        expected = their_texts(theirs, PROMPTS, 20, stop)
        for cache in (None, make_cache(ours, len(PROMPTS))):
            assert ours.generate(PROMPTS, 20, cache=cache, stop_token=stop) == expected


def test_requests_of_one_batch(pair):
    """Continuous batching: requests share the passes, and each writes what transformers writes for it alone."""
    ours, theirs = pair
    pool = PagedModelKVCache(24, 4, ours.num_layers, *stored_heads(ours), max_seqs=3)
    scheduler = Scheduler(ours, pool, token_budget=6, max_running=3)
    requests = [Request(prompt, 8) for prompt in PROMPTS]
    for request in requests:
        scheduler.add(request)
    scheduler.run()
    for prompt, request in zip(PROMPTS, requests):
        assert request.tokens == their_texts(theirs, [prompt], 8)[0][len(prompt) :]


def their_beams(theirs, prompt, width, count, stop, **options):
    """(texts, scores) of all beams of transformers, best first, cut behind the stop token."""
    with torch.no_grad():
        found = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=count,
            num_beams=width, num_return_sequences=width, do_sample=False, eos_token_id=stop, pad_token_id=PAD,
            return_dict_in_generate=True, output_scores=True, **options,
        )  # fmt: skip
    texts = []
    for text in found.sequences.tolist():
        ends = [i for i in range(len(prompt), len(text)) if text[i] == stop]
        texts.append(text[: ends[0] + 1] if ends else text)
    return texts, found.sequences_scores.numpy()


@pytest.mark.parametrize("width, penalty, early",
                         [(2, 0.0, "never"), (5, 0.0, False), (4, 1.0, "never"), (3, 0.5, "never")])  # fmt: skip
def test_beams(pair, width, penalty, early):
    """early_stopping="never" is what our search does; False is a guess where the penalty is not 0."""
    ours, theirs = pair
    prompt, settings = PROMPTS[0], dict(length_penalty=penalty, early_stopping=early)
    endless, _ = their_beams(theirs, prompt, width, 10, None, **settings)
    ended = 0
    for stop in (None, endless[0][-10], endless[0][-4], endless[-1][-2]):
        texts, scores = their_beams(theirs, prompt, width, 10, stop, **settings)
        ended += sum(text[-1] == stop for text in texts)
        for factory, options in [(None, None), *MEMBERS.values()]:
            cache = factory and factory(width, S, ours.num_layers, *stored_heads(ours), **options)
            beams = beam_search(ours, prompt, width, 10, cache=cache, stop_token=stop, length_penalty=penalty)
            assert [beam.ids for beam in beams] == texts and len(texts) == width
            np.testing.assert_allclose([beam.score for beam in beams], scores, rtol=0, atol=1e-4)
    assert ended, "no beam met its stop token"


def test_trained_by_us_and_loaded_by_them(pair, tmp_path):
    """Two steps of our AdamW, and two of PyTorch's on their model."""
    ours, theirs = load_again(pair, tmp_path / "before")
    ids = 1 + tokens(4, 13, seed=5, vocab=V - 1)  # their embedding of PAD is not trained
    mine = AdamW(ours.parameters(), lr=0.01, weight_decay=0.1)
    other = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1)
    before = their_logits(theirs, ids)
    ours.train()
    for _ in range(2):
        mine.zero_grad(), other.zero_grad()
        cross_entropy(ours(ids[:, :-1]), ids[:, 1:]).backward()
        logits = theirs(torch.tensor(ids[:, :-1])).logits
        torch.nn.functional.cross_entropy(logits.reshape(-1, V), torch.tensor(ids[:, 1:]).reshape(-1)).backward()
        mine.step(), other.step()
    save_checkpoint(ours.eval(), tmp_path / "after")
    again = type(theirs).from_pretrained(tmp_path / "after", attn_implementation="eager").eval()
    got, expected = ours(ids).numpy(), their_logits(again, ids)
    assert np.abs(expected - before).max() > 0.1, "two steps that change nothing would prove nothing"
    assert_close(got, expected, (4, 13, V))
    assert_close(got, their_logits(theirs, ids), (4, 13, V), atol=2e-3)  # Adam makes large what rounding left of a 0
    assert_close(load_checkpoint(tmp_path / "after")(ids).numpy(), got, (4, 13, V), atol=0)


def load_again(pair, folder):
    """Both models anew, so that they can be changed."""
    pair[1].save_pretrained(folder)
    return load_checkpoint(folder), type(pair[1]).from_pretrained(folder, attn_implementation="eager").eval()


EDGES = [
    ("gpt2", dict(n_embd=5, n_head=1, n_layer=1, n_inner=3, n_positions=2)),
    ("gpt2", dict(n_embd=3, n_head=3, n_layer=2, vocab_size=1, n_positions=7)),
    ("gpt2", dict(n_embd=1, n_head=1, n_layer=1, vocab_size=2, n_positions=1, tie_word_embeddings=False)),
    ("llama", dict(hidden_size=4, intermediate_size=1, num_hidden_layers=1, num_attention_heads=1,
                   num_key_value_heads=1, max_position_embeddings=2)),
    ("llama", dict(hidden_size=7, intermediate_size=3, num_attention_heads=7, num_key_value_heads=1, head_dim=2,
                   vocab_size=1, max_position_embeddings=9)),
    ("llama 3", dict(hidden_size=9, intermediate_size=5, num_attention_heads=3, num_key_value_heads=3, head_dim=10,
                     max_position_embeddings=11, attention_bias=True)),
    ("qwen2", dict(hidden_size=11, num_attention_heads=5, num_key_value_heads=5, head_dim=6, num_hidden_layers=1)),
    ("qwen2", dict(hidden_size=2, num_attention_heads=1, num_key_value_heads=1, vocab_size=3, intermediate_size=2,
                   max_position_embeddings=1)),
]  # fmt: skip


@pytest.mark.parametrize("kind, changes", EDGES)
def test_shapes_at_the_edges(kind, changes, their_model, tmp_path):
    ours, theirs = saved_and_loaded(their_model(kind, **changes), tmp_path / "theirs")
    vocab, longest = ours.vocab_size, min(ours.max_seq_len, 9)
    save_checkpoint(ours, tmp_path / "ours")
    again = type(theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    for batch_size in (1, 5):
        ids = tokens(batch_size, longest, seed=6, vocab=vocab)
        expected, shape = their_logits(theirs, ids), (batch_size, longest, vocab)
        assert_close(ours(ids).numpy(), expected, shape)
        assert_close(their_logits(again, ids), expected, shape)
        for factory, options in MEMBERS.values():
            cache = factory(batch_size, longest, ours.num_layers, *stored_heads(ours), **options)
            assert_close(run_in_pieces(ours, ids, cache, (1,) * longest), expected, shape)
            assert_same_contents(cache, their_cache(theirs, ids))
            if vocab > 1 and longest > 1:
                prompts = ids[:, :1].tolist()
                assert ours.generate(prompts, longest - 1, cache=cache) == their_texts(theirs, prompts, longest - 1)
