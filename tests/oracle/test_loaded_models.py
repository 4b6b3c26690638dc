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
from tinytorch.generation.kv_cache import create_kv_cache, enable_kv_cache, prefill, stored_heads  # noqa: E402
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


@pytest.fixture(scope="module", params=["gpt2", "llama", "llama 3", "mistral", "qwen2"])
def pair(request, their_model, tmp_path_factory):
    """(ours, theirs): transformers saved it, load_checkpoint read it."""
    return saved_and_loaded(their_model(request.param), tmp_path_factory.mktemp("checkpoint"))


def caches(model, batch_size):
    """(name, an empty cache for the model) for every member."""
    for name, (factory, options) in MEMBERS.items():
        yield name, factory(batch_size, S, model.num_layers, *stored_heads(model), **options)


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
        cache = theirs(torch.tensor(ids), past_key_values=transformers.DynamicCache()).past_key_values  # keeps all
    return [(layer.keys.numpy(), layer.values.numpy()) for layer in cache.layers]


def padded_left(rows):
    """ids, attention mask and positions of ragged rows, as transformers wants them: three tensors (B, T)."""
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def their_rows(theirs, rows):
    """Logits (T, V) of each ragged row, all of them run at once, padded on the left."""
    ids, mask, positions = padded_left(rows)
    found = their_logits(theirs, ids, attention_mask=mask, position_ids=positions)
    return [logits[-len(row) :] for row, logits in zip(rows, found)]


def run_in_pieces(ours, ids, cache, sizes):
    """The logits (B, T, V) of ids, run in chunks of these sizes."""
    edges = np.cumsum([0, *sizes])
    return np.concatenate([ours(ids[:, a:b], cache=cache).numpy() for a, b in zip(edges, edges[1:])], axis=1)


def assert_close(got, expected, shape, atol=1e-4, message=""):
    assert got.shape == expected.shape == shape, message
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol, err_msg=message)


def assert_same_contents(cache, expected, row=None, message=""):
    """expected: as from their_cache, of all rows or of one."""
    rows = slice(None) if row is None else slice(row, row + 1)
    for layer, (key, value) in enumerate(expected):
        for name, mine, theirs in zip(("keys", "values"), cache.get(layer), (key, value)):
            mine = mine.numpy()[rows, :, : theirs.shape[2]]
            assert_close(mine, theirs, theirs.shape, atol=3e-5, message=f"{message}: {name} of layer {layer}")


def compositions(total):
    """All ways to cut a text of so many tokens into chunks, as lists of their sizes."""
    for cuts in itertools.product((False, True), repeat=total - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), total]
        yield [b - a for a, b in zip(edges, edges[1:])]


def test_every_chunking_of_a_short_text(pair):
    ours, theirs = pair
    ids = tokens(2, 6)
    expected, contents = their_logits(theirs, ids), their_cache(theirs, ids)
    assert len(list(compositions(6))) == 32 and expected.std() > 0.3
    for sizes in compositions(6):
        for name, cache in caches(ours, 2):
            message = f"{name}, chunks of {sizes}"
            assert_close(run_in_pieces(ours, ids, cache, sizes), expected, (2, 6, V), message=message)
            assert cache.seq_lens == [6, 6]
            assert_same_contents(cache, contents, message=message)


@pytest.mark.parametrize("sizes", [(1,) * S, (17, 1, 1, 30, 15), (S - 1, 1)])
def test_chunkings_of_a_text_that_fills_the_context(pair, sizes):
    ours, theirs = pair
    ids = tokens(2, S, seed=1)
    expected, contents = their_logits(theirs, ids), their_cache(theirs, ids)
    for name, cache in caches(ours, 2):
        assert_close(run_in_pieces(ours, ids, cache, sizes), expected, (2, S, V), message=name)
        assert_same_contents(cache, contents, message=name)


def test_rows_of_different_length_are_left_padded_rows(pair):
    """Ours are padded on the right, theirs on the left; some chunks bring nothing to a row, one row has nothing yet."""
    ours, theirs = pair
    lengths, ids = [5, 12, 1, 0, 9], tokens(5, 12, seed=2)
    texts = [row[:length].tolist() for row, length in zip(ids, lengths)]
    longer = [[*text, 7, 7] for text in texts]
    expected, contents = their_rows(theirs, longer), [their_cache(theirs, [text]) for text in longer]
    for name, cache in caches(ours, 5):
        got = prefill(ours, ids, cache, chunk=4, n_new=lengths).numpy()
        step = ours(np.full((5, 2), 7), cache=cache).numpy()
        for row, length in enumerate(lengths):
            mine, message = np.concatenate([got[row, :length], step[row]]), f"{name}, row {row}"
            assert_close(mine, expected[row], (length + 2, V), message=message)
            assert_same_contents(cache, contents[row], row, message)


