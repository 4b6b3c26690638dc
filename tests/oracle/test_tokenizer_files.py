"""load_tokenizer against the `tokenizers` library and transformers, on tokenizers that these tests train and save.

Left out by rule: characters that this Python's Unicode does not know, and, where text is normalized, those that the
library's older tables order or compose otherwise (found by asking the library for each character).
"""

import functools
import json
import random
import sys
import unicodedata
from pydoc_data.topics import topics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinytorch.core.training import CheckpointError
from tinytorch.models.tokenizer import load_tokenizer
from tinytorch.models.tokenizer.added import is_word, spaces
from tinytorch.models.tokenizer.files import QWEN2_CHUNKS
from tinytorch.models.tokenizer.patterns import translate
from tinytorch.models.tokenizer.steps import isolate

tk = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

TEXT = "\n".join(topics[name] for name in sorted(topics))[:150_000]
TEXT += " naïve café 中文 日本語 12345 الله \U0001f600\U0001f600 e\u0301 don't DON'T I'll\r\n\r\n   " * 100
LLAMA3_CHUNKS = QWEN2_CHUNKS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
GPT4O_CHUNKS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CL100K_CHUNKS = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
DEEPSEEK_CHUNKS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
    r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<unk>", "<s>", "</s>"]
ADDED = [
    tk.AddedToken("<L>", lstrip=True), tk.AddedToken("<R>", rstrip=True), tk.AddedToken("<n e\u0301>"),
    tk.AddedToken("word", single_word=True), tk.AddedToken("<x", normalized=False),
    tk.AddedToken("<xy>", normalized=False, lstrip=True, rstrip=True),
    tk.AddedToken("\t\t", rstrip=True, normalized=False),
    tk.AddedToken("<sp>", special=True, rstrip=True), tk.AddedToken("<Sp>", special=True, normalized=True),
]  # fmt: skip
FAMILIES = ["gpt2", "gpt2 prefix", "llama3", "gpt4o", "cl100k", "deepseek", "qwen2", "nfkd", "digits",
            "llama2", "metaspace first", "metaspace always", "metaspace never"]  # fmt: skip


def by_pattern(*patterns):
    splits = [tk.pre_tokenizers.Split(tk.Regex(pattern), "isolated") for pattern in patterns]
    last = tk.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return tk.pre_tokenizers.Sequence([*splits, last])


def pre_tokenizer(family):
    chunks = {"llama3": [LLAMA3_CHUNKS], "gpt4o": [GPT4O_CHUNKS], "cl100k": [CL100K_CHUNKS], "qwen2": [QWEN2_CHUNKS],
              "deepseek": [r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK_CHUNKS]}  # fmt: skip
    if family in chunks:
        return by_pattern(*chunks[family])
    if family.startswith("metaspace"):
        scheme = family.split()[1]
        return tk.pre_tokenizers.Metaspace(prepend_scheme=scheme, split=scheme == "always")
    byte_level = tk.pre_tokenizers.ByteLevel(add_prefix_space=family == "gpt2 prefix")
    if family == "digits":
        return tk.pre_tokenizers.Sequence([tk.pre_tokenizers.Digits(individual_digits=True), byte_level])
    return None if family == "llama2" else byte_level


def of_characters(family):
    return family == "llama2" or family.startswith("metaspace")


@functools.cache
def trained(family):
    """The library's tokenizer with this family's settings, its own vocabulary, and added tokens of all kinds."""
    characters = of_characters(family)
    model = tk.models.BPE(ignore_merges=family == "llama3", byte_fallback=characters, fuse_unk=characters,
                          unk_token="<unk>" if characters else None)  # fmt: skip
    tokenizer, n, d = tk.Tokenizer(model), tk.normalizers, tk.decoders
    if pre_tokenizer(family):
        tokenizer.pre_tokenizer = pre_tokenizer(family)
    if family in ("qwen2", "nfkd", "llama2"):
        tokenizer.normalizer = {"qwen2": n.NFC, "nfkd": n.NFKD}.get(
            family, lambda: n.Sequence([n.Prepend("▁"), n.Replace(" ", "▁")])
        )()
    back = [d.Replace("▁", " "), d.ByteFallback(), d.Fuse()] + [d.Strip(" ", 1, 0)] * (family != "metaspace never")
    tokenizer.decoder = d.Sequence(back) if characters else d.ByteLevel()
    first = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))] if characters else SPECIAL
    alphabet = [] if characters else tk.pre_tokenizers.ByteLevel.alphabet()
    trainer = tk.trainers.BpeTrainer(vocab_size=1100, special_tokens=first, initial_alphabet=alphabet,
                                     limit_alphabet=300 if alphabet else 150, show_progress=False)  # fmt: skip
    tokenizer.train_from_iterator(TEXT.split() if characters else [TEXT], trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIAL]
    tokenizer = tk.Tokenizer.from_str(json.dumps(state))
    tokenizer.add_tokens(ADDED)
    if family != "gpt2":
        single = "<s> $A </s>" if family == "gpt2 prefix" else "<s> $A"
        tokenizer.post_processor = tk.processors.Sequence([tk.processors.ByteLevel(trim_offsets=False),
            tk.processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])])  # fmt: skip
    return tokenizer


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """pair(family): ours and the library's, from the same file."""

    @functools.cache
    def load(family):
        path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
        trained(family).save(str(path))
        return load_tokenizer(path), trained(family)

    return load


