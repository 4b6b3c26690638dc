"""Train the demo's GPT on Python's own documentation, with the course's tokenizer and Trainer.

Runs against whichever `tinytorch` comes first on the path. The seed is fixed: the same package, text and number of
steps give the same checkpoint.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path

import numpy as np

from tinytorch.core.losses import CrossEntropyLoss
from tinytorch.core.optimizers import AdamW
from tinytorch.core.tensor import manual_seed
from tinytorch.core.training import CosineSchedule, Trainer, keep_memory
from tinytorch.demo import language
from tinytorch.models.transformer import GPT
from tinytorch.text.tokenization import BPETokenizer
from tito.jobs import words

SIZES = {"vocab_size": 1024, "embed_dim": 128, "num_layers": 4, "num_heads": 4, "max_seq_len": 256}
SEED, BATCH_SIZE, MAX_LR = 17, 8, 4e-3


def train(out: Path, steps: int) -> float:
    """Train for `steps` steps, save to `out`, and return the validation loss in nats per token."""
    text = language.text()
    started = time.perf_counter()
    tokenizer = BPETokenizer()
    tokenizer.train(text, SIZES["vocab_size"])
    ids = tokenizer.encode(text)
    print(f"Tokenizer: {len(text):,} characters -> {len(ids):,} tokens, {tokenizer.vocab_size} different ones, "
          f"in {time.perf_counter() - started:.1f} s")
    manual_seed(SEED)
    model = GPT(**SIZES, dropout=0.1, rng=np.random.default_rng(SEED))
    count = sum(parameter.data.size for parameter in model.parameters())
    print(f"Model: {SIZES['num_layers']} layers of width {SIZES['embed_dim']}, {count:,} parameters; {steps} steps of "
          f"{BATCH_SIZE} x {SIZES['max_seq_len']} tokens")
    training, validation = language.splits(ids)
    trainer = Trainer(
        model,
        AdamW(model.parameters(), lr=MAX_LR, weight_decay=0.1),
        CrossEntropyLoss(),
        schedule=CosineSchedule(MAX_LR, steps, warmup_steps=steps // 20, min_lr=MAX_LR / 20),
        max_grad_norm=1.0,
    )
    keep_memory()  # this process only trains: its large arrays need not go back to the kernel after each step
    started = time.perf_counter()
    trainer.fit(lambda step: batch(training, step), steps)
    seconds = time.perf_counter() - started
    loss = float(trainer.evaluate(language.validation_batches(validation, SIZES["max_seq_len"])))
    print(f"Trained in {seconds:.0f} s: loss {trainer.losses[0]:.3f} -> {np.mean(trainer.losses[-20:]):.3f}, "
          f"validation loss {loss:.3f} nats per token")
    notes = {"validation_loss": f"{loss:.4f}", "steps": str(steps), "seed": str(SEED),
             "text": f"pydoc_data.topics of Python {platform.python_version()}"}
    language.save(out, model, SIZES, tokenizer, notes)
    print(f"Saved {out.name}: {out.stat().st_size:,} bytes")
    return loss


def batch(ids: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
    """The batch of one step; it depends on the step alone, so that a resumed run sees the same batches."""
    rng = np.random.default_rng([SEED, step])
    return language.windows(ids, rng.integers(0, len(ids) - SIZES["max_seq_len"] - 1, BATCH_SIZE), SIZES["max_seq_len"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    arguments = parser.parse_args()
    train(arguments.out, arguments.steps)


if __name__ == "__main__":
    words.exit_with(main)
