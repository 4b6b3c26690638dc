"""Checkpoints against the safetensors library, clipping and the whole loop against PyTorch."""

import numpy as np
import pytest

from tinytorch.core.layers import Linear, Parameter
from tinytorch.core.losses import mse_loss
from tinytorch.core.optimizers import AdamW
from tinytorch.core.tensor import Tensor
from tinytorch.core.training import (
    CheckpointError,
    CosineSchedule,
    Trainer,
    clip_grad_norm,
    load_checkpoint,
    save_checkpoint,
)

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors")
safetensors_numpy = pytest.importorskip("safetensors.numpy")

rng = np.random.default_rng(0)
TENSORS = {
    "wide": rng.standard_normal((3, 4)),
    "half": rng.standard_normal((2, 3, 5)).astype(np.float16),
    "single": rng.standard_normal(7).astype(np.float32),
    "number": np.array(-3),
    "empty": np.zeros((0, 4), np.float32),
    "bytes": np.arange(5, dtype=np.uint8),
    "yes": np.array([True, False, True]),
    "short": np.arange(-3, 3, dtype=np.int16),
}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].shape == array.shape and got[name].dtype == array.dtype, name
        assert np.array_equal(got[name], array), name


def test_the_library_reads_our_files(tmp_path):
    path = tmp_path / "ours.safetensors"
    save_checkpoint(path, TENSORS, {"step": "7", "clé": "é"})
    assert_same(safetensors_numpy.load_file(path), TENSORS)
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"step": "7", "clé": "é"}
        assert set(file.keys()) == set(TENSORS)


def test_the_library_reads_a_whole_run(tmp_path):
    model = Linear(3, 2, rng=np.random.default_rng(0))
    trainer = Trainer(model, AdamW(model.parameters()), mse_loss)
    trainer.fit(lambda step: (np.ones((4, 3)), np.zeros((4, 2))), 3, progress=False)
    trainer.save(tmp_path / "run.safetensors")
    got = safetensors_numpy.load_file(tmp_path / "run.safetensors")
    assert np.array_equal(got["model.weight"], model.weight.data)
    assert np.array_equal(got["optimizer.0.exp_avg"], trainer.optimizer.state[0]["exp_avg"])


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_we_read_the_library_s_files(tmp_path, metadata):
    path = tmp_path / "theirs.safetensors"
    safetensors_numpy.save_file(TENSORS, path, metadata=metadata)
    got, found = load_checkpoint(path)
    assert_same(got, TENSORS)
    assert found == (metadata or {})


def test_bfloat16_is_refused_by_name(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.ones(3, dtype=torch.bfloat16)}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="w holds BF16"):
        load_checkpoint(tmp_path / "b.safetensors")


@pytest.mark.parametrize("cut", [9, 60, -1])
def test_both_refuse_a_file_that_is_cut_off(tmp_path, cut):
    path = tmp_path / "cut.safetensors"
    save_checkpoint(path, TENSORS)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(safetensors.SafetensorError):
        safetensors_numpy.load_file(path)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


@pytest.mark.parametrize("max_norm", [0.01, 1.0, 1e6])
def test_clip_grad_norm(max_norm):
    grads = [rng.standard_normal(shape).astype(np.float32) for shape in ((3, 4), (5,), (2, 2, 2))]
    ours = [Parameter(np.zeros(g.shape)) for g in grads]
    theirs = [torch.nn.Parameter(torch.zeros(g.shape)) for g in grads]
    for p, q, grad in zip(ours, theirs, grads):
        p.grad, q.grad = Tensor(grad.copy()), torch.tensor(grad)
    norm, expected = clip_grad_norm(ours, max_norm), torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    assert norm == pytest.approx(expected.item(), rel=1e-5)
    for p, q in zip(ours, theirs):
        np.testing.assert_allclose(p.grad.data, q.grad.numpy(), rtol=1e-5)


def test_cosine_part_of_the_schedule():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.02)
    ours = CosineSchedule(0.3, 50, min_lr=0.02)
    for step in range(51):
        assert ours(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), f"step {step}"
        optimizer.step()
        theirs.step()


def test_the_whole_loop():
    """Schedule, clipping and AdamW together: fifty losses equal those of a loop in PyTorch."""
    model = Linear(5, 2, rng=np.random.default_rng(1))
    theirs = torch.nn.Linear(5, 2)
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(model.weight.data))
        theirs.bias.copy_(torch.tensor(model.bias.data))

    def get_batch(step):
        r = np.random.default_rng([1, step])
        return r.standard_normal((8, 5)).astype(np.float32), 3 * r.standard_normal((8, 2)).astype(np.float32)

    schedule = CosineSchedule(0.1, 50, warmup_steps=5)
    trainer = Trainer(model, AdamW(model.parameters(), lr=0.1), mse_loss, schedule, max_grad_norm=0.5)
    losses = trainer.fit(get_batch, 50, progress=False)
    optimizer, expected = torch.optim.AdamW(theirs.parameters(), lr=0.1), []
    for step in range(50):
        x, y = map(torch.tensor, get_batch(step))
        optimizer.param_groups[0]["lr"] = schedule(step)
        loss = torch.nn.functional.mse_loss(theirs(x), y)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step()
        expected.append(loss.item())
    assert len(losses) == 50
    np.testing.assert_allclose(losses, expected, rtol=2e-5)


def test_one_tensor_is_clipped_as_pytorch_clips_it():
    """PyTorch takes a single tensor in place of a list; so do we."""
    ours, theirs = Tensor([3.0, 4.0], requires_grad=True), torch.tensor([3.0, 4.0], requires_grad=True)
    (ours * ours).sum().backward()
    (theirs * theirs).sum().backward()
    norm = clip_grad_norm(ours, 1.0)
    assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(theirs, 1.0)))
    np.testing.assert_allclose(ours.grad.numpy(), theirs.grad.numpy(), rtol=1e-6)
