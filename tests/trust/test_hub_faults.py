"""Pushes that are cut off, killed or not allowed, and repositories read from the cache without a network."""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_hub import READER, FakeHub, Fault
from huggingface_hub.errors import HfHubHTTPError
from random_trajectories import check_rows, codec_of, filled
from reliability import Reliability
from safetensors.torch import load
from scripts import call
from tiny import tiny_pipeline
from versions import needs

from mcdi_hf import GeneratedAdapter, MCDiPipeline, TrajectoryFolder, load_trajectories


SUPPORT = {"first": ["a b c", "a c"], "second": ["x y z", "z y"]}
REPO = "tester/repo"
KINDS = ("pipeline", "adapter", "trajectories")
# The imports take most of a start, so they are done once: every line of the input is a push, in a process of its own.
PUSHER = """
import os, pickle, sys
from pathlib import Path
from mcdi_hf import MCDiPipeline, TrajectoryFolder

print("ready", flush=True)
for line in sys.stdin:
    kind, source = line.split()
    if (pid := os.fork()) == 0:
        if kind == "pipeline":
            made = MCDiPipeline.from_pretrained(source)
        else:
            made = TrajectoryFolder(Path(source)) if kind == "trajectories" else pickle.load(open(source, "rb"))
        made.push_to_hub("tester/repo")
        os._exit(0)
    print(pid, flush=True)
    os.waitpid(pid, 0)
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind -> where it lies, as `PUSHER` reads it."""
    root = tmp_path_factory.mktemp("sources")
    pipe, _ = tiny_pipeline()
    adapter = pipe(SUPPORT, generator=torch.Generator().manual_seed(0), num_inference_steps=2).adapters[0]
    pipe.save_pretrained(root / "pipeline")
    (root / "adapter").write_bytes(pickle.dumps(adapter))
    filled(root / "trajectories", codec_of(), range(3), range(3, 5)).finish()
    return {kind: root / kind for kind in KINDS}


@pytest.fixture(scope="module")
def pusher() -> Iterator[subprocess.Popen]:
    """A process that pushes what its input names, each in a child whose number it says."""
    command, pipe = [sys.executable, "-c", PUSHER], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        yield process


def pushed(kind: str, source: Path) -> MCDiPipeline | GeneratedAdapter | TrajectoryFolder:
    if kind == "adapter":
        return pickle.loads(source.read_bytes())
    return MCDiPipeline.from_pretrained(source) if kind == "pipeline" else TrajectoryFolder(source)


def kind_of(kind: str) -> str:
    return "dataset" if kind == "trajectories" else "model"


def check(hub: FakeHub, kind: str, source: Path) -> bool:
    """The repository holds all that was pushed, and has one commit beside its first."""
    files = hub.files(REPO, kind_of(kind))
    if kind == "adapter":
        expected = pickle.loads(source.read_bytes()).tensors
        found = load(files["adapter_model.safetensors"])
        whole = found.keys() == expected.keys() and all(found[key].equal(expected[key]) for key in expected)
        names = {"adapter_config.json", "adapter_model.safetensors", "generation.json", "README.md"}
    else:
        paths = {str(path.relative_to(source)): path for path in source.rglob("*") if path.is_file()}
        names = set(paths) | {"README.md"}
        whole = all(files.get(name) == path.read_bytes() for name, path in paths.items())
    return whole and files.keys() == names | {".gitattributes"} and len(hub.repos[kind_of(kind), REPO].commits) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("served", [False, True])
def test_a_lost_connection_and_another_try(
    hub: FakeHub, sources: dict[str, Path], reliability: Reliability, kind: str, served: bool
) -> None:
    fault = Fault("POST", "/commit/", served)
    hub.faults.append(fault)
    made = pushed(kind, sources[kind])
    with pytest.raises(Exception, match="disconnected"):
        made.push_to_hub(REPO)
    assert fault.reached.is_set() and not hub.faults
    assert (hub.files(REPO, kind_of(kind)).keys() == {".gitattributes"}) != served  # all of it, or nothing
    made.push_to_hub(REPO)
    part = "pushes that were cut off, again"
    _, said = reliability.attempt(part, lambda: check(hub, kind, sources[kind]), same=bool)
    assert not said and check(hub, kind, sources[kind])


@needs("huggingface_hub", "1.33", "does not try again")
@pytest.mark.parametrize("method, part", [("POST", "/preupload/"), ("PUT", "/lfs/"), ("POST", "/lfs/objects/batch")])
def test_a_lost_upload_is_taken_up_by_itself(hub: FakeHub, sources: dict[str, Path], method: str, part: str) -> None:
    hub.faults.append(Fault(method, part, served=False))
    pushed("trajectories", sources["trajectories"]).push_to_hub(REPO)
    assert not hub.faults and check(hub, "trajectories", sources["trajectories"])
    assert len(hub.blobs) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("served", [False, True])
