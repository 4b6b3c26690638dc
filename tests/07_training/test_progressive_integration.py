"""Lesson 07 against lessons 01 to 06: runs that are trained, stopped, killed, damaged and taken up again."""

import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import tinytorch
from tinytorch.core.activations import ReLU
from tinytorch.core.layers import Dropout, Linear, Sequential
from tinytorch.core.losses import CrossEntropyLoss, mse_loss
from tinytorch.core.optimizers import SGD, AdamW
from tinytorch.core.tensor import Tensor, manual_seed
from tinytorch.core.training import (
    CheckpointError,
    CosineSchedule,
    Trainer,
    clip_grad_norm,
    load_checkpoint,
    save_checkpoint,
)


def batch(step, size=16):
    rng = np.random.default_rng([3, step])
    x = rng.standard_normal((size, 6)).astype(np.float32)
    return x, x[:, :3].argmax(axis=1)


def make_trainer(seed=0, width=16, optimizer=AdamW, **options):
    rng = np.random.default_rng(seed)
    model = Sequential(Linear(6, width, rng=rng), ReLU(), Dropout(0.2), Linear(width, 3, rng=rng),
                       Dropout(0.1, rng=np.random.default_rng(seed + 1)))
    return Trainer(model, optimizer(model.parameters(), lr=0.01), CrossEntropyLoss(),
                   schedule=CosineSchedule(0.01, 40, warmup_steps=4), max_grad_norm=1.0, **options)


def everything(trainer):
    """All that a refused file must leave alone, as comparable values."""
    arrays = {name: array.tobytes() for name, array in trainer.model.state_dict().items()}
    state = trainer.optimizer.state_dict()
    buffers = {(i, n): np.asarray(v).tobytes() for i, e in state["state"].items() for n, v in e.items()}
    return arrays, buffers, state["settings"], trainer.step, list(trainer.losses), list(trainer.evaluations)


class Terminal(io.StringIO):
    def isatty(self):
        return True


class TestTrainerLearns:
    def test_loss_falls_and_is_recorded(self):
        manual_seed(0)
        trainer = make_trainer()
        losses = trainer.fit(batch, 40, evaluate_every=10, evaluation=[batch(1000, 64)], progress=False)
        assert len(losses) == 40 and np.isfinite(losses).all()
        assert np.mean(losses[-5:]) < np.mean(losses[:5])
        assert [step for step, _ in trainer.evaluations] == [10, 20, 30, 40]
        assert trainer.evaluations[-1][1] < trainer.evaluations[0][1]

    def test_schedule_reaches_the_optimizer(self):
        trainer, seen = make_trainer(), []

        def get_batch(step):
            seen.append(trainer.optimizer.lr)
            return batch(step)

        trainer.fit(get_batch, 40, progress=False)
        expected = [trainer.schedule(step) for step in range(40)]
        assert seen[1:] == expected[:-1], "the rate of step n must be set when step n is made"
        assert expected[3] == pytest.approx(0.008) and expected[4] == pytest.approx(0.01)

    def test_clipping_limits_the_step(self):
        model = Linear(2, 1, rng=np.random.default_rng(0))
        before = np.concatenate([p.data.ravel() for p in model.parameters()])
        trainer = Trainer(model, SGD(model.parameters(), lr=1.0), mse_loss, max_grad_norm=0.5)
        trainer.fit(lambda step: (np.full((4, 2), 100.0), np.full((4, 1), -1e4)), 1, progress=False)
        after = np.concatenate([p.data.ravel() for p in model.parameters()])
        assert np.linalg.norm(after - before) == pytest.approx(0.5, rel=1e-3)

    def test_clip_matches_numpy(self):
        model = make_trainer().model
        for i, p in enumerate(model.parameters()):
            p.grad = Tensor(np.random.default_rng(i).standard_normal(p.shape))
        flat = np.concatenate([p.grad.data.ravel() for p in model.parameters()])
        norm = clip_grad_norm(model.parameters(), 0.1)
        clipped = np.concatenate([p.grad.data.ravel() for p in model.parameters()])
        assert norm == pytest.approx(np.linalg.norm(flat), rel=1e-5)
        assert clipped.shape == flat.shape and clipped.dtype == np.float32
        np.testing.assert_allclose(clipped, flat * 0.1 / np.linalg.norm(flat), rtol=1e-4)

    def test_nan_loss_stops_before_anything_moves(self):
        trainer = make_trainer()
        trainer.fit(batch, 3, progress=False)
        before = everything(trainer)[:2]
        with pytest.raises(FloatingPointError, match="nan"):
            trainer.fit(lambda step: (np.full((2, 6), np.nan), np.array([0, 1])), 5, progress=False)
        assert everything(trainer)[:2] == before and trainer.step == 3

    def test_infinite_gradient_stops_before_anything_moves(self):
        model = Linear(1, 1, rng=np.random.default_rng(0))
        trainer = Trainer(model, SGD(model.parameters(), lr=1.0), mse_loss, max_grad_norm=1.0)
        before = everything(trainer)[0]

        def get_batch(step):
            return np.full((1, 1), 1e19), np.zeros((1, 1))

        with np.errstate(over="ignore"), pytest.raises(FloatingPointError):
            trainer.fit(get_batch, 1, progress=False)
        assert everything(trainer)[0] == before


