"""Answers requests for values over a pipe, in the peers' own interpreter: `python serve.py PARENT`, started by `estimators.py`.

A request is (name, arrays, settings), an answer ("values", …) or ("error", message, traceback). It ends with its parent: when the pipe is closed,
and even in the middle of a computation.
"""
import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection

KILLED_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def die_with(parent: int) -> None:
    "Ask the system to end this process with the one that started it; an interrupt of both is the parent's to handle."
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(KILLED_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before it could be asked for
        sys.exit(1)


def take_pipes() -> tuple[Connection, Connection]:
    "The pipes that were standard input and output; what libraries print goes to standard error from now on."
    pipes = Connection(os.dup(0), writable=False), Connection(os.dup(1), readable=False)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return pipes


def unpack(packed: Mapping[str, tuple]) -> dict:
    "Arrays from type, shape and bytes: pickles of arrays differ between versions of NumPy."
    import numpy as np

    return {name: np.frombuffer(content, kind).reshape(shape).copy() for name, (kind, shape, content) in packed.items()}


def answer(methods: Mapping[str, Callable], name: str, arrays: Mapping[str, tuple], settings: Mapping[str, object]) -> tuple:
    try:
        found = methods[name](**unpack(arrays), **settings)
        return "values", found.tolist() if hasattr(found, "tolist") else found
    except Exception as error:
        return "error", f"{type(error).__name__}: {error}", traceback.format_exc()


def serve(methods: Mapping[str, Callable]) -> None:
    "Answer until the other end closes the pipe."
    die_with(int(sys.argv[1]))
    requests, answers = take_pipes()
    while True:
        try:
            request = requests.recv()
        except EOFError:
            return
        answers.send(answer(methods, *request))


if __name__ == "__main__":
    from libraries import load, value

    serve({"load": load, "value": value})
