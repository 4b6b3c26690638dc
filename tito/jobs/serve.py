"""The server of `tito serve`: a checkpoint's GPT behind an HTTP interface in OpenAI's form.

Runs against whichever `tinytorch` comes first on the path, so the scheduler and the cache may be the learner's own.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from tito.jobs import words

END_OF_TEXT = "<|endoftext|>"  # the special token that ends a text, where the tokenizer has it


def main() -> int:
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # from here on Ctrl-C is answered: by exit_with
    arguments = parse()
    from tito.jobs.serving.server import Server, listen, reachable

    listener = listen(arguments.host, arguments.port)
    address, port = listener.getsockname()[:2]
    if reachable(address):
        print(f"Warning: {address} can be reached from other machines, and there is no authentication: "
              "whoever reaches this port can use it.", file=sys.stderr)
    loaded, tokenizer, _ = words.model_from(arguments.checkpoint)
    name = arguments.checkpoint.stem
    engine = engine_of(loaded, tokenizer, arguments)
    from tito.jobs.serving.app import application

    server = Server(application(engine, model_of(name, loaded, tokenizer)), engine)
    for number in (signal.SIGINT, signal.SIGTERM):  # also once more, after uvicorn has heard it
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    where = f"[{address}]" if ":" in address else address
    print(f"Serving {name!r} at http://{where}:{port}/v1 (Ctrl-C ends it)", flush=True)
    server.run(sockets=[listener])
    print("Stopped.", flush=True)
    return 0


def engine_of(model, tokenizer, sizes: argparse.Namespace):
    """The engine on the learner's scheduler and cache, which hold as many full contexts as requests may run."""
    try:
        from tinytorch.generation.paged import PagedModelKVCache, Scheduler
        from tito.jobs.serving.engine import Engine
    except ImportError as error:
        sys.exit(f"tito: the package lacks what serves: {error}. `tito module complete 23` brings it.")
    blocks = sizes.blocks or sizes.max_running * -(-model.max_seq_len // sizes.block_size)

    def new() -> tuple:
        cache = PagedModelKVCache(
            num_blocks=blocks, block_size=sizes.block_size, num_layers=model.num_layers, max_seqs=sizes.max_running,
            num_heads=model.num_kv_heads, head_dim=model.embed_dim // model.num_heads,
        )  # fmt: skip
        return Scheduler(model, cache, token_budget=sizes.token_budget, max_running=sizes.max_running), cache

    try:
        most = sizes.max_running + sizes.max_waiting
        return Engine(new, tokenizer.tokens, tokenizer.special_tokens.get(END_OF_TEXT), most)
    except (ValueError, MemoryError) as error:
        sys.exit(f"tito: a cache of {blocks:,} blocks of {sizes.block_size} tokens cannot be had: {error}")


def model_of(name: str, model, tokenizer):
    """What requests are measured by; a model that makes ids without a text ends the program with one sentence."""
    from tito.jobs.serving.asked import Model

    silent = [i for i in range(model.vocab_size) if i not in tokenizer.tokens]
    if silent:
        sys.exit(f"tito: the model makes {model.vocab_size} ids and its tokenizer has no text for {silent[0]}.")
    longest = max(map(len, tokenizer.tokens.values()))
    return Model(name, model.max_seq_len, model.vocab_size, longest, tokenizer.encode)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--blocks", type=int, default=None)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--max-running", type=int, default=16)
    parser.add_argument("--max-waiting", type=int, default=256)
    parser.add_argument("--token-budget", type=int, default=256)
    return parser.parse_args()


if __name__ == "__main__":
    words.exit_with(main)
