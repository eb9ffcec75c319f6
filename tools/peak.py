"""The peak memory of a block of code, and of code that runs in a process of its own."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tools.config import BadInput

GIB, MIB = 2**30, 2**20


def is_measurable(device: str) -> bool:
    """Whether the memory of a device can be measured."""
    return device.startswith("cuda") or Path("/proc/self/clear_refs").exists()


def check_measurable(device: str) -> None:
    """Raise BadInput where the memory of a device cannot be measured."""
    if not is_measurable(device):
        raise BadInput("CPU memory can be measured on Linux only; use --device cuda")


def lacks_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory ran out, a GPU's or the machine's."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    said = ("allocate memory", "out of memory", "not enough memory")  # mostly a CPU's, by Linux, CUDA and Windows
    return known or (isinstance(error, RuntimeError) and any(words in str(error) for words in said))


class Peak:
    """The most memory that was held within a block, on top of what was held before, as `mib`; nan if it ran out.

    Args:
        device: cpu (what is resident) or cuda (what PyTorch's allocator gave out).
        limit_gib: more is refused from now on, in GiB.
    """

    def __init__(self, device: str, limit_gib: float) -> None:
        self.device, self.limit_gib, self.mib = device, limit_gib, 0.0

    def __enter__(self) -> "Peak":
        if self.device.startswith("cuda"):
            torch.cuda.set_per_process_memory_fraction(
                min(1.0, self.limit_gib * GIB / torch.cuda.get_device_properties(self.device).total_memory)
            )
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            import resource  # not on Windows

            self.before = _resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            address_space = int(self.limit_gib * GIB) + _resident("VmSize")
            resource.setrlimit(resource.RLIMIT_AS, (address_space, resource.RLIM_INFINITY))
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        after = torch.cuda.max_memory_allocated() if self.device.startswith("cuda") else _resident("VmHWM")
        self.mib = math.nan if lacks_memory(error) else (after - self.before) / MIB
        return lacks_memory(error)


def _resident(field: str) -> int:
    """Return a field of this process's status on Linux, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def in_a_process(program: str, case: dict[str, Any]) -> dict[str, Any] | None:
    """Return what a program prints as JSON when it is called with `--measure CASE`; None if it was killed for memory.

    Raises:
        RuntimeError: if it failed otherwise.
    """
    # The C library of Linux gives freed memory back at once: what is resident is what is in use.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, program, "--measure", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if done.returncode in (-9, 137):
        return None
    raise RuntimeError(f"measuring {case} failed:\n{done.stderr}")
