"""A cache in a file: what is saved goes on bit by bit, what is damaged changes nothing, and no file is left behind.

Oracles: the cache that was never saved, plain arrays, a listing of the folder, and the real bytes of a file.
"""

import copy
import errno
import gc
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager

import numpy as np
import pytest

from tinytorch.core.training import load_checkpoint, save_checkpoint
from tinytorch.generation import cache_compression
from tinytorch.generation.cache_compression import OffloadedKVCache, PendingKVCache, load_cache, save_cache
from tinytorch.generation.kv_cache import (
    CacheStateError,
    KVCache,
    KVCacheConfig,
    MemoryTracker,
    enable_kv_cache,
    prefill,
    random_gpt,
)

SIZES = (2, 12, 3, 2, 8)  # B, S, L, H_kv, D: what random_gpt() with 2 rows stores
KINDS = {
    "KVCache": lambda **options: KVCache(*SIZES, **options),
    "grow": lambda **options: KVCache(*SIZES, grow=True, **options),
    "offloaded": lambda **options: OffloadedKVCache(*SIZES, **options),
    "offloaded grow": lambda **options: OffloadedKVCache(*SIZES, grow=True, **options),
}


def fill(cache, lengths=(5, 3), seed=0):
    """One pass of random tokens, `lengths` of them valid; the same for every cache of these sizes."""
    chunk = np.random.default_rng(seed).standard_normal((cache.num_layers, 2, 2, 2, max(lengths), 8))
    for layer, (key, value) in enumerate(chunk):
        cache.update(layer, key, value, list(lengths))
    cache.advance()
    return cache


def content(cache):
    """All that a reader can see of a cache, as bytes and plain numbers."""
    layers = [part.numpy().tobytes() for layer in range(cache.num_layers) for part in cache.get(layer)]
    return layers, cache.seq_lens, cache.pending_layers, cache.dtype.name


@pytest.fixture
def path(tmp_path):
    return tmp_path / "chat.safetensors"