@functools.cache
def assigned():
    return [c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) not in ("Cn", "Cs")]


@functools.cache
def characters():
    """The assigned characters whose normal form and order the library knows as this Python does."""

    def known(c, form):
        samples = [c]
        if unicodedata.combining(c) or unicodedata.category(c)[0] == "M":
            samples += ["a" + pair for mark in "\u0301\u0323\u05b0\u0345" for pair in (c + mark, mark + c)]
        return all(form.normalize_str(sample) == unicodedata.normalize("NFKD", sample) for sample in samples)

    form = tk.normalizers.NFKD()
    return [c for c in assigned() if known(c, form)]


PIECES = [
    "'s", "'S", "'ſ", "'T", "'lL", "'RE", "'ve", "'K", "'m", "12345", "  ", "   ", "\n", "\r\n", "\t", "\t\t",
    "\u00a0", "\u3000", "\x85", "\x1c", "\x0b", "\u2028", "</s>", "<s>", "<unk>", "<L>", "<R>", "word", " word ",
    "sword", "Ⓐword", "word\u200d", "<n e\u0301>", "<n é>", "<x", "<xy>", "<sp>", "<Sp>", "▁", "▁▁", "<0x41>",
    "\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea",
    "the ", "function", " def", "中文", "אבג", "ﷺ", "e\u0301", "\u0323\u0301", "ﬁ", "İ",
    "ß", "_", ".", "½", "٣",
]  # fmt: skip


def sample(rng):
    """A short text, its parts from the pieces, from all of Unicode, and from ASCII."""
    everything = characters()
    return "".join(
        rng.choice(PIECES) if kind < 0.55 else rng.choice(everything) if kind < 0.85 else chr(rng.randrange(128))
        for kind in (rng.random() for _ in range(rng.randrange(14)))
    )


def compare(ours, theirs, text, ids, add, skip):
    """Encode a text and decode it and some ids, with both."""
    got, expected = ours.encode(text, add), theirs.encode(text, add_special_tokens=add).ids
    assert got == expected, f"{text!r}: ours {named(theirs, got)}, tokenizers {named(theirs, expected)}"
    for some in (ids, expected):
        got, expected = ours.decode(some, skip), theirs.decode(some, skip_special_tokens=skip)
        assert got == expected, f"{named(theirs, some)}: ours {got!r}, tokenizers {expected!r}"


def named(tokenizer, ids):
    return [tokenizer.id_to_token(i) for i in ids]


