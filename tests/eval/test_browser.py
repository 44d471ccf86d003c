"""The pages of reports in a real browser, at the width of a laptop and of a phone, for a run, labels and pictures whose
names are HTML."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.build.build_shards import build
from eval import report, report_comparison
from eval.similarity_maps import COLORS
from tests.browser import Browser, missing
from tests.eval.test_report import make_run

pytestmark = pytest.mark.slow
HOSTILE = "<img src=x onerror=hacked=1>"
WIDTHS = {"laptop": 1280, "phone": 390}
# what reaches beyond the window, and may not scroll inside of its card
TOO_WIDE = """
[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, pre, svg') &&
  e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))
"""
BROKEN = "[...document.images].filter(i => !i.complete || !i.naturalWidth).length"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if reason := missing():
        pytest.skip(f"NO BROWSER HERE, SO THE REPORT IS NOT TESTED IN ONE: {reason}")
    with Browser() as one:
        yield one


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> list[Path]:
    """Two runs, of which one has names that are HTML."""
    root = tmp_path_factory.mktemp("browser")
    for name, source in ((HOSTILE, "china"), ("</script><script>hacked=1</script>".replace("/", "∕"), "flower")):
        shutil.copytree(photos / source, root / "photos" / name)
    build(root / "photos", root / "shards")
    out = [make_run(root / HOSTILE, root / "shards"), make_run(root / ("long" * 30), root / "shards")]
    Image.new("RGB", (4, 4)).save(out[0] / "pictures" / f"{HOSTILE}-000000001.png")
    row = '{"step": 40, "<script>hacked=1</script>": 1.0}\n{"step": 41, "<img src=x onerror=hacked=1>": 1.0}\n'
    (out[0] / "metrics.jsonl").open("a").write("\n" + row)
    (out[0] / "samples.jsonl").write_text(f'{{"step": 1, "prompt": "{HOSTILE}", "text": "</p>{HOSTILE}"}}\n')
    return out


@pytest.mark.parametrize("kind", WIDTHS)
@pytest.mark.parametrize("of", ["run", "comparison"])
def test_a_page_fits_and_executes_no_names(browser: Browser, runs: list[Path], tmp_path: Path, of: str, kind: str):
    path = report.write(runs[0]) if of == "run" else report_comparison.write(runs, tmp_path / "both.html")
    browser.open(path, WIDTHS[kind], touch=kind == "phone")
    assert browser.value("innerWidth") == WIDTHS[kind] and browser.value("document.images.length") > 5
    browser.value("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert browser.value("document.documentElement.scrollWidth") <= WIDTHS[kind]
    assert browser.value(TOO_WIDE) == [] and browser.value(BROKEN) == 0
    assert not browser.problems and browser.value("typeof hacked") == "undefined"
    assert HOSTILE in browser.value("document.body.innerText")
    browser.screenshot(tmp_path / "page.png")
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
    assert pixels.shape[1] == WIDTHS[kind] and len(np.unique(pixels.reshape(-1, 3)[::97], axis=0)) > 100


def test_a_patch_is_chosen_by_mouse_finger_and_keys(browser: Browser, runs: list[Path]):
    source = report.write(runs[0])
    maps = "[...document.querySelector('.similar').querySelectorAll('canvas')]"
    for touch in (False, True):
        browser.open(source, 390 if touch else 1280, touch=touch)
        pairs = [
            np.frombuffer(base64.b64decode(text), np.uint8).reshape(256, 256)
            for text in browser.value(f"{maps}.map(c => c.dataset.pairs)")
        ]
        box = browser.value(
            "(p => { p.scrollIntoView({block: 'center'}); const r = p.getBoundingClientRect();"
            " return [r.x, r.y, r.width, r.height] })(document.querySelector('.picker'))"
        )

        def check(patch: int, pairs: list[np.ndarray] = pairs) -> None:
            assert browser.value("Number(document.querySelector('.similar').dataset.patch)") == patch
            drawn = browser.value(f"{maps}.map(c => [...c.getContext('2d').getImageData(0, 0, 16, 16).data])")
            for pixels, of_map in zip(drawn, pairs, strict=True):
                assert np.array_equal(np.reshape(pixels, (256, 4))[:, :3], COLORS[of_map[patch]])

        check(8 * 16 + 8)  # preset
        row, column = 3, 11
        place = (box[0] + (column + 0.5) * box[2] / 16, box[1] + (row + 0.5) * box[3] / 16)
        (browser.tap if touch else browser.click)(*place)
        check(row * 16 + column)
        browser.value("document.querySelector('.picker').focus()")
        for key in ("ArrowUp", "ArrowLeft", "ArrowLeft"):
            browser.press(key)
        check((row - 1) * 16 + column - 2)
        assert browser.value("document.querySelector('.picker').getAttribute('aria-label')") == (
            "chosen patch: row 3, column 10"
        )
        assert not browser.problems
