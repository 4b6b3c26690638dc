"""The scheduler: whoever else is there, every request gets the text that it would have got alone.

Oracle: `GPT.generate` without a cache, run for one request. Floats are summed in another order in a batch, so only
requests are used whose choices are clear: `alone` measures the gaps, and requests that come near a tie are not drawn.
"""

from dataclasses import replace

import numpy as np
import pytest

from tinytorch.core.tensor import manual_seed
from tinytorch.generation.kv_cache import disable_kv_cache, enable_kv_cache, random_gpt
from tinytorch.generation.paged import (
    OutOfBlocks,
    PagedModelKVCache,
    Request,
    Scheduler,
    share_budget,
    tokens_to_run,
)
from tinytorch.models.transformer import next_probabilities

MODEL, ORACLE = random_gpt(), random_gpt()  # twins: 3 layers, 2 key-value heads of 8, vocabulary 64, max_seq_len 64
PREFIXES = [list(range(20)), list(range(40, 50))]
CLEAR = {"logit": 1e-3, "probability": 1e-5}  # rounding moves a logit by about 1e-5


def pool_of(num_blocks=40, block_size=4, max_seqs=8):
    return PagedModelKVCache(num_blocks, block_size, 3, 2, 8, max_seqs)


def smallest_gaps(request, text):
    """How near the choices of this text came to a tie: smallest distance of two logits, and of a draw to an edge."""
    start, rng = len(request.prompt), np.random.default_rng(request.seed)
    logits = ORACLE(text[:-1]).numpy()[0, start - 1 :]
    best = -np.sort(-logits, axis=-1)
    if request.temperature == 0:
        return {"logit": (best[:, 0] - best[:, 1]).min(), "probability": 1}
    ends = np.cumsum(next_probabilities(logits, request.temperature, request.top_k), axis=-1)
    draws = np.array([rng.random() for _ in ends])[:, None] * ends[:, -1:]
    k = request.top_k or 64
    kept = (best[:, k - 1] - best[:, k]).min() if k < 64 else 1
    return {"logit": kept, "probability": np.abs(ends - draws).min()}


def alone(request):
    """The new tokens of one request without a cache and without company, and whether every choice was clear."""
    text = ORACLE.generate(request.prompt, request.max_new_tokens, temperature=request.temperature,
                          top_k=request.top_k, rng=np.random.default_rng(request.seed), stop_token=request.stop_token)
    gaps = smallest_gaps(request, text)
    return text[len(request.prompt) :], all(gaps[name] > CLEAR[name] for name in CLEAR)


def clear_request(rng, most=60):
    """(request, its text alone): of any kind, at most so many tokens long, and no choice near a tie."""
    while True:
        prompt = rng.integers(0, 64, rng.integers(1, 16)).tolist()
        if rng.random() < 0.4:
            prompt = PREFIXES[rng.integers(2)] + prompt
        prompt = prompt[: most - 1]
        request = Request(prompt, int(rng.integers(1, min(16, most - len(prompt)) + 1)),
                          temperature=float(rng.choice([0, 0.7, 1.5])), top_k=[None, 1, 5][rng.integers(3)],
                          stop_token=[None, 5, range(10)][rng.integers(3)], seed=int(rng.integers(1000)))
        text, clear = alone(request)
        if clear:
            return request, text


class Watch:
    """Counts what passes through the model: shapes of ids per pass, rows of the head; fails at call `fail_at`."""

    def __init__(self, monkeypatch, *parts):
        self.shapes, self.head_rows, self.calls, self.fail_at = [], 0, 0, None
        for owner, name in [(MODEL, "token_embedding"), (MODEL, "head"), *parts]:
            monkeypatch.setattr(owner, name, self.counting(getattr(owner, name), name))

    def counting(self, part, name):
        def call(x):
            self.calls += 1
            if self.calls == self.fail_at:
                raise RuntimeError("the model failed")
            if name == "token_embedding":
                self.shapes.append(np.asarray(x).shape)
            elif name == "head":
                self.head_rows += len(x.data)
            return part(x)

        return call

    def take(self):
        """Shapes and head rows since the last call."""
        taken, self.shapes, self.head_rows = (self.shapes, self.head_rows), [], 0
        return taken


