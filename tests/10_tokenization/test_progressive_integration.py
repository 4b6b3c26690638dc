"""Lesson 10 in the package: both tokenizers on real text, and everything a later lesson relies on."""

import json
import os
import subprocess
import sys
from pydoc_data.topics import topics

import numpy as np
import pytest

from tinytorch.core.tensor import Tensor
from tinytorch.text.tokenization import BPETokenizer, CharTokenizer, Tokenizer

TEXT = "\n".join(topics[name] for name in sorted(topics))
UNUSUAL = "naïve 中文, 3½²\t\r\n  — ‘x’ \U0001d11e\x00 e\u0301 '\u00a0 can't \uffff\U0010ffff"


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer().train(TEXT, 512)


class TestCharTokenizer:
    def test_round_trip_on_real_text(self):
        tokenizer = CharTokenizer(TEXT)
        ids = tokenizer.encode(TEXT[:5000])
        assert len(ids) == 5000
        assert tokenizer.decode(ids) == TEXT[:5000]
        assert tokenizer.vocab_size == len(set(TEXT)) > max(ids)

    def test_unknown_character_is_named_with_its_position(self):
        with pytest.raises(ValueError, match=r"'ξ' at position 4"):
            CharTokenizer("abc ").encode("abc ξ")

    @pytest.mark.parametrize("bad", [-1, 4])
    def test_unknown_id_is_an_error_also_when_negative(self, bad):
        with pytest.raises(ValueError, match=rf"id {bad} .*4"):
            CharTokenizer("decade").decode([0, bad])

    def test_saved_and_loaded(self, tmp_path):
        tokenizer = CharTokenizer(UNUSUAL)
        tokenizer.save(tmp_path / "chars.json")
        assert CharTokenizer.load(tmp_path / "chars.json").encode(UNUSUAL) == tokenizer.encode(UNUSUAL)


class TestIdsAndTextInEveryForm:
    @pytest.fixture(params=["char", "bpe"])
    def tokenizer(self, request, bpe):
        return CharTokenizer(TEXT) if request.param == "char" else bpe

    def test_what_a_model_writes_is_decoded(self, tokenizer):
        """generate() answers with a list, an array or a Tensor, like its prompt."""
        ids = tokenizer.encode("for x in range(3)")
        for form in (tuple(ids), np.array(ids), np.array(ids, np.int32), Tensor(ids)):
            assert tokenizer.decode(form) == "for x in range(3)", type(form)

    @pytest.mark.parametrize("bad", [[1.5], np.array([1.0]), np.array([[1, 2]]), [[1, 2]], ["1"]])
    def test_what_are_no_ids_of_one_text(self, tokenizer, bad):
        with pytest.raises(TypeError, match="whole numbers"):
            tokenizer.decode(bad)

    @pytest.mark.parametrize("bad", [None, b"text", ["t"], 3])
    def test_what_is_no_text(self, tokenizer, bad):
        for call in (tokenizer.encode, CharTokenizer, lambda text: BPETokenizer().train(text, 300)):
            with pytest.raises(TypeError, match="takes text"):
                call(bad)

    def test_no_text_is_no_ids(self, tokenizer):
        assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""
        assert CharTokenizer("").vocab_size == 0 and BPETokenizer().train("", 300).vocab_size == 256


