"""Every page that this project writes, opened in a headless Chromium: what a reader meets, and what the page does.

Skipped where no browser is installed: VQSCALE_BROWSER names one that is not on the PATH.
"""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import browser as browsers
import numpy as np
import pytest
import test_dense
import test_quickstart_page
import test_score
import test_study
from PIL import Image

from vqscale.programs.commands import evaluate
from vqscale.programs.commands import page as page_command
from vqscale.show import claims_page, document, page, study_page
from vqscale.show.claims_page import Row
from vqscale.show.study_page import Results
from vqscale.tokenizer.model import Tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        browsers.find() is None, reason=f"no browser: none of {', '.join(browsers.NAMES)}, and no VQSCALE_BROWSER"
    ),
]

ROOT = Path(__file__).resolve().parents[1]
HOSTILE = "<script>console.error(1)</script><img src=https://example.com/x.png onerror=console.error(2)>"


def quickstart(folder, shards):
    runs = test_quickstart_page.write_runs(folder, shards)
    out = folder / "page.html"
    assert page_command.main([*(str(runs / name) for name in ("run", "prior", "samples")), "--out", str(out)]) == 0
    return out


def study(folder, task, name="sizes"):
    """Of runs with every number that a task shows, one of which failed, under a name that a stranger chose."""
    told = study_page.TASKS[task]
    keys = [key for key in told.columns if key not in ("quantizer", "K", "seed")]
    lines = [
        {**line, "status": "done", "steps": 400, **dict.fromkeys(keys, (at + 1) / 10), "verdict": "as it should be"}
        for at, line in enumerate(test_study.LINES)
    ]
    lines.append({**test_study.LINES[0], "run": name, "status": "failed", "error": f"{name} of memory"})
    for at, line in enumerate(lines[:2]):
        path = folder / line["run"] / (told.pictures.replace("*", str(at)))
        path.parent.mkdir(parents=True)
        Image.fromarray(np.full((256, 512, 3), 40 * at, np.uint8)).save(path)
    folders = {line["run"]: folder / line["run"] for line in lines[:2]}
    how = [f"vqscale study {name} folder={'/a/long/path' * 30}"]
    return study_page.write(folder, Results(name, told, lines, ["quantizer", "K"], folders, how))


def claims(folder):
    """One that holds, with a figure and a name that a stranger chose, and one that cannot be tested."""
    finding = {"compared": HOSTILE, "where": "K 4", "ours": 21.5, "judged": 0.5, "seeds": 3, "verdict": "holds"}
    lines = [{**line, "status": "done", "psnr": 20.0 + at} for at, line in enumerate(test_study.LINES)]
    said = {"paper": "IBQ", "says": HOSTILE, "measure": "PSNR", "command": f"vqscale claims {'/a/long/path' * 30}"}
    holds = Row("a", title=HOSTILE, verdict="holds", why="", ours="21.5", findings=[finding], made="3 runs", **said,
                lines=lines, dials=["quantizer", "K"], measures=["psnr"])  # fmt: skip
    cannot = Row(
        "b", title="speed", verdict="cannot be tested", why="it takes a GPU", ours="", findings=[], made="", **said
    )
    claims_page.write(folder / "index.html", [holds, cannot], ["how"])
    return folder / "index.html"


def evaluation(folder, shards):
    tokenizer = Tokenizer.from_config(test_score.config({"name": "ibq"}), seed=2)
    tokenizer.save(folder / "tokenizer")
    words = ["tokenizer", folder / "tokenizer", "--shards", shards / "val.tar", "--image-size", test_score.SIDE]
    words += ["--workers", 0, "--batch", 4, "--device", "cpu", "--out", folder / "out"]
    assert evaluate.main([str(word) for word in words]) == 0
    return folder / "out/index.html"


def dense(folder, task):
    held_out = test_dense.medium(task, folder)
    saved, wanted = test_dense.tokenizer_of(task).save(folder / "saved"), test_dense.run_yaml(folder, held_out, task)
    words = ["dense", saved, "--config", wanted, "--batch", 2, "--device", "cpu", "--out", folder / "out"]
    assert evaluate.main([str(word) for word in words]) == 0
    return folder / "out/index.html"


def dense_together(folder):
    dense(folder, "color")
    words = ["--dense", folder / "out", folder / "out", "--out", folder / "all.html"]
    assert page_command.main([str(word) for word in words]) == 0
    return folder / "all.html"


