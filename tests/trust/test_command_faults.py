"""`mcdi-hf` and the server under faults: killed in the middle, on a full disk, and for as many requests as a day has."""

import csv
import json
import random
import re
import resource
import signal
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest
from reliability import Reliability
from scripts import EXAMPLES, run_each, start
from tiny import seeded, tiny_pipeline

from mcdi_hf import GeneratedAdapter, MixedAdapters


TEXTS = ["a b c", "x y z", "k l"]
ROWS = [("a b c", "p"), ("a c", "p"), ("x y z", "q"), ("z y", "q")]
TASKS = ("shop", "home", "bank")
MCDI_HF = Path(sys.executable).with_name("mcdi-hf")
# Before which file operation `generate` is killed; it has 33 with three tasks. `make reliability` tries all.
SOME_KILLS, ALL_KILLS = (2, 12, 24), range(1, 32)
SOME_REQUESTS, ALL_REQUESTS = 20_000, 1_000_000


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a pipeline, a file of three tasks, a file of texts, and an adapter."""
    folder = tmp_path_factory.mktemp("commands")
    pipe, _ = tiny_pipeline("default")
    pipe.save_pretrained(folder / "pipeline")
    pipe({"p": ["a b c", "a c"], "q": ["x y z"]}, generator=seeded()).adapters[0].save_pretrained(
        folder / "shelf" / "one"
    )
    with (folder / "rows.csv").open("w", newline="") as file:
        rows = [(text, label, task) for task in TASKS for text, label in ROWS]
        csv.writer(file).writerows([("text", "label", "task"), *rows])
    (folder / "texts.csv").write_text("\n".join(["text", *TEXTS]))
    return folder


def generate(root: Path, folder: Path) -> list[str | Path]:
    given = [root / "rows.csv", "--pipeline", root / "pipeline", "--task_column", "task"]
    return [MCDI_HF, "generate", *given, "--num_candidates", "1", "--output_dir", folder]


def predict(root: Path, file: Path) -> list[str | Path]:
    return [MCDI_HF, "predict", root / "shelf" / "one", root / "texts.csv", "--split", "train", "--output_file", file]


def weights(folder: Path) -> dict[str, bytes]:
    for task in TASKS:
        GeneratedAdapter.from_pretrained(folder / task)  # whole, and its files fit
    return {task: (folder / task / "adapter_model.safetensors").read_bytes() for task in TASKS}


def test_a_batch_that_was_killed_comes_to_the_same_adapters(
    root: Path, thorough: bool, reliability: Reliability, tmp_path: Path
) -> None:
    numbers = ALL_KILLS if thorough else SOME_KILLS
    folders = {str(number): tmp_path / str(number) for number in (0, *numbers)}
    run = {name: generate(root, folder) for name, folder in folders.items()}
    kills = {name: (folder, int(name)) for name, folder in folders.items() if name != "0"}
    ended = run_each(run, kills=kills)
    assert [code for code, _, _ in ended.values()] == [0] + [-signal.SIGKILL] * len(numbers)
    again = run_each({name: command for name, command in run.items() if name != "0"})
    expected = weights(folders["0"])
    for name, (code, _, said) in again.items():
        assert code == 0, said[-2000:]
        part = "batches of generate after kill -9, again"
        found, _ = reliability.attempt(part, lambda: weights(folders[name]), same=expected.__eq__)
        assert found == expected


def test_predictions_are_written_whole_or_not_at_all(root: Path, reliability: Reliability, tmp_path: Path) -> None:
    numbers = ("2", "3", "4")  # as the file is begun beside its place, as it is moved there, and after the end
    run = {number: predict(root, tmp_path / number / "out.csv") for number in numbers}
    ended = run_each(run, kills={number: (tmp_path / number, int(number)) for number in numbers})
    assert [code for code, _, _ in ended.values()] == [-signal.SIGKILL] * 2 + [0]
    whole = (tmp_path / "4" / "out.csv").read_bytes()
    assert whole.count(b"\n") == 1 + len(TEXTS) and not list(tmp_path.glob("[23]/out.csv"))
    ended = run_each({number: run[number] for number in numbers[:2]})
    assert {code for code, _, _ in ended.values()} == {0}
    for number in ended:
        part = "files of predict after kill -9, again"
        found, _ = reliability.attempt(part, (tmp_path / number / "out.csv").read_bytes, same=whole.__eq__)
        assert found == whole


def test_a_full_disk_is_one_line_and_leaves_no_half(root: Path, reliability: Reliability, tmp_path: Path) -> None:
    commands = {"generate": generate(root, tmp_path / "made"), "predict": predict(root, tmp_path / "out.csv")}
    ended = run_each(commands, {"generate": 1000, "predict": 10})
    for name, (code, _, said) in ended.items():

        def refuse(text: str = said) -> None:
            raise OSError(text.splitlines()[-1])

        _, found = reliability.attempt("full disks", refuse, str(tmp_path))
        assert code == 1 and found.startswith("error: ") and "Traceback" not in said, name
    assert not (tmp_path / "out.csv").exists() and not list(tmp_path.glob("made/*/adapter_config.json"))
    again = run_each({"generate": commands["generate"]})["generate"]
    assert again[0] == 0 and weights(tmp_path / "made")


def test_a_server_that_was_killed_answers_as_before(root: Path, reliability: Reliability) -> None:
    """It writes nothing, so that neither a kill nor a disk that fills up can take anything from it."""
    pytest.importorskip("fastapi")
    command = [EXAMPLES / "serve.py", "--pipeline", root / "pipeline", "--adapters", root / "shelf", "--port", "0"]
    answers = []
    for _ in range(2):
        process = start(*command)
        said = next(line for line in iter(process.stderr.readline, "") if "Uvicorn running on" in line)
        address = re.search(r"http://[\d.:]+", said)[0]
        body = json.dumps({"adapter": "one", "texts": TEXTS}).encode()
        request = urllib.request.Request(f"{address}/predict", body, {"content-type": "application/json"})
        for size in (resource.RLIM_INFINITY, 0):
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            answers.append(urllib.request.urlopen(request, timeout=60).read())
        process.kill()
        assert process.wait(timeout=60) == -signal.SIGKILL
    for answer in answers:
        part = "answers of a server on a full disk and after kill -9"
        reliability.attempt(part, lambda: answer, same=answers[0].__eq__)
    assert len(json.loads(answers[0])) == len(TEXTS) and set(answers) == {answers[0]}


def test_memory_stays_flat(thorough: bool, reliability: Reliability) -> None:
    """Requests as a server has them, a few texts each, while adapters come, change and go."""
    pipe, backbone = tiny_pipeline()
    mixed = MixedAdapters(backbone, pipe.codec.layout)
    supports = [{"p": ["a b"], "q": ["x y"]}, {"p": ["k"], "q": ["m n"], "r": ["z"]}]
    adapters = pipe(supports, generator=seeded()).adapters
    for number in range(8):
        mixed.add(str(number), adapters[number % 2])
    expected = [mixed(TEXTS, [str(number)] * len(TEXTS)).labels for number in range(2)]
    draw, process, sizes, asked = random.Random(0), psutil.Process(), [], 0
    total = ALL_REQUESTS if thorough else SOME_REQUESTS
    while asked < total:
        rows = [(draw.randrange(8), draw.randrange(len(TEXTS))) for _ in range(draw.randint(1, 64))]
        labels = mixed([TEXTS[text] for _, text in rows], [str(adapter) for adapter, _ in rows]).labels
        asked += len(rows)
        assert labels == [expected[adapter % 2][text] for adapter, text in rows]
        changed = draw.randrange(8)
        mixed.replace(str(changed), adapters[changed % 2])
        if draw.random() < 0.1:
            mixed.drop(str(changed))
            mixed.add(str(changed), adapters[changed % 2])
        sizes.append(process.memory_info().rss)
    grown = (sizes[-1] - sizes[len(sizes) // 10]) / 2**20
    reliability.held("requests to adapters that come and go", asked)
    assert grown < 16, f"{grown:.1f} MiB more after {asked} requests than after a tenth of them"
