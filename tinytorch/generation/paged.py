"""Paged serving: one pool of blocks for many conversations, and the scheduler that fills it.

Lesson 23_paged_serving. Built from src/23_paged_serving/23_paged_serving.py by `tito dev build`: change it there, not here.
"""

__all__ = [
    "blocks_needed",
    "slots_of",
    "BlockCounts",
    "must_copy",
    "next_table",
    "Label",
    "digest",
    "Blocks",
    "block_name",
    "find_prefix",
    "Reservation",
    "Sequence",
    "cut_sequence",
    "token_list",
    "SequenceBook",
    "OutOfBlocks",
    "PassBook",
    "BlockTables",
    "gather",
    "BlockStore",
    "PagedPool",
    "PagedKVCache",
    "PagedModelKVCache",
    "TableLedger",
    "OpenPass",
    "GatheredTensor",
    "Buffer",
    "PagedPass",
    "PagedRows",
    "paged_kv_cache",
    "Request",
    "share_budget",
    "tokens_to_run",
    "RequestQueues",
    "StepPlanner",
    "check_request",
    "Scheduler",
]


# %% cell 2
# One pool, its tables, its rows and its scheduler belong together: longer than its neighbours.
import copy
import hashlib
import itertools
import math
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from tinytorch.core.attention import as_visible, attention_weights_array, mix_values_array
from tinytorch.core.autograd import no_grad
from tinytorch.core.tensor import Tensor, default_rng
from tinytorch.generation.kv_cache import (
    CacheDoor,
    CacheLedger,
    CacheRows,
    CacheStateError,
    KVView,
    check_tokens,
    slot_positions,
    storage_dtype,
    stored_heads,
    whole_number,
)
from tinytorch.models.transformer import check_prompt, check_sampling, evaluating, sample_next


# %% cell 10 (23-slots)
def blocks_needed(length, block_size):
    """Blocks that hold so many tokens, the last one perhaps in part.

    >>> [blocks_needed(length, 4) for length in (0, 1, 4, 5)]
    [0, 1, 1, 2]
    """
    return (length + block_size - 1) // block_size


