"""tools/memory.py: what it measures is what the gradients differ in."""

import csv
import sys
from pathlib import Path
from typing import Any

import pytest

import tools.memory
from tools.config import BadInput
from tools.memory import Case, in_a_process


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory of a process is read from /proc")
def test_memory_of_the_implicit_gradient_does_not_grow_with_the_steps() -> None:
    def peak(gradient: str, steps: int) -> float:
        case = Case("mdeq3d_tiny_seg", gradient, side=32, steps=steps, batch=1, device="cpu", limit_gib=8)
        return in_a_process(case)["peak_mib"]

    assert peak("implicit", 8) == pytest.approx(peak("implicit", 4), rel=0.05)
    assert peak("unrolled", 8) > 1.2 * peak("unrolled", 4)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory of a process is read from /proc")
def test_out_of_memory_is_a_row() -> None:
    row = in_a_process(Case("mdeq3d_tiny_seg", "unrolled", side=96, steps=2, batch=1, device="cpu", limit_gib=0.1))
    assert row["peak_mib"] == ""
    assert "out of memory" in row["note"]


def test_table_and_plot(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    def fake(case: Case) -> dict[str, Any]:
        lost = case.gradient == "unrolled" and case.side == 48
        peak = "" if lost else case.side * case.steps
        return dict(
            gradient=case.gradient, side=case.side, steps=case.steps, peak_mib=peak, note="out of memory" * lost
        )

    monkeypatch.setattr(tools.memory, "in_a_process", fake)
    monkeypatch.setattr(
        sys, "argv", ["memory.py", "--sides", "16", "32", "48", "--steps", "2", "4", "--out", str(tmp_path)]
    )
    tools.memory.main()
    rows = list(csv.DictReader((tmp_path / "memory.csv").read_text().splitlines()))
    cases = {(row["gradient"], row["side"], row["steps"]) for row in rows}
    assert len(cases) == len(rows) == 6 * 4  # sides at 4 steps, steps at side 32
    assert (tmp_path / "memory.png").stat().st_size > 10_000
    assert "out of memory" in capsys.readouterr().out
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model mdeq_tiny_cifar.foo", "no weights named mdeq_tiny_cifar.foo"),
        ("--model mdeq_tiny", "did you mean"),
        ("--device foo", "--device"),
        ("--device cuda:99", "device cuda:99 is not available"),
        ("--limit-gib 0", "--limit-gib must be above 0"),
        ("--batch-size 0", "--batch-size must be >= 1"),
        ("--sides 8", "--sides must be >= 16"),
    ],
)
def test_bad_input(words: str, message: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["memory.py", *words.split(), "--out", str(tmp_path / "out")])
    with pytest.raises(BadInput, match=message):
        tools.memory.main()
    assert not (tmp_path / "out").exists()
