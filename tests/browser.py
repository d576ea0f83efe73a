"""A page in headless Chromium: what is wrong with how it looks, at a width and in a colour scheme."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
# Least height of text in CSS pixels, and contrast of WCAG 2's level AA for text of that size.
SMALLEST, CONTRAST = 9.0, 4.5
_LOOK = """([smallest, contrast]) => {
  const found = [], wide = document.documentElement.clientWidth;
  const text = node => (node.textContent || node.outerHTML).trim().slice(0, 60);
  const say = (what, node) => found.push(`${what}: ${text(node)}`);
  const parse = text => {
    const n = text.match(/[\\d.]+/g).map(Number);
    return [...n.slice(0, 3), n[3] ?? 1];
  };
  const light = c => [0.2126, 0.7152, 0.0722].reduce((sum, part, i) => {
    const v = c[i] / 255;
    return sum + part * (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  }, 0);
  const over = (top, below) => below.map((b, i) => i < 3 ? top[i] * top[3] + b * (1 - top[3]) : 1);
  const ground = node => {
    const layers = [];
    for (let at = node; at; at = at.parentElement) layers.push(parse(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  const whole = document.documentElement.scrollWidth;
  if (whole > wide) found.push(`scrolls sideways: ${whole} px on ${wide}`);
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let texts = 0;
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    const range = document.createRange();
    range.selectNodeContents(walker.currentNode);
    const box = range.getBoundingClientRect();
    if (!walker.currentNode.data.trim() || !box.width || node.closest('style, defs')) continue;
    texts += 1;
    const style = getComputedStyle(node), drawn = node instanceof SVGElement;
    const scale = drawn ? Math.hypot(node.getScreenCTM().a, node.getScreenCTM().b) : 1;
    const size = parseFloat(style.fontSize) * scale;
    if (size < smallest) say(`text of ${size.toFixed(1)} px`, node);
    if (box.right > wide + 1 || box.left < -1) say('text beyond the edge', node);
    const below = ground(node), ink = over(parse(drawn ? style.fill : style.color), below);
    const [a, b] = [light(ink), light(below)].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < contrast) say(`contrast ${((a + 0.05) / (b + 0.05)).toFixed(1)}`, node);
  }
  for (const node of document.querySelectorAll('img, svg')) {
    const box = node.getBoundingClientRect();
    if (box.width < 150 || box.height < 100 || box.right > wide + 1) say('a picture without its size', node);
    if (node.tagName === 'IMG' && !node.naturalWidth) say('a picture that does not load', node);
  }
  return {found, texts, ground: light(ground(document.body)),
          images: document.images.length, charts: document.querySelectorAll('svg').length};
}"""


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser with an empty profile; what needs it is skipped where there is none."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("needs chromium (Debian's package, see .ci/debian_packages)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as profile:
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=program, args=list(FLAGS), offline=True
        )
        try:
            yield context
        finally:
            context.close()


def look(browser: Any, html: str, folder: Path, width: int, scheme: str) -> dict[str, Any]:
    """Open a page; returns `found` (what is wrong, in words), how many `texts`, `images` and `charts` it has,
    and `ground`, the relative luminance behind them.
    """
    file = folder / "page.html"
    file.write_text(html, encoding="utf-8")
    page = browser.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: asked.append(f"console: {message.text}"))
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    page.goto(file.as_uri(), wait_until="load")
    seen: dict[str, Any] = page.evaluate(_LOOK, [SMALLEST, CONTRAST])
    others = [url for url in asked if url != file.as_uri() and not url.startswith("data:")]
    seen["found"] += [f"request: {url}" for url in others]
    page.close()
    return seen