class TestSaveAndLoad:
    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
    @pytest.mark.parametrize("into", [*KINDS, None])
    @pytest.mark.parametrize("kind", KINDS)
    def test_generation_goes_on_bit_by_bit(self, kind, into, dtype, path):
        model, ids = random_gpt(), np.random.default_rng(0).integers(0, 64, (2, 6))
        cache = KINDS[kind](dtype=dtype)
        prefill(model, ids, cache, n_new=[6, 4])
        save_cache(cache, path)
        loaded = load_cache(path) if into is None else load_cache(path, fill(KINDS[into](dtype=dtype), (7, 2)))
        assert content(loaded) == content(cache) and cache.seq_lens == [6, 4]
        for piece in (ids[:, :1], ids[:, 1:4]):
            got, expected = (model(piece, cache=each).numpy() for each in (loaded, cache))
            assert got.shape == (2, piece.shape[1], 64)
            np.testing.assert_array_equal(got, expected)
        assert content(loaded) == content(cache) and cache.seq_lens == [10, 8]

    def test_what_is_not_a_token_is_zero_after_loading_over_longer_rows(self, path):
        save_cache(fill(KVCache(*SIZES), (3, 1)), path)
        cache = load_cache(path, fill(KVCache(*SIZES), (9, 9), seed=1))
        ones = np.ones((2, 2, 8, 8))
        cache.update(0, ones, ones, [0, 8])
        cache.advance()
        assert cache.seq_lens == [3, 9] and not cache.get(2)[0].numpy()[1, :, 1:].any()
        assert not cache.get(0)[1].numpy()[0, :, 3:].any()

    def test_the_file_is_an_ordinary_safetensors_file_for_the_tokens_alone(self, path):
        cache = fill(KVCache(2, 1000, 3, 2, 8))
        save_cache(cache, path)
        tensors, metadata = load_checkpoint(path)
        assert {name: (array.shape, array.dtype.name) for name, array in tensors.items()} == {
            "key": ((3, 2, 2, 5, 8), "float32"), "value": ((3, 2, 2, 5, 8), "float32"), "lengths": ((2,), "int64")}
        assert metadata["max_seq_len"] == "1000" and tensors["lengths"].tolist() == [5, 3]
        assert path.stat().st_size < 2 * tensors["key"].nbytes + 1000
        np.testing.assert_array_equal(tensors["value"][1], cache.get(1)[1].numpy())
        assert load_cache(path).max_seq_len == 1000

    def test_an_empty_cache_and_empty_rows_are_saved_too(self, path):
        for lengths in ((0, 0), (0, 4), (12, 12)):
            cache = fill(KVCache(*SIZES), lengths) if any(lengths) else KVCache(*SIZES)
            save_cache(cache, path)
            for loaded in (load_cache(path), load_cache(path, fill(KVCache(*SIZES)))):
                assert content(loaded) == content(cache) and loaded.seq_lens == list(lengths)

    def test_another_max_seq_len_will_do_if_the_tokens_fit(self, path):
        saved = fill(KVCache(*SIZES))
        save_cache(saved, path)
        for max_seq_len in (5, 64):
            cache = load_cache(path, KVCache(2, max_seq_len, 3, 2, 8))
            assert content(cache) == content(saved) and cache.capacity == max_seq_len
        with pytest.raises(ValueError, match="max_seq_len=4"):
            load_cache(path, KVCache(2, 4, 3, 2, 8))

    def test_pending_tokens_are_refused_when_saving_and_dropped_when_loading(self, path):
        cache = fill(KVCache(*SIZES))
        save_cache(cache, path)
        before, other = path.read_bytes(), fill(KVCache(*SIZES), (2, 2), seed=1)
        other.update(1, *np.ones((2, 2, 2, 1, 8)))
        with pytest.raises(CacheStateError, match=r"\[1\].*advance\(\) or abandon\(\)"):
            save_cache(other, path)
        assert path.read_bytes() == before
        assert content(load_cache(path, other)) == content(cache)

    def test_a_cache_that_does_not_name_its_arrays_says_so(self, path):
        save_cache(KVCache(*SIZES), other := path.with_name("other"))
        cache = PendingKVCache(*SIZES)
        for call in (lambda: save_cache(cache, path), lambda: load_cache(other, cache), cache.clone):
            with pytest.raises(NotImplementedError, match="PendingKVCache does not name the arrays that it keeps"):
                call()
        assert not path.exists()

    def test_a_closed_cache_has_room_for_nothing(self, path):
        save_cache(fill(KVCache(*SIZES)), path)
        cache = KVCache(*SIZES)
        cache.close()
        with pytest.raises(ValueError, match="max_seq_len=0"):
            load_cache(path, cache)

    def test_an_enabled_model_goes_on_with_a_loaded_cache(self, path):
        model, ids = random_gpt(), np.arange(8).reshape(2, 4)
        expected = model(ids).numpy()
        model(ids[:, :3], cache=(cache := KVCache(*SIZES)))
        save_cache(cache, path)
        enable_kv_cache(model, cache=load_cache(path))
        np.testing.assert_allclose(model(ids[:, 3:]).numpy()[:, 0], expected[:, 3], atol=1e-4)


def changed(state, **arrays):
    return {**state, **arrays}


def with_number(array, number):
    array = array.copy()
    array.flat[-1] = number
    return array