class TestEvaluate:
    @pytest.mark.parametrize("mode", [True, False])
    def test_mode_is_restored_and_dropout_off(self, mode):
        trainer = make_trainer()
        trainer.model.train(mode)
        first, second = (trainer.evaluate([batch(1), batch(2, 5)]) for _ in range(2))
        assert first == second
        assert [m.training for m in trainer.model.modules()] == [mode] * len(list(trainer.model.modules()))

    def test_mode_is_restored_after_an_error(self):
        trainer = make_trainer()
        with pytest.raises(ValueError):
            trainer.evaluate([(np.zeros((2, 5)), np.array([0, 1]))])
        assert trainer.model.training
        assert trainer.model(Tensor(batch(0)[0])).requires_grad, "recording must be on again"

    def test_rows_weigh_the_same(self):
        trainer = make_trainer()
        x, y = batch(0, 10)
        whole = trainer.evaluate([(x, y)])
        assert trainer.evaluate([(x[:9], y[:9]), (x[9:], y[9:])]) == pytest.approx(whole, rel=1e-6)

    def test_nothing_to_evaluate(self):
        with pytest.raises(ValueError, match="no batch"):
            make_trainer().evaluate([])


class TestResume:
    @pytest.mark.parametrize("stop", [1, 7, 20])
    @pytest.mark.parametrize("optimizer", [AdamW, lambda p, lr: SGD(p, lr, momentum=0.9)])
    def test_losses_are_bitwise_the_same(self, tmp_path, stop, optimizer):
        manual_seed(11)
        whole = make_trainer(optimizer=optimizer)
        whole.fit(batch, 25, evaluate_every=5, evaluation=[batch(77)], progress=False)
        manual_seed(11)
        first = make_trainer(optimizer=optimizer)
        first.fit(batch, stop, evaluate_every=5, evaluation=[batch(77)], progress=False)
        first.save(tmp_path / "run.safetensors")
        manual_seed(12)
        second = make_trainer(seed=5, optimizer=optimizer)
        second.resume(tmp_path / "run.safetensors")
        assert second.step == stop and second.losses == first.losses
        second.fit(batch, 25, evaluate_every=5, evaluation=[batch(77)], progress=False)
        assert len(second.losses) == 25
        assert second.losses == whole.losses and second.evaluations == whole.evaluations
        assert everything(second)[0] == everything(whole)[0]

    def test_checkpoint_every_and_at_the_end(self, tmp_path):
        path = tmp_path / "run.safetensors"
        trainer, steps = make_trainer(checkpoint=path, checkpoint_every=4), []

        def get_batch(step):
            steps.append(int(load_checkpoint(path)[1]["step"]) if path.exists() else None)
            return batch(step)

        trainer.fit(get_batch, 10, progress=False)
        assert steps == [None] * 4 + [4] * 4 + [8] * 2
        assert load_checkpoint(path)[1]["step"] == "10"
        assert os.listdir(tmp_path) == ["run.safetensors"]


