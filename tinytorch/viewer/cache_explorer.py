"""CacheExplorer: a recorded generation as an interactive page, step by step.

Everything that the page shows is measured on the model and the cache that are handed in: which slots were written is
read off the cache's own bytes before and after a step, which were read off the mask and the weights of the attention.
Only the multiplications are counted by formula (`multiplications`).
"""

import html
import json
from pathlib import Path

import numpy as np

from tinytorch.core.attention import attention_weights
from tinytorch.generation.kv_cache import create_kv_cache, original, stored_heads
from tinytorch.models.transformer import evaluating

__all__ = ["CacheExplorer", "multiplications", "record_generation"]

SCRIPT = Path(__file__).with_name("cache_explorer.js")
NOT_VISIBLE = -1  # in place of a weight: the slot was empty, or the mask hid it


def multiplications(model, num_rows, num_keys):
    """Multiplications of one forward pass: `num_rows` token rows, each attending over `num_keys` keys, one output row.

    Per row and layer: one per weight of every matrix. Per row, key and head: D for the score and D for the mixture.
    The output head runs for the last row only. Norms, GELU and softmax are not counted.
    """
    matrices = sum(p.data.size for block in model.blocks for _, p in block.named_parameters() if p.data.ndim == 2)
    attention = 2 * model.num_layers * model.num_heads * stored_heads(model)[1] * num_keys
    return num_rows * (matrices + attention) + model.head.weight.data.size


class WatchedAttention:
    """Stands in for an attention and notes the weights of the newest token: one array (H, S) per call."""

    def __init__(self, attention, notes):
        self._attention, self._notes = attention, notes

    def __getattr__(self, name):
        return getattr(self._attention, name)

    def __call__(self, *arguments):
        return self._attention(*arguments)

    def attend(self, query, key, value, visible=None):
        weights = attention_weights(query, key, visible).data[0, :, -1]  # (H, S)
        shown = np.ones(weights.shape[-1], bool) if visible is None else np.asarray(visible)[..., -1, :].reshape(-1)
        self._notes.append(np.where(shown[-weights.shape[-1] :], weights, NOT_VISIBLE))
        return self._attention.attend(query, key, value, visible)


def _held(cache):
    """Copies of what the cache holds: per layer (2, H_kv, seq_pos, D), batch row 0."""
    return [np.stack([part.data[0] for part in cache.get(layer)]) for layer in range(cache.num_layers)]


def _written(before, after):
    """The slots of one layer whose bytes changed, one list per head."""
    lists = []
    for head in range(after.shape[1]):
        old, new = before[:, head], after[:, head]
        same = np.zeros(new.shape[1], bool)
        same[: old.shape[1]] = (old == new[:, : old.shape[1]]).all(axis=(0, 2))
        lists.append(np.flatnonzero(~same).tolist())
    return lists


def record_generation(model, prompt, max_new_tokens, decode=str, cache=None):
    """Generate greedily from `prompt` (a list of ids) on a cache of the student's, and note every step.

    cache: an empty one for a single row, such as one whose class stands in a notebook; default: the package's KVCache.

    Returns a dictionary that JSON can carry: sizes, tokens (`decode` makes each id a text), and per step what was run,
    written and read, the attention weights, the bytes, and the multiplications with and without the cache.
    """
    if not 1 <= len(prompt) <= model.max_seq_len - max_new_tokens or max_new_tokens < 1:
        raise ValueError(f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones do not fit "
                         f"max_seq_len={model.max_seq_len}; at least one of each is needed")
    attentions, notes, ids, steps = [block.attention for block in model.blocks], [], list(prompt), []
    if cache is None:
        cache = create_kv_cache(1, model.max_seq_len, model.num_layers, *stored_heads(model))
    if cache.seq_pos or cache.batch_size != 1:
        raise ValueError(f"an empty cache for one row is needed, not {cache!r}")
    try:
        for block, attention in zip(model.blocks, attentions):
            block.attention = WatchedAttention(original(attention), notes)  # not a cache that is enabled
        with evaluating(model), cache.attached_to(model):
            for _ in range(max_new_tokens):
                before, start = _held(cache), cache.seq_pos
                logits = model(np.array([ids[start:]])).data[0, -1]
                steps.append(_step(model, cache, before, start, notes[-model.num_layers :]))
                ids.append(int(np.argmax(logits)))
    finally:
        for block, attention in zip(model.blocks, attentions):
            block.attention = attention
    return {
        "num_layers": model.num_layers, "num_heads": model.num_heads, "num_kv_heads": cache.num_heads,
        "max_seq_len": model.max_seq_len, "prompt_tokens": len(prompt),
        "tokens": [decode(token) for token in ids], "allocated_bytes": cache.nbytes, "steps": steps,
    }  # fmt: skip


def _step(model, cache, before, start, weights):
    length = cache.seq_pos
    return {
        "rows": length - start,
        "tokens_cached": length,
        "written": [_written(old, new) for old, new in zip(before, _held(cache))],
        "weights": [np.round(layer.astype(float), 4).tolist() for layer in weights],
        "used_bytes": cache.get_memory_usage()["used_bytes"],
        "multiplications": multiplications(model, length - start, length),
        "multiplications_without": multiplications(model, length, length),
    }


class CacheExplorer:
    """A recorded generation to look at: a widget in JupyterLab (with anywidget), or one HTML file.

    >>> explorer = CacheExplorer.record(model, prompt, max_new_tokens=20, decode=...)   # doctest: +SKIP
    >>> explorer                                                                        # doctest: +SKIP
    >>> explorer.save("cache.html")                                                     # doctest: +SKIP
    """

    def __init__(self, recording):
        self.recording = recording

    @classmethod
    def record(cls, model, prompt, max_new_tokens=24, decode=str, cache=None):
        """Generate and record; see `record_generation`."""
        return cls(record_generation(model, prompt, max_new_tokens, decode, cache))

    def to_html(self):
        """One self-contained page: no network, no server."""
        data = json.dumps(self.recording).replace("</", "<\\/")
        script = SCRIPT.read_text(encoding="utf-8").replace("export default", "const explorer =")
        return (
            '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>KV cache, step by step</title>'
            '<meta name="viewport" content="width=device-width"></head>\n<body style="margin:1.5rem">\n'
            f'<main id="explorer"></main>\n<script type="application/json" id="recording">{data}</script>\n'
            f"<script>\n{script}\n"
            'const recording = JSON.parse(document.getElementById("recording").textContent);\n'
            'explorer.render({model: {get: () => recording}, el: document.getElementById("explorer")});\n'
            "</script>\n</body>\n</html>\n"
        )

    def save(self, path):
        """Write the page to `path` and return it."""
        path = Path(path)
        path.write_text(self.to_html(), encoding="utf-8")
        return path

    def widget(self):
        """The page as an anywidget, for JupyterLab."""
        import anywidget
        import traitlets

        class Widget(anywidget.AnyWidget):
            _esm = SCRIPT.read_text(encoding="utf-8")
            recording = traitlets.Dict().tag(sync=True)

        return Widget(recording=self.recording)

    def _repr_mimebundle_(self, **options):
        """What Jupyter shows: the widget where anywidget is installed, else the page in a frame."""
        try:
            return self.widget()._repr_mimebundle_(**options)
        except ImportError:
            page = html.escape(self.to_html(), quote=True)
            frame = f'<iframe srcdoc="{page}" style="width:100%;height:720px;border:0" title="KV cache"></iframe>'
            return {"text/html": frame, "text/plain": repr(self)}

    def __repr__(self):
        return f"CacheExplorer({len(self.recording['steps'])} steps; .save('cache.html') writes the page)"