DAMAGED_STATES = {
    "another model: layers": lambda s: changed(s, key=s["key"][:2], value=s["value"][:2]),
    "another model: heads": lambda s: changed(s, key=s["key"][:, :, :1], value=s["value"][:, :, :1]),
    "another model: head_dim": lambda s: changed(s, key=s["key"][..., :4], value=s["value"][..., :4]),
    "another batch": lambda s: {name: array[:, :1] if array.ndim > 1 else array[:1] for name, array in s.items()},
    "one row broadcast": lambda s: changed(s, value=s["value"][:, :1]),
    "rank": lambda s: changed(s, key=s["key"][0]),
    "values shorter than keys": lambda s: changed(s, value=s["value"][:, :, :, :4]),
    "NaN in the keys": lambda s: changed(s, key=with_number(s["key"], np.nan)),
    "-inf in the values": lambda s: changed(s, value=with_number(s["value"], -np.inf)),
    "float64": lambda s: changed(s, key=s["key"].astype(np.float64), value=s["value"].astype(np.float64)),
    "float16": lambda s: changed(s, key=s["key"].astype(np.float16), value=s["value"].astype(np.float16)),
    "integers": lambda s: changed(s, value=s["value"].astype(np.int64)),
    "lengths too long": lambda s: changed(s, lengths=np.array([6, 3])),
    "lengths too short": lambda s: changed(s, lengths=np.array([4, 3])),
    "lengths below zero": lambda s: changed(s, lengths=np.array([5, -1])),
    "lengths of another batch": lambda s: changed(s, lengths=np.array([5, 3, 1])),
    "one length": lambda s: changed(s, lengths=np.array(5)),
    "no lengths": lambda s: changed(s, lengths=np.zeros(0, np.int64)),
    "lengths in float": lambda s: changed(s, lengths=np.array([5.0, 3.0])),
    "lengths as bool": lambda s: changed(s, lengths=np.array([True, True])),
    "values missing": lambda s: {name: array for name, array in s.items() if name != "value"},
    "more than a cache": lambda s: changed(s, extra=np.zeros(3)),
    "weights": lambda s: {"norm.weight": np.ones(8, np.float32)},
    "nothing": lambda s: {},
}
DAMAGED_BYTES = {
    "empty": lambda data: b"",
    "cut in the header": lambda data: data[:40],
    "cut in the numbers": lambda data: data[:-1],
    "a tail": lambda data: data + b"\0",
    "text": lambda data: b"Dear sir or madam, this is not a cache at all, and never was.",
    "a dtype that NumPy lacks": lambda data: data.replace(b'"F32"', b'"F33"'),
    "a shape that the bytes do not have": lambda data: data.replace(b"[3, 2, 2, 5, 8]", b"[3, 2, 2, 9, 8]"),
}


class TestDamage:
    def refuse(self, path, cache):
        before, nbytes = content(cache), cache.nbytes
        with pytest.raises(ValueError, match="chat.safetensors"):
            load_cache(path, cache)
        assert content(cache) == before and cache.nbytes == nbytes

    @pytest.mark.parametrize("fault", DAMAGED_STATES)
    def test_a_state_that_does_not_fit_is_refused_and_the_cache_as_before(self, fault, path):
        save_cache(fill(KVCache(*SIZES)), path)
        state, metadata = load_checkpoint(path)
        save_checkpoint(path, DAMAGED_STATES[fault](state), metadata)
        pending = fill(KVCache(*SIZES), (2, 4), seed=1)
        pending.update(0, *np.ones((2, 2, 2, 1, 8)))
        for cache in (pending, fill(KVCache(*SIZES, grow=True), (1, 1)), KVCache(*SIZES)):
            self.refuse(path, cache)

    @pytest.mark.parametrize("fault", DAMAGED_BYTES)
    def test_bytes_that_are_no_such_file_are_refused_and_the_cache_as_before(self, fault, path):
        save_cache(fill(KVCache(*SIZES)), path)
        path.write_bytes(DAMAGED_BYTES[fault](path.read_bytes()))
        self.refuse(path, fill(KVCache(*SIZES), (2, 4), seed=1))
        with pytest.raises(ValueError, match="chat.safetensors"):
            load_cache(path)

    @pytest.mark.parametrize("max_seq_len", [None, "", "-1", "0", "x", "12.0", "٣", "4"])
    def test_a_new_cache_needs_a_max_seq_len_in_which_the_tokens_fit(self, max_seq_len, path):
        save_cache(fill(KVCache(*SIZES)), path)
        state, _ = load_checkpoint(path)
        save_checkpoint(path, state, {} if max_seq_len is None else {"max_seq_len": max_seq_len})
        with pytest.raises(ValueError, match="chat.safetensors|max_seq_len"):
            load_cache(path)
        assert load_cache(path, KVCache(*SIZES)).seq_lens == [5, 3], "a given cache has its own"

    def test_a_growing_cache_that_finds_no_room_keeps_what_it_has(self, path):
        save_cache(fill(KVCache(2, 40, 3, 2, 8), (33, 2)), path)
        tracker = MemoryTracker()
        cache = fill(KVCache(2, 40, 3, 2, 8, grow=True, tracker=tracker), (2, 4), seed=1)
        tracker.limit_bytes, before, nbytes = tracker.current + 1, content(cache), cache.nbytes
        with pytest.raises(MemoryError):
            load_cache(path, cache)
        assert content(cache) == before and cache.nbytes == nbytes == tracker.current

    def test_no_file_no_folder(self, tmp_path):
        cache = fill(KVCache(*SIZES))
        before = content(cache)
        for call in (lambda: load_cache(tmp_path / "none", cache), lambda: load_cache(tmp_path, cache),
                     lambda: save_cache(cache, tmp_path / "none" / "chat")):
            with pytest.raises(OSError):
                call()
        assert content(cache) == before and list(tmp_path.iterdir()) == []


