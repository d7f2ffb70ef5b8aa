"""The page in a real browser, on a phone's width: upload, generate, classify, download, a bad file."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import tiny_pipeline

from mcdi_hf import GeneratedAdapter


sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio")
CHROMIUM = shutil.which("chromium")
APP = Path(__file__).parents[1] / "examples" / "space" / "app.py"
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt install chromium")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("generator")
    tiny_pipeline("default")[0].save_pretrained(folder)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    settings = {"PIPELINE": str(folder), "GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False"}
    process = subprocess.Popen([sys.executable, str(APP)], env={**os.environ, **settings, "HF_HUB_OFFLINE": "1"})
    address = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            urllib.request.urlopen(address, timeout=5).close()
            break
        except OSError:
            assert process.poll() is None, "the page did not start"
            time.sleep(0.1)
    yield address
    process.terminate()
    process.wait()


@pytest.fixture
def page(address: str) -> Iterator["sync_api.Page"]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.set_default_timeout(60_000)
        page.goto(address)
        yield page
        browser.close()


def generated(page: "sync_api.Page", starts: str) -> str:
    """Press the button, and wait for what the page says then."""
    page.click("#generate")
    page.wait_for_function(
        "starts => document.querySelector('#result textarea')?.value.startsWith(starts)", arg=starts
    )
    return page.input_value("#result textarea")


def shows(page: "sync_api.Page", place: str, text: str) -> None:
    page.wait_for_function(
        "([place, text]) => document.querySelector(place).innerText.includes(text)", arg=[place, text]
    )


def test_generate_classify_and_download(page: "sync_api.Page", tmp_path: Path) -> None:
    page.fill("#examples textarea", "p: a b c\np: b a\nq: x y\nq: z\nq: <script>alert(1)</script>")
    assert "2 classes from 5 examples" in generated(page, "An adapter")
    shows(page, "#table", "frozen backbone (free)")
    page.fill("#sentences textarea", "a b\nz y")
    page.click("#classify")
    shows(page, "#answers", "z y")
    with page.expect_download() as download:
        page.click("#adapter a[download]")
    with zipfile.ZipFile(download.value.path()) as archive:
        archive.extractall(tmp_path)
    assert GeneratedAdapter.from_pretrained(tmp_path).labels == ["p", "q"]
    assert page.evaluate("document.documentElement.scrollWidth") <= 390  # nothing stands out on a phone
    if place := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(place) / "space.png", full_page=True)


def test_large_files_are_not_taken(address: str) -> None:
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.csv"\r\n\r\n%s\r\n--x--\r\n'
    for size, taken in ((1_000, True), (1_000_000, False)):
        body, kind = part % (b"a" * size), {"Content-Type": "multipart/form-data; boundary=x"}
        request = urllib.request.Request(f"{address}/gradio_api/upload", body, kind)
        if taken:
            urllib.request.urlopen(request, timeout=60).close()
            continue
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(request, timeout=60)
        assert error.value.code == 413 and "200000 bytes" in error.value.read().decode()


def test_a_file_and_a_bad_file(page: "sync_api.Page", tmp_path: Path) -> None:
    bad, good = tmp_path / "bad.csv", tmp_path / "good.csv"
    bad.write_text("text,label\na,p,too,many\n")
    good.write_text("text,label\na b,p\nb a,p\nx y,q\nz,q\n")
    page.set_input_files("#file input[type=file]", bad)
    page.wait_for_selector("#file >> text=bad")
    assert "another number of cells" in generated(page, "Error: ")
    page.click("#file button[aria-label='Clear']")
    page.set_input_files("#file input[type=file]", good)
    page.wait_for_selector("#file >> text=good")
    assert "2 classes from 4 examples" in generated(page, "An adapter")