def sound(folder):
    import test_sounds_whole as sounds  # skipped without the extra audio

    sounds.tokenizer_of(None).save(folder / "saved", {"peak_db": [-6.0, -2.0]})
    held_out = sounds.write_shards(folder).shards
    words = ["sounds", folder / "saved", "--shards", held_out, "--no-speech", "--out", folder / "out"]
    assert evaluate.main([str(word) for word in words]) == 0
    return folder / "out/index.html"


# What is written -> (module of vqscale/show that writes it, how a small one is made)
PAGES = {
    "quickstart": ("run_page", quickstart),
    "study of tokenizers": ("study_page", lambda folder, shards: study(folder, "tokenizer")),
    "study of priors": ("study_page", lambda folder, shards: study(folder, "prior")),
    "study of a stranger": ("study_page", lambda folder, shards: study(folder, "prior", HOSTILE)),
    "claims": ("claims_page", lambda folder, shards: claims(folder)),
    "evaluation": ("report", evaluation),
    "dense": ("dense_page", lambda folder, shards: dense(folder, "panoptic")),
    "dense together": ("run_page", lambda folder, shards: dense_together(folder)),
    "sound": ("report", lambda folder, shards: sound(folder)),
}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = browsers.Browser(browsers.find(), tmp_path_factory.mktemp("browser"))
    yield found
    found.close()


@pytest.fixture(scope="module", params=PAGES)
def path(request, tmp_path_factory, tiny_shards):
    return PAGES[request.param][1](tmp_path_factory.mktemp("page"), tiny_shards)


@pytest.fixture
def opened(browser):
    """Opens a file in a window of so many pixels."""
    windows = []

    def open_(*words, **more):
        windows.append(browsers.Page(browser, *words, **more))
        return windows[-1]

    yield open_
    for window in windows:
        window.close()


# What is wrong with which text or picture: letters under 11 pixels, a contrast under 4.5 (of large letters 3) of a text
# and what is behind it (WCAG 2, relative luminance), pictures without words or without content.
LOOKED_AT = """(() => {
  const found = [], colour = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(x => x / 255)
    .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = node => {
    for (; node; node = node.parentElement) {
      const [r, g, b, a = 1] = colour(getComputedStyle(node).backgroundColor);
      if (a === 1) return [r, g, b];
    }
    return matchMedia("(prefers-color-scheme: dark)").matches ? [18, 18, 18] : [255, 255, 255];
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, parent = node.parentElement, text = node.textContent.trim().slice(0, 40);
    if (!text || !parent.checkVisibility()) continue;
    const style = getComputedStyle(parent), size = parseFloat(style.fontSize);
    const [a, b] = [light(colour(style.color)), light(behind(parent))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (size < 11) found.push(`${size} pixels: ${text}`);
    if (contrast < (size >= 24 ? 3 : 4.5)) found.push(`contrast ${contrast.toFixed(1)}: ${text}`);
  }
  for (const image of document.images) {
    if (!image.alt.trim()) found.push("a picture without words");
    if (!image.naturalWidth) found.push(`no picture: ${image.alt}`);
  }
  const wide = document.documentElement.scrollWidth;
  if (wide > innerWidth) found.push(`${wide} pixels wide in a window of ${innerWidth}`);
  return found;
})()"""


def faults(window: browsers.Page) -> list[str]:
    """What is wrong with an open page, in words: what it looks like, what the console says, what it asked for."""
    asked = [event["request"]["url"] for event in window.told("Network.requestWillBeSent")]
    said = window.told("Runtime.exceptionThrown", "Log.entryAdded")
    said += [event for event in window.told("Runtime.consoleAPICalled") if event["type"] in ("error", "warning")]
    own = [url for url in asked if url.startswith("file:")]
    others = [url for url in asked if not url.startswith(("file:", "data:"))]
    assert own, "nothing was opened"
    return window.value(LOOKED_AT) + [json.dumps(event) for event in said] + own[1:] + others


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1200])
def test_a_page_is_readable_and_asks_for_nothing(path, opened, width, scheme):
    assert faults(opened(path, width, scheme)) == []