class TestAFailedSave:
    @pytest.mark.parametrize("step", ["fsync", "replace"])
    def test_leaves_the_old_file_whole_and_nothing_beside_it(self, step, path, monkeypatch):
        save_cache(fill(KVCache(*SIZES)), path)
        before = path.read_bytes()

        def full(*args):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, step, full)
        with pytest.raises(OSError, match="No space left"):
            save_cache(fill(KVCache(*SIZES), (9, 9), seed=1), path)
        assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]

    @pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a system with SIGKILL")
    @pytest.mark.parametrize("step", ["fsync", "replace"])
    def test_a_kill_leaves_the_old_file_whole(self, step, path):
        save_cache(fill(KVCache(*SIZES)), path)
        before, cache = content(load_cache(path)), fill(KVCache(*SIZES), (9, 9), seed=1)
        program = f"""
import os, signal, sys
from tinytorch.generation.cache_compression import load_cache, save_cache
cache = load_cache(sys.argv[1])
cache.rollback(1)
os.{step} = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
save_cache(cache, sys.argv[1])
"""
        killed = subprocess.run([sys.executable, "-c", program, str(path)])
        assert killed.returncode == -signal.SIGKILL
        assert content(load_cache(path)) == before
        save_cache(cache, path)
        assert content(load_cache(path)) == content(cache)


