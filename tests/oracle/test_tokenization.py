"""Lesson 10 against Hugging Face's transformers and tokenizers, against `regex`, and against plain recounting."""

import inspect
import json
import random
import sys
import unicodedata
from collections import Counter
from pydoc_data.topics import topics

import pytest

from tinytorch.text.tokenization import BPETokenizer, byte_letters, learn_merges, split_text

TEXT = "\n".join(topics[name] for name in sorted(topics))
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
STRINGS = [
    "", " ", "  ", "a", " the", "the cat's hat, they'll've 12ab34", "x  y   z\n\n\nw \t\r\n ", "can't CAN'T 's 'S",
    "naïve café über straße", "中文字符 日本語 한국어 三本",
    "½ ² Ⅷ ٣ ३ 1²3", "e\u0301 \u200d\u200b\ufeff a\u00a0b\u3000c",
    "\x00\x01\x1c\x1d\x1e\x1f\x7f\x85", "\U0001d11e\U0001f600\U0010ffff", "def f(x):\n    return x_1 ** 2  # done\n",
    "a" * 300, "ab" * 200 + "c" * 77, TEXT[100_000:104_000], TEXT[-3000:],
]


def gpt2_files(tokenizer, folder):
    """Our tokenizer as vocab.json and merges.txt, with ids shuffled as in foreign files; the two paths."""
    letters = byte_letters()
    written = {i: "".join(letters[b] for b in token) for i, token in tokenizer.tokens.items()}
    order = random.Random(0).sample(range(len(written)), len(written))
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    vocab.write_text(json.dumps({token: order[i] for i, token in written.items()}), encoding="utf-8")
    lines = [f"{written[left]} {written[right]}\n" for left, right in tokenizer.merges]
    merges.write_text("#version: 0.2\n" + "".join(lines), encoding="utf-8")
    return str(vocab), str(merges)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    tokenizer = BPETokenizer(["<|endoftext|>"]).train(TEXT[:200_000] + "naïve 中文 " * 20, 900)
    assert tokenizer.vocab_size == 900
    return gpt2_files(tokenizer, tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def ours(files):
    return BPETokenizer.from_gpt2_files(*files)


@pytest.fixture(scope="module")
def theirs(files):
    """transformers' GPT2Tokenizer from the same two files, whatever its constructor is called in this version."""
    transformers = pytest.importorskip("transformers")
    taken = inspect.signature(transformers.GPT2Tokenizer.__init__).parameters
    names = ("vocab_file", "merges_file") if "vocab_file" in taken else ("vocab", "merges")
    return transformers.GPT2Tokenizer(**dict(zip(names, files)))


class TestGPT2Files:
    @pytest.mark.parametrize("text", STRINGS, ids=range(len(STRINGS)))
    def test_same_ids_as_transformers(self, ours, theirs, text):
        got, expected = ours.encode(text), theirs(text)["input_ids"]
        assert got == expected, f"{text[:60]!r}: ours {got[:20]}, transformers {expected[:20]}"
        assert ours.decode(got) == text

    def test_special_token_as_transformers(self, ours, theirs):
        text = "one <|endoftext|>two<|endoftext|>"
        got = ours.encode(text, allow_special=True)
        assert got == theirs(text)["input_ids"]
        assert got[-1] == theirs.eos_token_id
        assert len(ours.encode(text)) > len(got), "without allow_special the name is ordinary text"

    def test_decodes_as_transformers_also_when_cut(self, ours, theirs):
        ids = ours.encode("€ naïve \U0001f600 中")
        for start in range(len(ids)):
            for stop in range(start, len(ids) + 1):
                got = ours.decode(ids[start:stop])
                expected = theirs.decode(ids[start:stop], clean_up_tokenization_spaces=False)
                assert got == expected, f"{ids[start:stop]}: ours {got!r}, transformers {expected!r}"

    def test_saved_and_loaded_it_stays_the_same(self, ours, tmp_path):
        ours.save(tmp_path / "gpt2.json")
        loaded = BPETokenizer.load(tmp_path / "gpt2.json")
        assert loaded.to_dict() == ours.to_dict()
        assert loaded.encode(STRINGS[5]) == ours.encode(STRINGS[5])


class TestSplit:
    def test_every_assigned_character_as_regex(self):
        """`regex` knows \\p{L}; on every assigned character, in order and shuffled, the chunks are the same."""
        regex = pytest.importorskip("regex")
        pattern = regex.compile(GPT2_PATTERN)
        assigned = [c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) not in ("Cn", "Cs")]
        assert len(assigned) > 250_000
        for seed in range(3):
            if seed:
                random.Random(seed).shuffle(assigned)
            text = "".join(assigned)
            assert split_text(text) == pattern.findall(text)

    def test_white_space_and_apostrophes_as_regex(self):
        regex = pytest.importorskip("regex")
        pattern = regex.compile(GPT2_PATTERN)
        rng = random.Random(1)
        pieces = [" ", "  ", "\n", "\t", "\r\n", "\x1c", "\x85", "\u00a0"]
        pieces += ["'", "'s", "'re", "a", "Z", "_", "1", "½", "."]
        for _ in range(300):
            text = "".join(rng.choices(pieces, k=30))
            assert split_text(text) == pattern.findall(text), repr(text)

    def test_help_text_as_tokenizers(self):
        byte_level = pytest.importorskip("tokenizers").pre_tokenizers.ByteLevel(add_prefix_space=False)
        expected = [TEXT[a:b] for _, (a, b) in byte_level.pre_tokenize_str(TEXT)]
        assert split_text(TEXT) == expected

    def test_byte_letters_as_tokenizers(self):
        alphabet = pytest.importorskip("tokenizers").pre_tokenizers.ByteLevel.alphabet()
        assert len(alphabet) == 256
        assert sorted(byte_letters()) == sorted(alphabet)