def test_kill_in_a_push_and_another_push(
    hub: FakeHub,
    sources: dict[str, Path],
    pusher: subprocess.Popen,
    reliability: Reliability,
    kind: str,
    served: bool,
) -> None:
    fault = Fault("POST", "/commit/", served=served, hold=True)
    hub.faults.append(fault)
    pusher.stdin.write(f"{kind} {sources[kind]}\n")
    pusher.stdin.flush()
    child = int(pusher.stdout.readline())
    assert fault.reached.wait(timeout=60)
    os.kill(child, signal.SIGKILL)
    fault.over.set()
    assert (hub.files(REPO, kind_of(kind)).keys() == {".gitattributes"}) != served
    pushed(kind, sources[kind]).push_to_hub(REPO)
    part = "pushes after kill -9 in a push"
    _, said = reliability.attempt(part, lambda: check(hub, kind, sources[kind]), same=bool)
    assert not said and check(hub, kind, sources[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("there", [False, True])
def test_who_may_not_write_is_told(hub: FakeHub, sources: dict[str, Path], kind: str, there: bool) -> None:
    made = pushed(kind, sources[kind])
    if there:
        made.push_to_hub(REPO)
    before = len(hub.repos[kind_of(kind), REPO].commits) if there else 0
    changed = made
    if kind == "adapter":
        changed.tensors = {key: value + 1 for key, value in made.tensors.items()}
    with pytest.raises(HfHubHTTPError, match="403"):
        changed.push_to_hub(REPO, token=READER)
    assert len(hub.repos) == int(there)
    assert not there or len(hub.repos[kind_of(kind), REPO].commits) == before


def test_who_may_not_read_is_told(hub: FakeHub, sources: dict[str, Path]) -> None:
    pushed("pipeline", sources["pipeline"]).push_to_hub(REPO, private=True)
    with pytest.raises(OSError, match="(?i)repository not found|401"):
        MCDiPipeline.from_pretrained(REPO, token=False)
    assert isinstance(MCDiPipeline.from_pretrained(REPO, token=READER), MCDiPipeline)


def test_trajectories_are_private_or_on_a_branch_if_asked(hub: FakeHub, sources: dict[str, Path]) -> None:
    folder = TrajectoryFolder(sources["trajectories"])
    folder.push_to_hub(REPO, private=True)
    assert hub.repos["dataset", REPO].private
    rows, _, codec = load_trajectories(REPO)
    check_rows(list(rows), codec, range(5))
    info = folder.push_to_hub("tester/other", create_pr=True)
    assert info.pr_revision == "refs/pr/1" and "trajectories.json" not in hub.files("tester/other", "dataset")
    assert "trajectories.json" in hub.files("tester/other", "dataset", ref="refs/pr/1")


def test_a_pipeline_of_the_hub_knows_its_commit(hub: FakeHub, sources: dict[str, Path]) -> None:
    made = pushed("pipeline", sources["pipeline"])
    assert made.revision is None
    made.push_to_hub(REPO)
    first = hub.repos["model", REPO].refs["main"]
    changed = pushed("pipeline", sources["pipeline"])
    changed.register_to_config(strength=0.25)
    changed.push_to_hub(REPO)
    second = hub.repos["model", REPO].refs["main"]
    for revision, commit, strength in ((None, second, 0.25), (first, first, 1.0)):
        loaded = MCDiPipeline.from_pretrained(REPO, revision=revision)
        loaded.set_progress_bar_config(disable=True)
        adapter = loaded(SUPPORT, num_inference_steps=1).adapters[0]
        assert loaded.revision == adapter.details.generator_revision == commit
        assert loaded.config.strength == strength and adapter.details.generator == REPO


OFFLINE = """
import sys
from pathlib import Path
from datasets import load_dataset
from mcdi_hf import MCDiPipeline, load_trajectories
from peft import PeftModel
from tiny import tiny_backbone

pipe = MCDiPipeline.from_pretrained("tester/pipeline")
pipe.set_progress_bar_config(disable=True)
adapter = pipe({"first": ["a b c"], "second": ["x y z"]}, num_inference_steps=1).adapters[0]
model = PeftModel.from_pretrained(tiny_backbone().classifier(num_labels=2), "tester/adapter")
rows, _, _ = load_trajectories("tester/trajectories")
print(pipe.revision, adapter.details.generator, model.peft_config["default"].r, len(rows))
"""


def test_without_a_network_the_cache_serves(hub: FakeHub, sources: dict[str, Path], tmp_path: Path) -> None:
    for kind in KINDS:
        pushed(kind, sources[kind]).push_to_hub(f"tester/{kind}")
    folder = str(Path(__file__).parents[1])
    own = {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": f"{folder}:{Path(folder).parent / 'src'}"}
    hub.log.clear()
    online = call("-c", OFFLINE, HF_HUB_OFFLINE="0", **own)
    assert hub.log  # nothing was in the cache
    hub.log.clear()
    assert call("-c", OFFLINE, **own) == online and not hub.log
    commit = hub.repos["model", "tester/pipeline"].refs["main"]
    rank = pickle.loads(sources["adapter"].read_bytes()).lora_config["r"]
    assert online.split() == [commit, "tester/pipeline", str(rank), "5"]
