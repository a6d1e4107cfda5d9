"""The HTML report in headless Chromium: pointers, keys and touch, and the numbers that they bring up."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import CHROMEDRIVER, CHROMIUM, Browser, webdriver
from test_html_report import COUNT, EVIL, HEIGHT, WIDTH, make_posterior

from alpenglow import Posterior
from alpenglow.html_report import write_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and CHROMEDRIVER),
        reason="no Chromium with its driver (Debian: chromium, chromium-driver)",
    ),
]
KINDS = {1: "grey", 2: "complex", 3: "RGB"}
DESKTOP, PHONE = (1280, 900), (360, 740)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.driver.quit()


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """Chromium, whose console has to stay empty."""
    yield chromium
    assert chromium.driver.get_log("browser") == []


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, Posterior]]:
    folder = tmp_path_factory.mktemp("reports")
    made = {channels: (folder / f"{kind}.html", make_posterior(channels)) for channels, kind in KINDS.items()}
    for path, posterior in made.values():
        write_report(posterior, path, name=f"{path.stem}.h5")
    return made


def close(shown: list[float], values: Any, digits: int, slack: float = 0.0) -> None:
    """Equal to the values within the rounding to significant digits."""
    values = np.ravel(values)
    rounding = 0.5 * 10.0 ** (np.floor(np.log10(np.maximum(np.abs(values), 1e-12))) + 1 - digits)
    assert np.shape(shown) == values.shape
    assert (np.abs(shown - values) <= 1.001 * rounding + slack).all(), (shown, values)


@pytest.mark.parametrize("channels", KINDS)
def test_the_mouse_reads_a_pixel(
    browser: Browser, pages: dict[int, tuple[Path, Posterior]], channels: int
) -> None:
    path, posterior = pages[channels]
    browser.open(path, DESKTOP)
    lower, upper = posterior.interval(0.9)
    digits = 3 if channels > 1 else 4
    for view, row, column in [("mean", 3, 21), ("error", 17, 5), ("sample", 0, WIDTH - 1), ("r_hat", 9, 14)]:
        browser.point(view, row, column)
        assert browser.text("#place") == f"Row {row}, column {column}"
        shown = browser.reading()
        expected = {
            "mean": posterior.mean,
            "std": posterior.std,
            "MAP": posterior.map_image,
            "truth": posterior.truth,
            "ESS": posterior.diagnostics["ess"],
            "R-hat": posterior.diagnostics["r_hat"],
            "MCSE": posterior.diagnostics["mcse"],
        }
        for name, image in expected.items():
            close(shown[name], image[:, row, column], digits)  # type: ignore[index]
        bounds = [lower[:, row, column], upper[:, row, column]]
        if channels == 1:
            close(shown["90 %"], np.concatenate(bounds), digits)
        else:
            close(shown["90 % from"], bounds[0], digits)
            close(shown["90 % to"], bounds[1], digits)
        sample = posterior.samples[0, :, row, column]  # type: ignore[index]
        close(shown["sample"], sample, digits, slack=0.05 * float(posterior.std.max()))
        assert sum(browser.counts()) == COUNT
        squares = posterior.std[:, row, column].square()
        combined = (squares.mean() if channels == 3 else squares.sum()).sqrt()
        close([float(browser.text("[data-view=std] .at"))], combined, 4)
        for other in ("mean", "map", "std"):  # the marker of every view lies on the same pixel
            box = "document.querySelector(`[data-view=${arguments[0]}] .%s`).getBoundingClientRect()"
            x, width = browser.run(f"const b = {box % 'marker'}; return [b.x, b.width]", other)
            left, whole = browser.run(f"const b = {box % 'stage'}; return [b.x, b.width]", other)
            assert (x + width / 2 - left) / whole * WIDTH == pytest.approx(column + 0.5, abs=0.05)


def test_colours_stand_for_values(browser: Browser, pages: dict[int, tuple[Path, Posterior]]) -> None:
    places = [(2, 3), (17, 22), (10, 12)]
    path, posterior = pages[1]
    browser.open(path, DESKTOP)
    images = np.stack([posterior.mean.numpy(), posterior.truth.numpy()])  # type: ignore[union-attr]
    low, high = images.min(), images.max()
    for row, column in places:
        grey = 255 * (posterior.mean[0, row, column].item() - low) / (high - low)
        assert browser.colour("mean", row, column) == [pytest.approx(grey, abs=1.5)] * 3 + [255]
    browser.run("document.getElementById('scale-high').value = ''")
    browser.press("#scale-high", str(low + 2 * (high - low)), "\n")
    assert browser.colour("mean", 2, 3)[0] == pytest.approx(
        127.5 * (posterior.mean[0, 2, 3].item() - low) / (high - low), abs=1.5
    )
    browser.press("#scale-low", "9", "\n")  # black above white: refused, and the value stays
    assert float(browser.find("#scale-low").get_attribute("value")) == pytest.approx(low, rel=1e-3)
    browser.click("#scale-reset")
    assert float(browser.find("#scale-high").get_attribute("value")) == pytest.approx(high, rel=1e-3)
    path, posterior = pages[3]
    browser.open(path, DESKTOP)
    for row, column in places:
        colour = (posterior.mean[:, row, column].numpy() + 1) * 127.5
        assert browser.colour("mean", row, column)[:3] == pytest.approx(colour.clip(0, 255), abs=1.5)


def test_the_slider_and_the_buttons(browser: Browser, pages: dict[int, tuple[Path, Posterior]]) -> None:
    path, posterior = pages[1]
    browser.open(path, DESKTOP)
    browser.mouse(("move", browser.at("mean", 5.5, 20.5)), ("down", None), ("up", None))
    keys = webdriver.Keys
    slack = 0.05 * posterior.std[0, 5, 20].item()

    def shows(number: int) -> None:
        assert browser.text("[data-view=sample] .title") == f"Sample {number + 1}/{COUNT}"
        close(browser.reading()["sample"], posterior.samples[number, 0, 5, 20], 4, slack)  # type: ignore[index]

    shows(0)
    before = browser.colour("sample", 5, 20)
    browser.press("#slider", keys.ARROW_RIGHT, keys.ARROW_RIGHT, keys.ARROW_RIGHT)
    shows(3)
    assert browser.colour("sample", 5, 20) != before
    browser.press("#slider", keys.END)
    shows(COUNT - 1)
    browser.click("#next")
    shows(0)
    browser.click("#previous")
    shows(COUNT - 1)
    browser.click("#play")
    assert browser.text("#play") == "Stop"
    browser.driver.execute_async_script("setTimeout(arguments[0], 700)")
    browser.click("#play")
    assert browser.text("#play") == "Play"
    number = int(browser.text("[data-view=sample] .title").split()[1].split("/")[0]) - 1
    assert number < COUNT - 1
    shows(number)


def test_a_pixel_is_held(browser: Browser, pages: dict[int, tuple[Path, Posterior]]) -> None:
    browser.open(pages[1][0], DESKTOP)
    click = [("down", None), ("up", None)]
    browser.mouse(("move", browser.at("mean", 4.5, 7.5)), *click)
    browser.point("truth", 12, 20)
    assert browser.text("#pixel h2") == "Row 4, column 7 held"
    browser.mouse(("move", browser.at("std", 6.5, 9.5)), *click)
    assert browser.text("#pixel h2") == "Row 6, column 9 held"
    browser.mouse(*click)
    assert browser.text("#pixel h2") == "Row 6, column 9"
    browser.point("truth", 12, 20)
    assert browser.text("#pixel h2") == "Row 12, column 20"


def test_keys(browser: Browser, pages: dict[int, tuple[Path, Posterior]]) -> None:
    path, posterior = pages[1]
    browser.open(path, DESKTOP)
    keys, stage = webdriver.Keys, "[data-view=mean] .stage"
    browser.point("mean", 4, 7)
    browser.press(stage, keys.ARROW_RIGHT, keys.ARROW_RIGHT, keys.ARROW_DOWN)
    assert browser.text("#place") == "Row 5, column 9"
    assert browser.text("#spoken").startswith("Row 5, column 9: mean ")
    close(browser.reading()["mean"], posterior.mean[:, 5, 9], 4)
    browser.press(stage, *[keys.ARROW_UP] * 9, keys.ARROW_LEFT)
    assert browser.text("#place") == "Row 0, column 8"
    browser.press(stage, keys.ENTER)
    assert browser.text("#held") == "held"
    browser.press(stage, keys.ESCAPE)
    assert not browser.find("#held").is_displayed()


def test_zoom(browser: Browser, pages: dict[int, tuple[Path, Posterior]]) -> None:
    path, posterior = pages[1]
    browser.open(path, DESKTOP)
    mean = posterior.mean[0]
    places = [(6, 7), (10, 13), (14, 18)]
    whole = [browser.colour("std", *place) for place in places]
    # The middle quarter: rows 5 to 15, columns 6.5 to 19.5, twice as large.
    start, end = browser.at("mean", 5, 6.5), browser.at("mean", 15, 19.5)
    browser.mouse(("move", start), ("down", None), ("move", end), ("up", None))
    assert browser.find("#zoom-reset").is_enabled()
    for (row, column), colour in zip(places, whole, strict=True):
        middle = (2 * (row + 0.5 - 5), 2 * (column + 0.5 - 6.5))
        assert browser.colour("std", middle[0] - 0.5, middle[1] - 0.5) == colour
        browser.mouse(("move", browser.at("truth", *middle)))
        assert browser.text("#place") == f"Row {row}, column {column}"
        close(browser.reading()["mean"], mean[row, column], 4)
    browser.press("[data-view=mean] .stage", *[webdriver.Keys.ARROW_RIGHT] * 4)  # out of the region
    assert browser.text("#place") == "Row 14, column 22"
    assert browser.find("[data-view=mean] .marker").is_displayed()
    browser.click("#zoom-reset")
    assert [browser.colour("std", *place) for place in places] == whole
    browser.point("mean", 0, 0)
    browser.click("#zoom-in")
    browser.mouse(("move", browser.at("mean", HEIGHT - 0.5, WIDTH - 0.5)))
    assert browser.text("#place") == f"Row {HEIGHT // 2 - 1}, column {WIDTH // 2 - 1}"
    browser.click("#zoom-out")
    browser.point("mean", 19, 25)
    assert browser.text("#place") == "Row 19, column 25"


def test_phase_of_a_complex_image(browser: Browser, pages: dict[int, tuple[Path, Posterior]]) -> None:
    path, posterior = pages[2]
    browser.open(path, DESKTOP)
    row, column = 8, 19
    browser.mouse(("move", browser.at("mean", row + 0.5, column + 0.5)), ("down", None), ("up", None))
    re, im = posterior.mean[:, row, column].tolist()
    close([float(browser.text("[data-view=mean] .at"))], np.hypot(re, im), 4)
    assert browser.text(".marginal p") == "magnitude"
    grey = browser.colour("mean", row, column)
    assert grey[0] == grey[1] == grey[2]
    browser.click("[value=phase]")
    close([float(browser.text("[data-view=mean] .at").split()[0])], np.arctan2(im, re), 3)
    assert browser.text(".marginal p") == "phase (rad)"
    assert browser.text("[data-view=mean] .low") == "-3.14"
    assert len(set(browser.colour("mean", row, column)[:3])) > 1
    assert sum(browser.counts()) == COUNT
    browser.click("[value=magnitude]")
    assert browser.colour("mean", row, column) == grey


@pytest.mark.parametrize("channels", KINDS)
def test_on_a_phone(browser: Browser, pages: dict[int, tuple[Path, Posterior]], channels: int) -> None:
    path, posterior = pages[channels]
    browser.open(path, PHONE, touch=True)
    assert browser.run("return document.documentElement.scrollWidth") <= PHONE[0]
    browser.tap("std", 3, 21)
    assert browser.text("#place") == "Row 3, column 21"
    close(browser.reading()["mean"], posterior.mean[:, 3, 21], 3 if channels > 1 else 4)
    # The read-out stays in sight beside the image that is touched, and nothing in it is cut off.
    top, bottom, inner, outer = browser.run(
        "const panel = document.getElementById('pixel'), box = panel.getBoundingClientRect();"
        "return [box.top, box.bottom, panel.scrollWidth, panel.clientWidth]"
    )
    assert 0 < top < bottom <= PHONE[1] + 1
    assert top > 0.45 * PHONE[1]
    assert inner <= outer
    boxes = browser.run(
        "return ['#values', '#marginals'].map((name) => {"
        "  const box = document.querySelector(name).getBoundingClientRect();"
        "  return [box.right, box.bottom, box.left, box.top]; })"
    )
    assert boxes[0][0] <= boxes[1][2] or boxes[0][1] <= boxes[1][3]  # side by side, or one above the other
    browser.press("[data-view=mean] .stage", webdriver.Keys.ENTER)
    assert browser.find("#held").is_displayed()
    browser.tap("mean", 11, 2)  # a finger cannot hover: a touch always reads, and holds nothing
    assert browser.text("#pixel h2") == "Row 11, column 2"


def test_dark_and_print(browser: Browser, pages: dict[int, tuple[Path, Posterior]]) -> None:
    def brightness(selector: str, of: str) -> float:
        script = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
        return float(np.mean([int(v) for v in re.findall(r"\d+", browser.run(script, selector, of))[:3]]))

    path, _ = pages[1]
    for dark in (False, True):
        browser.open(path, DESKTOP, dark=dark)
        assert (brightness("body", "backgroundColor") < 60) == dark
        assert (brightness("#values td", "color") > 200) == dark
    browser.media("print", dark=True)
    assert brightness("body", "backgroundColor") == 255
    assert not browser.find(".toolbar").is_displayed()
    assert browser.find("#values").is_displayed()


def test_odd_results_open(browser: Browser, tmp_path: Path) -> None:
    full = make_posterior(1)
    unsampled = Posterior(full.mean, full.std, full.energy, 1)
    unsampled.diagnostics[EVIL] = full.std.numpy()
    single = make_posterior(2, count=1)
    for number, posterior in enumerate([unsampled, single]):
        write_report(posterior, tmp_path / f"{number}.html", name=EVIL)
        browser.open(tmp_path / f"{number}.html", DESKTOP)
        browser.point("mean", 5, 6)
        close(browser.reading()["mean"], posterior.mean[:, 5, 6], 4 if number == 0 else 3)
        assert browser.text("h1") == EVIL
        assert browser.run("return window.broken === undefined")
    assert browser.driver.find_elements("css selector", "[data-view=std]") == []
