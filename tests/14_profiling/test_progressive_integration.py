"""Lesson 14 against lessons 01 to 13: profiles of real models, which come out of it as they went in."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from tinytorch.core.activations import ReLU
from tinytorch.core.layers import Dropout, Linear, Module, Sequential
from tinytorch.core.losses import cross_entropy
from tinytorch.core.tensor import Tensor, plug_in
from tinytorch.models.transformer import GPT
from tinytorch.profiling.profiler import (
    FlopCounter,
    MemoryTracker,
    Profiler,
    array_bytes,
    count_flops,
    count_parameters,
    layer_table,
    measure_latency,
    measure_memory,
    plugged_in,
    profile_layers,
)


def small_gpt(**options):
    sizes = {"vocab_size": 40, "embed_dim": 16, "num_layers": 2, "num_heads": 4, "max_seq_len": 24} | options
    return GPT(**sizes, rng=np.random.default_rng(0))


def mlp():
    rng = np.random.default_rng(0)
    return Sequential(Linear(8, 32, rng=rng), ReLU(), Dropout(0.5), Linear(32, 4, rng=rng))


def gpt_flops(model, B, T):
    """By hand: four products per block with weights, two of attention, and the head."""
    E, D = model.embed_dim, model.embed_dim // model.num_heads
    qkv = (model.num_heads + 2 * model.num_kv_heads) * D
    weights = E * qkv + E * E + 2 * 4 * E * E
    block = 2 * B * T * weights + 2 * 2 * B * T * T * E
    return model.num_layers * block + 2 * B * T * E * model.vocab_size


class TestCounting:
    @pytest.mark.parametrize("tie", [True, False])
    def test_parameters_of_gpt(self, tie):
        model = small_gpt(tie_weights=tie)
        E, V = 16, 40
        block = 2 * 2 * E + (3 * E * E + 3 * E) + (E * E + E) + (4 * E * E + 4 * E) + (4 * E * E + E)
        assert count_parameters(model) == V * E + 24 * E + 2 * block + 2 * E + (0 if tie else V * E)
        assert array_bytes(model) == 4 * count_parameters(model)

    @pytest.mark.parametrize(("B", "T"), [(1, 1), (2, 7), (3, 24)])
    @pytest.mark.parametrize("kv_heads", [None, 2, 1])
    def test_flops_of_gpt(self, B, T, kv_heads):
        model = small_gpt(num_kv_heads=kv_heads)
        assert count_flops(model, (B, T)) == gpt_flops(model, B, T)

    def test_input_and_shape_give_the_same(self):
        model, ids = small_gpt(), np.random.default_rng(0).integers(0, 40, (2, 5))
        assert count_flops(model, ids) == count_flops(model, Tensor(ids)) == count_flops(model, (2, 5)) > 0
        assert count_flops(mlp(), (3, 8)) == 2 * 3 * (8 * 32 + 32 * 4)

    def test_counting_leaves_model_and_engine_alone(self):
        model = mlp()
        model.train()
        count_flops(model, (3, 8))
        assert model.training and all(m.training for m in model.modules() if isinstance(m, Module))
        loss = cross_entropy(model(Tensor(np.ones((3, 8)))), Tensor([0, 1, 2]))
        loss.backward()
        grads = [p.grad for p in model.parameters()]
        assert len(grads) == 4 and all(g is not None for g in grads), "autograd must be plugged in again"

    def test_engine_is_back_after_an_error(self):
        before = plug_in(None)
        plug_in(before)
        with pytest.raises(ValueError), plugged_in(FlopCounter()):
            mlp()(Tensor(np.ones((3, 7))))
        now = plug_in(before)
        assert now is before


class TestLatency:
    def test_calls_and_spread(self):
        calls = []
        seconds = measure_latency(calls.append, 1, warmup=3, repeats=9)
        assert len(calls) == 12 and len(seconds.all) == 9
        assert 0 <= min(seconds.all) <= seconds.low <= seconds <= seconds.high <= max(seconds.all)
        assert seconds == np.median(seconds.all) and "ms" in str(seconds)

    def test_settings_of_the_profiler(self):
        calls = []
        Profiler(warmup=1, repeats=4).measure_latency(calls.append, 1)
        assert len(calls) == 5
        Profiler(warmup=1, repeats=4).measure_latency(calls.append, 1, warmup=0, repeats=2)
        assert len(calls) == 7

    @pytest.mark.parametrize("bad", [{"repeats": 0}, {"warmup": -1}])
    def test_nothing_to_time(self, bad):
        with pytest.raises(ValueError, match="repeats"):
            measure_latency(int, **bad)


class TestMemory:
    def test_peak_kept_and_result(self):
        def work(n):
            moment = np.ones(4 * n, np.uint8)
            return moment[:n].copy()

        got = measure_memory(work, 2**20)
        assert got["result_bytes"] == 2**20
        assert got["kept_bytes"] == pytest.approx(2**20, rel=0.02)
        assert got["peak_bytes"] == pytest.approx(5 * 2**20, rel=0.02)

    def test_training_keeps_more_than_evaluation(self):
        model, x = small_gpt(embed_dim=64), np.ones((4, 24), int)
        training = measure_memory(model, x)["kept_bytes"]
        model.eval()
        profiler = Profiler()
        for parameter in model.parameters():
            parameter.requires_grad = False
        evaluation = profiler.measure_memory(model, x)["kept_bytes"]
        assert 4 * 4 * 24 * 40 <= evaluation < 0.1 * training

    def test_array_bytes_counts_shared_memory_once(self):
        base = np.zeros((4, 8), np.float32)
        assert array_bytes([base, base[1:], Tensor(base), {"again": base.T}]) == 4 * 4 * 8
        assert array_bytes({"a": np.zeros(3, np.int8), "b": (np.zeros(2), 5, None)}) == 3 + 16


class TestReport:
    def test_rows_of_gpt(self):
        model = small_gpt()
        rows = profile_layers(model, (2, 6), warmup=0, repeats=2)
        names = [row["name"] for row in rows]
        assert names[0] == "GPT" and len(set(names)) == len(names)
        assert {"token_embedding", "blocks.0.attention.qkv_proj", "blocks.1.mlp", "norm", "head"} <= set(names)
        by_name = {row["name"]: row for row in rows}
        assert by_name["GPT"]["flops"] == gpt_flops(model, 2, 6)
        assert by_name["GPT"]["parameters"] == count_parameters(model)
        assert by_name["head"]["flops"] == 2 * 2 * 6 * 16 * 40 and by_name["head"]["shape"] == (2, 6, 40)
        attention = by_name["blocks.0.attention"]
        inside = by_name["blocks.0.attention.qkv_proj"]["flops"] + by_name["blocks.0.attention.out_proj"]["flops"]
        assert attention["flops"] - inside == 2 * 2 * 2 * 6 * 6 * 16, "scores and mixed values are attention's own"
        assert all(row["calls"] == 1 for row in rows), [r["name"] for r in rows if r["calls"] != 1]
        assert all(row["seconds"] > 0 for row in rows)

    def test_own_times_add_up_to_the_whole(self):
        model = mlp()
        rows = profile_layers(model, (64, 8), warmup=1, repeats=1)
        assert [row["name"] for row in rows] == ["Sequential", "0", "1", "2", "3"]
        assert sum(row["own_seconds"] for row in rows) == pytest.approx(rows[0]["seconds"], rel=1e-6)

    @pytest.mark.parametrize("make", [small_gpt, mlp])
    def test_the_very_same_parts_are_back(self, make):
        model = make()
        x = np.ones((2, 6), int) if make is small_gpt else np.ones((2, 8), np.float32)
        model.eval()
        before, expected = [id(m) for m in model.modules()], model(Tensor(x)).numpy().copy()
        names = [name for name, _ in model.named_parameters()]
        profile_layers(model, x, warmup=0, repeats=1)
        assert [id(m) for m in model.modules()] == before and not model.training
        assert [name for name, _ in model.named_parameters()] == names
        after = model(Tensor(x)).numpy()
        assert after.shape == expected.shape and np.array_equal(after, expected)

    def test_parts_are_back_after_an_error(self):
        model = small_gpt()
        before = [id(m) for m in model.modules()]
        with pytest.raises(ValueError):
            profile_layers(model, (1, 25))  # longer than max_seq_len
        assert [id(m) for m in model.modules()] == before and model.training

    def test_parts_in_tuples_and_parts_used_twice(self):
        class Twice(Module):
            def __init__(self):
                shared = Linear(4, 4, rng=np.random.default_rng(0))
                self.layers = (shared, ReLU(), shared)
                self.inner = Linear(4, 4, rng=np.random.default_rng(1))

            def forward(self, x):
                for layer in self.layers:
                    x = layer(x)
                return self.inner(self.inner(x))

        model = Twice()
        layers = model.layers
        rows = {row["name"]: row for row in profile_layers(model, (3, 4), warmup=0, repeats=1)}
        assert all(a is b for a, b in zip(model.layers, layers)) and len(model.layers) == 3
        assert rows["inner"]["calls"] == 2 and rows["inner"]["flops"] == 2 * 2 * 3 * 4 * 4
        assert rows["Twice"]["flops"] == 4 * 2 * 3 * 4 * 4
        assert rows["Twice"]["parameters"] == 2 * 20, "the shared layer's parameters count once"

    def test_table_and_plot(self, tmp_path):
        profiler = Profiler(warmup=0, repeats=1)
        rows = profiler.profile_layers(small_gpt(), (1, 4))
        lines = layer_table(rows).splitlines()
        assert len(lines) == len(rows) + 2 and len({len(line) for line in lines}) == 1
        assert layer_table(rows).isascii() and f"{rows[0]['parameters']:,}" in lines[2]
        pytest.importorskip("matplotlib").use("Agg")
        assert profiler.plot(rows, tmp_path / "layers.png") is not None
        assert (tmp_path / "layers.png").stat().st_size > 1000

    def test_importing_needs_no_matplotlib_and_prints_nothing(self):
        code = "import sys, tinytorch.profiling.profiler; assert 'matplotlib' not in sys.modules"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)})
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class TestMemoryTracker:
    def test_several_purposes_add_up_and_come_back(self):
        tracker = MemoryTracker()
        weights, cache = tracker.allocate(100, "weights"), tracker.allocate(30, purpose="kv_cache")
        more = tracker.allocate(np.int64(20), "kv_cache")
        assert (tracker.current, tracker.peak) == (150, 150)
        assert tracker.by_purpose == {"weights": 100, "kv_cache": 50} and tracker.usage("kv_cache") == 50
        for handle in (cache, cache, more, weights, weights):
            handle.close()
        assert (tracker.current, tracker.peak, tracker.by_purpose) == (0, 150, {})
        assert tracker.usage() == tracker.usage("never") == 0

    def test_limit_refuses_before_anything_is_counted(self):
        tracker = MemoryTracker(limit_bytes=100)
        tracker.allocate(60, "a")
        with pytest.raises(MemoryError, match="41.*60.*100"):
            tracker.allocate(41, "b")
        assert (tracker.current, tracker.peak, tracker.by_purpose) == (60, 60, {"a": 60})
        tracker.allocate(40, "b")
        tracker.allocate(0, "c")
        with pytest.raises(MemoryError):
            tracker.allocate(1)

    def test_with_gives_back_also_after_an_error(self):
        tracker = MemoryTracker()
        with pytest.raises(LookupError), tracker.allocate(10) as handle:
            assert handle.num_bytes == 10 and tracker.current == 10
            raise LookupError
        assert tracker.current == 0 and handle.closed

    @pytest.mark.parametrize("bad", [-1, 1.5, "3", None, True, float("nan")])
    def test_bytes_are_whole_numbers(self, bad):
        tracker = MemoryTracker()
        with pytest.raises(ValueError, match="num_bytes"):
            tracker.allocate(bad)
        if bad is not None:
            with pytest.raises(ValueError, match="limit_bytes"):
                MemoryTracker(bad)
        assert tracker.current == 0

    def test_threads_share_one_limit(self):
        tracker, granted = MemoryTracker(limit_bytes=1000), []

        def ask():
            for _ in range(200):
                try:
                    granted.append(tracker.allocate(7))
                except MemoryError:
                    pass

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(granted) == 1000 // 7 and tracker.current == 7 * len(granted)
        for handle in granted:
            handle.close()
        assert tracker.current == 0
