# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   tinytorch:
#     lesson: "23"
# ---

# %% [markdown]
"""
# Lesson 23: Paged serving

**You build** what serves many conversations from one memory: blocks handed out on demand, a table per sequence, and
prefixes that are stored once. Then the scheduler that keeps the batch full.

**Needs** lessons 01, 13, 14 and 17. **Exported** to `tinytorch.generation.paged`. **Time** 90 minutes.
"""

# %%
#| default_exp generation.paged
#| export
import copy
import hashlib
import math
import threading
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from tinytorch.core.tensor import Tensor
from tinytorch.generation.kv_cache import (
    CacheDoor,
    CacheLedger,
    CacheRows,
    CacheStateError,
    KVView,
    check_tokens,
    slot_positions,
    storage_dtype,
    whole_number,
)

# %%
#| export
def blocks_needed(length, block_size):
    """Blocks that hold so many tokens, the last one perhaps in part.

    >>> [blocks_needed(length, 4) for length in (0, 1, 4, 5)]
    [0, 1, 1, 2]
    """
    return (length + block_size - 1) // block_size


def slots_of(table, start, stop, block_size):
    """The slots (array) of positions start .. stop - 1; block b has the slots b * block_size and following.

    >>> slots_of([7, 1], 2, 6, block_size=4).tolist()
    [30, 31, 4, 5]
    """
    positions = np.arange(start, stop)
    return np.array(table, int)[positions // block_size] * block_size + positions % block_size

# %%
#| export
class OutOfBlocks(ValueError):
    """The pool has too few free blocks. Nothing was changed."""


class Label(NamedTuple):
    """What a full block holds: its name, the name of the block before it, and its tokens."""

    name: str
    parent: str
    tokens: tuple


def block_name(parent, tokens):
    """The name of a full block: a hash of its parent's name ("" for the first block) and of its own tokens."""
    return hashlib.sha256(repr((parent, tokens)).encode()).hexdigest()


class Blocks:
    """How often each block is held, which are free, and which have names. Numbers only, no arrays.

    A block that nobody holds is free; it keeps its contents and its name until it is taken for something else.
    Free blocks are taken in the order in which they were freed.
    """

    def __init__(self, num_blocks):
        self.counts, self.free = [0] * num_blocks, OrderedDict.fromkeys(range(num_blocks))
        self.labels, self.named = [None] * num_blocks, {}  # a Label or None per block; name -> block

    def take(self):
        """The block that has been free for longest, held once and without a name."""
        block, _ = self.free.popitem(last=False)
        self.unname(block)
        self.counts[block] = 1
        return block

    def hold(self, block):
        """One more sequence holds the block; a free one is found again."""
        if self.counts[block] == 0:
            del self.free[block]
        self.counts[block] += 1

    def give(self, block):
        """One sequence less holds the block; without any it is free."""
        if self.counts[block] == 0:
            raise CacheStateError(f"block {block} is free already: it was given back twice")
        self.counts[block] -= 1
        if self.counts[block] == 0:
            self.free[block] = None

    def name(self, block, label):
        """Let a full block be found, unless another with the same contents can be."""
        if label.name not in self.named and self.labels[block] is None:
            self.named[label.name], self.labels[block] = block, label

    def unname(self, block):
        """The block is about to be written: it can no longer be found."""
        label, self.labels[block] = self.labels[block], None
        if label is not None:
            del self.named[label.name]

    def find(self, parent, tokens):
        """(block, name) of the block that holds these tokens behind that parent, or (None, name)."""
        name = block_name(parent, tokens)
        block = self.named.get(name)
        same = block is not None and self.labels[block] == (name, parent, tokens)  # a hash may lie
        return block if same else None, name


def find_prefix(blocks, tokens, block_size):
    """The blocks that hold the beginning of a prompt, and their names; at least one token is left to run."""
    found, names = [], []
    for start in range(0, len(tokens) - block_size, block_size):
        piece = tuple(tokens[start : start + block_size])
        block, name = blocks.find(names[-1] if names else "", piece)
        if block is None:
            break
        found.append(block)
        names.append(name)
    return found, names

# %%
#| export
def token_list(tokens):
    """Token ids as a list of ints; ValueError where one is none."""
    values = np.asarray(tokens.data if isinstance(tokens, Tensor) else tokens)
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu") or (values < 0).any():
        raise ValueError(f"tokens are whole numbers from 0 in one row, got {values.dtype} of shape {values.shape}")
    return values.tolist()


def must_copy(last_blocks, holders):
    """Which writers must copy their last block first: all who share it, except the last of them.

    last_blocks: per writer, the partly filled block it will write into, or None; holders: block -> sequences.

    >>> must_copy([3, 3, None, 5], {3: 2, 5: 1})
    [True, False, False, False]
    """
    left, copies = dict(holders), []
    for block in last_blocks:
        shared = block is not None and left[block] > 1
        if shared:
            left[block] -= 1
        copies.append(shared)
    return copies


class Reservation(NamedTuple):
    """The blocks of an open pass: n tokens, the table with which they are written, what was taken for it, and the
    shared block that a copy replaces (None: there is none)."""

    n: int
    blocks: list
    taken: list
    left: int


@dataclass
class Sequence:
    """One sequence: its table, its tokens as far as they are known, the names of its full blocks."""

    blocks: list = field(default_factory=list)
    length: int = 0
    tokens: list = field(default_factory=list)
    names: list = field(default_factory=list)
    pending: Reservation = None


class BlockTables:
    """Which blocks hold which sequence. Bookkeeping without arrays; blocks and sequences are numbers.

    A pass reserves blocks (`reserve`), is written elsewhere, and is then counted (`commit`) or dropped (`release`).
    Sequences of the same tokens share full blocks: `add_sequence(tokens)` finds those that are here, by name.
    """

    def __init__(self, num_blocks, block_size, max_seqs):
        self.num_blocks = whole_number("num_blocks", num_blocks, least=0)
        self.block_size, self.max_seqs = whole_number("block_size", block_size), whole_number("max_seqs", max_seqs)
        self.blocks, self._sequences, self._next_id = Blocks(self.num_blocks), {}, 0
        self._leaving = Counter()  # block -> sequences that go over to a copy when their pass is committed

    def add_sequence(self, tokens=None):
        """A new sequence, and its id. tokens: its prompt; `length` says how much of it is here already."""
        tokens = [] if tokens is None else token_list(tokens)
        found, names = find_prefix(self.blocks, tokens, self.block_size)
        length = len(found) * self.block_size
        return self._add(Sequence(found, length, tokens[:length], names))

    def fork(self, seq):
        """A second sequence with the same tokens, in the same blocks."""
        old = self._sequence(seq)
        return self._add(Sequence(list(old.blocks), old.length, list(old.tokens), list(old.names)))

    def _add(self, sequence):
        if len(self._sequences) >= self.max_seqs:
            raise ValueError(f"max_seqs={self.max_seqs} sequences are live: finish one, or allow more")
        for block in sequence.blocks:
            self.blocks.hold(block)
        seq, self._next_id = self._next_id, self._next_id + 1
        self._sequences[seq] = sequence
        return seq

    def finish_sequence(self, seq):
        """Give back what the sequence holds; its id is never used again."""
        self.truncate(seq, 0)
        del self._sequences[seq]

    def truncate(self, seq, length):
        """Keep the first tokens of a sequence. The last blocks are freed first: prefixes stay for longest."""
        sequence = self._between_passes(seq)
        if whole_number("length", length, least=0) > sequence.length:
            raise ValueError(f"sequence {seq} holds {sequence.length} tokens: it cannot be cut to {length}")
        for block in reversed(sequence.blocks[blocks_needed(length, self.block_size) :]):
            self.blocks.give(block)
        del sequence.blocks[blocks_needed(length, self.block_size) :]
        del sequence.tokens[length:], sequence.names[length // self.block_size :]
        sequence.length = length

    def reserve(self, seq, n):
        """Find room for n more tokens; the (source, target) pairs of blocks to be copied before they are written."""
        return self.reserve_all([seq], [n])

    def reserve_all(self, seqs, counts):
        """`reserve` for several sequences, all or none: OutOfBlocks before anything has changed."""
        sequences = [self._between_passes(seq) for seq in seqs]
        copies, fresh = self._needs(sequences, counts)
        needed = sum(copies) + sum(fresh)
        if needed > self.num_free():
            raise OutOfBlocks(
                f"{sum(counts)} more tokens of sequences {list(seqs)} need {needed} blocks, {self.num_free()} of "
                f"num_blocks={self.num_blocks} are free: finish or truncate a sequence, or make a larger pool")
        for sequence, n, copies_last, more in zip(sequences, counts, copies, fresh):
            sequence.pending = self._extend(sequence, n, copies_last, more)
        return [(s.pending.left, s.pending.taken[0]) for s in sequences if s.pending.left is not None]

    def blocks_for(self, seqs, counts):
        """Blocks that `reserve_all` would take."""
        return sum(map(sum, self._needs([self._sequence(seq) for seq in seqs], counts)))

    def _needs(self, sequences, counts):
        """Per sequence: must it copy its last block, and how many new blocks does it need?"""
        size = self.block_size
        last = [s.blocks[-1] if n and s.length % size else None for s, n in zip(sequences, counts)]
        holders = {block: self.blocks.counts[block] - self._leaving[block] for block in last if block is not None}
        fresh = [blocks_needed(s.length + n, size) - len(s.blocks) for s, n in zip(sequences, counts)]
        return must_copy(last, holders), fresh

    def _extend(self, sequence, n, copies_last, more):
        """The reservation of n tokens: new blocks behind, and the last one replaced by a copy where it must be."""
        blocks, left = list(sequence.blocks), None
        taken = [self.blocks.take() for _ in range(copies_last + more)]
        if copies_last:
            left = blocks.pop()
            self._leaving[left] += 1
        elif n and sequence.length % self.block_size:
            self.blocks.unname(blocks[-1])  # written in place: no longer what its name says
        return Reservation(n, blocks + taken, taken, left)

    def commit(self, seq, n, tokens=None):
        """Count the n reserved tokens as stored. tokens: which they are, so that full blocks can be found."""
        sequence, tokens = self._sequence(seq), None if tokens is None else token_list(tokens)
        pending = sequence.pending
        if pending is None or pending.n != n:
            raise CacheStateError(f"commit of {n} tokens to sequence {seq}: "
                                  f"{'none are' if pending is None else f'{pending.n} were'} reserved")
        if tokens is not None and len(tokens) != n:
            raise ValueError(f"{len(tokens)} tokens were named, {n} are stored in sequence {seq}")
        if pending.left is not None:
            self._leaving[pending.left] -= 1
            self.blocks.give(pending.left)
        if tokens is not None and len(sequence.tokens) == sequence.length:
            sequence.tokens += tokens
        sequence.blocks, sequence.length, sequence.pending = pending.blocks, sequence.length + n, None
        self._name_full_blocks(sequence)

    def _name_full_blocks(self, sequence):
        size, names = self.block_size, sequence.names
        for index in range(len(names), len(sequence.tokens) // size):
            parent, tokens = names[-1] if names else "", tuple(sequence.tokens[index * size : (index + 1) * size])
            names.append(block_name(parent, tokens))
            self.blocks.name(sequence.blocks[index], Label(names[-1], parent, tokens))

    def release(self, seq):
        """Drop the open pass of a sequence, if there is one: its blocks are free again."""
        sequence = self._sequence(seq)
        pending, sequence.pending = sequence.pending, None
        if pending is not None:
            for block in reversed(pending.taken):
                self.blocks.give(block)
            if pending.left is not None:
                self._leaving[pending.left] -= 1

    def length(self, seq):
        """Committed tokens of a sequence."""
        return self._sequence(seq).length

    def table(self, seq, pending=False):
        """The blocks of a sequence, in order: of what is committed, or with those of the open pass."""
        sequence = self._sequence(seq)
        return list(sequence.pending.blocks if pending and sequence.pending else sequence.blocks)

    def num_free(self):
        """Blocks that nobody holds."""
        return len(self.blocks.free)

    def sequences(self):
        """The ids of the live sequences, oldest first."""
        return list(self._sequences)

    def _sequence(self, seq):
        seq = seq if type(seq) is int else whole_number("seq", seq, least=0)  # True is no sequence
        if seq not in self._sequences:
            raise ValueError(f"sequence {seq} is not live: add_sequence and fork give ids, finish_sequence ends them")
        return self._sequences[seq]

    def _between_passes(self, seq):
        sequence = self._sequence(seq)
        if sequence.pending is not None:
            raise CacheStateError(f"sequence {seq} has an open pass: commit it, or abandon (release) it first")
        return sequence

# %%
#| export
class BlockStore:
    """The numbers of all blocks, (L, 2, H_kv, num_blocks, block_size, D). Arrays without sequences.

    Heads come before blocks: so the blocks of a table, gathered side by side, are a head's tokens in order.
    """

    def __init__(self, num_layers, num_blocks, num_heads, block_size, head_dim, dtype=np.float32, tracker=None):
        shape = (num_layers, 2, num_heads, num_blocks, block_size, head_dim)
        self.dtype, self._counted = storage_dtype(dtype), None
        if tracker is not None:
            self._counted = tracker.allocate(math.prod(shape) * self.dtype.itemsize, purpose="kv_cache")
        try:
            self._keep(np.zeros(shape, self.dtype))
        except BaseException:
            self.close()
            raise

    def _keep(self, array):
        self.array = array
        self._slots = array.reshape(*array.shape[:3], array.shape[3] * array.shape[4], array.shape[5])

    def write(self, layer_idx, slots, key, value):
        """Key and value (H_kv, n, D) of one layer into n slots."""
        layer = self._slots[layer_idx]
        layer[0][:, slots], layer[1][:, slots] = key, value

    def clear(self, layer_idx, slots):
        """Zeros into n slots of one layer."""
        self._slots[layer_idx][:, :, slots] = 0

    def read(self, layer_idx, tables):
        """Key and value of one layer through tables (B, n), gathered: (2, H_kv, B, n * block_size, D)."""
        layer = self.array[layer_idx]  # (2, H_kv, num_blocks, block_size, D)
        gathered = np.take(layer, tables, axis=2)  # (2, H_kv, B, n, block_size, D)
        return gathered.reshape(2, layer.shape[1], len(tables), -1, layer.shape[4])

    def copy(self, pairs):
        """Copy whole blocks, (source, target) each, in every layer."""
        for source, target in pairs:
            self.array[:, :, :, target] = self.array[:, :, :, source]

    @property
    def nbytes(self):
        """Bytes of the array."""
        return getattr(self, "array", np.empty(0)).nbytes

    def close(self):
        """Give the memory back, to the tracker as well. A second call does nothing."""
        counted, self._counted = self._counted, None
        if counted is not None:
            counted.close()
        if self.nbytes:
            self._keep(self.array[:, :, :, :0].copy())

# %%
#| export
class PagedPool:
    """Sequences in blocks: what a cache of one layer and that of a whole model have in common."""

    def __init__(self, num_blocks, block_size, num_layers, num_heads, head_dim, max_seqs, dtype, tracker):
        sizes = dict(num_blocks=num_blocks, block_size=block_size, num_layers=num_layers, num_heads=num_heads,
                     head_dim=head_dim, max_seqs=max_seqs)
        for name, value in sizes.items():
            setattr(self, name, whole_number(name, value))
        self.tables = BlockTables(self.num_blocks, self.block_size, self.max_seqs)
        self.store = BlockStore(self.num_layers, self.num_blocks, self.num_heads, self.block_size, self.head_dim,
                                dtype, tracker)
        self.dtype, self._tracker = self.store.dtype, tracker

    def add_sequence(self, tokens=None):
        """A new sequence, and its id. tokens: its prompt; what is stored of it already need not be run again."""
        return self.tables.add_sequence(tokens)

    def seq_len(self, seq):
        """Committed tokens of a sequence."""
        return self.tables.length(seq)

    def fork(self, seq):
        """A second sequence with the same tokens: nothing is copied until one of them is written."""
        return self.tables.fork(seq)

    def truncate(self, seq, length):
        """Keep the first tokens of a sequence."""
        self.tables.truncate(seq, length)

    def finish_sequence(self, seq):
        """The sequence ends: its blocks are free, unless others hold them."""
        self.tables.finish_sequence(seq)

    def num_free(self):
        """Blocks that nobody holds."""
        return self.tables.num_free()

    @property
    def nbytes(self):
        """Bytes of the store, full or empty."""
        return self.store.nbytes

    def get_memory_usage(self):
        """Bytes allocated, and bytes of blocks that are held; MB are 2**20 bytes."""
        used = self.nbytes * (self.num_blocks - self.num_free()) // max(self.num_blocks, 1)
        return {"total_bytes": self.nbytes, "total_mb": self.nbytes / 2**20, "used_bytes": used,
                "cache_tensors": 2 * self.num_layers, "dtype": self.dtype.name,
                "num_blocks": self.num_blocks, "free_blocks": self.num_free()}

    def close(self):
        """Give the memory back: a pool without blocks. A second call does nothing."""
        self.store.close()
        self.num_blocks, self.tables = 0, BlockTables(0, self.block_size, self.max_seqs)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def __repr__(self):
        sizes = ("num_blocks", "block_size", "num_layers", "num_heads", "head_dim", "max_seqs")
        listed = ", ".join(f"{name}={getattr(self, name)}" for name in sizes)
        return f"{type(self).__name__}({listed}, dtype={self.dtype.name}, free={self.num_free()})"

# %%
#| export
class PagedKVCache(PagedPool):
    """The paged cache of one layer: sequences come and go, `update` appends to one of them.

    >>> cache = PagedKVCache(num_blocks=4, block_size=2, num_heads=1, head_dim=1, max_seqs=2)
    >>> first = cache.add_sequence()
    >>> cache.update(first, [[[1], [2], [3]]], [[[4], [5], [6]]])
    >>> second = cache.fork(first)
    >>> cache.update(second, [[[7]]], [[[8]]])
    >>> [cache.get_kv(seq)[0].ravel().tolist() for seq in (first, second)], cache.num_free()
    ([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 7.0]], 1)
    """

    def __init__(self, num_blocks, block_size, num_heads, head_dim, max_seqs, *, dtype=np.float32):
        super().__init__(num_blocks, block_size, 1, num_heads, head_dim, max_seqs, dtype, None)

    def update(self, seq, k, v, tokens=None):
        """Append T tokens, k and v (H, T, D). tokens: their ids, so that later prompts can find full blocks.

        OutOfBlocks, a ValueError, where the pool is too full; what is refused changes nothing.
        """
        length, (k, v) = self.seq_len(seq), (self._checked(name, part) for name, part in (("k", k), ("v", v)))
        tokens, count = None if tokens is None else token_list(tokens), k.shape[1]
        if v.shape[1] != count or (tokens is not None and len(tokens) != count):
            raise ValueError(f"keys of {count} tokens came with values of {v.shape[1]} and tokens {tokens}: "
                             "they must be as many")
        self.store.copy(self.tables.reserve(seq, count))
        slots = slots_of(self.tables.table(seq, pending=True), length, length + count, self.block_size)
        self.store.write(0, slots, k, v)
        self.tables.commit(seq, count, tokens)

    def get_kv(self, seq):
        """Keys and values of a sequence, (H, len, D) each; copies."""
        tables, length = np.array([self.tables.table(seq)], int), self.seq_len(seq)
        return tuple(self.store.read(0, tables)[:, :, 0, :length])

    def _checked(self, name, tokens):
        array = np.asarray(tokens.data if isinstance(tokens, Tensor) else tokens)
        if array.ndim != 3:
            raise ValueError(f"{name} has shape {array.shape}, needed (heads, tokens, head_dim)")
        return check_tokens(name, array[None], 1, self.num_heads, self.head_dim, self.dtype)[0]

# %%
#| export
class PagedModelKVCache(PagedPool):
    """The paged cache of a whole model: one table per sequence serves all layers.

    `rows` makes a batch of some of the sequences, with the contract of every cache:

        with pool.rows(ids).attached_to(model, n_new=counts):
            logits = model(padded)
    """

    def __init__(self, num_blocks, block_size, num_layers, num_heads, head_dim, max_seqs, *,
                 dtype=np.float32, strict=False, tracker=None):
        super().__init__(num_blocks, block_size, num_layers, num_heads, head_dim, max_seqs, dtype, tracker)
        self.strict, self.lock = bool(strict), threading.Lock()

    def rows(self, seqs, tokens=None):
        """Some sequences as the rows of a batch. tokens: per row, the ids that the next pass will bring."""
        return PagedRows(self, seqs, tokens)

    def clone(self):
        """An independent pool with the same sequences, under the same ids; open passes are not in it."""
        twin = PagedModelKVCache(self.num_blocks, self.block_size, self.num_layers, self.num_heads, self.head_dim,
                                 self.max_seqs, dtype=self.dtype, strict=self.strict, tracker=self._tracker)
        twin.tables = copy.deepcopy(self.tables)
        for seq in twin.tables.sequences():
            twin.tables.release(seq)
        twin.store.array[...] = self.store.array
        return twin

    def __copy__(self):
        return self.clone()  # two pools on one store would overwrite each other

    def __deepcopy__(self, memo):
        return self.clone()

# %%
#| export
class TableLedger(CacheLedger):
    """A ledger whose lengths stand in the block tables, and are changed there only."""

    def __init__(self, tables, seqs):
        self.tables, self.seqs = tables, seqs
        self.close_pass()

    @property
    def lengths(self):
        return [self.tables.length(seq) for seq in self.seqs]

    @lengths.setter
    def lengths(self, lengths):
        """The tables know already."""


class OpenPass(NamedTuple):
    """Where a pass writes and reads, the same in every layer."""

    rows: np.ndarray  # of the new tokens of all rows: the row of each,
    steps: np.ndarray  # its place in the chunk,
    slots: np.ndarray  # and the slot that it will fill
    tables: np.ndarray  # (B, n): the blocks of each row, padded with block 0
    visible: list  # per row, tokens that are stored and new
    pos: np.ndarray  # (B, S)


class PagedRows(CacheDoor, CacheRows):
    """Sequences of a pool as the rows of a batch: the contract of every cache. Cheap: made anew for every step.

    seqs: the ids, one per row; `reorder` changes them. tokens: per row, the ids that the next pass brings (or None):
    full blocks then get names. A pass that finds too few free blocks raises OutOfBlocks and changes nothing.
    """

    def __init__(self, pool, seqs, tokens=None, *, max_seq_len=None, owns_pool=False):
        self.pool, self.seqs, self.tokens, self.owns_pool = pool, list(seqs), tokens, owns_pool
        if not self.seqs or len(set(self.seqs)) < len(self.seqs):
            raise ValueError(f"rows need sequences, each of them once, got {self.seqs}")
        self.batch_size, self.num_layers = len(self.seqs), pool.num_layers
        self.num_heads, self.head_dim = pool.num_heads, pool.head_dim
        self.dtype, self.strict, self._lock = pool.dtype, pool.strict, pool.lock
        self.max_seq_len = pool.num_blocks * pool.block_size if max_seq_len is None else max_seq_len
        self._ledger, self._open = TableLedger(pool.tables, self.seqs), None

    @property
    def capacity(self):
        """Tokens that one row can be given, if no other takes the blocks."""
        return self.max_seq_len

    @property
    def nbytes(self):
        """Bytes of the whole pool."""
        return self.pool.nbytes

    def get_memory_usage(self):
        """That of the whole pool."""
        return self.pool.get_memory_usage()

    def update(self, layer_idx, key, value, n_new=None):
        """As in KVCache; the view is gathered through the tables, so it is a copy and stays what it was."""
        with self._lock:
            layer_idx, key, value, n_new = self._accept(layer_idx, key, value, n_new)
        now = self._open
        key, value = (part.swapaxes(0, 1)[:, now.rows, now.steps] for part in (key, value))  # (H_kv, n, D)
        self.pool.store.write(layer_idx, now.slots, key, value)
        return KVView(*self._gathered(layer_idx, now.tables, now.visible), now.pos)

    def get(self, layer_idx):
        """Committed keys and values of one layer, (B, H_kv, seq_pos, D) each, as copies; empty slots are zero."""
        layer_idx, lengths = self._layer(layer_idx), self.seq_lens
        return self._gathered(layer_idx, self._tables(pending=False), lengths)

    def abandon(self):
        """Drop what is pending: the pass that wrote it has failed. Its blocks are free again."""
        if self._open is not None:
            self._release()
        self._ledger.close_pass()

    def reset(self):
        """Empty again: every row has 0 tokens, its blocks are free."""
        self.abandon()
        for seq in self.seqs:
            self.pool.truncate(seq, 0)

    def clone(self):
        """An independent copy of what is committed: forks, or a pool of its own if these rows have one."""
        if self.owns_pool:
            return PagedRows(self.pool.clone(), self.seqs, max_seq_len=self.max_seq_len, owns_pool=True)
        return PagedRows(self.pool, [self.pool.fork(seq) for seq in self.seqs], max_seq_len=self.max_seq_len)

    def close(self):
        """The sequences end; with a pool of their own, its memory is given back. A second call does nothing."""
        if isinstance(self._ledger, TableLedger):
            self.abandon()
            for seq in self.seqs:
                self.pool.finish_sequence(seq)
            self.max_seq_len, self._ledger = 0, CacheLedger(self.batch_size)
        if self.owns_pool:
            self.pool.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def _open_pass(self, lengths):
        tables, starts = self.pool.tables, self.seq_lens
        counts = [stop - start for start, stop in zip(starts, lengths)]
        named = counts if self.tokens is None else [len(token_list(row)) for row in self.tokens]
        if named != counts:
            raise ValueError(f"tokens names {named} ids per row, the pass brings {counts}")
        copies = tables.reserve_all(self.seqs, counts)
        try:
            self.pool.store.copy(copies)
            slots = [slots_of(tables.table(seq, pending=True), start, stop, self.pool.block_size)
                     for seq, start, stop in zip(self.seqs, starts, lengths)]
            self._open = OpenPass(
                np.repeat(np.arange(self.batch_size), counts), np.concatenate([np.arange(n) for n in counts]),
                np.concatenate(slots), self._tables(pending=True), lengths, slot_positions(lengths))
        except BaseException:
            self._release()
            raise

    def _release(self):
        self._open = None
        for seq in self.seqs:
            self.pool.tables.release(seq)

    def _keep_pass(self):
        """Count the new tokens in the tables; a layer that was skipped reads as zeros."""
        for layer_idx in set(range(self.num_layers)) - self._ledger.written:
            self.pool.store.clear(layer_idx, self._open.slots)
        tokens, self.tokens, self._open = self.tokens or [None] * self.batch_size, None, None
        for seq, n, row in zip(self.seqs, self._ledger.n_new, tokens):
            self.pool.tables.commit(seq, n, row)

    def _tables(self, pending):
        tables = [self.pool.tables.table(seq, pending) for seq in self.seqs]
        longest = max(map(len, tables))
        return np.array([table + [0] * (longest - len(table)) for table in tables], int)

    def _gathered(self, layer_idx, tables, lengths):
        both = self.pool.store.read(layer_idx, tables)[..., : max(lengths), :].swapaxes(1, 2)  # (2, B, H, S, D)
        for row, length in enumerate(lengths):
            both[:, row, :, length:] = 0
        both.flags.writeable = False
        return Tensor(both[0], dtype=self.dtype), Tensor(both[1], dtype=self.dtype)

    def _forget(self, kept, stored):
        self.abandon()  # a pool cuts no sequence with an open pass
        for seq, length in zip(self.seqs, kept):
            self.pool.truncate(seq, length)

    def _gather(self, rows):
        """Rows that are named go on, once as they are and then as forks; those that are not end."""
        for row in set(range(self.batch_size)) - set(rows):
            self.pool.finish_sequence(self.seqs[row])
        old, seen = list(self.seqs), set()
        for row, source in enumerate(rows):
            self.seqs[row] = self.pool.fork(old[source]) if source in seen else old[source]
            seen.add(source)


def paged_kv_cache(batch_size, max_seq_len, num_layers, num_heads, head_dim, *, block_size=16, num_blocks=None,
                   dtype=np.float32, strict=False, tracker=None):
    """A paged cache for a batch, with a pool of its own: a factory for enable_kv_cache.

    num_blocks: fewer than all rows need at full length is allowed; then OutOfBlocks may end a pass.
    """
    batch_size, max_seq_len = whole_number("batch_size", batch_size), whole_number("max_seq_len", max_seq_len)
    if num_blocks is None:
        num_blocks = batch_size * blocks_needed(max_seq_len, whole_number("block_size", block_size))
    pool = PagedModelKVCache(num_blocks, block_size, num_layers, num_heads, head_dim, batch_size,
                             dtype=dtype, strict=strict, tracker=tracker)
    seqs = [pool.add_sequence() for _ in range(batch_size)]
    return PagedRows(pool, seqs, max_seq_len=max_seq_len, owns_pool=True)

# %% [markdown]
"""
## S. The scheduler

Eight people ask at once. *One after the other*, the last waits for all before them, and every decode step reads all
weights for a single row. As a *static batch*, the rows share each pass; but all start together, nobody can join, and
the batch is busy until the longest text is done.

Run both. How much of the batch's work was for somebody?
"""

# %%
#| export
import itertools
from collections.abc import Iterable
from typing import Any

from tinytorch.core.autograd import no_grad
from tinytorch.core.tensor import default_rng
from tinytorch.generation.kv_cache import stored_heads
from tinytorch.models.transformer import check_prompt, check_sampling, evaluating, sample_next

# %%
# Given, and not part of the package: what checks and measurements of this section use.
import time

from tinytorch.generation.kv_cache import KVCache, random_gpt


def count_rows(model, run):
    """The token rows that really pass through the model during `run()`."""
    rows, embedding = [], model.token_embedding

    def counting(ids):
        rows.append(np.asarray(ids).size)
        return embedding(ids)

    model.token_embedding = counting
    try:
        run()
    finally:
        model.token_embedding = embedding
    return sum(rows)


def error_of(run, kind=ValueError):
    """The message of the error that `run()` raises; "" when it raises none."""
    try:
        run()
    except kind as error:
        return str(error)
    return ""

# %% nbgrader={"grade": false, "grade_id": "23-measure-static", "locked": true, "schema_version": 3, "solution": false, "task": false}
def show_static_batches(wanted=(4, 32, 8, 16, 4, 8, 64, 4), prompt_len=16):
    """Seconds until everybody has the text: one after the other, and as one batch that runs to the longest."""
    model = random_gpt(256, 128, 4, 4, prompt_len + max(wanted), 4)
    prompts = np.random.default_rng(0).integers(0, 256, (len(wanted), prompt_len))
    for name, rows, lengths in (("one by one", 1, wanted), ("static batch", len(wanted), [max(wanted)])):
        cache, start = KVCache(rows, model.max_seq_len, 4, 4, 32), time.perf_counter()
        for i, length in enumerate(lengths):
            model.generate(prompts[i : i + rows], length, cache=cache)
        seconds, tokens = time.perf_counter() - start, rows * sum(lengths)
        print(f"{name:<12} {seconds:6.3f} s, {tokens} tokens computed, {sum(wanted)} of them wanted")


if __name__ == "__main__":
    show_static_batches()

# %% [markdown]
"""
So let the unit that we schedule be one *step* of the model, not one request (Yu et al., *Orca*, OSDI 2022, section
3.1: iteration-level scheduling). After each step, who is done leaves, and who waits comes in: **continuous batching**.

    step          1 2 3 4 5 6 7 8 9 10        two rows; A wants 7 tokens, B 2, C 2, D 3
    static        A A A A A A A C C .
                  B B . . . . . D D D
    continuous    A A A A A A A
                  B B C C D D D

*Predict.* Two rows, and five requests that want 3, 8, 2, 2 and 1 tokens, in this order. How many steps until all are
done, in static batches of two, and continuously?
"""

# %% nbgrader={"grade": false, "grade_id": "23-predict-steps", "locked": false, "schema_version": 3, "solution": true, "task": false}
# predicted_static_steps = ...
# predicted_continuous_steps = ...
### BEGIN SOLUTION
predicted_static_steps = 11
predicted_continuous_steps = 8
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "23-predict-steps-test", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def count_steps(wanted, num_rows, static):
    """Oracle: the picture, column by column."""
    waiting, rows, steps, busy = list(wanted), [], 0, False
    while waiting or rows:
        while waiting and len(rows) < num_rows and not (static and busy):
            rows.append(waiting.pop(0))
        rows = [left - 1 for left in rows if left > 1]
        steps, busy = steps + 1, bool(rows)
    return steps


def test_unit_predict_steps():
    """Oracle: the steps, counted one by one."""
    wanted = [3, 8, 2, 2, 1]
    static, continuous = count_steps(wanted, 2, static=True), count_steps(wanted, 2, static=False)
    assert predicted_static_steps == static, (
        f"static: got {predicted_static_steps}, counted {static}; each batch of two lasts as long as its longest")
    assert predicted_continuous_steps == continuous, (
        f"continuous: got {predicted_continuous_steps}, counted {continuous}; a row that is free is taken at once")


if __name__ == "__main__":
    test_unit_predict_steps()

# %% [markdown]
"""
A request is what a client asks for, and what became of it. `seed` starts random numbers of its own, so that nobody
else's draws change its text.
"""

# %%
#| export
@dataclass(eq=False)
class Request:
    """What a client asks for, and what the Scheduler makes of it.

    prompt: token ids. temperature, top_k: as in GPT.generate. stop_token: an id or several; the text ends with it.
    seed: the start of this request's own random numbers; None takes it from the course's.

    Filled in by the scheduler: request_id (never used twice), tokens (the new ids so far), state ("waiting",
    "running", "finished" or "cancelled"), finish_reason ("stop", "length", "cancelled" or None), seq (its sequence in
    the cache while it runs) and rng.
    """

    prompt: list
    max_new_tokens: int
    temperature: float = 0.0
    top_k: Any = None
    stop_token: Any = None
    seed: Any = None
    request_id: Any = field(default=None, init=False)
    tokens: list = field(default_factory=list, init=False)
    state: str = field(default="waiting", init=False)
    finish_reason: Any = field(default=None, init=False)
    seq: Any = field(default=None, init=False, repr=False)
    rng: Any = field(default=None, init=False, repr=False)

# %% [markdown]
"""
### A budget for each step

The time of a step grows with the token rows in it. If a prompt of 2000 tokens were run at once, all who are decoding
would wait for it. So a step has a **token budget**: first one token for each request that decodes, then prompts, in
chunks, as far as it goes (Agrawal et al., *Sarathi-Serve*, OSDI 2024, section 4: chunked prefills).

    budget 16       lacks    step 1   step 2   step 3
    A  decodes        1         1        1        1
    B  prompt        30        14       14        2
    C  decodes        1         1        1        1
    D  prompt        20         0        0       12

A request *lacks* the tokens of its text that the cache does not hold yet; who decodes lacks one. Who came first is
served first.
"""

# %% nbgrader={"grade": false, "grade_id": "23-budget", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def share_budget(lacks, budget):
    """How many tokens each request runs in one step: who lacks one first, then the others, each group in order.

    lacks: the tokens that each running request lacks, in order of arrival. Source: Sarathi-Serve, algorithm 3.

    >>> share_budget([1, 30, 1, 20], budget=16)
    [1, 14, 1, 0]
    """
    counts = [0] * len(lacks)
    ### BEGIN SOLUTION
    decoding = [index for index, lack in enumerate(lacks) if lack == 1]
    reading = [index for index, lack in enumerate(lacks) if lack > 1]
    for index in decoding + reading:
        counts[index] = min(lacks[index], budget)
        budget -= counts[index]
    ### END SOLUTION
    return counts

# %% nbgrader={"grade": true, "grade_id": "23-budget-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_budget():
    """Oracle: the picture, column by column."""
    for lacks, expected in (([1, 30, 1, 20], [1, 14, 1, 0]), ([1, 16, 1, 20], [1, 14, 1, 0]),
                            ([1, 2, 1, 20], [1, 2, 1, 12])):
        got = share_budget(list(lacks), 16)
        assert len(got) == 4, f"four requests lack {lacks}: got {got}, expected one count for each"
        assert sum(got) <= 16, f"{lacks}: got {got}, {sum(got)} tokens; the budget of 16 is for all of them together"
        assert (got[0], got[2]) == (1, 1), f"{lacks}: got {got}; A and C lack one token: they decode, and come first"
        assert got == expected, f"{lacks}: got {got}, expected {expected}; prompts take what is left, in order"
    ### BEGIN HIDDEN TESTS
    assert share_budget([], 4) == [], "nobody runs: expected []"
    assert share_budget([9, 9, 1], 1) == [0, 0, 1], "a budget of 1: the one who decodes gets it, expected [0, 0, 1]"
    assert share_budget([5, 3, 1], 100) == [5, 3, 1], "a budget for all: expected [5, 3, 1]"
    assert share_budget([40], 7) == [7], "one long prompt, budget 7: expected [7], a chunk of it"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_budget()

# %% [markdown]
"""
### What is still to run

A request may have to give its blocks back in mid-text and be *resumed* later. That sounds like a special case, as does
a chunk, and decoding itself. It is one rule: the text is the prompt and all that was generated; run what the cache lacks.

    prompt a b c d, generated        stored     to run
    new                       -         0       a b c d
    after a chunk of 3        -         3       d
    decoding                x y z       6       z
    resumed                 x y z       0       a b c d x y z
    resumed, prefix found   x y z       2       c d x y z

In every row one token is drawn when the last of these has run, and not before.
"""

# %% nbgrader={"grade": false, "grade_id": "23-to-run", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
def tokens_to_run(prompt, tokens, stored):
    """The ids that the cache lacks. prompt, tokens: ids given and generated; stored: how many ids the cache holds.

    >>> tokens_to_run([11, 12, 13], [14, 15], stored=4)
    [15]
    """
    ### BEGIN SOLUTION
    return (prompt + tokens)[stored:]
    ### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "23-to-run-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_to_run():
    """Oracle: the picture."""
    for tokens, stored, expected in (("", 0, "abcd"), ("", 3, "d"), ("xyz", 6, "z"), ("xyz", 0, "abcdxyz"),
                                     ("xyz", 2, "cdxyz")):
        got = "".join(tokens_to_run(list("abcd"), list(tokens), stored))
        case = f"prompt abcd, generated {tokens or 'nothing'}, {stored} stored: got {got!r}, expected {expected!r}"
        assert len(got) <= len(expected), f"{case}; a token is run a second time"
        assert len(got) >= len(expected), f"{case}; a token is lost"
        assert got == expected, case
    ### BEGIN HIDDEN TESTS
    prompt, tokens = list(range(7)), [7, 8, 9]
    for stored in range(10):
        got = tokens_to_run(prompt, tokens, stored)
        assert got == list(range(stored, 10)), f"ids 0 to 9, {stored} stored: got {got}"
    assert (prompt, tokens) == (list(range(7)), [7, 8, 9]), "the request's own lists were changed"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_to_run()

# %% [markdown]
"""
### Who waits, who runs

Two lists, both in order of arrival, and the block tables of section ???. No model and no arrays: only numbers are
needed to decide. `preempt` and `leave` are the only ways out of `running`, and both give the blocks back.
"""

# %%
#| export
class RequestQueues:
    """Requests that wait and requests that run, in order of arrival. Bookkeeping: BlockTables, no arrays, no model.

    Every running request is older than every waiting one, so one that is preempted goes back to the front.
    """

    def __init__(self, tables, token_budget=256, max_running=None):
        self.tables, self.token_budget = tables, whole_number("token_budget", token_budget)
        self.max_running = tables.max_seqs
        if max_running is not None:
            self.max_running = min(whole_number("max_running", max_running), tables.max_seqs)
        self.waiting, self.running, self.preemptions = [], [], 0

    @property
    def has_work(self):
        """Whether any request is not done."""
        return bool(self.waiting or self.running)

    def to_run(self, request):
        """The ids of a running request that the cache lacks."""
        return tokens_to_run(request.prompt, request.tokens, self.tables.length(request.seq))

    def fits(self, requests, counts):
        """Whether the free blocks suffice for these requests to run so many tokens each."""
        return self.tables.blocks_for([request.seq for request in requests], counts) <= self.tables.num_free()

    def start(self, request):
        """Give a waiting request a sequence; it finds what the pool still holds of its text."""
        request.seq = self.tables.add_sequence(request.prompt + request.tokens)

    def give_back(self, request):
        """Give the blocks of a request back to the pool."""
        if request.seq is not None:
            self.tables.finish_sequence(request.seq)
            request.seq = None

    def preempt(self, request):
        """Stop a running request for now: its blocks come back, its text is kept, and it waits in front."""
        self.give_back(request)
        self.running.remove(request)
        self.waiting.insert(0, request)
        request.state, self.preemptions = "waiting", self.preemptions + 1

    def leave(self, request, state, reason):
        """A request is done: its blocks come back, and nobody waits for it."""
        self.give_back(request)
        (self.running if request in self.running else self.waiting).remove(request)
        request.state, request.finish_reason = state, reason

    def cancel(self, request_id):
        """End a request that waits or runs; its blocks come back. False if the id is unknown or done."""
        for request in self.waiting + self.running:
            if request.request_id == request_id:
                self.leave(request, "cancelled", "cancelled")
                return True
        return False

# %% [markdown]
"""
### When blocks run out

Nobody knows how long a text will get. So requests are let in while there is room, and the pool can run out in
mid-text. Then the **newest** gives way: it has had the least, and the oldest always comes to its end. Its text is run
again later, prompt and new tokens as one prompt: *recomputation* (Kwon et al., vLLM, SOSP 2023, section 4.5).

    6 blocks of 4     A 8 tokens   B 8 tokens   C 4 tokens       free 1; all decode, each needs a new block: 3
    C gives way       A            B                             free 2; needed 2

Write `make_room`. With every request that gives way (`self.preempt(request)`), ask again: how is the budget shared
(`self.to_run(request)` are the ids that it lacks), and is there room now (`self.fits(requests, counts)`)?
"""

# %% nbgrader={"grade": false, "grade_id": "23-make-room", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
class StepPlanner(RequestQueues):
    """Decides what runs in the next step."""

    def make_room(self):
        """How many tokens each of self.running runs; before that, the newest give way until the blocks suffice."""
        ### BEGIN SOLUTION
        while True:
            counts = share_budget([len(self.to_run(request)) for request in self.running], self.token_budget)
            if self.fits(self.running, counts):
                return counts
            self.preempt(self.running[-1])
        ### END SOLUTION

    def admit(self):
        """Let the first who waits run, if a row, some budget, and blocks for all texts so far are there; else False.

        Nobody overtakes: while the first does not fit, the others wait behind.
        """
        lacks = [len(self.to_run(request)) for request in self.running]
        if not self.waiting or len(lacks) >= self.max_running or sum(lacks) >= self.token_budget:
            return False
        request = self.waiting[0]
        self.start(request)
        if not self.fits([*self.running, request], [*lacks, len(self.to_run(request))]):
            self.give_back(request)
            return False
        self.running.append(self.waiting.pop(0))
        request.state = "running"
        return True

    def schedule(self):
        """The plan of one step, as a list of (request, how many of its tokens run)."""
        while self.admit():
            pass
        plan = [(request, count) for request, count in zip(self.running, self.make_room()) if count]
        if self.has_work and not plan:
            raise OutOfBlocks(f"nobody can run: {self.tables.num_free()} of {self.tables.num_blocks} blocks are free, "
                              "the others are held by sequences that are not this scheduler's; finish those")
        return plan

# %% nbgrader={"grade": true, "grade_id": "23-make-room-test", "locked": true, "points": 4, "schema_version": 3, "solution": false, "task": false}
def planner_of(num_blocks, stored):
    """A planner with blocks of 4; its running requests A, B, ... hold so many tokens and lack one more each."""
    planner = StepPlanner(BlockTables(num_blocks, 4, max_seqs=8))
    for name, length in zip("ABCDE", stored):
        request = Request([ord(name)] * length, 9)
        request.tokens, request.request_id, request.state = [7], name, "running"
        planner.start(request)
        planner.tables.reserve(request.seq, length)
        planner.tables.commit(request.seq, length)
        planner.running.append(request)
    return planner


def names(requests):
    return "".join(request.request_id for request in requests)


def test_unit_make_room():
    """Oracle: the picture, counted by hand."""
    planner = planner_of(8, [8, 8, 4])
    counts = planner.make_room()
    assert (counts, names(planner.running)) == ([1, 1, 1], "ABC"), (
        f"8 blocks are enough for A, B and C: got counts {counts}, running {names(planner.running)}")
    planner = planner_of(6, [8, 8, 4])
    counts, running, waiting = planner.make_room(), names(planner.running), names(planner.waiting)
    assert len(running) < 3, "3 blocks needed, 1 free: nobody gave way, and the pass will not fit"
    assert "A" in running, f"running {running}: A gave way, the oldest, and may never end; let the newest give way"
    assert (running, waiting) == ("AB", "C"), f"got running {running}, waiting {waiting}, expected AB and C"
    assert counts == [1, 1], f"got counts {counts}, expected [1, 1]: share the budget anew, among those who stay"
    newest = planner.waiting[0]
    assert (newest.tokens, newest.seq, newest.state) == ([7], None, "waiting"), (
        f"C gave way: got {newest}; it keeps its text and holds no blocks")
    planner = planner_of(5, [8, 4, 4, 4])
    counts, running, waiting = planner.make_room(), names(planner.running), names(planner.waiting)
    assert (running, waiting, counts) == ("AB", "CD", [1, 1]), (
        f"5 blocks, 4 needed, 0 free: got running {running}, waiting {waiting}, counts {counts}; "
        "ask again after each who gives way")
    ### BEGIN HIDDEN TESTS
    assert planner.tables.num_free() == 2, f"after C and D gave way: {planner.tables.num_free()} free, expected 2"
    planner = planner_of(4, [4, 4, 4, 4])
    assert (planner.make_room(), names(planner.running), names(planner.waiting)) == ([1, 1], "AB", "CD"), (
        f"4 full blocks, none free: running {names(planner.running)}, waiting {names(planner.waiting)}")
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_make_room()

# %% [markdown]
"""
### The step

`step` reads as a sentence: schedule, run, postprocess. Two things in `forward` (given) save work. Requests that run
as many tokens share one pass, so no row is padded: all who decode are one pass of T = 1. And only a position after
which a token is due goes through the head.

If anything fails in there, the passes that were already committed are truncated away: the step never happened.

Write `postprocess`: each token belongs to its request. A text that ends with one of its own `stop_token` ids is done
("stop"), as is one of `max_new_tokens` ("length"). Who is done leaves, by `self.leave(request, "finished", reason)`.
"""

# %%
#| export
def check_request(request, model, cache):
    """Prompt, stop ids and random numbers of a request that can be served, or a ValueError that says what cannot."""
    if request.request_id is not None:
        raise ValueError(f"this request is number {request.request_id} already: make a new Request for each text")
    new = whole_number("max_new_tokens", request.max_new_tokens)
    ids = check_prompt(request.prompt, new, model.max_seq_len)
    if len(ids) > 1 or ids.min() < 0 or ids.max() >= model.vocab_size:
        raise ValueError(f"a prompt is one list of ids from 0 to {model.vocab_size - 1}, got {request.prompt!r:.80}")
    longest = blocks_needed(ids.shape[1] + new - 1, cache.block_size)  # the last new token is never run
    if longest > cache.num_blocks:
        raise ValueError(f"a prompt of {ids.shape[1]} tokens and max_new_tokens={new} need {longest} blocks of "
                         f"{cache.block_size}, the pool has {cache.num_blocks}: ask for less, or make a larger pool")
    if isinstance(request.temperature, bool) or not isinstance(request.temperature, (int, float, np.number)):
        raise ValueError(f"temperature is a number, got {request.temperature!r}")
    check_sampling(request.temperature, request.top_k)
    several = request.stop_token if isinstance(request.stop_token, Iterable) else [request.stop_token]
    stop_ids = tuple(whole_number("stop_token", token, least=0) for token in several if token is not None)
    seed = default_rng().integers(2**63) if request.seed is None else whole_number("seed", request.seed, least=0)
    return ids[0].tolist(), stop_ids, np.random.default_rng(seed)

# %% nbgrader={"grade": false, "grade_id": "23-postprocess", "locked": false, "schema_version": 3, "solution": true, "task": false}
#| export
class Scheduler(StepPlanner):
    """Serves many requests at once from one pool of blocks; every text is the one that `generate` gives it alone.

    model: a GPT; cache: a PagedModelKVCache of its sizes. token_budget: token rows per step. max_running: requests
    that run at once (default, and at most: the cache's max_seqs). Call it from one thread: a server puts `add` and
    `cancel` between steps. Sources: Orca (continuous batching), Sarathi-Serve (budget, chunks), vLLM (preemption).
    """

    def __init__(self, model, cache, token_budget=256, max_running=None):
        super().__init__(cache.tables, token_budget, max_running)
        needed, sizes = (len(model.blocks), *stored_heads(model)), (cache.num_layers, cache.num_heads, cache.head_dim)
        if needed != sizes:
            raise ValueError(f"the model needs a cache of (layers, heads, head_dim) = {needed}, got {sizes}")
        self.model, self.cache, self._ids = model, cache, itertools.count()
        self._modules = list(model.modules())

    def add(self, request):
        """Let a request wait for its turn; return its id. ValueError, before anything changes, if it can never run."""
        request.prompt, request.stop_token, request.rng = check_request(request, self.model, self.cache)
        request.request_id = next(self._ids)
        self.waiting.append(request)
        return request.request_id

    def step(self):
        """One step for everybody who runs; return its new tokens as a list of (request, token)."""
        plan = self.schedule()
        sampled = self.forward(plan)
        self.postprocess(sampled)
        return sampled

    def postprocess(self, sampled):
        """Append each (request, token), and let the requests leave that are done."""
        ### BEGIN SOLUTION
        for request, token in sampled:
            request.tokens.append(token)
            if token in request.stop_token:
                self.leave(request, "finished", "stop")
            elif len(request.tokens) == request.max_new_tokens:
                self.leave(request, "finished", "length")
        ### END SOLUTION

    def run(self):
        """Step until nothing is left."""
        while self.has_work:
            self.step()

    def forward(self, plan):
        """Run a plan; return (request, token) for all who are due one. After an error, nothing has been run."""
        stored = {request: self.tables.length(request.seq) for request, _ in plan}
        passes, due = {}, {}
        for request, count in plan:
            passes.setdefault(count, []).append(request)
        try:
            with self.evaluating():
                for count, requests in passes.items():
                    due.update(self.run_pass(requests, count))
                logits = self.model.head(Tensor(np.stack(list(due.values())))).numpy() if due else []  # (due, V)
        except BaseException:
            for request, length in stored.items():
                self.tables.truncate(request.seq, length)
            raise
        return [(request, int(sample_next(row[None], request.temperature, request.top_k, request.rng)[0]))
                for request, row in zip(due, logits)]

    def evaluating(self):
        """`evaluating(model)`, without the walk through the model where no mode has to change: a step is short."""
        return evaluating(self.model) if any(module.training for module in self._modules) else no_grad()

    def run_pass(self, requests, count):
        """Run `count` tokens of each request in one pass; the last hidden state (E,) of those who are due a token."""
        seqs, ids = [r.seq for r in requests], [self.to_run(r)[:count] for r in requests]
        with self.cache.rows(seqs, tokens=ids).attached_to(self.model, n_new=[count] * len(seqs)):
            last = self.model.hidden(np.array(ids)).numpy()[:, -1]  # (B, count, E) -> (B, E)
        return {request: row for request, row in zip(requests, last) if not self.to_run(request)}

# %% nbgrader={"grade": true, "grade_id": "23-postprocess-test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
def test_unit_postprocess():
    """Oracle: three requests by hand; the tokens are made up, no model runs."""
    pool = PagedModelKVCache(20, 4, 3, 2, 8, max_seqs=8)
    scheduler, free = Scheduler(random_gpt(), pool), pool.num_free

    def running(*requests):
        for request in requests:
            scheduler.add(request)
        for request, count in scheduler.schedule():
            pool.tables.reserve(request.seq, count)
            pool.tables.commit(request.seq, count)
        return requests

    a, b, c = running(Request([10], 3, stop_token=7), Request([11], 3), Request([12], 3, stop_token=[8, 9]))
    scheduler.postprocess([(a, 5), (b, 5), (c, 5)])
    assert [r.tokens for r in (a, b, c)] == [[5]] * 3, f"after one step: got {[r.tokens for r in (a, b, c)]}"
    assert [r.state for r in (a, b, c)] == ["running"] * 3, "after one of three tokens: nobody is done yet"
    scheduler.postprocess([(a, 7), (b, 7), (c, 7)])
    assert a.tokens == [5, 7], f"a: tokens {a.tokens}, expected [5, 7]; the stop token is part of the text"
    assert (a.state, a.finish_reason) == ("finished", "stop"), f"a drew its stop token: {a.state}, {a.finish_reason}"
    assert b.state == c.state == "running", "7 stops a alone: b has no stop token, and c has others"
    assert a not in scheduler.running, "a is done and still runs: let it leave"
    assert free() == 18, f"a is done: {free()} of 20 blocks are free, expected 18; its blocks never came back"
    scheduler.postprocess([(b, 1), (c, 9)])
    assert (b.state, b.finish_reason) == ("finished", "length"), f"b has its 3 tokens: {b.state}, {b.finish_reason}"
    assert (c.state, c.finish_reason) == ("finished", "stop"), f"c drew 9, one of its two: {c.state}, {c.finish_reason}"
    assert not scheduler.has_work and free() == 20, f"all are done: {free()} of 20 blocks are free"
    ### BEGIN HIDDEN TESTS
    d, e = running(Request([3], 1), Request([4], 2, stop_token=6))
    scheduler.postprocess([(d, 2), (e, 2)])
    assert (d.tokens, d.finish_reason, e.state) == ([2], "length", "running"), f"max_new_tokens=1: got {d}"
    scheduler.postprocess([(e, 6)])
    assert e.finish_reason == "stop", f"the last token is a stop token: got {e.finish_reason}, expected 'stop'"
    ### END HIDDEN TESTS


if __name__ == "__main__":
    test_unit_postprocess()

# %% [markdown]
"""
### Proof

Nine requests of every kind arrive over time; the pool is so small that some must give way; one is cancelled in the
middle, one pass fails. The oracle is `generate`, without a cache, for each request alone.
"""

# %% nbgrader={"grade": true, "grade_id": "23-serve-test", "locked": true, "points": 5, "schema_version": 3, "solution": false, "task": false}
def mixed_requests(count, seed):
    """Requests of all kinds: long and short, greedy and drawn, with and without a stop token."""
    rng = np.random.default_rng(seed)
    return [Request(rng.integers(0, 64, rng.integers(1, 24)).tolist(), int(rng.integers(1, 16)),
                    temperature=(0.0, 0.9)[i % 2], top_k=(None, 20)[i % 3 == 1], stop_token=(None, 5, [6, 7])[i % 3],
                    seed=i) for i in range(count)]


def alone(model, request):
    """Oracle: the new tokens that one request gets from `generate`, without a cache and without anybody else."""
    text = model.generate(request.prompt, request.max_new_tokens, temperature=request.temperature, top_k=request.top_k,
                          rng=np.random.default_rng(request.seed), stop_token=list(request.stop_token) or None)
    return text[len(request.prompt):]


def test_unit_serve(count=9, seed=0, num_blocks=14, token_budget=10):
    """Oracles: `generate` without a cache for each request alone, and the counted token rows."""
    model, pool = random_gpt(), PagedModelKVCache(num_blocks, 4, 3, 2, 8, max_seqs=6)
    scheduler, coming = Scheduler(model, pool, token_budget), mixed_requests(count, seed)
    requests, streamed, most = list(coming), {request: [] for request in coming}, 0

    def one_step():
        for request, token in scheduler.step():
            streamed[request].append(token)

    while coming or scheduler.has_work:
        if coming:
            scheduler.add(coming.pop(0))
        most = max(most, count_rows(model, one_step))
    assert most <= token_budget, f"one step ran {most} token rows, the budget is {token_budget}"
    assert scheduler.preemptions > 0, "nobody gave way: was the pool ever full?"
    for request in requests:
        expected = alone(model, request)
        assert request.tokens == expected, (
            f"request {request.request_id}: got {request.tokens}, alone {expected}; a token lost, or run twice?")
        assert streamed[request] == expected, f"request {request.request_id}: step() told {streamed[request]}"
    assert pool.num_free() == num_blocks, f"all are done: {pool.num_free()} of {num_blocks} blocks are free"


if __name__ == "__main__":
    test_unit_serve()

### BEGIN HIDDEN TESTS
if __name__ == "__main__":
    test_unit_serve(count=12, seed=1, num_blocks=11, token_budget=3)
    test_unit_serve(count=12, seed=2, num_blocks=10, token_budget=100)
### END HIDDEN TESTS

# %% nbgrader={"grade": true, "grade_id": "23-undisturbed-test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
def test_unit_undisturbed():
    """Oracle: the others' texts, alone. One request is cancelled in mid-text; a pass fails after another succeeded."""
    model, pool = random_gpt(), PagedModelKVCache(30, 4, 3, 2, 8, max_seqs=6)
    scheduler, embedding, calls = Scheduler(model, pool), model.token_embedding, []
    requests = [Request([5, 6, 7], 8, temperature=0.9, seed=i) for i in range(3)]
    for request in requests:
        scheduler.add(request)
    scheduler.step()
    assert scheduler.cancel(1), "request 1 runs: cancel got False"
    assert not scheduler.cancel(1), "request 1 was cancelled already: cancel got True"
    requests.append(Request([1, 2, 3, 4], 4))
    scheduler.add(requests[3])

    def failing(ids):
        calls.append(ids.shape)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return embedding(ids)

    before, model.token_embedding = [list(request.tokens) for request in requests], failing
    assert "memory" in error_of(scheduler.step, RuntimeError), "the error of the model was swallowed"
    assert calls == [(2, 1), (1, 4)], f"passes of shape {calls}: expected who decodes as one, then the new prompt"
    assert [request.tokens for request in requests] == before, "the step failed, and yet somebody has a new token"
    scheduler.run()
    for request in (requests[0], requests[2], requests[3]):
        assert request.tokens == alone(model, request), f"request {request.request_id}: not the text it gets alone"
    assert requests[1].tokens == alone(model, requests[1])[:1], "the cancelled request had one token, and keeps it"
    assert pool.num_free() == 30, f"all are done: {pool.num_free()} of 30 blocks are free"


if __name__ == "__main__":
    test_unit_undisturbed()

# %% [markdown]
"""
### What it brings

Sixteen requests, all there at once, and 1, 4 or 16 rows to run them in; one row is one after the other. The first
token comes out of the last chunk of the prompt: the *time to first token* is what a person waits before anything
happens.

*Predict:* which gains more from 16 rows, the tokens per second or the wait for the first token? Of whom?
"""

# %% nbgrader={"grade": false, "grade_id": "23-measure-serving", "locked": true, "schema_version": 3, "solution": false, "task": false}
def pool_for(model, num_blocks, block_size=16, max_seqs=16):
    return PagedModelKVCache(num_blocks, block_size, model.num_layers, *stored_heads(model), max_seqs)


def questions(count, prompt_len, max_new_tokens, shared=0, seed=0):
    """Requests with random prompts, of which the first `shared` tokens are the same."""
    rng = np.random.default_rng(seed)
    start = rng.integers(0, 256, shared).tolist()
    return [Request(start + rng.integers(0, 256, prompt_len - shared).tolist(), max_new_tokens) for _ in range(count)]


def serve(scheduler, requests):
    """Serve them all, there at once: seconds in total, and seconds until each has its first token."""
    start, first = time.perf_counter(), {}
    for request in requests:
        scheduler.add(request)
    while scheduler.has_work:
        for request, _ in scheduler.step():
            first.setdefault(request.request_id, time.perf_counter() - start)
    return time.perf_counter() - start, list(first.values())


def show_serving(rows=(1, 4, 16), count=16, prompt_len=32, max_new_tokens=32):
    model = random_gpt(256, 128, 4, 4, 256, 4)
    print("rows   tokens/s   first token: median      last")
    for max_running in rows:
        scheduler = Scheduler(model, pool_for(model, 128), max_running=max_running)
        seconds, first = serve(scheduler, questions(count, prompt_len, max_new_tokens))
        print(f"{max_running:>4} {count * max_new_tokens / seconds:>10,.0f} {np.median(first):>18.3f} s {max(first):>7.3f} s")


if __name__ == "__main__":
    show_serving()

# %% [markdown]
"""
The tokens per second grow, since each weight that is read serves more rows; the last in the queue gains more than
that, for it no longer waits for whole texts.

What does the budget do? Four requests are decoding when a prompt of 480 tokens comes in. *Predict:* with a smaller
budget, what gets better, what gets worse?
"""

# %% nbgrader={"grade": false, "grade_id": "23-measure-budget", "locked": true, "schema_version": 3, "solution": false, "task": false}
def show_budgets(budgets=(512, 128, 32, 16)):
    model = random_gpt(256, 128, 4, 4, 512, 4)
    print("budget   longest step   first token of the long prompt")
    for token_budget in budgets:
        scheduler = Scheduler(model, pool_for(model, 128), token_budget)
        for request in questions(4, 16, 200):
            scheduler.add(request)
        for _ in range(10):
            scheduler.step()
        late, steps = questions(1, 480, 1, seed=1)[0], []
        scheduler.add(late)
        while late.state != "finished":
            start = time.perf_counter()
            scheduler.step()
            steps.append(time.perf_counter() - start)
        print(f"{token_budget:>6} {1e3 * max(steps):>11.1f} ms {1e3 * sum(steps):>26.1f} ms")


if __name__ == "__main__":
    show_budgets()

# %% [markdown]
"""
The longest step is how long those who decode see nothing: a small budget keeps it short. The newcomer pays: more
steps, and each of its chunks reads the cache again.

### Prefixes, and the pool over time

Eight requests begin with the same 64 tokens, a system prompt, and go on with 16 of their own. The second finds the
blocks that the first has filled; so the first goes one step ahead. (Who starts in the same step finds nothing yet.)
"""

# %% nbgrader={"grade": false, "grade_id": "23-measure-prefix", "locked": true, "schema_version": 3, "solution": false, "task": false}
def show_prefix(count=8):
    model = random_gpt(256, 128, 4, 4, 256, 4)
    for shared in (0, 64):
        pool, most, start = pool_for(model, 128), 0, time.perf_counter()
        scheduler, requests = Scheduler(model, pool), questions(count, 80, 16, shared)
        scheduler.add(requests[0])
        rows = count_rows(model, scheduler.step)
        for request in requests[1:]:
            scheduler.add(request)
        while scheduler.has_work:
            rows += count_rows(model, scheduler.step)
            most = max(most, 128 - pool.num_free())
        seconds = time.perf_counter() - start
        print(f"{shared:>2} tokens shared: {most} blocks held at once, {rows} token rows run, {seconds:.3f} s")


if __name__ == "__main__":
    show_prefix()

# %% [markdown]
"""
And a look into a pool that is too small: each line is a step, each letter a block of the request of that name.
"""

# %% nbgrader={"grade": false, "grade_id": "23-measure-pool", "locked": true, "schema_version": 3, "solution": false, "task": false}
def show_pool(num_blocks=16, block_size=4, every=4):
    """Six requests of 12 + 20 tokens, one more at every third step; lines of the pool, and who waits."""
    pool = PagedModelKVCache(num_blocks, block_size, 3, 2, 8, max_seqs=6)
    scheduler, coming, step = Scheduler(random_gpt(256), pool, token_budget=8), questions(6, 12, 20), 0
    while coming or scheduler.has_work:
        if coming and step % 3 == 0:
            scheduler.add(coming.pop(0))
        scheduler.step()
        step, owners = step + 1, ["."] * num_blocks
        for request in scheduler.running:
            for block in pool.tables.table(request.seq):
                owners[block] = "ABCDEF"[request.request_id]
        if step % every == 1:
            waiting = "".join("ABCDEF"[request.request_id] for request in scheduler.waiting)
            print(f"step {step:>3}   {''.join(owners)}   {waiting}")
    print(f"{step} steps, {scheduler.preemptions} times somebody gave way")


if __name__ == "__main__":
    show_pool()

# %% [markdown]
"""
*Look back.* Why may a request whose text fits the pool alone always end? (It becomes the oldest; the oldest never gives
way while another runs, and every step runs a token of it or ends others sooner.) What would go wrong if a short request
could overtake a long one that waits for blocks? Where does a resumed request find part of its text? (In blocks that
were freed, and not yet taken again: look at the doubled letters in the tables of a run of your own.)
"""

# %% [markdown]
"""
## The end
"""
