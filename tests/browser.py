"""A report page in headless Chromium, and what a person does with it; for test_html_report_browser."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_html_report import HEIGHT, WIDTH

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
# Two frames: the page reads a pixel in the frame after the pointer moved.
FRAMES = "requestAnimationFrame(() => requestAnimationFrame(arguments[0]))"


class Browser:
    """A page in Chromium and what a person does with it."""

    def __init__(self) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
            options.add_argument(argument)
        if os.geteuid() == 0:  # Chromium's sandbox refuses root, as containers run
            options.add_argument("--no-sandbox")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        service = webdriver.ChromeService(CHROMEDRIVER)
        self.driver = webdriver.Chrome(options=options, service=service)

    def open(self, path: Path, size: tuple[int, int], *, touch: bool = False, dark: bool = False) -> None:
        width, height = size
        self.devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2,
            mobile=touch,
        )
        self.devtools("Emulation.setTouchEmulationEnabled", enabled=touch)
        self.media("", dark)
        self.driver.get(path.as_uri())
        self.settle()

    def media(self, name: str, dark: bool = False) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", media=name, features=[scheme])

    def devtools(self, command: str, **arguments: Any) -> Any:
        return self.driver.execute_cdp_cmd(command, arguments)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def settle(self) -> None:
        self.driver.execute_async_script(FRAMES)

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return self.find(selector).text.replace("−", "-")

    def at(self, view: str, row: float, column: float) -> tuple[int, int]:
        """Where a point of the whole image lies in the window, scrolled to."""
        stage = f"[data-view={view}] .stage"
        self.run("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", stage)
        box = self.run("return document.querySelector(arguments[0]).getBoundingClientRect().toJSON()", stage)
        x, y = box["x"] + column / WIDTH * box["width"], box["y"] + row / HEIGHT * box["height"]
        return round(x), round(y)

    def point(self, view: str, row: int, column: int) -> None:
        """Moves the mouse over the middle of a pixel."""
        self.mouse(("move", self.at(view, row + 0.5, column + 0.5)))

    def mouse(self, *steps: tuple[str, Any]) -> None:
        chain = webdriver.ActionChains(self.driver, duration=20)
        for step, where in steps:
            if step == "move":
                chain.w3c_actions.pointer_action.move_to_location(*where)
            elif step == "down":
                chain.w3c_actions.pointer_action.pointer_down()
            else:
                chain.w3c_actions.pointer_action.pointer_up()
        chain.perform()
        self.settle()

    def click(self, selector: str) -> None:
        self.run("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", selector)
        self.find(selector).click()
        self.settle()

    def press(self, selector: str, *keys: str) -> None:
        self.find(selector).send_keys(*keys)
        self.settle()

    def tap(self, view: str, row: int, column: int) -> None:
        x, y = self.at(view, row + 0.5, column + 0.5)
        self.devtools("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.devtools("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        self.settle()

    def reading(self) -> dict[str, list[float]]:
        """The rows of the read-out as numbers."""
        rows = self.run(
            "return [...document.querySelectorAll('#values tr')]"
            ".map((row) => [row.dataset.row, row.innerText])"
        )
        number = r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?"
        values = {name: text[len(name) :].replace("−", "-") for name, text in rows if name}
        return {name: [float(found) for found in re.findall(number, text)] for name, text in values.items()}

    def colour(self, view: str, row: float, column: float) -> list[int]:
        """RGBA that the canvas shows at a pixel of the whole image."""
        return self.run(
            "const shown = document.querySelector(`[data-view=${arguments[0]}] .stage canvas`);"
            "const copy = Object.assign(document.createElement('canvas'), {width: 1, height: 1});"
            "const context = copy.getContext('2d', {willReadFrequently: true});"
            "context.drawImage(shown, -Math.floor(arguments[1] * shown.width),"
            "  -Math.floor(arguments[2] * shown.height));"
            "return [...context.getImageData(0, 0, 1, 1).data]",
            view,
            (column + 0.5) / WIDTH,
            (row + 0.5) / HEIGHT,
        )

    def counts(self) -> list[int]:
        """Counts of the bins of the first marginal."""
        titles = self.run("return [...document.querySelectorAll('.marginal')[0].querySelectorAll('title')]"
                          ".map((title) => title.textContent)")  # fmt: skip
        return [int(title.split()[0]) for title in titles]
