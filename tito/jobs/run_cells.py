"""Run cells one after another in one fresh interpreter, without a kernel: `tito dev verify` tries wrong bodies so.

Standard input: {"cells": [[label, source], …], "check": [label, source]} as JSON. The last line of standard output:
{"failure": null or "TypeOfError: message", "before": {label: "TypeOfError: message"}}. Errors of the cells before
the check are reported and do not stop the run: in a notebook, they would not either.
"""

import contextlib
import io
import json
import sys
import types


def run(label: str, source: str, namespace: dict) -> str | None:
    """Run one cell; the error it raised, as text, or None."""
    try:
        exec(compile(source, label, "exec", dont_inherit=True), namespace)
        return None
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main() -> None:
    job = json.load(sys.stdin)
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    with contextlib.redirect_stdout(io.StringIO()):
        before = {label: run(label, source, module.__dict__) for label, source in job["cells"]}
        failure = run(*job["check"], module.__dict__)
    print(json.dumps({"failure": failure, "before": {k: v for k, v in before.items() if v}}))


if __name__ == "__main__":
    main()
