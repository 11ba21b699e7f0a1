"""The report in a browser: nothing it complains of, all pictures drawn, dialogues that open."""

from __future__ import annotations

import html
import json
import re
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import pytest
import tiny
from tiny_experiment import experiment

from spt_jax.evaluation.run_evaluation import evaluate_run, write_results

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium on the PATH (Debian: apt install chromium)")


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """The report of an evaluation of the tiny model."""
    workdir = tmp_path_factory.mktemp("run")
    setting = experiment(samples=2)
    evaluation = evaluate_run(setting, tiny.trainable(setting.model), tiny.trainable(setting.model, 2), tiny.DIALOGUES)
    metrics = "".join(f'{{"step": {step}, "loss/total": {5 / step}, "usage/0": 0.5}}\n' for step in range(1, 9))
    (workdir / "metrics.jsonl").write_text(metrics)
    write_results(
        workdir, evaluation, setting.config, source="tiny", checkpoint="best", step=8, chat="spt-jax chat", question=""
    )
    return workdir / "report.html"


def browser(report: Path, *arguments: str, fragment: str = "") -> subprocess.CompletedProcess[str]:
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command += [f"--user-data-dir={report.parent / 'profile'}", "--enable-logging=stderr", "--v=0", *arguments]
    done = subprocess.run(
        [*command, f"file://{report}{fragment}"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def framed(page: Path, width: int, more: str = "") -> Path:
    """A page that shows another in a frame as wide as a screen: a window is at least 500 pixels wide."""
    frame = page.with_name(f"frame-{width}.html")
    style = f"width: {width}px; height: 2400px; border: 0"
    frame.write_text(f'<body style="margin: 0">{more}<iframe src="{page.name}" style="{style}"></iframe></body>')
    return frame


def opened(dom: str) -> list[str]:
    """The ids in the dialogues that are open."""
    return re.findall(r'<details name="dialogues" open="">.*?<div id="(dialogue-\d+)">', dom, flags=re.DOTALL)


def test_the_console_is_silent_and_every_picture_is_drawn(report):
    done = browser(report, "--dump-dom")
    assert "CONSOLE" not in done.stderr
    pictures = re.findall(r"<svg.*?</svg>", done.stdout, flags=re.DOTALL)
    assert len(pictures) >= 5  # curves, two heat maps, bars, the map, personas
    assert all(re.search(r"<(circle|rect|path|polyline)", picture) for picture in pictures)
    assert opened(done.stdout) == []


@pytest.mark.parametrize("number", [1, 3])
def test_a_link_opens_its_dialogue_and_no_other(report, number):
    assert opened(browser(report, "--dump-dom", fragment=f"#dialogue-{number}").stdout) == [f"dialogue-{number}"]


MEASURE = """
<script>
  const root = document.documentElement, found = {width: innerWidth, closed: root.scrollWidth, dialogues: []};
  for (const other of document.querySelectorAll("details:not([name])")) other.open = true;
  for (const dialogue of document.querySelectorAll("details[name=dialogues]")) {
    dialogue.querySelector("summary").click();
    found.dialogues.push({
      open: [...document.querySelectorAll("details[name=dialogues][open] > div")].map((content) => content.id),
      text: dialogue.innerText, width: root.scrollWidth,
    });
  }
  parent.postMessage(found, "*");
</script></body>"""
"""Opens one dialogue after another as a reader does, and tells what can be read then, and how wide the page is."""


@pytest.mark.parametrize("width", [390, 1200])
def test_every_dialogue_opens_to_its_replies_and_nothing_is_wider_than_the_screen(report, width):
    allowed = report.read_text().replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';")
    measured = report.with_name("measured.html")
    measured.write_text(allowed.replace("</body>", MEASURE))
    hear = "<script>onmessage = ({data}) => document.body.dataset.found = JSON.stringify(data)</script>"
    dom = browser(framed(measured, width, hear), "--dump-dom", "--virtual-time-budget=10000").stdout
    found = json.loads(html.unescape(re.search(r'data-found="([^"]*)"', dom)[1]))
    assert found["width"] == width
    assert found["closed"] <= width
    assert [dialogue["open"] for dialogue in found["dialogues"]] == [
        [f"dialogue-{number}"] for number in range(len(tiny.DIALOGUES))
    ]
    answers = [json.loads(line) for line in (report.parent / "predictions.jsonl").read_text().splitlines()]
    for number, dialogue in enumerate(found["dialogues"]):
        assert dialogue["width"] <= width
        for answer in answers:
            if answer["dialogue"] == number:
                assert f"as it was said: {answer['reference']}" in dialogue["text"]
                assert answer["prediction"].strip() in dialogue["text"]
    samples = json.loads((report.parent / "results.json").read_text())["samples"]
    assert len({sample["dialogue"] for sample in samples}) == 2
    for sample in samples:
        text = found["dialogues"][sample["dialogue"]]["text"]
        assert text.count("What every prompt would have said") == 1
        assert all(reply.strip() in text for reply in [*sample["replies"], sample["no_prompt"]])


@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_is_painted_at_the_width_of_a_phone_and_of_a_desk(report, width):
    picture = report.parent / f"{width}.png"
    browser(framed(report, width), f"--screenshot={picture}", f"--window-size={width},2400", "--hide-scrollbars")
    colours = colours_of(picture)
    assert len(colours) > 100  # text, cards, curves and dots


def colours_of(picture: Path) -> set[bytes]:
    """The distinct bytes of pixels in a PNG's filtered rows: enough to tell a page from a blank one."""
    content = picture.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    data, place = b"", 8
    while place < len(content):
        [length] = struct.unpack(">I", content[place : place + 4])
        if content[place + 4 : place + 8] == b"IDAT":
            data += content[place + 8 : place + 8 + length]
        place += length + 12
    raw = zlib.decompress(data)
    return {raw[i : i + 3] for i in range(0, len(raw) - 3, 3)}
