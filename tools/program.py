"""How every program begins and ends: its command line, the memory it keeps, and its last line after bad input."""

import argparse
import ctypes
import errno
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from mdeq import WeightsError
from tools.config import BadInput, split_overrides


class Parser(argparse.ArgumentParser):
    """A parser of a program's words whose complaints are bad input: one line, as any other."""

    def __init__(self, *, description: str | None) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message}; see --help")

    def parse_with_settings(self) -> argparse.Namespace:
        """Return the arguments of the command line; `overrides` are its `key=value` words."""
        self.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the config")
        overrides, rest = split_overrides(sys.argv[1:])
        arguments = self.parse_args(rest)
        if arguments.overrides:
            raise BadInput(f"expected key=value, got {arguments.overrides[0]!r}")
        arguments.overrides = overrides
        return arguments


def check_at_least(least: int, arguments: argparse.Namespace, *names: str) -> None:
    """Raise BadInput for an argument, or one of several numbers of one, below the least; None is passed over."""
    for name in names:
        value = getattr(arguments, name)
        lowest = min(value) if isinstance(value, list) else value
        if lowest is not None and lowest < least:
            raise BadInput(f"--{name.replace('_', '-')} must be >= {least}, got {lowest}")


def keep_freed_memory() -> None:
    """Have the C library of Linux keep what tensors free for the next ones, unless the environment says otherwise.

    It would give large blocks back to the system, which hands every page of the next one out anew: on CPUs with two and
    more threads that is up to two fifths of the time of f (docs/benchmark.md).
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # the C library may be another than glibc
    if mallopt is not None:
        trim_threshold, most_mapped = -1, -4
        mallopt(most_mapped, 0)
        mallopt(trim_threshold, 2**31 - 1)


def program(main: Callable[[], None]) -> None:
    """Run a program; bad input ends it with one line on stderr and exit code 2."""
    keep_freed_memory()
    for name in ("stdout", "stderr"):  # None where it is closed, and where Windows has no console
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal cannot show must not end the program
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except (BadInput, WeightsError) as error:
        _refuse(message_of(error))
    except BrokenPipeError:  # what reads the output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would say so at its exit
        sys.exit(128 + 13)  # as of a process that SIGPIPE ended; Windows has no such signal
    except OSError as error:
        if error.filename is None or not (isinstance(error, PermissionError) or error.errno == errno.ENAMETOOLONG):
            raise
        _refuse(f"{error.strerror}: {error.filename}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


class DeferredSignals:
    """A context in which Ctrl-C and SIGTERM are only taken note of, so that what is under way can be brought to an end.

    Alone, a second Ctrl-C interrupts as ever. Processes of torchrun get signals twice, from the terminal and from it,
    and it kills those that take too long. Signals that this process was started to ignore stay so.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():  # which alone can set handlers
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: not of Python's setting
                self._before[number] = signal.signal(number, self._note)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    @contextmanager
    def acted_on(self) -> Iterator[None]:
        """Have signals do what they ever do for a while, also those that have come already."""
        noted, deferring = self.received, bool(self._before)
        self.__exit__()
        self.received = None
        try:
            if noted is not None:
                signal.raise_signal(noted)
            yield
        finally:
            if deferring:
                self.__enter__()

    def _note(self, number: int, frame: object) -> None:
        if self.received == number == signal.SIGINT and "RANK" not in os.environ:
            raise KeyboardInterrupt
        self.received = number


def message_of(error: BadInput | WeightsError) -> str:
    """Return the one line of an error; from a data loader's worker it comes wrapped in that worker's traceback."""
    message = [line for line in str(error).splitlines() if line.strip()][-1]
    return message.removeprefix("tools.config.BadInput: ")


def _refuse(message: str) -> None:
    """End the program with one line."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(3)  # mostly the first process says the same, and torchrun ends this one with it
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(2) if "RANK" in os.environ else sys.exit(2)  # the other processes must not wait for this one
