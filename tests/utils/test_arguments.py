"""Arguments from dataclasses, the command line and a file."""

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import pytest
from scripts import EXAMPLES
from transformers.hf_argparser import HfArg

from mcdi_hf import MCDiTrainingArguments, TrajectoryArguments
from mcdi_hf.commands.collect import DataArguments
from mcdi_hf.utils.arguments import check_fields, parse_arguments


@dataclass
class Own:
    needed: str = HfArg(help="needed")
    steps: int = HfArg(default=1, help="how many steps")
    rate: float = HfArg(default=0.5, help="how fast")
    shots: list[int] | None = HfArg(default=None, help="how many shots")
    flag: bool = HfArg(default=False, help="whether")
    kind: Literal["one", "two"] = HfArg(default="one", help="which")
    place: Path | None = HfArg(default=None, help="where")

    def __post_init__(self) -> None:
        check_fields(self)


def parse(tmp_path: Path, values: object, *arguments: str) -> Own:
    path = tmp_path / "own.json"
    path.write_text(json.dumps(values))
    return parse_arguments(Own, description="own", args=["--config", str(path), *arguments])[0]


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    values = {"steps": 5, "rate": 2, "shots": [1, 3], "flag": True, "needed": "yes", "kind": "two", "place": "/there"}
    found = parse(tmp_path, values, "--steps", "7", "--flag", "false")
    assert found == Own("yes", 7, 2.0, [1, 3], False, "two", Path("/there")) and isinstance(found.rate, float)


def test_without_a_file_there_is_the_command_line_alone() -> None:
    assert parse_arguments(Own, description="", args=["--needed", "no", "--shots", "1", "2"]) == (
        Own("no", shots=[1, 2]),
    )