@pytest.fixture
def watch(monkeypatch):
    return Watch(monkeypatch)


def check_bookkeeping(scheduler, pool):
    """Blocks are held by running requests only, and both lists are one queue in order of arrival."""
    held = {block for request in scheduler.running for block in pool.tables.table(request.seq)}
    assert pool.num_free() == pool.num_blocks - len(held)
    queue = [request.request_id for request in scheduler.running + scheduler.waiting]
    assert queue == sorted(queue)
    assert {request.state for request in scheduler.running} <= {"running"}
    assert {request.state for request in scheduler.waiting} <= {"waiting"}
    assert all(request.seq is None for request in scheduler.waiting)
    assert len(scheduler.running) <= scheduler.max_running


def watched_step(scheduler, watch):
    """One step; asserts the budget, the rows of the head, and that everybody who decodes gets a token."""
    decoding = [(r, len(r.tokens)) for r in scheduler.running if len(r.prompt + r.tokens) - 1 == stored(scheduler, r)]
    before = scheduler.preemptions
    new = scheduler.step()
    shapes, head_rows = watch.take()
    done = [request for request, _ in new if request.state == "finished"]
    assert sum(rows for rows, _ in shapes) == len(scheduler.running) + len(done), "a row of the batch stood idle"
    assert sum(rows * count for rows, count in shapes) <= scheduler.token_budget
    assert len({count for _, count in shapes}) == len(shapes), f"passes of one length are one pass: {shapes}"
    assert head_rows == len(new) == len({request for request, _ in new})
    late = [request for request, had in decoding if len(request.tokens) == had]
    assert not late or scheduler.preemptions > before
    return new


def finish(scheduler, most=500):
    """`run`, but a mistake ends as a failure and not as a test that hangs."""
    for _ in range(most):
        if not scheduler.has_work:
            return
        scheduler.step()
    raise AssertionError(f"still at work after {most} steps")


def stored(scheduler, request):
    return scheduler.cache.seq_len(request.seq)


def serve(scheduler, pool, requests, rng, watch, cancel_rate=0.0):
    """Requests arrive over time, some are cancelled; returns what step() told, per request."""
    coming, told, admitted, steps = list(requests), {request: [] for request in requests}, [], 0
    while coming or scheduler.has_work:
        while coming and rng.random() < 0.5:
            scheduler.add(coming.pop(0))
        for request, token in watched_step(scheduler, watch):
            told[request].append(token)
        admitted += [r for r in scheduler.running if r not in admitted]
        if rng.random() < cancel_rate:
            choice = requests[rng.integers(len(requests))]
            could = choice in scheduler.waiting + scheduler.running
            assert scheduler.cancel(choice.request_id) is could
        check_bookkeeping(scheduler, pool)
        steps += 1
        assert steps < 3000, "no progress"
    order = [request.request_id for request in admitted]
    assert order == sorted(order), "somebody overtook"
    return told


