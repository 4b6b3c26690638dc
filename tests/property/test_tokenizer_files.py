"""Tokenizers from files, without the library: texts come back, and no damaged or hostile file cuts text in silence."""

import json
import random
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinytorch.core.training import CheckpointError
from tinytorch.models.tokenizer import load_tokenizer
from tinytorch.models.tokenizer.files import QWEN2_CHUNKS
from tinytorch.models.tokenizer.patterns import translate
from tinytorch.text.tokenization import BPETokenizer, byte_letters

TRAINED = BPETokenizer().train("she sells sea shells by the sea shore; naïve café, 中文 中文 it's 1234 " * 3, 290)
texts = st.text() | st.text("ab '\n\t1_.\u00a0é\u0301", max_size=60)
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


def state_of(**changes):
    """A small tokenizer.json of Llama 3's kind, with some parts changed."""
    letters = byte_letters()
    names = {i: "".join(letters[byte] for byte in token) for i, token in TRAINED.tokens.items()}
    split = {"type": "Split", "pattern": {"Regex": QWEN2_CHUNKS}, "behavior": "Isolated", "invert": False}
    state = {
        "version": "1.0",
        "added_tokens": [dict(id=290, content="<s>", special=True), dict(id=291, content="</s>", special=True)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL]},
        "post_processor": {"type": "TemplateProcessing", "special_tokens": {"<s>": {"id": "<s>", "ids": [290]}},
                           "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]},
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": {name: i for i, name in names.items()},
                  "merges": [[names[left], names[right]] for left, right in TRAINED.merges]},
    }  # fmt: skip
    for place, value in changes.items():
        *parents, last = place.split("__")
        at = state
        for parent in parents:
            at = at[parent]
        at[last] = value
    return state


def write(folder, state):
    (folder / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write(tmp_path_factory.mktemp("good"), state_of()))


@settings(deadline=None, max_examples=150)
@given(text=texts)
def test_every_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids[0] == 290
    assert tokenizer.decode(ids) == "<s>" + text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.replace("<s>", "").replace("</s>", "")
    plain = tokenizer.encode(text, add_special_tokens=False, allow_special=False)
    assert tokenizer.decode(plain) == text and not {290, 291} & set(plain)


@settings(deadline=None, max_examples=100)
@given(ids=st.lists(st.integers(0, 300)))
def test_any_ids_are_the_bytes_of_their_tokens(tokenizer, ids):
    expected = b"".join(b"<s>" if i == 290 else b"</s>" if i == 291 else TRAINED.tokens.get(i, b"") for i in ids)
    assert tokenizer.decode(ids) == expected.decode(errors="replace")


def test_a_negative_id_and_half_a_surrogate_pair(tokenizer):
    with pytest.raises(ValueError, match="-1"):
        tokenizer.decode([3, -1])
    with pytest.raises(ValueError, match="position 1"):
        tokenizer.encode("a\ud800")


def test_special_tokens_and_size(tokenizer):
    assert tokenizer.special_tokens == {"<s>": 290, "</s>": 291}
    assert tokenizer.vocab_size == 292
    assert tokenizer.encode("a<s>b</s>", False)[1::2] == [290, 291]