@contextmanager
def file_limit(num_bytes):
    """Inside, no file may grow beyond so many bytes: a full disk that also stops root."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def mapped_files(folder):
    """Files in `folder` that this process has mapped, also those without a name (Linux tells, others do not)."""
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("only Linux lists what a process has mapped")
    with open("/proc/self/maps") as file:
        return {line.split(maxsplit=5)[4] for line in file if f"{folder}/" in line}


class TestOffloaded:
    def test_every_operation_gives_the_bytes_of_the_cache_in_memory(self, tmp_path):
        rng = np.random.default_rng(0)
        for grow, dtype in ((False, "float32"), (True, "float16"), (True, "float32")):
            pair = (KVCache(2, 40, 2, 2, 4, dtype=dtype),
                    OffloadedKVCache(2, 40, 2, 2, 4, dtype=dtype, grow=grow, folder=tmp_path))
            for _ in range(60):
                name = rng.choice(["pass", "pass", "pass", "half", "truncate", "rollback", "reorder", "clone", "reset"],
                                  p=[0.2, 0.2, 0.2, 0.1, 0.05, 0.1, 0.1, 0.03, 0.02])
                pair = self.both(name, pair, rng)
                memory, disk = pair
                assert content(disk) == content(memory), name
            assert os.listdir(tmp_path) == [] and memory.seq_pos > 0

    def both(self, name, pair, rng):
        free = [pair[0].max_seq_len - length for length in pair[0].seq_lens]
        n_new = [min(int(count), room) for count, room in zip(rng.integers(0, 6, 2), free)]
        lost = [int(rng.integers(0, length + 1)) // 3 for length in pair[0].seq_lens]
        chunk, rows = rng.standard_normal((2, 2, 2, 2, 5, 4)), rng.integers(0, 2, 2).tolist()
        kept = [length - count for length, count in zip(pair[0].seq_lens, lost)]
        calls = {"truncate": ("truncate", kept), "rollback": ("rollback", lost), "reorder": ("reorder", rows),
                 "pass": ("advance",), "half": ("abandon",), "reset": ("reset",), "clone": ("clone",)}
        call, *arguments = calls[name]
        for cache in pair:
            for layer in range({"pass": 2, "half": 1}.get(name, 0)):
                cache.update(layer, *chunk[layer], n_new)
        results = [getattr(cache, call)(*arguments) for cache in pair]
        return results if name == "clone" else pair

    def test_views_are_plain_read_only_arrays_that_share_the_file(self, tmp_path):
        cache = OffloadedKVCache(*SIZES, folder=tmp_path)
        view = cache.update(0, *np.ones((2, 2, 2, 3, 8)))
        assert type(view.key.numpy()) is np.ndarray and not view.key.numpy().flags.writeable
        cache.advance()
        assert np.shares_memory(view.key.numpy(), cache.get(0)[0].numpy())

    def test_a_view_outlives_its_cache(self, tmp_path):
        cache = fill(OffloadedKVCache(*SIZES, folder=tmp_path))
        key, expected = cache.get(1)[0].numpy(), cache.get(1)[0].numpy().copy()
        cache.close()
        del cache
        gc.collect()
        np.testing.assert_array_equal(key, expected)

    @pytest.mark.parametrize("end", ["close", "with", "exception", "forget", "grow", "clone", "cycle"])
    def test_the_file_goes(self, end, tmp_path):
        cache = OffloadedKVCache(*SIZES[:1], 40, *SIZES[2:], folder=tmp_path, grow=True)
        fill(cache)
        assert len(mapped_files(tmp_path)) == 1 and os.listdir(tmp_path) == []
        if end == "close":
            cache.close()
            cache.close()
            assert cache.nbytes == 0
        elif end == "with":
            with cache:
                pass
        elif end == "exception":
            with pytest.raises(RuntimeError), cache:
                raise RuntimeError
        elif end == "grow":
            fill(cache, (30, 30))
            assert len(mapped_files(tmp_path)) == 1, "the old file stays when the cache grows"
        elif end == "clone":
            twins = [cache.clone(), copy.copy(cache), copy.deepcopy(cache)]
            assert len(mapped_files(tmp_path)) == 4, "a file for each"
            del twins
        elif end == "cycle":
            cache.myself = cache
        if end not in ("close", "with", "exception"):
            del cache
            gc.collect()
        assert mapped_files(tmp_path) == set() and os.listdir(tmp_path) == []

    def test_nothing_is_left_by_a_program_that_ends_or_is_killed(self, tmp_path):
        program = """
import os, sys
from tinytorch.generation.cache_compression import OffloadedKVCache
cache = OffloadedKVCache(1, 64, 2, 2, 8, folder=sys.argv[1])
twin = cache.clone()
if sys.argv[2] == "kill":
    os.kill(os.getpid(), 9)
if sys.argv[2] == "raise":
    raise SystemExit(3)