class TestLibrary:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_thousands_of_texts_and_of_rows_of_ids(self, pair, family):
        ours, theirs = pair(family)
        rng, size = random.Random(family), theirs.get_vocab_size()
        for _ in range(1600):
            ids = [rng.randrange(size + 3) for _ in range(rng.randrange(10))]
            compare(ours, theirs, sample(rng), ids, rng.random() < 0.5, rng.random() < 0.5)

    @pytest.mark.parametrize("family", ["gpt2", "gpt4o", "deepseek", "qwen2"])
    def test_every_assigned_character(self, pair, family):
        """Beside changing neighbours: one text of all of them, shuffled."""
        ours, theirs = pair(family)
        everything = characters() if family == "qwen2" else assigned()
        assert len(everything) > 250_000
        text = "".join(random.Random(family).sample(everything, len(everything)))
        for start in range(0, len(text), 50_000):
            part = text[start : start + 50_000]
            assert ours.encode(part) == theirs.encode(part).ids

    @pytest.mark.parametrize("family", ["gpt2", "llama3", "qwen2", "llama2"])
    @settings(deadline=None, max_examples=40)
    @given(data=st.data())
    def test_what_hypothesis_finds(self, pair, family, data):
        ours, theirs = pair(family)
        text = data.draw(st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=8).map("".join))
        known = set(characters())
        ids = data.draw(st.lists(st.integers(0, theirs.get_vocab_size()), max_size=12))
        text = "".join(c for c in text if c in known)
        compare(ours, theirs, text, ids, data.draw(st.booleans()), data.draw(st.booleans()))

    @pytest.mark.parametrize("family", FAMILIES)
    def test_names_of_special_tokens_as_plain_text(self, pair, family):
        ours, theirs = pair(family)[0], tk.Tokenizer.from_str(trained(family).to_str())
        theirs.encode_special_tokens = True
        rng = random.Random(1)
        for _ in range(200):
            text = sample(rng)
            assert ours.encode(text, False, allow_special=False) == theirs.encode(text, add_special_tokens=False).ids

    @pytest.mark.parametrize("family", ["gpt2", "qwen2", "llama2"])
    def test_long_texts(self, pair, family):
        ours, theirs = pair(family)
        for text in ("ab" * 20_000, " " * 30_000 + "x", "\n \n" * 10_000, "'" * 20_000, "é" * 20_000, TEXT[:50_000]):
            assert ours.encode(text) == theirs.encode(text).ids

    def test_merges_in_any_order(self, tmp_path):
        """A file may merge a token before it is made, make one in two ways, or name a pair twice."""
        rng, letters = random.Random(0), sorted(tk.pre_tokenizers.ByteLevel.alphabet())
        shortcuts = []
        for _ in range(150):
            tokens, merges = ["a", "b", "c"], []
            for _ in range(12):
                left, right = rng.choices(tokens, k=2)
                merges.append((left, right))
                tokens.append(left + right)
            if rng.random() < 0.7:
                rng.shuffle(merges)
            vocab = {token: i for i, token in enumerate(dict.fromkeys(letters + tokens))}
            theirs = tk.Tokenizer(tk.models.BPE(vocab, merges, ignore_merges=rng.random() < 0.3))
            theirs.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
            theirs.decoder = tk.decoders.ByteLevel()
            state = json.loads(theirs.to_str())
            state["model"]["merges"] = [list(pair) if rng.random() < 0.5 else " ".join(pair) for pair in merges]
            (tmp_path / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
            ours = load_tokenizer(tmp_path)
            shortcuts.append(ours.bpe.in_order())
            for text in ["".join(rng.choices("aaabbc", k=rng.randrange(1, 30))) for _ in range(40)] + tokens:
                assert ours.encode(text) == theirs.encode(text).ids, f"{merges} on {text}"
        assert 0 < sum(shortcuts) < 150, "both ways to merge should occur"

    @pytest.mark.parametrize("pattern", [
        r"\d+", r"\D+", r"\S+", r"\P{L}+", r"[\p{Sc}\p{Nl}A]", ".", r"(?i:'sk|[^dk])|\p{Lm}{2}",
        r"\.++|a*\p{M}+|a+", r"[a-c\-\]^]+", r"\p{L}\p{M}?(?=\s)|\p{Z}", r"[&\\/]|(x|y)z",
        r"\s\r?\n|[ \t]{2,3}", "[一-龥]",
    ])  # fmt: skip
    def test_pieces_of_patterns(self, pattern):
        """Oniguruma, which the library uses, cuts as our translation does."""
        theirs = tk.pre_tokenizers.Split(tk.Regex(pattern), "isolated")
        rng, ours = random.Random(pattern), isolate(translate(pattern))
        for _ in range(60):
            some = rng.choices(assigned(), k=20) + rng.choices("aAbcdxyz'sSkK\u212aſ \t\r\n.^-]&/1\u0301", k=60)
            text = "".join(rng.sample(some, len(some)))
            assert ours(text, True) == [piece for piece, _ in theirs.pre_tokenize_str(text)], repr(text)

    def test_word_characters_and_white_space(self):
        """What a token with single_word or lstrip looks at, for each assigned character before it."""
        theirs = tk.Tokenizer(tk.models.BPE({}, []))
        theirs.add_tokens([tk.AddedToken("[w]", single_word=True), tk.AddedToken("[l]", lstrip=True)])
        words = [c for c in assigned() if not theirs.encode(c + "[w]").ids]
        assert [c for c in assigned() if is_word(c)] == words
        blank = [c for c in assigned() if theirs.encode(c + "[l]").offsets[0][0] == 0]
        assert [c for c in assigned() if spaces().fullmatch(c)] == blank


def check_directory(folder, texts=400):
    """Ours and AutoTokenizer from one directory."""
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    rng = random.Random(2)
    for _ in range(texts):
        text, skip = sample(rng), rng.random() < 0.5
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids, f"{text!r}: ours {ours.encode(text)}, transformers {ids}"
        assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False)["input_ids"]
        expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert ours.decode(ids, skip) == expected
    assert ours.vocab_size == len(theirs)
    assert ours.special_tokens == {t.content: i for i, t in theirs.added_tokens_decoder.items() if t.special}
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    return ours