class TestTraining:
    def test_merges_as_tokenizers_on_half_a_megabyte(self):
        """Hugging Face's trainer has the same rule for ties, over ids in the order of the byte letters."""
        tokenizers = pytest.importorskip("tokenizers")
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        model.train_from_iterator([TEXT], tokenizers.trainers.BpeTrainer(
            vocab_size=1024, min_frequency=2, initial_alphabet=alphabet, show_progress=False))
        expected = [tuple(pair) for pair in json.loads(model.to_str())["model"]["merges"]]

        letters = byte_letters()
        place = {letter: i for i, letter in enumerate(sorted(letters))}
        counted = Counter(split_text(TEXT))
        words = [[place[letters[b]] for b in chunk.encode()] for chunk in counted]
        tokens, got = sorted(letters), []
        for left, right in learn_merges(words, list(counted.values()), 768):
            got.append((tokens[left], tokens[right]))
            tokens.append(tokens[left] + tokens[right])
        assert len(got) == 768
        wrong = [i for i, (a, b) in enumerate(zip(got, expected)) if a != b]
        assert not wrong, f"merge {wrong[0]}: ours {got[wrong[0]]}, tokenizers {expected[wrong[0]]}"

    @pytest.mark.parametrize("seed", range(6))
    def test_merges_as_plain_recounting(self, seed):
        """Everything recounted in every round, with nothing but lists: repeats and ties are frequent here."""
        rng = random.Random(seed)
        words = [[rng.choice([97, 98, 99][: 1 + seed % 3]) for _ in range(rng.randrange(1, 12))] for _ in range(30)]
        weights = [rng.randrange(1, 4) for _ in words]
        got = learn_merges(words, weights, 40)
        assert len(got) > 3
        assert got == recount(words, weights, 40)

    def test_the_order_of_words_does_not_matter(self):
        counted = Counter(split_text(TEXT[:20_000]))
        words, weights = [list(c.encode()) for c in counted], list(counted.values())
        forward, backward = learn_merges(words, weights, 100), learn_merges(words[::-1], weights[::-1], 100)
        assert len(forward) == 100
        assert forward == backward


def recount(words, weights, num_merges):
    """BPE by its definition, independent of the lesson's functions."""
    words, merges = [tuple(w) for w in words], []
    while len(merges) < num_merges:
        counts = {}
        for word, weight in zip(words, weights):
            for i in range(len(word) - 1):
                counts[word[i:i + 2]] = counts.get(word[i:i + 2], 0) + weight
        best = sorted(((-n, pair) for pair, n in counts.items() if n >= 2))
        if not best:
            break
        pair, new_id = best[0][1], 256 + len(merges)
        merges.append(pair)
        for k, word in enumerate(words):
            out = []
            for i in word:
                out.append(i)
                if tuple(out[-2:]) == pair:
                    out[-2:] = [new_id]
            words[k] = tuple(out)
    return merges
