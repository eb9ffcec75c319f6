"""A process that talks to a Hub: takes steps from standard input as JSON and prints what came of each.

A step is ["create", name], ["publish", word, ...], ["full", name]: create with no room for large files, or
["anonymous", step, ...]: another step without the token.
"""

import contextlib
import hashlib
import io
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any
from unittest import mock

import timm

import mdeq
import tools.publish
from tools.program import program

ROOM = 20_000  # bytes of the largest file on the full disk


def digest(model: Any) -> str:
    """Return a hash of all weights."""
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        total.update(name.encode() + value.numpy().tobytes())
    return total.hexdigest()


def create(name: str) -> dict[str, Any]:
    model = timm.create_model(name, pretrained=True)
    return {"weights": digest(model), "tag": model.pretrained_cfg["tag"], "steps": model.deq.solver.max_steps}


def full(name: str) -> dict[str, Any]:
    import resource  # POSIX alone has it

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, before[1]))
    try:
        return create(name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def anonymous(kind: str, *words: str) -> dict[str, Any]:
    with mock.patch.dict(os.environ, HF_TOKEN=""):
        return {"create": create, "publish": publish}[kind](*words)


def publish(*words: str) -> dict[str, Any]:
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = mock.patch("sys.argv", ["tools/publish.py", *words])
    with argv, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            program(tools.publish.main)
        except SystemExit as end:
            code = end.code
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def outcome(step: Callable[..., dict[str, Any]], words: list[str]) -> dict[str, Any]:
    try:
        return step(*words)
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}


def main() -> None:
    steps = {"create": create, "publish": publish, "full": full, "anonymous": anonymous}
    results = []
    for number, (kind, *words) in enumerate(json.load(sys.stdin)):
        with contextlib.suppress(urllib.error.URLError):  # a mark among the requests that the server notes
            urllib.request.urlopen(f"{os.environ['HF_ENDPOINT']}/step/{number}")
        started = time.monotonic()
        result = outcome(steps[kind], words)
        results.append({**result, "seconds": time.monotonic() - started})
    print(json.dumps({"package": mdeq.__file__, "results": results}))


if __name__ == "__main__":
    main()