class TestBPETraining:
    def test_vocabulary_of_half_a_megabyte(self, bpe):
        assert len(TEXT) > 400_000
        assert bpe.vocab_size == 512
        assert len(bpe.merges) == 256
        assert sorted(bpe.tokens) == list(range(512))

    def test_each_merge_joins_two_earlier_tokens(self, bpe):
        for (left, right), (rank, new_id) in bpe.merges.items():
            assert new_id == 256 + rank and left < new_id and right < new_id
            assert bpe.tokens[new_id] == bpe.tokens[left] + bpe.tokens[right]

    def test_smaller_vocabulary_is_the_beginning_of_the_larger(self, bpe):
        small = BPETokenizer().train(TEXT, 300)
        assert list(small.merges) == list(bpe.merges)[:44]

    def test_same_merges_in_a_process_with_other_hashes(self, bpe):
        code = ("import sys, json; from tinytorch.text.tokenization import BPETokenizer; "
                "print(json.dumps(BPETokenizer().train(sys.stdin.read(), 300).to_dict()['merges']))")
        text = TEXT[:50_000]
        results = []
        for seed in ("1", "2"):
            path = os.pathsep.join(p for p in sys.path if p)
            environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path, "PYTHONUTF8": "1"}
            done = subprocess.run([sys.executable, "-c", code], input=text, capture_output=True, encoding="utf-8",
                                  env=environment, check=True)
            results.append(json.loads(done.stdout))
        assert len(results[0]) == 44
        assert results[0] == results[1]

    def test_stops_when_no_pair_occurs_twice(self):
        tokenizer = BPETokenizer().train("abcabc", 1000)
        assert [tokenizer.tokens[i] for i in range(256, tokenizer.vocab_size)] == [b"ab", b"abc"]

    def test_shortens_text_it_has_not_seen(self):
        tokenizer = BPETokenizer().train(TEXT[:400_000], 1024)
        unseen = TEXT[400_000:]
        assert len(tokenizer.encode(unseen)) < 0.5 * len(unseen)

    @pytest.mark.parametrize("size", [0, 255, 256])
    def test_too_small_a_vocabulary_says_what_is_needed(self, size):
        with pytest.raises(ValueError, match="257"):
            BPETokenizer(["<|end|>"]).train("abab", size)


class TestBPEText:
    @pytest.mark.parametrize("text", ["", " ", UNUSUAL, "".join(map(chr, range(0x300))), TEXT[1000:3000], "x" * 5000])
    def test_round_trip(self, bpe, text):
        ids = bpe.encode(text)
        assert all(type(i) is int and 0 <= i < bpe.vocab_size for i in ids)
        assert bpe.decode(ids) == text

    def test_untrained_it_writes_bytes(self):
        assert BPETokenizer().encode("né€") == list("né€".encode())

    def test_training_words_become_the_tokens_that_training_left(self, bpe):
        assert bpe.encode(" the") == [next(i for i, token in bpe.tokens.items() if token == b" the")]

    def test_ids_may_come_from_an_array(self, bpe):
        assert bpe.decode(np.array(bpe.encode("return x"))) == "return x"

    def test_half_a_character_becomes_the_replacement_character(self):
        assert BPETokenizer().decode([0xE2, 0x82]) == "\ufffd"

    def test_half_a_surrogate_pair_is_refused_by_position(self, bpe):
        with pytest.raises(ValueError, match="position 2.*surrogate"):
            bpe.encode("ab\udc80")
        with pytest.raises(ValueError, match="position 0.*surrogate"):
            BPETokenizer().train("\ud800x", 300)

    @pytest.mark.parametrize("bad", [-1, 512, 10**9])
    def test_unknown_id_is_named(self, bpe, bad):
        with pytest.raises(ValueError, match=rf"id {bad} .*512"):
            bpe.decode([65, bad])

    @pytest.mark.parametrize("bad", [None, 5, b"bytes", ["list"]])
    def test_only_text_is_encoded(self, bpe, bad):
        with pytest.raises(TypeError, match="str"):
            bpe.encode(bad)

    def test_what_is_handed_out_cannot_spoil_the_cache(self, bpe):
        first = bpe.encode(" the")
        first.append(0)
        assert bpe.encode(" the") == first[:-1]