@pytest.mark.parametrize("named, ids", [
    ({}, (None, None)), ({"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}, (290, 291)),
])  # fmt: skip
def test_ids_that_begin_and_end_a_text(named, ids, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")
    loaded = load_tokenizer(write(tmp_path, state_of()))
    assert (loaded.bos_id, loaded.eos_id) == ids


FIRST = " ".join(state_of()["model"]["merges"][0])
SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed"}
REPLACED = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
REFUSED = [
    (dict(model__type="Unigram"), "model.type is 'Unigram'"),
    (dict(model__type=["BPE"]), "model.type"),
    (dict(model=None), "model should be an object"),
    (dict(version="2.0"), "version"),
    (dict(model__dropout=0.1), "model.dropout"),
    (dict(model__end_of_word_suffix="</w>"), "model.end_of_word_suffix"),
    (dict(model__vocab=[["a", 0]]), "model.vocab should be an object"),
    (dict(model__vocab__a=-1), "gives 'a' the id -1"),
    (dict(model__vocab__a=True), "gives 'a' the id True"),
    (dict(model__vocab__a=98.0), "gives 'a' the id 98.0"),
    (dict(model__vocab__a=98), "gives the id 98 to"),
    (dict(model__vocab={"a": 0}, model__merges=[]), "model.vocab has no token for the bytes 0, 1, 2"),
    (dict(model__vocab={"\ud800": 0}), "half of a surrogate pair"),
    (dict(model__merges=[["a", "§§"]]), "model.merges should hold two tokens at place 0"),
    (dict(model__merges=["a b", "a"]), "model.merges should hold two tokens at place 0"),
    (dict(model__merges=[FIRST, 7]), "at place 1"),
    (dict(model__merges=[FIRST, [["s"], "h"]]), "at place 1"),
    (dict(model__merges={}), "model.merges should be a list"),
    (dict(added_tokens=[{"id": 290, "content": "<s>"}] * 2), r"added_tokens\[1\] adds '<s>' again"),
    (dict(added_tokens=[{"id": 400, "content": "<s>"}]), "adds '<s>' as 400, and by its place it is 290"),
    (dict(added_tokens=[{"id": 1, "content": "<s>"}]), "adds '<s>' as 1"),
    (dict(added_tokens=[{"id": 290, "content": ""}]), r"added_tokens\[0\].content has 0 characters"),
    (dict(added_tokens=[{"id": 290, "content": "a" * 10**6}]), "has 1000000 characters"),
    (dict(added_tokens=[{"id": 290, "content": "x\udfff"}]), "half of a surrogate pair"),
    (dict(added_tokens=[{"id": 290, "content": "<s>", "lstrip": 1}]), r"lstrip should be true or false, and is 1"),
    (dict(added_tokens=[7]), r"added_tokens\[0\] should be an object"),
    (dict(normalizer={"type": "Lowercase"}), "normalizer is of the type 'Lowercase'; we know only NFC"),
    (dict(normalizer={"type": "Sequence", "normalizers": [{"type": "Nmt"}]}), r"normalizers\[0\] is of the type 'Nmt'"),
    (dict(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}] * 99}), "99 steps"),
    (dict(normalizer={"type": "Sequence", "normalizers": [{"type": "Sequence"}]}), "is of the type 'Sequence'"),
    (dict(normalizer=REPLACED), "replaces by more characters"),
    (dict(normalizer=[]), "normalizer should be an object"),
    (dict(pre_tokenizer={"type": "Whitespace"}), "pre_tokenizer is of the type 'Whitespace'"),
    (dict(pre_tokenizer={}), "pre_tokenizer.type should be a text"),
    (dict(pre_tokenizer=None), "model.byte_fallback is False"),
    (dict(pre_tokenizer__pretokenizers=[BYTE_LEVEL, BYTE_LEVEL]), "a step after ByteLevel"),
    (dict(pre_tokenizer__pretokenizers=[SPLIT]), "behavior is 'Removed'"),
    (dict(decoder=None), "decoder and pre_tokenizer do not go together"),
    (dict(decoder={"type": "WordPiece"}), "do not go together"),
    (dict(post_processor={"type": "BertProcessing"}), "post_processor is of the type 'BertProcessing'"),
    (dict(post_processor__single=[]), "post_processor.single has the text 0 times"),
    (dict(post_processor__special_tokens={}), r"post_processor.special_tokens.<s>"),
    (dict(post_processor__special_tokens={"<s>": {"ids": [999]}}), "adds the id 999, which no token has"),
]  # fmt: skip


