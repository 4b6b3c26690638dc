"""Record a generation from a checkpoint and write CacheExplorer's page.

Runs against whichever `tinytorch` comes first on the path, so the cache that is shown may be the learner's own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tinytorch.viewer.cache_explorer import CacheExplorer
from tito.jobs import words


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model, tokenizer, _ = words.model_from(arguments.checkpoint)
    prompt = tokenizer.encode(arguments.prompt)
    try:
        explorer = CacheExplorer.record(model, prompt, arguments.new, decode=lambda token: tokenizer.decode([token]))
    except ValueError as error:
        print(f"tito: {error}", file=sys.stderr)
        return 1
    explorer.save(arguments.out)
    print(f"{arguments.out}: {len(explorer.recording['steps'])} steps, {arguments.out.stat().st_size:,} bytes. "
          "Open it in a browser; it needs no network.")
    return 0


if __name__ == "__main__":
    words.exit_with(main)