class TestDamagedFiles:
    @pytest.fixture
    def saved(self, tmp_path):
        trainer = make_trainer()
        trainer.fit(batch, 3, progress=False)
        trainer.save(tmp_path / "good.safetensors")
        return (tmp_path / "good.safetensors").read_bytes()

    def refuse(self, tmp_path, content, words):
        path = tmp_path / "bad.safetensors"
        path.write_bytes(content)
        trainer = make_trainer(seed=8)
        trainer.fit(batch, 2, progress=False)
        before = everything(trainer)
        with pytest.raises(CheckpointError, match=words) as error:
            trainer.resume(path)
        assert "bad.safetensors" in str(error.value)
        assert everything(trainer) == before

    @pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 50, -1, -100])
    def test_cut_off_anywhere(self, tmp_path, saved, cut):
        self.refuse(tmp_path, saved[:cut], "cut off|damaged|does not read")

    def test_tail_other_formats_and_a_lying_length(self, tmp_path, saved):
        self.refuse(tmp_path, saved + b"\0", "tail")
        self.refuse(tmp_path, b"PK\x03\x04" + bytes(500), "no checkpoint")
        self.refuse(tmp_path, struct.pack("<Q", 2**63) + saved[8:], "no checkpoint")
        self.refuse(tmp_path, struct.pack("<Q", 500) + b"[" * 500, "does not read")

    @pytest.mark.parametrize("fault", ["shape", "negative", "type", "offset", "not a dict"])
    def test_wrong_headers(self, tmp_path, saved, fault):
        length = struct.unpack("<Q", saved[:8])[0]
        header = json.loads(saved[8 : 8 + length])
        entry = header["model.0.weight"]
        changes = {"shape": {"shape": [16, 7]}, "negative": {"shape": [-16, -6]}, "type": {"dtype": "F64"},
                   "offset": {"data_offsets": [entry["data_offsets"][0] + 4, entry["data_offsets"][1]]}}
        header["model.0.weight"] = entry | changes[fault] if fault in changes else 7
        text = json.dumps(header).encode()
        self.refuse(tmp_path, struct.pack("<Q", len(text)) + text + saved[8 + length :], "damaged")

    def test_another_model_optimizer_or_file(self, tmp_path, saved):
        path = tmp_path / "good.safetensors"
        for trainer in (make_trainer(width=17), make_trainer(optimizer=SGD)):
            before = everything(trainer)
            with pytest.raises(CheckpointError, match="does not fit"):
                trainer.resume(path)
            assert everything(trainer) == before
        save_checkpoint(path, {"w": np.ones(3)})
        with pytest.raises(CheckpointError, match="not a training run"):
            make_trainer().resume(path)
        with pytest.raises(FileNotFoundError):
            make_trainer().resume(tmp_path / "nowhere.safetensors")

    def test_a_part_is_missing(self, tmp_path, saved):
        tensors, metadata = load_checkpoint(tmp_path / "good.safetensors")
        del tensors["model.0.bias"]
        save_checkpoint(tmp_path / "less.safetensors", tensors, metadata)
        trainer = make_trainer(seed=8)
        before = everything(trainer)
        with pytest.raises(CheckpointError, match="0.bias"):
            trainer.resume(tmp_path / "less.safetensors")
        assert everything(trainer) == before