"""
        for end, code in (("end", 0), ("raise", 3), ("kill", -9)):
            if end == "kill" and os.name == "nt":
                continue
            ended = subprocess.run([sys.executable, "-c", program, str(tmp_path), end])
            assert ended.returncode == code and os.listdir(tmp_path) == []

    def test_a_clone_has_a_file_of_its_own_in_the_same_folder_and_all_options(self, tmp_path):
        tracker = MemoryTracker()
        config = KVCacheConfig(3, 12, 2, 8, batch_size=2, dtype=np.float16)
        cache = OffloadedKVCache.from_config(config, tracker, folder=tmp_path, strict=True, grow=True)
        twin = fill(cache).clone()
        assert type(twin) is OffloadedKVCache and content(twin) == content(cache)
        assert (twin.strict, twin.grow, twin._folder) == (True, True, tmp_path)
        assert tracker.usage("kv_cache") == cache.nbytes + twin.nbytes
        fill(twin, (1, 1), seed=1)
        assert cache.seq_lens == [5, 3] and twin.seq_lens == [6, 4]
        for each in (cache, twin):
            each.close()
        assert tracker.current == 0

    def test_the_bytes_are_taken_from_the_disk_at_once(self, tmp_path):
        assert os.path.isdir(tmp_path)
        for reserve in (True, False):
            with tempfile.TemporaryFile(dir=tmp_path) as file, pytest.MonkeyPatch.context() as patch:
                if not reserve:
                    patch.delattr(os, "posix_fallocate", raising=False)
                cache_compression.take_bytes(file, 3 * 2**20 + 5)
                found = os.fstat(file.fileno())
                assert found.st_size == 3 * 2**20 + 5
                assert getattr(found, "st_blocks", 2**20) * 512 >= found.st_size, "a sparse file fails when it is late"
                file.seek(0)
                assert not any(file.read())

    @pytest.mark.parametrize("reserve", [True, False])
    def test_a_full_disk_is_said_clearly_and_leaves_nothing(self, reserve, tmp_path, monkeypatch):
        if not reserve:
            monkeypatch.delattr(os, "posix_fallocate", raising=False)
        tracker, small = MemoryTracker(), fill(OffloadedKVCache(2, 40, 3, 2, 8, folder=tmp_path, grow=True))
        before, nbytes = content(small), small.nbytes
        with file_limit(nbytes), pytest.raises(OSError, match=f"bytes does not go into {tmp_path}.*folder="):
            OffloadedKVCache(2, 64, 3, 2, 8, folder=tmp_path, tracker=tracker)
        with file_limit(nbytes), pytest.raises(OSError, match=str(nbytes * 2)):
            fill(small, (20, 20))
        assert tracker.current == 0 and os.listdir(tmp_path) == [] and len(mapped_files(tmp_path)) == 1
        assert content(small) == before and small.nbytes == nbytes, "what would not grow is as it was"
        fill(small, (2, 2))
        assert small.seq_lens == [7, 5]

    def test_a_folder_that_is_none_is_named(self, tmp_path):
        tracker = MemoryTracker()
        with pytest.raises(OSError, match="missing"):
            OffloadedKVCache(*SIZES, folder=tmp_path / "missing", tracker=tracker)
        assert tracker.current == 0

    def test_a_model_runs_on_it_by_enable_kv_cache(self, tmp_path):
        model = random_gpt()
        expected = model.generate([1, 2, 3], 9)
        cache = enable_kv_cache(model, factory=OffloadedKVCache, folder=tmp_path, grow=True)
        assert model.generate([1, 2, 3], 9) == expected and cache.seq_lens == [11]
        model.blocks[1].attention.part.causal = False  # the next model is refused, and its new file goes
        with pytest.raises(ValueError, match="causal"):
            enable_kv_cache(model, factory=OffloadedKVCache, folder=tmp_path)
        assert len(mapped_files(tmp_path)) == 1