def test_the_cache_after_rollback_and_going_on(pair):
    ours, theirs = pair
    ids, others, kept = tokens(3, 14, seed=3), tokens(3, 6, seed=4), [8, 14, 12]
    cut = [row[:length].tolist() for row, length in zip(ids, kept)]
    texts = [[*text, *more] for text, more in zip(cut, others.tolist())]
    expected = their_rows(theirs, texts)
    before, after = ([their_cache(theirs, [text]) for text in rows] for rows in (cut, texts))
    for name, cache in caches(ours, 3):
        run_in_pieces(ours, ids, cache, (9, 1, 4))
        cache.rollback([6, 0, 2])
        for row in range(3):
            assert_same_contents(cache, before[row], row, f"{name}, row {row}")
        got = run_in_pieces(ours, others, cache, (1, 4, 1))
        for row in range(3):
            assert_close(got[row], expected[row][-6:], (6, V), message=f"{name}, row {row}")
            assert_same_contents(cache, after[row], row, f"{name}, row {row}")


def ended(text, prompt_len, stop):
    """The text as far as its stop token: what stands behind it is padding."""
    return text[: text.index(stop, prompt_len) + 1] if stop in text[prompt_len:] else text


def their_texts(theirs, prompts, count, stop=None):
    """Greedy texts by transformers' generate, from a batch that is padded on the left; each ends at its stop token."""
    ids, mask, _ = padded_left(prompts)
    with torch.no_grad():
        found = theirs.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, eos_token_id=stop,
                                pad_token_id=PAD)[:, ids.shape[1] :].tolist()  # fmt: skip
    return [ended(prompt + new, len(prompt), stop) for prompt, new in zip(prompts, found)]


@pytest.mark.parametrize("prompts", [PROMPTS[:1], [row[-3:] for row in PROMPTS if len(row) > 2], PROMPTS],
                         ids=["one", "even", "ragged"])  # fmt: skip
def test_greedy_texts(pair, prompts):
    """Also with a token that ends one row at once, another in the middle, or one at its last place."""
    ours, theirs = pair
    endless = their_texts(theirs, prompts, 20)
    assert [len(text) for text in endless] == [len(prompt) + 20 for prompt in prompts]
    for stop in (None, endless[0][-20], endless[-1][-10], endless[-1][-1]):
        expected = their_texts(theirs, prompts, 20, stop)
        for name, cache in [("none", None), *caches(ours, len(prompts))]:
            got = ours.generate(prompts, 20, stop_token=stop, cache=cache)
            assert [ended(text, len(prompt), stop) for prompt, text in zip(prompts, got)] == expected, name


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
    texts = [ended(text, len(prompt), stop) for text in found.sequences.tolist()]
    return texts, found.sequences_scores.numpy()


@pytest.mark.parametrize("width, penalty, early",
                         [(2, 0.0, "never"), (5, 0.0, False), (4, 1.0, "never"), (3, 0.5, "never")])  # fmt: skip
def test_beams(pair, width, penalty, early):
    """early_stopping="never" is what our search does; False is a guess where the penalty is not 0."""
    ours, theirs = pair
    prompt, settings = PROMPTS[0], dict(length_penalty=penalty, early_stopping=early)
    endless, _ = their_beams(theirs, prompt, width, 10, None, **settings)
    stopped = 0
    for stop in (None, endless[0][-10], endless[0][-4], endless[-1][-2]):
        texts, scores = their_beams(theirs, prompt, width, 10, stop, **settings)
        stopped += sum(text[-1] == stop for text in texts)
        for name, cache in [("none", None), *caches(ours, width)]:
            beams = beam_search(ours, prompt, width, 10, cache=cache, stop_token=stop, length_penalty=penalty)
            assert [beam.ids for beam in beams] == texts and len(texts) == width, name
            np.testing.assert_allclose([beam.score for beam in beams], scores, rtol=0, atol=1e-4)
    assert stopped, "no beam met its stop token"


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
    ("gpt2", dict(n_embd=5, n_head=1, n_layer=1, n_inner=3, n_positions=2,
                  layer_norm_epsilon=0.03)),
    ("gpt2", dict(n_embd=3, n_head=3, n_layer=2, vocab_size=1, n_positions=7)),
    ("gpt2", dict(n_embd=1, n_head=1, n_layer=1, vocab_size=2, n_positions=1, tie_word_embeddings=False)),
    ("llama", dict(hidden_size=4, intermediate_size=1, num_hidden_layers=1, num_attention_heads=1,
                   num_key_value_heads=1, max_position_embeddings=2)),
    ("llama", dict(hidden_size=7, intermediate_size=3, num_attention_heads=7, num_key_value_heads=1, head_dim=2,
                   vocab_size=1, max_position_embeddings=9,
                   rms_norm_eps=0.02)),
    ("llama 3", dict(hidden_size=9, intermediate_size=5, num_attention_heads=3, num_key_value_heads=3, head_dim=10,
                     max_position_embeddings=11, attention_bias=True)),
    ("qwen2", dict(hidden_size=11, num_attention_heads=5, num_key_value_heads=5, head_dim=6, num_hidden_layers=1,
                   rms_norm_eps=0.03)),
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