class TestTheTextIsTheOneThatARequestGetsAlone:
    @pytest.mark.parametrize("budget", [1, 2, 3, 7, 16, 1000])
    @pytest.mark.parametrize("seed", range(6))
    def test_random_scenarios(self, budget, seed, watch):
        """Pools from too small to ample, arrivals, cancellations, shared prefixes, stop tokens, all temperatures."""
        rng = np.random.default_rng([seed, budget])
        block_size = int(rng.integers(1, 9))
        num_blocks = int(rng.integers(48 // block_size, 160 // block_size))
        pool = pool_of(num_blocks, block_size, max_seqs=int(rng.integers(1, 8)))
        scheduler = Scheduler(MODEL, pool, budget, max_running=[None, 2, 100][rng.integers(3)])
        drawn = [clear_request(rng, min(60, num_blocks * block_size)) for _ in range(9)]
        told = serve(scheduler, pool, [request for request, _ in drawn], rng, watch, cancel_rate=0.15 * (seed % 2))
        for request, text in drawn:
            assert request.tokens == told[request]
            if request.state == "cancelled":
                assert request.finish_reason == "cancelled" and request.tokens == text[: len(request.tokens)]
                continue
            assert request.state == "finished" and request.tokens == text
            stops = np.isin(text[-1], [] if request.stop_token is None else request.stop_token)
            assert request.finish_reason == ("stop" if stops else "length")
        assert pool.num_free() == num_blocks and not pool.tables.sequences()

    @pytest.mark.parametrize("budget", [1, 5, 100])
    def test_a_pool_that_only_one_fits(self, budget, watch):
        """Twelve blocks of two: preemption again and again. Nothing is lost or repeated, and it ends."""
        rng = np.random.default_rng(budget)
        pool = pool_of(num_blocks=12, block_size=2)
        scheduler = Scheduler(MODEL, pool, budget)
        drawn = [clear_request(rng, 24) for _ in range(10)]
        serve(scheduler, pool, [request for request, _ in drawn], rng, watch)
        assert [request.tokens for request, _ in drawn] == [text for _, text in drawn]
        assert scheduler.preemptions > 0 or budget == 1
        assert pool.num_free() == 12

    def test_sampling_goes_on_where_preemption_stopped_it(self):
        """The request gave way in mid-text, and its draws are those of one generator from beginning to end."""
        rng = np.random.default_rng(0)
        while True:
            request = Request(rng.integers(0, 64, 6).tolist(), 12, temperature=1.3, seed=8)
            text, clear = alone(request)
            if clear:
                break
        pool = pool_of(num_blocks=8)
        scheduler = Scheduler(MODEL, pool)
        scheduler.add(Request([1] * 8, 20))
        scheduler.add(request)
        given_way = 0
        while scheduler.has_work:
            scheduler.step()
            given_way += request.state == "waiting" and len(request.tokens) > 2
        assert given_way and request.tokens == text

    def test_who_came_before_and_comes_after_changes_nothing(self):
        """500 rounds on one pool: whatever its blocks held, the same request gets the same text."""
        pool, rng = pool_of(num_blocks=9), np.random.default_rng(1)
        request, text = clear_request(rng, 20)
        scheduler, ids = Scheduler(MODEL, pool), set()
        for round_ in range(100):
            mine = replace(request)
            ids |= {scheduler.add(Request(rng.integers(0, 64, 5).tolist(), 3)), scheduler.add(mine)}
            scheduler.run()
            assert mine.tokens == text, round_
        assert len(ids) == 200 and pool.num_free() == 9

    def test_no_seed_takes_the_courses(self):
        def texts():
            manual_seed(3)
            requests = [Request([1, 2, 3], 10, temperature=2.0) for _ in range(2)]
            scheduler = Scheduler(MODEL, pool_of())
            for request in requests:
                scheduler.add(request)
            scheduler.run()
            return [request.tokens for request in requests]

        first, second = texts(), texts()
        assert first == second and first[0] != first[1]


class TestWhatRuns:
    def test_share_budget_against_one_token_at_a_time(self):
        """Oracle: hand the budget out token by token, to the first in line who lacks one."""
        rng = np.random.default_rng(0)
        for _ in range(300):
            lacks = rng.integers(1, [2, 9][rng.integers(2)], rng.integers(0, 8)).tolist()
            budget = int(rng.integers(1, 30))
            line = sorted(range(len(lacks)), key=lambda i: (lacks[i] != 1, i))
            tokens = [i for i in line for _ in range(lacks[i])][:budget]
            assert share_budget(lacks, budget) == [tokens.count(i) for i in range(len(lacks))]

    def test_tokens_to_run_and_what_is_stored_are_the_text(self):
        for stored_tokens in range(8):
            assert [0, 1, 2, 3, 4, 5, 6][:stored_tokens] + tokens_to_run([0, 1, 2, 3], [4, 5, 6], stored_tokens) \
                == [0, 1, 2, 3, 4, 5, 6]

    def test_rows_without_preemption_are_exactly_those_of_a_cached_generate(self, watch):
        """P + n - 1 token rows for each, whatever the budget; the head runs once per new token."""
        for budget in (1, 4, 64):
            scheduler = Scheduler(MODEL, pool_of(), budget)
            for length in (5, 9, 13):
                scheduler.add(Request(list(range(length, 2 * length)), 6))
            scheduler.run()
            shapes, head_rows = watch.take()
            assert sum(rows * count for rows, count in shapes) == sum(length + 5 for length in (5, 9, 13))
            assert head_rows == 3 * 6

    def test_a_long_prompt_comes_in_chunks_beside_those_who_decode(self, watch):
        scheduler = Scheduler(MODEL, pool_of(), token_budget=10)
        for prompt in ([1], [2]):
            scheduler.add(Request(prompt, 30))
        scheduler.step()
        watch.take()
        scheduler.add(Request(list(range(20)), 1))
        shapes = []
        for _ in range(3):
            assert len(watched_shapes(scheduler, watch, shapes)) >= 2
        assert shapes == [[(2, 1), (1, 8)], [(2, 1), (1, 8)], [(2, 1), (1, 4)]]

    def test_who_decodes_is_one_batch(self, watch):
        scheduler = Scheduler(MODEL, pool_of())
        for length in (3, 3, 7):
            scheduler.add(Request(list(range(length)), 4))
        shapes = []
        while scheduler.has_work:
            watched_shapes(scheduler, watch, shapes)
        assert shapes == [[(2, 3), (1, 7)], [(3, 1)], [(3, 1)], [(3, 1)]]

    def test_a_shared_prefix_is_run_and_stored_once(self, watch):
        pool = pool_of(block_size=4)
        scheduler = Scheduler(MODEL, pool)
        scheduler.add(Request(list(range(18)), 20))
        scheduler.step()
        assert (watch.take()[0], pool.num_free()) == ([(1, 18)], 35)
        scheduler.add(Request([*range(16), 60, 61], 20))
        scheduler.step()
        assert (watch.take()[0], pool.num_free()) == ([(1, 1), (1, 2)], 34)

    def test_a_resumed_request_finds_its_own_blocks(self, watch):
        """The newest gave way with 4 full blocks, prompt and new tokens; one of them is taken before it comes back."""
        pool = pool_of(num_blocks=8)
        scheduler, older, newer = Scheduler(MODEL, pool), Request([1] * 8, 12), Request([2] * 8, 20)
        scheduler.add(older)
        scheduler.add(newer)
        while not scheduler.preemptions:
            assert scheduler.has_work
            scheduler.step()
        text = newer.prompt + newer.tokens
        while newer.state == "waiting":
            watch.take()
            scheduler.step()
        rows = sum(rows * count for rows, count in watch.take()[0])
        assert (len(text), rows) == (17, 5)

    def test_max_running(self):
        scheduler = Scheduler(MODEL, pool_of(), max_running=1)
        requests = [Request([i], 3) for i in range(3)]
        for request in requests:
            scheduler.add(request)
        order = []
        while scheduler.has_work:
            order += [request.request_id for request, _ in scheduler.step()]
            assert len(scheduler.running) <= 1
        assert order == [0, 0, 0, 1, 1, 1, 2, 2, 2]

    def test_a_step_with_nothing_to_do(self, watch):
        scheduler = Scheduler(MODEL, pool_of())
        assert scheduler.step() == [] and not scheduler.has_work and watch.calls == 0


def watched_shapes(scheduler, watch, shapes):
    watched_shapes_now = []
    new = scheduler.step()
    watched_shapes_now, rows = watch.take()
    assert rows == len(new)
    shapes.append(watched_shapes_now)
    return watched_shapes_now


class TestFairness:
    def test_the_newest_gives_way_and_the_oldest_never(self):
        pool = pool_of(num_blocks=8, block_size=2)
        scheduler = Scheduler(MODEL, pool)
        requests = [Request([i, i + 1], 13) for i in range(3)]
        for request in requests:
            scheduler.add(request)
        gave_way = []
        while requests[0].state != "finished":
            scheduler.step()
            gave_way += [r.request_id for r in scheduler.waiting if r.request_id not in gave_way]
            assert requests[0].state in ("running", "finished")
        assert gave_way == [2, 1], "first the newest, then the next"
        assert len(requests[0].tokens) == 13

    def test_a_large_request_is_not_overtaken_by_small_ones(self):
        """A stream of small requests never ends; the large one needs the whole pool, and still comes to its end."""
        pool = pool_of(num_blocks=8)
        scheduler, large = Scheduler(MODEL, pool), Request(list(range(26)), 7)
        for i in range(3):
            scheduler.add(Request([i], 8))
        scheduler.step()
        scheduler.add(large)
        for step in range(60):
            if large.state == "finished":
                break
            late = Request([step % 64], 8)
            scheduler.add(late)
            scheduler.step()
            assert large.state != "waiting" or late.state == "waiting"
        assert len(large.tokens) == 7

    @pytest.mark.parametrize(("first", "second"), [((16, 4), (12, 4)), ((24, 4), (12, 4))])
    def test_nobody_is_let_in_only_to_give_way(self, first, second):
        """Admission counts the blocks that those who run still need for their prompts, not only those they hold."""
        pool = pool_of(num_blocks=first[0] // 4 + 2)
        scheduler, requests = Scheduler(MODEL, pool, token_budget=10), [Request([n] * n, m) for n, m in (first, second)]
        for request in requests:
            scheduler.add(request)
        finish(scheduler)
        assert scheduler.preemptions == 0
        assert [len(request.tokens) for request in requests] == [4, 4]

    def test_a_pool_that_others_hold_is_an_error_not_a_loop(self):
        pool = pool_of(num_blocks=4)
        outside = pool.add_sequence()
        with pool.rows([outside]).attached_to(MODEL):
            MODEL(np.arange(12)[None])
        scheduler, request = Scheduler(MODEL, pool), Request(list(range(20, 30)), 2)
        scheduler.add(request)
        with pytest.raises(OutOfBlocks, match="1 of 4 blocks are free"):
            finish(scheduler)
        assert request.state == "waiting" and pool.num_free() == 1
        pool.finish_sequence(outside)
        scheduler.run()
        assert request.finish_reason == "length" and pool.num_free() == 4


class TestAdd:
    @pytest.mark.parametrize(("change", "message"), [
        (dict(prompt=[]), "at least one"),
        (dict(prompt=[1, 64]), "0 to 63"),
        (dict(prompt=[-1]), "0 to 63"),
        (dict(prompt=[1.5]), "whole numbers"),
        (dict(prompt=["a"]), "whole numbers"),
        (dict(prompt=[True]), "whole numbers"),
        (dict(prompt=None), "token ids"),
        (dict(prompt=[[1, 2], [3, 4]]), "one list of ids"),
        (dict(prompt=[[1, 2], [3]]), "different lengths"),
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(max_new_tokens=-3), "max_new_tokens"),
        (dict(max_new_tokens=2.0), "max_new_tokens"),
        (dict(max_new_tokens=True), "max_new_tokens"),
        (dict(max_new_tokens=None), "max_new_tokens"),
        (dict(max_new_tokens=62), "max_seq_len=64"),
        (dict(max_new_tokens=10**30), "max_seq_len=64"),
        (dict(prompt=[1] * 20, max_new_tokens=22), "11 blocks of 4, the pool has 10"),
        (dict(temperature=-0.1), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(temperature="hot"), "temperature"),
        (dict(temperature=None), "temperature"),
        (dict(top_k=0), "top_k"),
        (dict(top_k=1.5), "top_k"),
        (dict(stop_token="x"), "stop_token"),
        (dict(stop_token=[1, 2.5]), "stop_token"),
        (dict(stop_token=[[1, 2], [3]]), "stop_token"),
        (dict(stop_token=-1), "stop_token"),
        (dict(stop_token=True), "stop_token"),
        (dict(seed=-1), "seed"),
        (dict(seed="x"), "seed"),
    ], ids=str)
    def test_refuses_what_can_never_run_and_nothing_changes(self, change, message):
        pool = pool_of(num_blocks=10)
        scheduler, asked = Scheduler(MODEL, pool), {"prompt": [1, 2, 3], "max_new_tokens": 4, **change}
        request = Request(**asked)
        with pytest.raises(ValueError, match=message):
            scheduler.add(request)
        assert (request.request_id, request.prompt, request.rng) == (None, asked["prompt"], None)
        assert not scheduler.has_work and pool.num_free() == 10
        assert scheduler.add(Request([1], 1)) == 0, "the refused request used up an id"

    def test_what_just_fits(self):
        pool = pool_of(num_blocks=10)
        scheduler = Scheduler(MODEL, pool)
        requests = [Request([1] * 20, 21), Request(np.arange(30), 11), Request([5], 40, stop_token=np.int64(70))]
        for request in requests:
            scheduler.add(request)
        scheduler.run()
        assert [len(request.tokens) for request in requests] == [21, 11, 40]
        assert requests[1].tokens == ORACLE.generate(list(range(30)), 11)[30:]
        long = Request([1, 2], 62)
        scheduler = Scheduler(MODEL, pool_of())
        scheduler.add(long)
        scheduler.run()
        assert len(long.tokens) == 62

    def test_a_request_is_added_once(self):
        scheduler, request = Scheduler(MODEL, pool_of()), Request([1], 2)
        scheduler.add(request)
        for other in (scheduler, Scheduler(MODEL, pool_of())):
            with pytest.raises(ValueError, match="number 0 already"):
                other.add(request)
        scheduler.run()
        with pytest.raises(ValueError, match="number 0 already"):
            scheduler.add(request)

    def test_the_callers_list_may_change_afterwards(self):
        prompt = [4, 5, 6]
        scheduler, request = Scheduler(MODEL, pool_of()), Request(prompt, 3)
        scheduler.add(request)
        prompt[:] = [9]
        scheduler.run()
        assert request.tokens == ORACLE.generate([4, 5, 6], 3)[3:]

    @pytest.mark.parametrize("options", [dict(token_budget=0), dict(token_budget=1.5), dict(max_running=0)], ids=str)
    def test_a_scheduler_that_could_run_nobody_is_refused(self, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            Scheduler(MODEL, pool_of(), **options)

    def test_a_pool_of_another_models_size_is_refused(self):
        with pytest.raises(ValueError, match=r"\(3, 2, 8\), got \(2, 2, 8\)"):
            Scheduler(MODEL, PagedModelKVCache(8, 4, 2, 2, 8, 4))


class TestCancel:
    def test_in_every_state(self):
        pool = pool_of(num_blocks=10)
        scheduler = Scheduler(MODEL, pool, token_budget=8, max_running=2)
        lengths = ((2, 1), (3, 9), (20, 9), (4, 9))
        done, decoding, reading, waiting = requests = [Request(list(range(n)), new) for n, new in lengths]
        for request in requests:
            scheduler.add(request)
        scheduler.step()
        scheduler.step()
        assert [r.state for r in requests] == ["finished", "running", "running", "waiting"]
        assert not reading.tokens and stored(scheduler, reading) > 0
        tokens = list(decoding.tokens)
        assert [scheduler.cancel(r.request_id) for r in requests] == [False, True, True, True]
        assert [scheduler.cancel(r.request_id) for r in requests] == [False] * 4
        assert not any(scheduler.cancel(unknown) for unknown in (99, -1, None, "0"))
        assert not scheduler.has_work and pool.num_free() == 10 and decoding.tokens == tokens and tokens
        assert [r.finish_reason for r in (done, decoding)] == ["length", "cancelled"]
        assert scheduler.step() == []

    def test_a_preempted_request_can_be_cancelled(self):
        pool = pool_of(num_blocks=6, block_size=2)
        scheduler, first, second = Scheduler(MODEL, pool), Request([1, 2], 9), Request([3, 4], 9)
        for request in (first, second):
            scheduler.add(request)
        while not scheduler.preemptions:
            scheduler.step()
        assert second.state == "waiting" and scheduler.cancel(second.request_id)
        scheduler.run()
        assert first.tokens == ORACLE.generate([1, 2], 9)[2:] and pool.num_free() == 6


class TestAModelThatFails:
    def test_at_every_call_of_a_story(self, monkeypatch):
        """One failure at call 1, 2, 3 ... of embedding, blocks, norm and head: the texts are as without it."""
        watch = Watch(monkeypatch, *((block.mlp, "up_proj") for block in MODEL.blocks[::2]), (MODEL, "norm"))
        rng, fail_at, failed = np.random.default_rng(5), 0, True
        drawn = [clear_request(rng, 30) for _ in range(4)]
        while failed:
            fail_at, failed = fail_at + 7, False
            pool = pool_of(num_blocks=9)
            scheduler, requests = Scheduler(MODEL, pool, token_budget=6), [replace(r) for r, _ in drawn]
            for request in requests:
                scheduler.add(request)
            watch.calls, watch.fail_at = 0, fail_at
            while scheduler.has_work:
                before = [(list(r.tokens), r.rng.bit_generator.state) for r in requests]
                try:
                    scheduler.step()
                except RuntimeError:
                    failed = True
                    assert [(r.tokens, r.rng.bit_generator.state) for r in requests] == before
                    assert all(stored(scheduler, r) < len(r.prompt + r.tokens) for r in scheduler.running)
                check_bookkeeping(scheduler, pool)
            assert [r.tokens for r in requests] == [text for _, text in drawn], f"after a failure at call {fail_at}"
            assert pool.num_free() == 9
        assert fail_at > 50

    def test_passes_that_succeeded_are_taken_back(self, watch):
        """Who decodes ran in the first pass, the prompt's pass fails: no token, no length has changed."""
        pool = pool_of()
        scheduler, old, new = Scheduler(MODEL, pool), Request([1, 2, 3], 5), Request([4, 5], 5)
        scheduler.add(old)
        scheduler.step()
        scheduler.add(new)
        watch.take()
        watch.fail_at = watch.calls + 2
        with pytest.raises(RuntimeError, match="the model failed"):
            scheduler.step()
        assert watch.take()[0] == [(1, 1)], "the first pass did run"
        assert (stored(scheduler, old), len(old.tokens), stored(scheduler, new), new.tokens) == (3, 1, 0, [])
        scheduler.run()
        assert [r.tokens for r in (old, new)] == [ORACLE.generate(r.prompt, 5)[len(r.prompt) :] for r in (old, new)]
        assert pool.num_free() == 40

    def test_ctrl_c_between_two_passes(self, monkeypatch):
        pool, embedding, calls = pool_of(), MODEL.token_embedding, []
        scheduler, requests = Scheduler(MODEL, pool), [Request([1, 2, 3], 5), Request([4, 5], 5)]
        scheduler.add(requests[0])
        scheduler.step()
        scheduler.add(requests[1])

        def interrupted(ids):
            calls.append(ids)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return embedding(ids)

        monkeypatch.setattr(MODEL, "token_embedding", interrupted)
        with pytest.raises(KeyboardInterrupt):
            scheduler.step()
        assert [stored(scheduler, request) for request in requests] == [3, 0]
        finish(scheduler)
        assert [r.tokens for r in requests] == [ORACLE.generate(r.prompt, 5)[len(r.prompt) :] for r in requests]


class TestTheModelIsLeftAsItWas:
    def test_training_mode_comes_back(self):
        model = random_gpt()
        model.train()
        scheduler, request = Scheduler(model, pool_of()), Request([1, 2], 4)
        scheduler.add(request)
        finish(scheduler)
        assert all(module.training for module in model.modules())
        assert request.tokens == ORACLE.generate([1, 2], 4)[2:]

    def test_an_enabled_cache_is_not_touched(self):
        model = random_gpt()
        cache = enable_kv_cache(model)
        model([[7, 8, 9]])
        scheduler, request = Scheduler(model, pool_of()), Request([1, 2], 4)
        scheduler.add(request)
        scheduler.run()
        assert cache.seq_lens == [3] and model._kv_cache is cache
        assert request.tokens == ORACLE.generate([1, 2], 4)[2:]
        disable_kv_cache(model)