def slots_of(table, start, stop, block_size):
    """The slots of positions start .. stop - 1, an array; block b has the slots from b * block_size on.

    >>> slots_of([7, 1, 4], 2, 6, block_size=4).tolist()
    [30, 31, 4, 5]
    """
    positions, table = np.arange(start, stop), np.array(table, int)
    return table[positions // block_size] * block_size + positions % block_size


# %% cell 14 (23-counts)
class BlockCounts:
    """How many sequences hold each block, and which blocks are free, longest free first."""

    def __init__(self, num_blocks):
        self.counts, self.free = [0] * num_blocks, OrderedDict.fromkeys(range(num_blocks))

    def take(self):
        """The block that has been free for longest; it is held once now."""
        block, _ = self.free.popitem(last=False)
        self.counts[block] = 1
        return block

    def hold(self, block):
        """One more sequence holds the block. A free one is found again."""
        if self.counts[block] == 0:
            del self.free[block]
        self.counts[block] += 1

    def give(self, block):
        """One sequence less holds the block; without any it is free. CacheStateError when it is free already."""
        if self.counts[block] == 0:
            raise CacheStateError(f"block {block} is free already: it was given back twice")
        self.counts[block] -= 1
        if self.counts[block] == 0:
            self.free[block] = None


# %% cell 20 (23-copy)
def must_copy(written, holders):
    """Which writers must copy first: all who write into a block that others hold, but for the last who stays.

    written: per writer a block, or None; holders: dict of block -> number of sequences that hold it.

    >>> must_copy([3, 3, None, 5], {3: 2, 5: 1})
    [True, False, False, False]
    """
    staying, copies = dict(holders), []
    for block in written:
        shared = block is not None and staying[block] > 1
        copies.append(shared)
        if shared:
            staying[block] -= 1
    return copies


def next_table(blocks, table, written, copies, num_new):
    """The table that a pass writes with, and the blocks taken for it: (table, taken), the copy before the new ones.

    blocks has take() and unname(block); written: the last block of table, if the pass writes into it, or None;
    copies: must it be copied first?
    """
    taken = [blocks.take() for _ in range(copies + num_new)]
    if copies:
        return table[:-1] + taken, taken
    if written is not None:
        blocks.unname(written)
    return table + taken, taken


# %% cell 23
class Label(NamedTuple):
    """What a full block holds: its name, the name of the block before it ("" for the first), and its tokens."""

    name: str
    parent: str
    tokens: tuple


def digest(value):
    """A hash of 64 hexadecimal digits, the same in every process: SHA-256 of what `repr` says."""
    return hashlib.sha256(repr(value).encode()).hexdigest()


class Blocks(BlockCounts):
    """Counted blocks with names. A free block keeps its name, and can be found by it, until it is taken."""

    def __init__(self, num_blocks):
        super().__init__(num_blocks)
        self.labels, self.named = [None] * num_blocks, {}  # a Label or None per block; name -> block

    def take(self):
        """As before; what is taken will be written, so it loses its name."""
        block = super().take()
        self.unname(block)
        return block

    def name(self, block, label):
        """Let a full block be found, unless another with the same contents can be."""
        if label.name not in self.named and self.labels[block] is None:
            self.named[label.name], self.labels[block] = block, label

    def unname(self, block):
        """The block can no longer be found."""
        label, self.labels[block] = self.labels[block], None
        if label is not None:
            del self.named[label.name]


# %% cell 25 (23-names)
def block_name(parent, tokens):
    """The name of a full block: the digest of its parent's name and of its own tokens (a tuple) together."""
    return digest((parent, tokens))


def find_prefix(blocks, tokens, block_size):
    """The blocks, in order, that hold the beginning of a prompt (a list); at least one token is left to run."""
    found, parent = [], ""
    for start in range(0, len(tokens) - block_size, block_size):
        piece = tuple(tokens[start : start + block_size])
        name = block_name(parent, piece)
        block = blocks.named.get(name)
        if block is None or blocks.labels[block] != Label(name, parent, piece):
            break
        found.append(block)
        parent = name
    return found


# %% cell 28 (23-truncate)
class Reservation(NamedTuple):
    """An open pass: n tokens, the table they are written with, the blocks taken, the shared block left (or None)."""

    n: int
    blocks: list
    taken: list
    left: int


@dataclass
class Sequence:
    """One sequence: its table, its length, its tokens as far as they are known, the names of its full blocks."""

    blocks: list = field(default_factory=list)
    length: int = 0
    tokens: list = field(default_factory=list)
    names: list = field(default_factory=list)
    pending: Reservation = None


def cut_sequence(sequence, length, block_size):
    """Keep the first tokens of a Sequence, in place; return the blocks that it no longer needs, the last first."""
    kept = blocks_needed(length, block_size)
    dropped = sequence.blocks[kept:]
    del sequence.blocks[kept:], sequence.tokens[length:], sequence.names[length // block_size :]
    sequence.length = length
    return dropped[::-1]


# %% cell 31
def token_list(tokens):
    """Token ids as a list of ints; ValueError where one is none."""
    values = np.asarray(tokens.data if isinstance(tokens, Tensor) else tokens)
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu") or (values < 0).any():
        raise ValueError(f"tokens are whole numbers from 0 in one row, got {values.dtype} of shape {values.shape}")
    return [int(token) for token in values]


class SequenceBook:
    """The live sequences by their ids, which are never used twice."""

    def __init__(self, num_blocks, block_size, max_seqs):
        self.num_blocks = whole_number("num_blocks", num_blocks, least=0)
        self.block_size, self.max_seqs = whole_number("block_size", block_size), whole_number("max_seqs", max_seqs)
        self.blocks, self._sequences, self._next_id = Blocks(self.num_blocks), {}, 0

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

    def _add(self, sequence):
        if len(self._sequences) >= self.max_seqs:
            raise ValueError(f"max_seqs={self.max_seqs} sequences are live: finish one, or allow more")
        for block in sequence.blocks:
            self.blocks.hold(block)
        seq, self._next_id = self._next_id, self._next_id + 1
        self._sequences[seq] = sequence
        return seq


# %% cell 32
class OutOfBlocks(ValueError):
    """The pool has too few free blocks. Nothing was changed."""


class PassBook(SequenceBook):
    """What a pass takes, and what it leaves when it is committed or fails.

    A shared block that is copied stays held until the commit, so that a failed pass finds it as it was.
    """

    def reserve(self, seq, n):
        """Find room for n more tokens; the (source, target) pairs of blocks to be copied before they are written."""
        return self.reserve_all([seq], [n])

    def reserve_all(self, seqs, counts):
        """`reserve` for several sequences, all or none: OutOfBlocks before anything has changed."""
        sequences, counts = [self._between_passes(seq) for seq in seqs], [whole_number("n", n, least=0) for n in counts]
        if not len(set(seqs)) == len(seqs) == len(counts):
            raise ValueError(f"each sequence is named once, with its tokens, got {list(seqs)} and {counts}")
        plans = self._plans(sequences, counts)
        needed = sum(copies + num_new for _, copies, num_new in plans)
        if needed > self.num_free():
            raise OutOfBlocks(
                f"{sum(counts)} more tokens of sequences {list(seqs)} need {needed} blocks, {self.num_free()} of "
                f"num_blocks={self.num_blocks} are free: finish or truncate a sequence, or make a larger pool")
        pairs = []
        for sequence, n, (written, copies, num_new) in zip(sequences, counts, plans):
            table, taken = next_table(self.blocks, sequence.blocks, written, copies, num_new)
            sequence.pending = Reservation(n, table, taken, written if copies else None)
            if copies:
                pairs.append((written, taken[0]))
        return pairs

    def blocks_for(self, seqs, counts):
        """Blocks that `reserve_all` would take."""
        plans = self._plans([self._sequence(seq) for seq in seqs], counts)
        return sum(copies + num_new for _, copies, num_new in plans)

    def _plans(self, sequences, counts):
        """Per sequence: the partly filled block that it writes into (or None), must it copy it, its new blocks."""
        size = self.block_size
        written = [s.blocks[-1] if n and s.length % size else None for s, n in zip(sequences, counts)]
        holders = {block: self.blocks.counts[block] for block in written if block is not None}
        num_new = [blocks_needed(s.length + n, size) - len(s.blocks) for s, n in zip(sequences, counts)]
        return list(zip(written, must_copy(written, holders), num_new))

    def commit(self, seq, n, tokens=None):
        """Count the n reserved tokens as stored. tokens: which they are, so that full blocks can be found."""
        sequence, tokens = self._sequence(seq), None if tokens is None else token_list(tokens)
        pending = sequence.pending
        if pending is None or pending.n != n:
            raise CacheStateError(f"commit of {n} tokens to sequence {seq}, "
                                  f"{0 if pending is None else pending.n} are reserved: reserve(seq, n) comes first")
        if tokens is not None and len(tokens) != n:
            raise ValueError(f"{len(tokens)} tokens were named, {n} are stored in sequence {seq}")
        all_known = tokens is not None and len(sequence.tokens) == sequence.length
        sequence.blocks, sequence.length, sequence.pending = pending.blocks, sequence.length + n, None
        if pending.left is not None:  # from here on, Ctrl-C may cost a free block or a name, and no token
            self.blocks.give(pending.left)
        if all_known:
            sequence.tokens += tokens
        self._name_full_blocks(sequence)

    def release(self, seq):
        """Drop the open pass of a sequence, if there is one: its blocks are free again."""
        sequence = self._sequence(seq)
        pending, sequence.pending = sequence.pending, None
        for block in reversed(pending.taken if pending else []):
            self.blocks.give(block)

    def _name_full_blocks(self, sequence):
        size, names = self.block_size, sequence.names
        for index in range(len(names), len(sequence.tokens) // size):
            parent, tokens = names[-1] if names else "", tuple(sequence.tokens[index * size : (index + 1) * size])
            names.append(block_name(parent, tokens))
            self.blocks.name(sequence.blocks[index], Label(names[-1], parent, tokens))


# %% cell 33
class BlockTables(PassBook):
    """Which blocks hold which sequence. Bookkeeping without arrays: blocks and sequences are numbers.

    >>> tables = BlockTables(num_blocks=4, block_size=4, max_seqs=2)
    >>> first = tables.add_sequence()
    >>> tables.reserve(first, 6), tables.commit(first, 6, tokens=[1, 2, 3, 4, 5, 6])
    ([], None)
    >>> second = tables.add_sequence([1, 2, 3, 4, 9])
    >>> tables.length(second), tables.table(first), tables.table(second), tables.num_free()
    (4, [0, 1], [0], 2)
    """

    def add_sequence(self, tokens=None):
        """A new sequence, and its id. tokens: its prompt; `length` says how much of it is here already."""
        tokens = [] if tokens is None else token_list(tokens)
        found = find_prefix(self.blocks, tokens, self.block_size)
        length, names = len(found) * self.block_size, [self.blocks.labels[block].name for block in found]
        return self._add(Sequence(found, length, tokens[:length], names))

    def fork(self, seq):
        """A second sequence with the same committed tokens, in the same blocks; its id."""
        old = self._sequence(seq)
        return self._add(Sequence(list(old.blocks), old.length, list(old.tokens), list(old.names)))

    def truncate(self, seq, length):
        """Keep the first tokens of a sequence."""
        sequence = self._between_passes(seq)
        if whole_number("length", length, least=0) > sequence.length:
            raise ValueError(f"sequence {seq} holds {sequence.length} tokens: it cannot be cut to {length}")
        for block in cut_sequence(sequence, length, self.block_size):
            self.blocks.give(block)

    def finish_sequence(self, seq):
        """Give back what the sequence holds; its id is never used again."""
        self.truncate(seq, 0)
        del self._sequences[seq]


# %% cell 37 (23-gather)
def gather(blocks, tables, out=None):
    """A layer's keys, or values, in order: (H_kv, num_blocks, block_size, D), tables (B, n) -> (B, H_kv, n*block_size, D).

    out (H_kv, B, n, block_size, D): memory for them, in the place of new memory.
    """
    num_heads, head_dim = blocks.shape[0], blocks.shape[3]
    taken = np.take(blocks, tables, axis=1, out=out, mode="clip")  # (H_kv, B, n, block_size, D)
    return taken.reshape(num_heads, len(tables), -1, head_dim).swapaxes(0, 1)


# %% cell 40
class BlockStore:
    """The numbers of all blocks, (L, 2, H_kv, num_blocks, block_size, D). Arrays without sequences."""

    def __init__(self, num_layers, num_blocks, num_heads, block_size, head_dim, dtype=np.float32, tracker=None):
        shape = (num_layers, 2, num_heads, num_blocks, block_size, head_dim)
        self.dtype, self._counted = storage_dtype(dtype), None
        if tracker is not None:
            self._counted = tracker.allocate(math.prod(shape) * self.dtype.itemsize, purpose="kv_cache")
        try:
            self._keep(np.zeros(shape, self.dtype))
        except BaseException:  # within the tracker's limit, and yet more than the machine can do
            self._release()
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

    def copy(self, pairs):
        """Copy whole blocks, (source, target) each, in every layer."""
        for source, target in pairs:
            self.array[:, :, :, target] = self.array[:, :, :, source]

    @property
    def nbytes(self):
        """Bytes of the array."""
        return self.array.nbytes

    def close(self):
        """Give the memory back, to the tracker as well. A second call does nothing."""
        self._release()
        self._keep(self.array[:, :, :, :0].copy())

    def _release(self):
        counted, self._counted = self._counted, None
        if counted is not None:
            counted.close()


# %% cell 42
class PagedPool:
    """Sequences in blocks: what the cache of one layer and that of a whole model have in common."""

    def __init__(self, num_blocks, block_size, num_layers, num_heads, head_dim, max_seqs, dtype, tracker):
        sizes = dict(num_blocks=num_blocks, block_size=block_size, num_layers=num_layers, num_heads=num_heads,
                     head_dim=head_dim, max_seqs=max_seqs)
        for name, value in sizes.items():
            setattr(self, name, whole_number(name, value))
        self.store = BlockStore(self.num_layers, self.num_blocks, self.num_heads, self.block_size, self.head_dim,
                                dtype, tracker)
        self.tables = BlockTables(self.num_blocks, self.block_size, self.max_seqs)
        self.dtype, self._tracker = self.store.dtype, tracker

    def add_sequence(self, tokens=None):
        """A new sequence, and its id. tokens: its prompt; `seq_len` says how much of it need not be run again."""
        return self.tables.add_sequence(tokens)

    def seq_len(self, seq):
        """Committed tokens of a sequence."""
        return self.tables.length(seq)

    def fork(self, seq):
        """A second sequence with the same tokens, and its id: nothing is copied until one of the two is written."""
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
        """Bytes allocated, and bytes of the blocks that are held; MB are 2**20 bytes."""
        held = self.num_blocks - self.num_free()
        return {"total_bytes": self.nbytes, "total_mb": self.nbytes / 2**20,
                "used_bytes": held * self.nbytes // max(self.num_blocks, 1), "cache_tensors": 2 * self.num_layers,
                "dtype": self.dtype.name, "num_blocks": self.num_blocks, "free_blocks": self.num_free()}

    def close(self):
        """Give the memory back, to the tracker as well: a pool without blocks. A second call does nothing."""
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


# %% cell 43
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

        OutOfBlocks, a ValueError, where too few blocks are free. What is refused changes nothing.
        """
        start, k, v = self.seq_len(seq), self._checked("k", k), self._checked("v", v)
        count, tokens = k.shape[1], None if tokens is None else token_list(tokens)
        if v.shape[1] != count or (tokens is not None and len(tokens) != count):
            raise ValueError(f"keys of {count} tokens came with values of {v.shape[1]} and the tokens {tokens}: "
                             "they must be as many")
        pairs = self.tables.reserve(seq, count)
        try:
            self.store.copy(pairs)
            slots = slots_of(self.tables.table(seq, pending=True), start, start + count, self.block_size)
            self.store.write(0, slots, k, v)
        except BaseException:  # Ctrl-C
            self.tables.release(seq)
            raise
        self.tables.commit(seq, count, tokens)

    def get_kv(self, seq):
        """Keys and values of a sequence, (H, len, D) each; copies."""
        table, length = np.array([self.tables.table(seq)], int), self.seq_len(seq)
        key, value = (gather(blocks, table)[0, :, :length] for blocks in self.store.array[0])
        return key, value

    def _checked(self, name, tokens):
        array = np.asarray(tokens.data if isinstance(tokens, Tensor) else tokens)
        if array.ndim != 3:
            raise ValueError(f"{name} has shape {array.shape}, needed (heads, tokens, head_dim)")
        return check_tokens(name, array[None], 1, self.num_heads, self.head_dim, self.dtype)[0]


# %% cell 46
class PagedModelKVCache(PagedPool):
    """The paged cache of a whole model: one table per sequence serves all layers; `rows` makes a batch.

    Sequences are added, forked, cut and finished between passes, from one thread.
    """

    def __init__(self, num_blocks, block_size, num_layers, num_heads, head_dim, max_seqs, *,
                 dtype=np.float32, strict=False, tracker=None):
        super().__init__(num_blocks, block_size, num_layers, num_heads, head_dim, max_seqs, dtype, tracker)
        self.strict, self.lock, self.buffer = bool(strict), threading.Lock(), Buffer(self.dtype)

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


# %% cell 47
class TableLedger(CacheLedger):
    """A ledger whose lengths stand in the block tables, and are changed there only."""

    def __init__(self, tables, seqs):
        self.tables, self.seqs = tables, seqs
        self.close_pass()

    @property
    def lengths(self):
        """Committed tokens per row."""
        return [self.tables.length(seq) for seq in self.seqs]

    @lengths.setter
    def lengths(self, lengths):
        """The tables know already."""


class OpenPass(NamedTuple):
    """Where a pass writes and reads, the same in every layer."""

    rows: np.ndarray  # of each new token of all rows: its row,
    steps: np.ndarray  # its place in the chunk,
    slots: np.ndarray  # and the slot that it will fill
    tables: np.ndarray  # (B, n): the blocks of each row, padded with block 0
    visible: list  # per row, how many tokens are stored and new,
    positions: np.ndarray  # and the position in each slot, (B, S)
    tokens: list  # per row, the ids of the new ones, or None


# %% cell 48
class GatheredTensor(Tensor):
    """Keys or values of one layer, (B, H_kv, S, D), behind block tables (B, n); `data` gathers a copy if somebody asks.

    blocks (H_kv, num_blocks, block_size, D); lengths: tokens per row, zeros follow in shorter rows.
    """

    _gathered = None

    def __init__(self, blocks, tables, lengths):
        self.blocks, self.tables, self.lengths = blocks, tables, lengths

    @property
    def data(self):
        if self._gathered is None:
            self._gathered = self.gathered(None)
            for row, length in enumerate(self.lengths):
                self._gathered[row, :, length:] = 0
            self._gathered.flags.writeable = False
        return self._gathered

    def gathered(self, buffer):
        """The numbers, in memory that is used again or (None) in new memory; beyond a row's length they mean nothing."""
        num_heads, _, block_size, head_dim = self.blocks.shape
        out = None if buffer is None else buffer.shaped((num_heads, *self.tables.shape, block_size, head_dim))
        return gather(self.blocks, self.tables, out)[:, :, : max(self.lengths)]


class Buffer:
    """Memory that is used again: to ask the system for a large array, page by page, costs as much as to fill it."""

    def __init__(self, dtype):
        self._flat = np.empty(0, dtype)

    def shaped(self, shape):
        """An array of this shape, with whatever numbers are left there."""
        size = math.prod(shape)
        if size > self._flat.size:
            self._flat = np.empty(2 * size, self._flat.dtype)
        return self._flat[:size].reshape(shape)


# %% cell 49
class PagedPass(CacheDoor):
    """What the rows of a pool do in a pass: open it, write, read, and keep or drop what was written."""

    def update(self, layer_idx, key, value, n_new=None):
        """As in KVCache; the view is gathered through the tables when it is read, so read it before the pass ends."""
        with self._lock:
            layer_idx, key, value, n_new = self._accept(layer_idx, key, value, n_new)
        now = self._open
        key, value = (part.swapaxes(0, 1)[:, now.rows, now.steps] for part in (key, value))  # (H_kv, n, D)
        self.pool.store.write(layer_idx, now.slots, key, value)
        return KVView(*self._through(layer_idx, now.tables, now.visible), now.positions)

    def attend(self, query, key, value, visible):
        """scaled_dot_product_attention of query (B, H, T, D) over what update returned, in the pool's buffer."""
        with self._lock:  # for the buffer
            keys = key.gathered(self.pool.buffer)
            visible = as_visible(visible, (*query.shape[:-1], keys.shape[2]))
            weights = attention_weights_array(query.data, keys, visible)
            return Tensor(mix_values_array(weights, value.gathered(self.pool.buffer)), dtype=self.dtype)

    def get(self, layer_idx):
        """Committed keys and values of one layer, (B, H_kv, seq_pos, D) each, as copies; empty slots are zero."""
        pair = self._through(self._layer(layer_idx), self._tables(pending=False), self.seq_lens)
        return tuple(Tensor(part.data, dtype=self.dtype) for part in pair)

    def abandon(self):
        """Drop what is pending: the pass that wrote it has failed. Its blocks are free again."""
        if self._open is not None:
            self._release()
        self._ledger.close_pass()

    def _open_pass(self, lengths):
        """Reserve the blocks of all rows, or none, and copy what is shared and will be written."""
        tables, starts = self.pool.tables, self.seq_lens
        counts = [stop - start for start, stop in zip(starts, lengths)]
        tokens = [None] * self.batch_size if self.tokens is None else [token_list(row) for row in self.tokens]
        if self.tokens is not None and [len(row) for row in tokens] != counts:
            raise ValueError(f"tokens names {[len(row) for row in tokens]} ids per row, the pass brings {counts}")
        copies = tables.reserve_all(self.seqs, counts)
        try:
            self.pool.store.copy(copies)
            slots = [slots_of(tables.table(seq, pending=True), start, stop, self.pool.block_size)
                     for seq, start, stop in zip(self.seqs, starts, lengths)]
            rows, steps = np.repeat(np.arange(self.batch_size), counts), np.concatenate([np.arange(n) for n in counts])
            positions = slot_positions(lengths)
            positions.flags.writeable = False  # every layer hands out the same
            self._open = OpenPass(rows, steps, np.concatenate(slots), self._tables(pending=True), lengths, positions, tokens)
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
        starts = self.seq_lens
        try:
            for seq, n, tokens in zip(self.seqs, self._ledger.n_new, self._open.tokens):
                self.pool.tables.commit(seq, n, tokens)
        except BaseException:  # Ctrl-C between two rows: all of them, or none
            self._release()
            for seq, start in zip(self.seqs, starts):
                self.pool.tables.truncate(seq, start)
            raise
        self._open = self.tokens = None

    def _tables(self, pending):
        tables = [self.pool.tables.table(seq, pending) for seq in self.seqs]
        longest = max(map(len, tables))
        return np.array([table + [0] * (longest - len(table)) for table in tables], int)

    def _through(self, layer_idx, tables, lengths):
        return tuple(GatheredTensor(blocks, tables, lengths) for blocks in self.pool.store.array[layer_idx])


# %% cell 50
class PagedRows(PagedPass, CacheRows):
    """Sequences of a pool as the rows of a batch: the contract of every cache. Cheap: made anew for every pass.

    seqs: the ids, one per row; `reorder` changes them. tokens: per row, the ids that the next pass brings (or None):
    full blocks then get names. A pass that finds too few free blocks raises OutOfBlocks and changes nothing.
    max_seq_len: the tokens that one row can be given; by default, all that the pool has room for.
    """

    def __init__(self, pool, seqs, tokens=None, *, max_seq_len=None, owns_pool=False):
        self.pool, self.seqs, self.tokens, self.owns_pool = pool, list(seqs), tokens, owns_pool
        if not self.seqs or len(set(self.seqs)) < len(self.seqs):
            raise ValueError(f"a batch needs sequences, each of them once, got {self.seqs}")
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

    def reset(self):
        """Empty again: every row has 0 tokens, its blocks are free."""
        self.truncate(0)

    def clone(self):
        """An independent copy of what is committed: forks, or a pool of its own if these rows have one."""
        if self.owns_pool:
            return PagedRows(self.pool.clone(), self.seqs, max_seq_len=self.max_seq_len, owns_pool=True)
        forks = []
        try:
            for seq in self.seqs:
                forks.append(self.pool.fork(seq))
        except ValueError:  # max_seqs: nothing is changed
            for seq in forks:
                self.pool.finish_sequence(seq)
            raise
        return PagedRows(self.pool, forks, max_seq_len=self.max_seq_len)

    def close(self):
        """The sequences end; a pool of their own gives its memory back. A second call does nothing."""
        if self.max_seq_len:
            self.abandon()
            for seq in self.seqs:
                self.pool.finish_sequence(seq)
            self.max_seq_len, self._ledger = 0, CacheLedger(self.batch_size)
        if self.owns_pool:
            self.pool.close()

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


# %% cell 51
def paged_kv_cache(batch_size, max_seq_len, num_layers, num_heads, head_dim, *, block_size=16, num_blocks=None,
                   dtype=np.float32, strict=False, tracker=None):
    """A paged cache for a batch, with a pool of its own: a factory for enable_kv_cache.

    num_blocks: fewer than all rows need at full length are allowed; then OutOfBlocks may end a pass.
    """
    batch_size, max_seq_len = whole_number("batch_size", batch_size), whole_number("max_seq_len", max_seq_len)
    if num_blocks is None:
        num_blocks = batch_size * blocks_needed(max_seq_len, whole_number("block_size", block_size))
    pool = PagedModelKVCache(num_blocks, block_size, num_layers, num_heads, head_dim, batch_size,
                             dtype=dtype, strict=strict, tracker=tracker)
    seqs = [pool.add_sequence() for _ in range(batch_size)]
    return PagedRows(pool, seqs, max_seq_len=max_seq_len, owns_pool=True)


# %% cell 68
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


# %% cell 70 (23-budget)
def share_budget(lacks, budget):
    """How many tokens each request runs in one step: who lacks one first, then the others, each group in order.

    lacks: the tokens that each running request lacks, in order of arrival. Source: Sarathi-Serve, algorithm 3.

    >>> share_budget([1, 30, 1, 20], budget=16)
    [1, 14, 1, 0]
    """
    counts = [0] * len(lacks)
    decoding = [index for index, lack in enumerate(lacks) if lack == 1]
    reading = [index for index, lack in enumerate(lacks) if lack > 1]
    for index in decoding + reading:
        counts[index] = min(lacks[index], budget)
        budget -= counts[index]
    return counts


# %% cell 73 (23-to-run)
def tokens_to_run(prompt, tokens, stored):
    """The ids that the cache lacks. prompt, tokens: ids given and generated; stored: how many ids the cache holds.

    >>> tokens_to_run([11, 12, 13], [14, 15], stored=4)
    [15]
    """
    return (prompt + tokens)[stored:]


# %% cell 76
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


# %% cell 78 (23-make-room)
class StepPlanner(RequestQueues):
    """Decides what runs in the next step."""

    def make_room(self):
        """How many tokens each of self.running runs; before that, the newest give way until the blocks suffice."""
        while True:
            counts = share_budget([len(self.to_run(request)) for request in self.running], self.token_budget)
            if self.fits(self.running, counts):
                return counts
            self.preempt(self.running[-1])

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


# %% cell 81
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


# %% cell 82 (23-postprocess)
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
        for request, token in sampled:
            request.tokens.append(token)
            if token in request.stop_token:
                self.leave(request, "finished", "stop")
            elif len(request.tokens) == request.max_new_tokens:
                self.leave(request, "finished", "length")

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