class TestDamaged:
    @pytest.mark.parametrize("changes, problem", REFUSED, ids=lambda value: value if isinstance(value, str) else "")
    def test_a_part_that_is_not_ours(self, tmp_path, changes, problem):
        with pytest.raises(CheckpointError, match=problem) as caught:
            load_tokenizer(write(tmp_path, state_of(**changes)))
        assert str(tmp_path / "tokenizer.json") in str(caught.value)
        assert len(str(caught.value)) < len(str(tmp_path)) + 500

    @pytest.mark.parametrize("content", [
        b"", b"[]", b"\x80\x04N.", b'{"model"', b"[" * 10**6, b'{"a":' * 10**6,
        b'{"normalizer": ' + b"[" * 500 + b"]" * 500 + b"}",
    ])  # fmt: skip
    def test_what_is_no_tokenizer(self, tmp_path, content):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(CheckpointError, match="tokenizer.json"):
            load_tokenizer(tmp_path)

    def test_nothing_there(self, tmp_path):
        for path, problem in ((tmp_path, "holds no tokenizer.json"), (tmp_path / "missing", "is missing")):
            with pytest.raises(CheckpointError, match=problem):
                load_tokenizer(path)

    @pytest.mark.parametrize("name, content, problem", [
        ("merges.txt", "#version: 0.2\na \u00a7\n", "line 2"),
        ("merges.txt", "a b\x00 c\n", "line 1"),
        ("merges.txt", b"\xff\xff", "merges.txt does not read"),
        ("vocab.json", "[1]", "vocab.json should hold an object"),
        ("tokenizer_config.json", '{"tokenizer_class": "BertTokenizer"}', "tokenizer_class is 'BertTokenizer'"),
        ("config.json", '{"model_type": "llama"}', "model_type is 'llama'"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "<s>"}}}', "where an id should stand"),
        ("tokenizer_config.json", '{"eos_token": 3}', "eos_token.content should be a text"),
        ("tokenizer_config.json", '{"add_bos_token": "yes"}', "add_bos_token should be true or false"),
        ("special_tokens_map.json", '{"eos_token": {"content": "a", "rstrip": []}}', "rstrip"),
        ("added_tokens.json", '{"<s>": "290"}', "added_tokens.json: <s> should be a whole number"),
    ])  # fmt: skip
    def test_vocabulary_and_merges(self, tmp_path, name, content, problem):
        vocab = state_of()["model"]["vocab"]
        (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
        (tmp_path / "merges.txt").write_text(FIRST + "\n", encoding="utf-8")
        assert load_tokenizer(tmp_path).decode(load_tokenizer(tmp_path).encode("she")) == "she"
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(CheckpointError, match=problem):
            load_tokenizer(tmp_path)


class TestPatterns:
    @pytest.mark.parametrize("pattern", [
        r"(a+)+b", r"(a|a)*b", r"a*a*b", r"a+b", r"(?:a|aa)+", r"a?" * 20 + "a" * 20, "(?:a|a)" * 30 + "b", r"a*",
        r"a|", r"(?=a)", r"\s+$", r"\w+", r"\bx", r"(?<!a)b", r"(?<n>a)", r"\1", r"a+?b", r"[[:alpha:]]", r"[a&&b]",
        r"\p{Han}", r"\p{^L}", r"(?i:straße)", r"(?i:fix)", r"(?i:\p{L})", r"(?x: a)", r"(a", r"a)", r"[a", r"[z-a]",
        r"a{3,2}", r"+", r"x" * 5000, "\\",
        r"a{1,7}b{1,7}c{1,7}d", r"\s*\s*x", r"\s*x|.\s+", r"\s*x|a+", r"\s+(?!\S)",
    ])  # fmt: skip
    def test_unknown_or_slow_ones_are_refused(self, tmp_path, pattern):
        with pytest.raises(ValueError):
            translate(pattern)
        state = state_of()
        state["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
        with pytest.raises(CheckpointError, match=r"json: pre_tokenizer.pretokenizers\[0\].pattern is a"):
            load_tokenizer(write(tmp_path, state))

    @pytest.mark.parametrize("pattern, text, found", [
        (r"\p{Lu}\p{Ll}*|\P{L}", "aBcd éÉé1", ["Bcd", " ", "Éé", "1"]),
        (r"\S+|\s", "a b\x1cc\u00a0d", ["a", " ", "b\x1cc", "\u00a0", "d"]),
        (r"(?i:'sk|[dk])", "'sk 'SK 'ſ\u212a K \u212a ı", ["'sk", "'SK", "'ſ\u212a", "K", "\u212a"]),
        (r"[a-c\-\]^]+|\d{1,2}", "ab-]^d 123٣", ["ab-]^", "12", "3٣"]),
        (r".", "a\nb", ["a", "b"]),
        (r"a++|\.", "aa.b", ["aa", "."]),
    ])  # fmt: skip
    def test_what_is_translated(self, pattern, text, found):
        assert translate(pattern).findall(text) == found

    def test_long_runs_that_lead_nowhere(self):
        """Each would take a quarter of an hour, were time to grow with the square of the length."""
        for pattern in (translate(QWEN2_CHUNKS), translate(r"a?\s*[\r\n]|\s+(?!\S)|\s+|.")):
            for character in " \nAa'1\u0301":
                text = character * 300_000 + "x"
                assert "".join(pattern.findall(text)) == text


class TestNormalizers:
    def load(self, folder, form):
        return load_tokenizer(write(folder, state_of(normalizer={"type": form})))

    @pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
    def test_long_runs_of_marks_are_as_unicodedata_says(self, tmp_path, form):
        normalize, rng = self.load(tmp_path, form).normalize, random.Random(0)
        for _ in range(30):
            marks = "e\u0301\u0323\u0344\u0f73\u0f71\u05b0\uff9e\u3099\u0345"
            text = "".join(rng.choices(marks, [1] + [20] * 9, k=300))
            assert normalize(text) == unicodedata.normalize(form, text)

    @pytest.mark.parametrize("form, marks, first, second, third", [
        ("NFC", "\u0301\u0323", "\u1ea1", "\u0323", "\u0301"),
        ("NFKC", "\u0301\uff9e", "\u00e1", "\u3099", "\u0301"),
    ])  # fmt: skip
    def test_half_a_million_marks(self, tmp_path, form, marks, first, second, third):
        """`unicodedata` alone would take minutes."""
        n, normalize = 250_000, self.load(tmp_path, form).normalize
        ordered = (second * n + third * n).replace(second if form == "NFC" else third, "", 1)
        assert normalize("a" + marks * n) == first + ordered


def test_long_chunks(tokenizer):
    for text in ("she" * 100_000, " " * 300_000, "é" * 300_000):
        assert tokenizer.decode(tokenizer.encode(text, False)) == text
