"""Beam search and assisted generation against transformers' GPT-2 with the same weights."""

import copy

import numpy as np
import pytest

from tinytorch.generation.kv_cache import create_kv_cache
from tinytorch.generation.paged import paged_kv_cache
from tinytorch.generation.speculative import beam_search, first_layers, speculative_generate

torch = pytest.importorskip("torch")
L, H, D, S = 3, 4, 6, 32
PROMPT = [3, 14, 15, 9, 2]


def their_beams(theirs, width, count, stop, penalty):
    """(ids, score) of all beams of transformers, best first, without its padding."""
    with torch.no_grad():
        found = theirs.generate(
            torch.tensor([PROMPT]), max_new_tokens=count, num_beams=width, num_return_sequences=width, do_sample=False,
            eos_token_id=stop, pad_token_id=30, length_penalty=penalty, early_stopping="never",
            return_dict_in_generate=True, output_scores=True,
        )
    texts = []
    for ids in found.sequences.tolist():
        ends = [i for i in range(len(PROMPT), len(ids)) if stop is not None and ids[i] == stop]
        texts.append(ids[: ends[0] + 1] if ends else ids)
    return texts, found.sequences_scores.numpy()


@pytest.mark.parametrize("width", [2, 5])
@pytest.mark.parametrize("stop, penalty", [(None, 0.0), (None, 1.0), (7, 0.0), (11, 1.0), (20, 2.0)])
def test_beams_equal_those_of_transformers(peers, width, stop, penalty):
    ours, theirs = peers
    texts, scores = their_beams(theirs, width, 9, stop, penalty)
    for factory in (None, create_kv_cache, paged_kv_cache):
        cache = None if factory is None else factory(width, S, L, H, D)
        beams = beam_search(ours, PROMPT, width, 9, cache=cache, stop_token=stop, length_penalty=penalty)
        assert [beam.ids for beam in beams] == texts and len(texts) == width
        np.testing.assert_allclose([beam.score for beam in beams], scores, atol=1e-4)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_speculation_equals_greedy_and_assisted_generation_of_transformers(peers, k):
    ours, theirs = peers
    shallow = copy.deepcopy(theirs)
    shallow.transformer.h = shallow.transformer.h[:1]
    shallow.config.n_layer = 1
    shallow.generation_config.num_assistant_tokens = k
    options = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=30)
    with torch.no_grad():
        plain = theirs.generate(torch.tensor([PROMPT]), **options)[0].tolist()
        assisted = theirs.generate(torch.tensor([PROMPT]), assistant_model=shallow, **options)[0].tolist()
    got = speculative_generate(first_layers(ours, 1), ours, PROMPT, 20, k)
    assert len(got) == 25 and got == plain == assisted
