"""The HTTP server under load: 32 clients at once, every answer compared."""

import http.client
import json
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tiny import seeded, tiny_pipeline

from mcdi_hf import MCDiPipeline


pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
TEXTS = ["a b c", "x y", "z", "k l m", "b"]
SUPPORTS = {
    "shop": {"refund": ["a b", "b a"], "delivery": ["x y z"]},
    "home": {"lights": ["k l"], "music": ["m n"], "heating": ["z z"]},
}


@pytest.fixture(scope="module")
def pipe() -> MCDiPipeline:
    pipe, _ = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def address(pipe: MCDiPipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from serve import make_app

    folder = tmp_path_factory.mktemp("adapters")
    for name, support in SUPPORTS.items():
        pipe(support, generator=seeded()).adapters[0].save_pretrained(folder / name)
    server = uvicorn.Server(uvicorn.Config(make_app(pipe, folder), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def ask(address: str, path: str, body: Any = None, method: str | None = None) -> Any:
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address + path, content, {"content-type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def same(found: list[dict], expected: list[dict]) -> bool:
    """Whether answers are those of one adapter."""
    pairs = zip(found, expected, strict=True)
    return all(one["label"] == two["label"] and abs(one["score"] - two["score"]) < 1e-3 for one, two in pairs)


def test_32_clients_at_once_get_each_their_own_answers(pipe: MCDiPipeline, address: str) -> None:
    adapters = {name: pipe(support, generator=seeded()).adapters[0] for name, support in SUPPORTS.items()}
    expected = {name: pipe.predict(adapter, TEXTS) for name, adapter in adapters.items()}

    def client(number: int) -> int:
        """Ask, and make, replace and drop adapters of this client's own and one that all have, in between."""
        right = 0
        for turn, mine in enumerate(("home", "shop", "home", "shop")):
            ask(address, f"/adapters/client%20{number}", SUPPORTS[mine], "PUT")  # added, then replaced
            ask(address, "/adapters/all", SUPPORTS["shop" if number % 2 else "home"], "PUT")
            for name, likes in (
                ("shop", ["shop"]),
                ("home", ["home"]),
                (f"client {number}", [mine]),
                ("all", SUPPORTS),
            ):
                found = ask(address, "/predict", {"adapter": name, "texts": TEXTS})
                right += sum(
                    same(found, expected[like]) for like in likes
                )  # of one adapter, from the first to the last
            if turn % 2:
                ask(address, f"/adapters/client%20{number}", method="DELETE")
        return right

    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(client, range(32))) == [4 * 4] * 32
    ask(address, "/adapters/all", method="DELETE")
    assert ask(address, "/adapters") == sorted(SUPPORTS)


@pytest.mark.parametrize(
    ("path", "body", "method", "code", "said"),
    [
        ("/predict", {"adapter": "shpo", "texts": ["a"]}, "POST", 404, "such as ['shop'"),
        ("/predict", {"adapter": "shop", "texts": []}, "POST", 422, "at least 1"),
        ("/predict", {"adapter": "shop", "texts": ["a"] * 257}, "POST", 422, "at most 256"),
        ("/predict", {"adapter": "shop", "texts": ["a" * 10_001]}, "POST", 422, "at most 10000"),
        ("/adapters/x", {"one": ["a"]}, "PUT", 422, "at least 2"),
        ("/adapters/x", {"one": ["a"], "two": [" "]}, "PUT", 422, "expected a text that is not empty"),
        ("/adapters/x", None, "DELETE", 404, "no adapters ['x']"),
    ],
)
def test_wrong_requests_are_told(address: str, path: str, body: Any, method: str, code: int, said: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as error:
        ask(address, path, body, method)
    assert error.value.code == code and said in error.value.read().decode()


@pytest.mark.parametrize("header", [("content-length", "9000000"), ("transfer-encoding", "chunked")])
def test_a_body_that_is_too_large_is_not_read(address: str, header: tuple[str, str]) -> None:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    connection.putrequest("POST", "/predict")
    connection.putheader(*header)
    connection.endheaders()  # and no byte of a body
    answer = connection.getresponse()
    assert answer.status == 413 and b"8000000 bytes at most" in answer.read()
    connection.close()
