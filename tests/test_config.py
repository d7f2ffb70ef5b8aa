"""Arguments from a file, as the scripts read them."""

import argparse
import json
import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from config import as_arguments, parse_args  # noqa: E402


CONFIGS = Path(__file__).parents[1] / "examples" / "configs"
ARGUMENTS = sorted(set(CONFIGS.glob("*.json")) - set(CONFIGS.glob("benchmark*.json")))  # those are lists of families


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    made.add_argument("--steps", type=int, default=1)
    made.add_argument("--shots", type=int, nargs=2)
    made.add_argument("--flag", action="store_true")
    made.add_argument("--needed", required=True)
    return made


def parse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, values: object, *arguments: str) -> argparse.Namespace:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    monkeypatch.setattr(sys, "argv", ["script", "--config", str(path), *arguments])
    return parse_args(parser())


def test_the_command_line_overrides_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    values = {"steps": 5, "shots": [1, 3], "flag": True, "needed": "yes"}
    found = parse(monkeypatch, tmp_path, values, "--steps", "7")
    assert (found.steps, found.shots, found.flag, found.needed) == (7, [1, 3], True, "yes")


def test_without_a_file_there_is_the_command_line_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["script", "--needed", "no"])
    found = parse_args(parser())
    assert (found.steps, found.needed, found.config) == (1, "no", None)


@pytest.mark.parametrize("values", [{"stepz": 5}, {"steps": "many"}, {"needed": "yes", "shots": [1]}])
def test_what_the_script_does_not_know_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, values: dict
) -> None:
    with pytest.raises(SystemExit):
        parse(monkeypatch, tmp_path, {"needed": "yes"} | values)


def test_a_config_that_is_not_read_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"needed": "yes"}))
    monkeypatch.setattr(sys, "argv", ["script", "--needed", "no", "--conf", str(path)])
    with pytest.raises(SystemExit):
        parse_args(parser())
    assert "config.json was not read" in capsys.readouterr().err


def test_a_file_of_something_else_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds a list: expected one JSON object"):
        parse(monkeypatch, tmp_path, ["steps"])
    with pytest.raises(ValueError, match="False for 'flag'"):
        parse(monkeypatch, tmp_path, {"flag": False, "needed": "yes"})


@pytest.mark.parametrize("path", ARGUMENTS, ids=lambda path: path.stem)
def test_the_configs_are_known_to_their_scripts(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    script, needed = "train_arguments", ["--trajectories", "t", "--validation_domains", "d"]
    if path.stem.endswith("_trajectories"):
        script, needed = "collect_trajectories", []
    elif path.stem.endswith("_vit"):
        script, needed = "pretrain_vit", ["--dataset_name", "data"]
    monkeypatch.setattr(sys, "argv", ["script", "--config", str(path), "--output_dir", "run", *needed])
    described = [script] if script == "train_arguments" else []
    assert __import__(script).arguments(*described).config == path


@pytest.mark.parametrize("path", sorted((CONFIGS / "benchmark").glob("*.json")), ids=lambda path: path.stem)
def test_the_benchmarks_generators_are_known_to_their_scripts(path: Path) -> None:
    from collect_trajectories import arguments as collecting
    from train_arguments import ABLATIONS
    from train_arguments import arguments as training

    family = json.loads(path.read_text())
    for values in family["generators"].values():
        values["trajectories"]["mixture"] = str(CONFIGS.parents[1] / values["trajectories"]["mixture"])
        assert Path(values["trajectories"]["mixture"]).exists()
        collecting(as_arguments(values["trajectories"] | {"output_dir": "run"}, path.stem))
        for objective in ABLATIONS.values():
            own = family.get("training", {}) | values["training"] | objective
            own |= {"trajectories": "t", "validation_domains": ["d"], "output_dir": "run"}
            assert training("", as_arguments(own, path.stem)).objective == objective["objective"]
    assert {table["generator"] for table in family["tables"]} == set(family["generators"])