def vocabulary(family):
    """{token: id} and the merges of a family, "<|endoftext|>" at the end."""
    model = json.loads(trained(family).to_str())["model"]
    return {**model["vocab"], "<|endoftext|>": len(model["vocab"])}, [tuple(pair) for pair in model["merges"]]


class TestTransformers:
    @pytest.mark.parametrize("settings", [{}, {"add_prefix_space": True}, {"add_bos_token": True}])
    def test_gpt2(self, tmp_path, settings):
        vocab, merges = vocabulary("gpt2")
        transformers.GPT2TokenizerFast(vocab=vocab, merges=merges, **settings).save_pretrained(tmp_path)
        ours = check_directory(tmp_path)
        assert ours.eos_id == vocab["<|endoftext|>"]

    def test_qwen2(self, tmp_path):
        vocab, merges = vocabulary("qwen2")
        theirs = transformers.Qwen2TokenizerFast(vocab=vocab, merges=merges)
        theirs.add_tokens(["<tool_call>", transformers.AddedToken("<|im_start|>", special=True)])
        theirs.save_pretrained(tmp_path)
        assert "<|im_start|>" in check_directory(tmp_path).special_tokens

    @pytest.mark.parametrize("family", ["llama3", "llama2", "gpt2 prefix", "deepseek"])
    def test_any_file(self, tmp_path, family):
        names = dict(bos_token="<s>", eos_token="</s>", additional_special_tokens=["<x", "<xy>"])
        wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=trained(family), **names)
        wrapped.save_pretrained(tmp_path)
        ours = check_directory(tmp_path)
        assert (ours.bos_id, ours.eos_id) == (1, 2)

    @pytest.mark.parametrize("flags", [{}, {"added_tokens_decoder": {
        "0": {"content": "<unk>", "lstrip": True, "special": True},
        "1": {"content": "<s>", "rstrip": True, "special": True},
    }}])  # fmt: skip
    @pytest.mark.parametrize("adds", [{}, {"add_bos_token": False, "add_eos_token": True}])
    def test_roles_and_flags_of_the_configuration(self, tmp_path, flags, adds):
        """Beside a file whose own tokens have other flags, or lack a role's token."""
        trained("llama3").save(str(tmp_path / "tokenizer.json"))
        mask = {"__type": "AddedToken", "content": "sword", "lstrip": True, "special": True}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
                  "pad_token": "<L>", "mask_token": mask, "additional_special_tokens": ["<x", "function"]}  # fmt: skip
        older = {"unk_token": {"content": "<n\u0301>", "single_word": True}}
        for name, content in {"tokenizer_config": config | flags | adds, "special_tokens_map": older}.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
        ours = check_directory(tmp_path)
        assert "function" in ours.special_tokens and "<x" not in ours.special_tokens
        assert ("<n\u0301>" in ours.special_tokens) == (not flags)

    def test_llama(self, tmp_path):
        model = json.loads(trained("metaspace first").to_str())["model"]
        merges = [tuple(pair) for pair in model["merges"]]
        transformers.LlamaTokenizerFast(vocab=model["vocab"], merges=merges).save_pretrained(tmp_path)
        check_directory(tmp_path)

    @pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
    @pytest.mark.parametrize("extra", [{}, {"special_tokens_map.json": {"eos_token": "</s>", "pad_token": {
        "content": "<pad>", "lstrip": True, "rstrip": False, "single_word": False, "normalized": False}},
        "added_tokens.json": {"<pad>": 1101, "</s>": 2, "plain word": 1102}}])  # fmt: skip
    def test_vocabulary_and_merges(self, tmp_path, kind, extra):
        vocab, merges = vocabulary(kind)
        assert len(vocab) == 1101
        (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
        lines = "".join(f"{left} {right}\n" for left, right in merges)
        (tmp_path / "merges.txt").write_text("#version: 0.2\n" + lines, encoding="utf-8")
        config = {"tokenizer_class": {"gpt2": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer"}[kind]}
        config |= dict.fromkeys(["add_prefix_space", "add_bos_token", "add_eos_token"], bool(extra))
        for name, content in {"tokenizer_config.json": config, **extra}.items():
            (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
        check_directory(tmp_path)

    def test_a_kind_that_we_do_not_have(self, tmp_path):
        unigram = tk.Tokenizer(tk.models.Unigram([("a", 0.0)], 0))
        unigram.save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(CheckpointError, match="pre_tokenizer|Unigram"):
            load_tokenizer(tmp_path)