class TestSpecialTokens:
    def test_they_take_the_last_ids(self):
        tokenizer = BPETokenizer(["<|end|>", "<|user|>"]).train(TEXT[:20_000], 300)
        assert tokenizer.vocab_size == 300
        assert tokenizer.special_tokens == {"<|end|>": 298, "<|user|>": 299}

    def test_typed_they_are_text_unless_allowed(self):
        tokenizer = BPETokenizer(["<|end|>"]).train("banana banana", 300)
        end = tokenizer.special_tokens["<|end|>"]
        assert end not in tokenizer.encode("a<|end|>b")
        assert tokenizer.encode("a<|end|>b", allow_special=True) == [97, end, 98]
        assert tokenizer.decode([97, end, 98]) == "a<|end|>b"

    def test_the_longer_of_two_names_wins(self):
        tokenizer = BPETokenizer(["<|a|>", "<|a|><|b|>"])
        assert tokenizer.encode("<|a|><|b|><|a|>", allow_special=True) == [257, 256]

    def test_training_text_is_cut_at_them(self):
        tokenizer = BPETokenizer(["<|end|>"]).train("xy<|end|>" * 50, 300)
        assert [tokenizer.tokens[i] for i in range(256, tokenizer.vocab_size)] == [b"xy", b"<|end|>"]

    @pytest.mark.parametrize("bad", ["<|end|>", [""]])
    def test_a_text_for_the_list_or_an_empty_name_is_refused(self, bad):
        with pytest.raises(ValueError, match="special_tokens"):
            BPETokenizer(bad)


class TestFiles:
    def test_saved_and_loaded(self, bpe, tmp_path):
        bpe.save(tmp_path / "bpe.json")
        for cls in (BPETokenizer, Tokenizer):
            loaded = cls.load(tmp_path / "bpe.json")
            assert type(loaded) is BPETokenizer
            assert loaded.encode(TEXT[:3000] + UNUSUAL) == bpe.encode(TEXT[:3000] + UNUSUAL)

    def test_dict_survives_json(self, bpe):
        assert BPETokenizer.from_dict(json.loads(json.dumps(bpe.to_dict()))).to_dict() == bpe.to_dict()

    def test_a_save_that_fails_leaves_the_old_file_and_no_other(self, bpe, tmp_path, monkeypatch):
        path = tmp_path / "bpe.json"
        bpe.save(path)
        before = path.read_bytes()

        def fails(source, target):
            raise OSError("disk full")

        monkeypatch.setattr(os, "replace", fails)
        with pytest.raises(OSError, match="disk full"):
            BPETokenizer().save(path)
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["bpe.json"]

    @pytest.mark.parametrize("content", [
        "", "{", "[]", "{}", '{"kind": "char", "characters": ["a"]}',
        '{"kind": "bpe", "byte_ids": [0], "merges": [[7, 8, 9]], "special_tokens": {}}',
    ])
    def test_a_file_that_is_none_is_named(self, tmp_path, content):
        path = tmp_path / "broken.json"
        path.write_text(content)
        with pytest.raises(ValueError, match="broken.json"):
            BPETokenizer.load(path)

    @pytest.mark.parametrize("change", [
        {"byte_ids": [0, *range(255)]}, {"byte_ids": list(range(255))}, {"merges": [[97, 98, 3]]},
        {"special_tokens": {"<|end|>": 65}},
    ])
    def test_a_file_that_gives_one_id_two_meanings(self, tmp_path, change):
        path = tmp_path / "broken.json"
        path.write_text(json.dumps({**BPETokenizer().to_dict(), **change}))
        with pytest.raises(ValueError, match="broken.json"):
            BPETokenizer.load(path)

    def test_characters_in_another_order_would_be_other_ids(self):
        with pytest.raises(ValueError, match="not sorted"):
            CharTokenizer.from_dict({"kind": "char", "characters": ["b", "a"]})

    def test_gpt2_files_that_do_not_fit_are_named_with_the_line(self, tmp_path):
        from tinytorch.text.tokenization import byte_letters

        vocab, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
        vocab.write_text(json.dumps({letter: i for i, letter in enumerate(byte_letters())}), encoding="utf-8")
        merges.write_text("#version: 0.2\na b\n", encoding="utf-8")
        with pytest.raises(ValueError, match=r"merges.txt, line 2.*'ab'"):
            BPETokenizer.from_gpt2_files(vocab, merges)
        vocab.write_text('{"a": 0}', encoding="utf-8")
        with pytest.raises(ValueError, match="no token for the bytes"):
            BPETokenizer.from_gpt2_files(vocab, merges)
