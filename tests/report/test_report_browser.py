"""The page in a real browser, where there is one."""

import pytest
from fake_run import fake_run
from report_browser import CHROMIUM, Browser

from himoe.report import write_report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")


def test_it_opens_without_a_request_an_error_or_a_sideways_scroll(tmp_path):
    page = write_report(fake_run(tmp_path / "run", domains=("code", "<script>alert(1)</script>")))
    with Browser() as browser:
        for width, dark in ((1280, False), (390, True)):
            browser.open(page, width=width, dark=dark)
            assert browser.evaluate("document.documentElement.scrollWidth") == width
            wide = "[...document.querySelectorAll('.chart svg')].every((svg) => svg.clientWidth < innerWidth)"
            assert browser.evaluate(wide)
        names = "[...document.querySelectorAll('#chart-0 .legendtext')].map((text) => text.textContent)"
        assert browser.evaluate(names) == ["training", "code", "<script>alert(1)</script>"]
        browser.evaluate("document.querySelector('button[data-axis=yaxis]').click()")
        assert browser.evaluate("document.getElementById('chart-0').layout.yaxis.type") == "log"
        assert {url.split(":")[0] for url in browser.requests} <= {"file", "data"}
        assert browser.problems == []