def test_a_window_is_counted_as_mistral_counts(their_model, tmp_path):
    """A Mistral without its window is a Llama, and lesson 22's window makes it a Mistral again: i - w < j <= i."""
    ids, longest = tokens(2, S, seed=7), 20
    for window in (1, 2, 5, S - 1, S):
        folder = tmp_path / str(window)
        ours, theirs = saved_and_loaded(their_model("mistral", sliding_window=window), folder)
        plain, other = saved_and_loaded(their_model("mistral", sliding_window=None), tmp_path / f"{window} plain")
        assert (ours.window, plain.window) == (window, None)
        expected, shape = their_logits(theirs, ids), (2, S, V)
        assert_close(ours(ids).numpy(), expected, shape)
        assert_close(plain(ids).numpy(), their_logits(other, ids), shape)
        sizes = 2, S, ours.num_layers, *stored_heads(ours)
        for chunks in ((1,) * S, (3, 1, 1, 40, 2, 17), (S,)):
            for model, spare in itertools.product((ours, plain), (0, 3)):
                cache = SlidingWindowKVCache(*sizes, window=window, spare=spare)
                assert_close(run_in_pieces(model, ids, cache, chunks), expected, shape, message=f"{window}, {chunks}")
        for wrong in {window - 1, window + 1} & set(range(1, S)):
            cache = SlidingWindowKVCache(*sizes, window=wrong)
            assert np.abs(run_in_pieces(plain, ids, cache, (longest, S - longest)) - expected).max() > 1e-2


def test_a_window_keeps_what_mistral_keeps(their_model, tmp_path):
    """Their cache holds the window - 1 newest tokens, ours one more; after chunks, a rollback and going on."""
    ours, theirs = saved_and_loaded(their_model("mistral"), tmp_path)
    ids = tokens(2, 30, seed=8)
    cache = SlidingWindowKVCache(2, S, ours.num_layers, *stored_heads(ours), window=ours.window, spare=2)
    run_in_pieces(ours, np.concatenate([ids[:, :20], ids[:, :2]], axis=1), cache, (9, 9, 1, 3))
    cache.rollback(2)
    run_in_pieces(ours, ids[:, 20:], cache, (1, 1, 8))
    with torch.no_grad():
        layers = theirs(torch.tensor(ids), use_cache=True).past_key_values.layers
    assert cache.residents()[0, -5:].tolist() == [25, 26, 27, 28, 29]
    for layer, peer in enumerate(layers):
        for mine, kept in zip(cache.get(layer), (peer.keys.numpy(), peer.values.numpy())):
            assert_close(mine.numpy()[:, :, -4:], kept, (2, 2, 4, 4), atol=3e-5, message=f"layer {layer}")


def test_a_mistral_on_its_window_writes_its_text(their_model, tmp_path):
    """Forty tokens through a window of five: greedy, and with beams, in bounded memory."""
    ours, theirs = saved_and_loaded(their_model("mistral"), tmp_path / "theirs")
    prompts = [row[-3:] for row in PROMPTS if len(row) > 2]
    cache = enable_kv_cache(ours, factory=SlidingWindowKVCache, batch_size=3, window=ours.window)
    assert ours.generate(prompts, 40) == their_texts(theirs, prompts, 40) and cache.config.max_context_length == 5
    texts, scores = their_beams(theirs, prompts[0], 3, 40, None, length_penalty=1.0, early_stopping="never")
    beams = beam_search(ours, prompts[0], 3, 40, length_penalty=1.0)
    assert [beam.ids for beam in beams] == texts
    np.testing.assert_allclose([beam.score for beam in beams], scores, rtol=0, atol=1e-4)