class TestFiles:
    @pytest.mark.parametrize("dtype", "f2 f4 f8 i1 i2 i4 i8 u1 u2 u4 u8 ? >f4 >i8".split())
    def test_every_dtype_and_odd_shapes_come_back(self, tmp_path, dtype):
        shapes = [(), (0,), (3, 0, 2), (1,), (2, 3), (2, 1, 2)]
        tensors = {f"t{i}": (np.arange(np.prod(shape, dtype=int)) % 2).reshape(shape).astype(dtype)
                   for i, shape in enumerate(shapes)}
        tensors["turned"] = np.arange(6).reshape(2, 3).astype(dtype).T
        save_checkpoint(tmp_path / "x", tensors, {"clé": "naïve, \n\"quoted\""})
        got, metadata = load_checkpoint(tmp_path / "x")
        assert metadata == {"clé": "naïve, \n\"quoted\""} and got.keys() == tensors.keys()
        for name, array in tensors.items():
            assert got[name].shape == array.shape and got[name].dtype == array.dtype.newbyteorder("<")
            assert np.array_equal(got[name], array) and got[name].flags.writeable

    @pytest.mark.parametrize("tensors", [{"a": np.array(["text"])}, {"a": np.array([1j])}, {"__metadata__": np.ones(1)},
                                         {"a": np.array([object()])}])
    def test_what_the_format_cannot_hold_leaves_the_old_file(self, tmp_path, tensors):
        path = tmp_path / "x"
        path.write_bytes(b"old")
        with pytest.raises(CheckpointError, match="does not go into a checkpoint"):
            save_checkpoint(path, tensors)
        assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x"]

    @pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
    def test_killed_many_times_there_is_always_a_whole_file(self, tmp_path):
        """The oracle is the file itself: all its numbers are those of one save, and the saves go on."""
        path, started = tmp_path / "run.safetensors", tmp_path / "started"
        code = (
            "import sys, itertools, pathlib, numpy as np\n"
            "from tinytorch.core.training import save_checkpoint\n"
            "for n in itertools.count(int(sys.argv[3])):\n"
            "    save_checkpoint(sys.argv[1], {'a': np.full(200_000, n), 'b': np.full((3, 7), n)}, {'n': str(n)})\n"
            "    pathlib.Path(sys.argv[2]).touch()\n"
        )
        package = str(Path(tinytorch.__file__).parents[1])
        last = 0
        for attempt in range(10):
            started.unlink(missing_ok=True)
            process = subprocess.Popen([sys.executable, "-c", code, str(path), str(started), str(last + 1)],
                                       env={**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1"})
            try:
                deadline = time.monotonic() + 60
                while not started.exists() and time.monotonic() < deadline:
                    time.sleep(0.001)
                time.sleep(0.0013 * attempt)
            finally:
                process.send_signal(signal.SIGKILL)
                process.wait()
            tensors, metadata = load_checkpoint(path)
            n = int(metadata["n"])
            assert n > last, f"after kill {attempt} the file is of save {n}, the one before was {last}"
            assert tensors["a"].shape == (200_000,) and tensors["b"].shape == (3, 7)
            assert np.all(tensors["a"] == n) and np.all(tensors["b"] == n), f"kill {attempt}: a mixture of saves"
            last = n
        assert set(os.listdir(tmp_path)) <= {"run.safetensors", "run.safetensors.tmp", "started"}


class TestProgress:
    def test_one_line_on_a_terminal(self, monkeypatch):
        stream = Terminal()
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("COLUMNS", "80")
        trainer = make_trainer()
        trainer.fit(batch, 30)
        text = stream.getvalue()
        assert text.count("\n") == 1 and text.endswith("\n"), "one line, left only at the end"
        lines = [line for line in text.strip("\n").split("\r") if line]
        assert {len(line) for line in lines} == {79}, "each drawing covers the one before"
        assert re.search(r"step 30/30 +loss \d+\.\d{4} +[\d,]+ steps/s +0:00:00 left", lines[-1]), lines[-1]
        assert f"{trainer.losses[-1]:.4f}" in lines[-1] and text.isascii()

    def test_token_ids_are_counted_as_tokens(self, monkeypatch):
        stream = Terminal()
        monkeypatch.setattr(sys, "stderr", stream)
        model = Linear(4, 3, rng=np.random.default_rng(0))
        trainer = Trainer(model, SGD(model.parameters(), lr=0.1), CrossEntropyLoss())
        trainer.fit(lambda step: (np.ones((2, 4), int), np.array([0, 1])), 2)
        assert "tokens/s" in stream.getvalue() and "steps/s" not in stream.getvalue()

    @pytest.mark.parametrize("columns", ["5", "30", "60", "300"])
    def test_any_width(self, monkeypatch, columns):
        stream = Terminal()
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("COLUMNS", columns)
        make_trainer().fit(batch, 2)
        assert {len(x) for x in stream.getvalue().strip("\n").split("\r") if x} == {int(columns) - 1}

    def test_silent_where_there_is_no_terminal_or_no_wish(self, monkeypatch, capfd):
        make_trainer().fit(batch, 3)
        stream = Terminal()
        monkeypatch.setattr(sys, "stderr", stream)
        make_trainer().fit(batch, 3, progress=False)
        assert capfd.readouterr() == ("", "") and stream.getvalue() == ""


@pytest.mark.skipif(os.name != "posix", reason="os.kill sends SIGINT on POSIX")
class TestInterrupt:
    def interrupt_at(self, when, tmp_path):
        manual_seed(4)
        trainer = make_trainer(checkpoint=tmp_path / "run.safetensors")

        class Interrupting(AdamW):
            def update(self, step, *piece):
                if step == when and piece[0].size == 16:  # in the middle of a step: some weights have moved
                    os.kill(os.getpid(), signal.SIGINT)
                super().update(step, *piece)

        trainer.optimizer.__class__ = Interrupting
        Interrupting.__name__ = "AdamW"
        return trainer

    def test_ctrl_c_in_the_middle_of_a_step(self, tmp_path):
        """The oracle is the run that nobody interrupted."""
        before = signal.getsignal(signal.SIGINT)
        trainer = self.interrupt_at(5, tmp_path)
        with pytest.raises(KeyboardInterrupt):
            trainer.fit(batch, 12, progress=False)
        assert trainer.step == 5 == len(trainer.losses)
        assert {entry["step"] for entry in trainer.optimizer.state.values()} == {5}, "a half step"
        assert signal.getsignal(signal.SIGINT) is before
        resumed = make_trainer(seed=9)
        resumed.resume(tmp_path / "run.safetensors")
        resumed.fit(batch, 12, progress=False)
        manual_seed(4)
        assert resumed.losses == make_trainer().fit(batch, 12, progress=False)

    def test_interrupt_while_a_batch_is_made(self):
        trainer = make_trainer()

        def get_batch(step):
            if step == 3:
                raise KeyboardInterrupt
            return batch(step)

        with pytest.raises(KeyboardInterrupt):
            trainer.fit(get_batch, 10, progress=False)
        assert trainer.step == len(trainer.losses) == 3
        trainer.fit(batch, 10, progress=False)
        assert trainer.step == len(trainer.losses) == 10

    def test_fit_works_in_another_thread(self):
        trainer = make_trainer()
        thread = threading.Thread(target=trainer.fit, args=(batch, 5), kwargs={"progress": False})
        thread.start()
        thread.join(60)
        assert trainer.step == 5
