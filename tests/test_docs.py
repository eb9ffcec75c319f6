"""The Python blocks of the pages in docs/ run, in order, in one namespace."""

import re
from pathlib import Path

import pytest
from small_sets import blob, save_nifti

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = ["dense.md", "downstream.md", "equilibria.md", pytest.param("export.md", marks=pytest.mark.slow)]


@pytest.mark.parametrize("page", PAGES)
def test_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_nifti(tmp_path / "scan.nii.gz", blob((20, 24, 18))[0])
    path = DOCS / page
    text = path.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count("```python"), "a block was not recognised"
    assert blocks
    namespace: dict[str, object] = {"__name__": page}
    for block in blocks:
        line = text[: block.start(1)].count("\n")
        # Blank lines in front, so that a traceback gives the line of the page.
        exec(compile("\n" * line + block[1], str(path), "exec"), namespace)