@pytest.mark.parametrize(
    "values, message",
    [
        ({"stepz": 5}, r"own.json has unknown arguments \['stepz'\]"),
        ({"steps": "many"}, "own.json: steps is 'many': expected int"),
        ({"steps": True}, "own.json: steps is True: expected int"),
        ({"steps": 1.5}, "own.json: steps is 1.5: expected int"),
        ({"rate": "1"}, "own.json: rate is '1': expected float"),
        ({"shots": [1, "2"]}, "own.json: shots is '2': expected int"),
        ({"shots": 1}, r"own.json: shots is 1: expected list\[int\]"),
        ({"flag": 1}, "own.json: flag is 1: expected bool"),
        ({"kind": "three"}, r"own.json: kind is 'three': expected one of \['one', 'two'\]"),
        ({"place": 3}, "own.json: place is 3: expected Path"),
        ({"shots": None}, r"own.json says null for \['shots'\]"),
        (["steps"], "own.json holds a list: expected a JSON object"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, values: object, message: str
) -> None:
    values = {"needed": "yes"} | values if isinstance(values, dict) else values
    with pytest.raises(SystemExit) as ended:
        parse(tmp_path, values)
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and re.search(message, said[-1]) and "error: " in said[-1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the following arguments are required: --needed"),
        (["--needed", "x", "--conf", "own.json"], "not used by the HfArgumentParser: ['--conf', 'own.json']"),
        (["--needed", "x", "--config", "nowhere.json"], "nowhere.json is missing"),
        (["--needed", "x", "--steps", "many"], "invalid int value: 'many'"),
        (["--needed", "x", "--kind", "three"], "invalid choice: 'three'"),
    ],
)
def test_what_is_wrong_with_a_command_line_ends_with_code_2(
    capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments(Own, description="own", args=arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("kind", [MCDiTrainingArguments, TrajectoryArguments])
def test_help_shows_every_argument_with_its_default(kind: type, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(kind, description="", args=["--help"])
    shown = capsys.readouterr().out.split("\n  --")[1:]
    shown = {text.split()[0].strip(","): "".join(text.split()) for text in shown}
    made = kind("out")
    for field in fields(kind):
        default = "" if field.name == "output_dir" else f"(default: {getattr(made, field.name)})".replace(" ", "")
        assert shown[field.name].endswith(default), field.name


@pytest.mark.parametrize(
    "kind, values, message",
    [
        (TrajectoryArguments, {"ways": [5]}, r"ways is \[5\]: expected the least and the greatest"),
        (TrajectoryArguments, {"shots": [0, 3]}, "shots is"),
        (TrajectoryArguments, {"push_to_hub": True}, "push_to_hub needs hub_dataset_id"),
        (TrajectoryArguments, {"num_targets": 25}, "num_targets is 25: expected 1 to num_steps"),
        (TrajectoryArguments, {"num_tasks": 0}, "num_tasks is 0: expected a number from 1"),
        (TrajectoryArguments, {"stack_size": 0}, "stack_size is 0: expected a number from 1"),
        (TrajectoryArguments, {"lr_scheduler": "reduce_lr_on_plateau"}, "lr_scheduler is 'reduce_lr_on_plateau'"),
        (TrajectoryArguments, {"pooling": "max"}, "pooling is 'max': expected one of"),
        (MCDiTrainingArguments, {"shots": [3, 1]}, "shots is"),
        (MCDiTrainingArguments, {"objective": "ocd"}, "objective is 'ocd': expected one of"),
        (MCDiTrainingArguments, {"max_train_steps": 0}, "max_train_steps is 0: expected a number from 1"),
        (MCDiTrainingArguments, {"lr_scheduler": "step"}, "lr_scheduler is 'step': expected one of .*'linear'"),
        (MCDiTrainingArguments, {"num_layers": 0}, "num_layers is 0: expected a number from 1"),
        (MCDiTrainingArguments, {"train_batch_size": 0}, "train_batch_size is 0: expected a number from 1"),
        (MCDiTrainingArguments, {"strengths": []}, "strengths or validation_tasks is empty"),
        (MCDiTrainingArguments, {"push_to_hub": True}, "push_to_hub needs hub_model_id"),
        (
            MCDiTrainingArguments,
            {"learning_rate": 1e3},
            "learning_rate is 1000.0: expected a number above 0, 1 at most",
        ),
        (TrajectoryArguments, {"shared_learning_rate": 0}, "shared_learning_rate is 0.0"),
        (MCDiTrainingArguments, {"tasks_per_step": 0}, "leaves the task loss alone, but task_loss_weight is 0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(kind: type, values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind("out", **values)


def test_a_path_and_a_tuple_are_as_good_as_text_and_a_list(tmp_path: Path) -> None:
    made = TrajectoryArguments(str(tmp_path), ways=(2, 3), sam_rho=1)
    assert (made.output_dir, made.ways, made.sam_rho) == (tmp_path, [2, 3], 1.0)


KINDS = {"_trajectories": (DataArguments, TrajectoryArguments), "": (MCDiTrainingArguments,)}
CONFIGS = [
    (path, KINDS["_trajectories" if path.stem.endswith("_trajectories") else ""])
    for path in sorted(EXAMPLES.glob("**/configs/*.json"))
    if "benchmark" not in str(path.relative_to(EXAMPLES)) and not path.stem.endswith("_vit")
]
assert CONFIGS


@pytest.mark.parametrize("path, kinds", CONFIGS, ids=[path.stem for path, _ in CONFIGS])
def test_the_configs_are_known_to_their_scripts(path: Path, kinds: tuple) -> None:
    found = parse_arguments(*kinds, description="", args=["--config", str(path), "--output_dir", "run"])
    values = {name: value for one in found for name, value in vars(one).items()}
    wanted = json.loads(path.read_text())
    assert {name: values[name] for name in wanted} == wanted | {
        k: Path(wanted[k]) for k in ("mixture",) if k in wanted
    }
    assert "mixture" not in wanted or (EXAMPLES.parent / wanted["mixture"]).is_file()