def test_every_fault_of_a_page_is_found(opened, tmp_path):
    """Otherwise the test above could not fail."""
    body = (
        "<p style='font-size:9px'>small</p><p style='color:#888'>pale</p><div style='width:500px'>wide</div>"
        "<img src='data:image/gif;base64,R0lGODlhAQABAAAAACw='><img alt='gone' src='https://example.com/x.png'>"
        "<script>console.error('told'); undefined_name;</script>"
    )
    (tmp_path / "bad.html").write_text(f"<!doctype html><body style='background:#fff'>{body}")
    found = " | ".join(faults(opened(tmp_path / "bad.html", 400)))
    for fault in ("9 pixels: small", "contrast 3.5: pale", "508 pixels wide in a window of 400", "without words"):
        assert fault in found
    for fault in ("no picture: gone", "told", "undefined_name", "https://example.com/x.png"):
        assert fault in found
    text = document.whole("hostile", HOSTILE)
    (tmp_path / "hostile.html").write_text(text)  # even what was not escaped runs nothing and asks for nothing
    window = opened(tmp_path / "hostile.html", 400)
    assert window.told("Runtime.consoleAPICalled", "Network.responseReceived")[1:] == []
    assert "Content Security Policy" in " ".join(faults(window))


class Texts(HTMLParser):
    """The texts that a file has for its readers."""

    def __init__(self, path):
        super().__init__()
        self.found, self._within = [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        if tag not in ("img", "meta", "br"):
            self._within.append(tag)

    def handle_endtag(self, tag):
        self._within.pop()

    def handle_data(self, data):
        if data.strip() and not {"script", "style", "title"} & {*self._within}:
            self.found.append(" ".join(data.split()))


COPIED = "getSelection().selectAllChildren(document.body); getSelection().toString()"


def test_texts_and_numbers_are_copied_and_need_no_script(path, opened):
    told = Texts(path).found
    numbers = [text for text in told if re.search(r"\d", text)]
    assert len(numbers) > 5
    for scripts in (True, False):
        copied = " ".join(opened(path, 1200, scripts=scripts).value(COPIED).split())
        assert [text for text in told if text not in copied] == []


ROWS = """[...document.querySelectorAll("table")].map(
  table => [...table.tBodies[0].rows].map(row => [...row.cells].map(cell => cell.innerText)))"""
PLACE = """(() => {
  const header = document.querySelectorAll("table")[%d].tHead.rows[0].cells[%d];
  header.scrollIntoView({block: "center", inline: "center"});
  const at = header.getBoundingClientRect();
  return [at.x + at.width / 2, at.y + at.height / 2, header.ariaSort];
})()"""


def number(text: str) -> float | None:
    try:
        return float(text.replace(",", "").rstrip("%"))
    except ValueError:
        return None


def expected(rows: list[list[str]], column: int, down: bool) -> list[list[str]]:
    """Rows by the numbers of a column, and those without one after all others."""
    numbers = [row for row in rows if row[column] not in ("", "nan")]
    return sorted(numbers, key=lambda row: number(row[column]), reverse=down) + [
        row for row in rows if row not in numbers
    ]


def test_a_click_on_a_header_sorts_its_table(path, opened):
    window = opened(path, 1200)
    tables, sorted_by_number = window.value(ROWS), 0
    for table, rows in enumerate(tables):
        for column in range(len(rows[0])):
            texts = [row[column].strip() for row in rows]
            for turn in ("ascending", "descending"):
                before = window.value(ROWS)[table]
                window.click(*window.value(PLACE % (table, column))[:2])
                after = window.value(ROWS)[table]
                assert window.value(PLACE % (table, column))[2] == turn
                assert sorted(after) == sorted(before)
                if all(number(text) is not None for text in texts if text):
                    sorted_by_number += 1
                    assert after == expected(before, column, turn == "descending")
                else:
                    ordered = [row[column].strip() for row in after if row[column].strip()]
                    assert ordered == sorted(ordered, key=natural, reverse=turn == "descending")
    assert sorted_by_number > 0 or len(tables) == 0


def natural(text: str):
    """As people sort: digits by their value."""
    return [
        (0, int(part), "") if part.isdigit() else (1, math.inf, part)
        for part in re.split(r"(\d+)", text.lower())
        if part
    ]


def test_every_module_that_writes_pages_has_one_here():
    writers = {path.stem for path in (ROOT / "vqscale").rglob("*.py") if "page.page(" in path.read_text()}
    assert writers == {module for module, _ in PAGES.values()}
    assert "document.whole(" in Path(page.__file__).read_text()
    assert [path.name for path in (ROOT / "vqscale").rglob("*.py") if "<html" in path.read_text()] == ["document.py"]
