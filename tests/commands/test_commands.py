"""`mcdi-hf`: files in, adapters and predictions out; what is wrong is one line."""

import csv
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from fake_hub import FakeHub
from peft import AutoPeftModelForSequenceClassification
from scripts import LAUNCH, call
from tiny import tiny_image_dataset, tiny_image_pipeline, tiny_pipeline

from mcdi_hf import GeneratedAdapter, MCDiPipeline
from mcdi_hf.commands.main import main


ROWS = [("a b c", "p"), ("a c", "p"), ("b a", "p"), ("x y z", "q"), ("z y", "q"), ("x", "q"), ("k l", "r"), ("m", "r")]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generator")
    tiny_pipeline("default")[0].save_pretrained(folder)
    return folder


def write_csv(path: Path, rows: list[tuple], names: tuple[str, ...] = ("text", "label")) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])
    return path


def generate(file: Path, pipeline: Path, output_dir: Path, *options: str) -> None:
    main(["generate", str(file), "--pipeline", str(pipeline), "--output_dir", str(output_dir), *options])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


def failing(capsys: pytest.CaptureFixture, *argv: str | Path) -> str:
    """What a command says that refuses what it was given."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        main(list(map(str, argv)))
    assert isinstance(error.value.code, str) and "\n" not in error.value.code
    return error.value.code


def test_a_file_becomes_an_adapter_that_plain_peft_loads_and_predicts(pipeline: Path, tmp_path: Path, capsys) -> None:
    file = write_csv(tmp_path / "rows.csv", ROWS)
    generate(file, pipeline, tmp_path / "made", "--seed", "3")
    assert "1 adapters are in" in capsys.readouterr().out
    adapter = GeneratedAdapter.from_pretrained(tmp_path / "made")
    assert adapter.labels == ["p", "q", "r"] and adapter.details.shots == [3, 3, 2]
    main(
        ["predict", str(tmp_path / "made"), str(file), "--split", "train", "--output_file", str(tmp_path / "out.csv")]
    )
    with (tmp_path / "out.csv").open(newline="") as found:
        rows = list(csv.DictReader(found))
    assert [row["text"] for row in rows] == [text for text, _ in ROWS]
    model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "made", num_labels=3)
    pipe = MCDiPipeline.from_pretrained(pipeline)
    with torch.no_grad():
        scores = model(**pipe.backbone.inputs([text for text, _ in ROWS])).logits.softmax(dim=1)
    assert [row["label"] for row in rows] == [adapter.labels[index] for index in scores.argmax(dim=1).tolist()]
    assert [float(row["score"]) for row in rows] == pytest.approx(scores.max(dim=1).values.tolist(), abs=1e-3)
    capsys.readouterr()
    (tmp_path / "lines.txt").write_text("a b\nx y\n")
    main(["predict", str(tmp_path / "made"), str(tmp_path / "lines.txt"), "--split", "train"])
    assert capsys.readouterr().out.splitlines()[0] == "text,label,score"


ODD = ["../out", "a/b", ".", "..", "<script>", "task: [x]", "ünï", "a b"]


def test_an_adapter_for_each_task_wherever_its_name_would_lead(pipeline: Path, tmp_path: Path) -> None:
    rows = [(text, label, task) for task in ODD for text, label in ROWS]
    file = write_csv(tmp_path / "rows.csv", rows, ("text", "label", "customer"))
    options = ["--task_column", "customer", "--select", "--num_candidates", "2"]
    generate(file, pipeline, tmp_path / "made" / "here", *options)
    assert {path.name for path in (tmp_path / "made").iterdir()} == {"here"}
    folders = [path for path in (tmp_path / "made" / "here").iterdir() if path.is_dir()]
    assert len(folders) == len(ODD)
    first = files(tmp_path / "made" / "here")
    # Killed in the middle: what is missing is made again, to the same files, and no more of the rest.
    shutil.rmtree(folders[0])
    generate(file, pipeline, tmp_path / "made" / "here", *options)
    assert files(tmp_path / "made" / "here") == first
    # The same task among others is the same adapter.
    alone = write_csv(tmp_path / "alone.csv", rows[-len(ROWS) :], ("text", "label", "customer"))
    generate(alone, pipeline, tmp_path / "alone", *options)
    one, other = (GeneratedAdapter.from_pretrained(tmp_path / place / "a b") for place in ("made/here", "alone"))
    torch.testing.assert_close(one.tensors, other.tensors, rtol=1e-4, atol=1e-4)


def test_two_processes_make_what_one_makes(pipeline: Path, tmp_path: Path) -> None:
    rows = [(text, label, f"task {number}") for number in range(130) for text, label in ROWS[number % 2 :]]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": one, "label": two, "task": three}) + "\n" for one, two, three in rows))
    given = ["generate", file, "--pipeline", pipeline, "--task_column", "task", "--num_candidates", "1"]
    call(*LAUNCH, "--num_processes", 2, "-m", "mcdi_hf", *given, "--output_dir", tmp_path / "two")
    call("-m", "mcdi_hf", *given, "--output_dir", tmp_path / "one")
    assert len(files(tmp_path / "one")) == 130 and files(tmp_path / "one") == files(tmp_path / "two")


def test_adapters_are_pushed(pipeline: Path, hub: FakeHub, tmp_path: Path) -> None:
    rows = [(text, label, task) for task in ("one", "two") for text, label in ROWS]
    file = write_csv(tmp_path / "rows.tsv", [("\t".join(row),) for row in rows], ("text\tlabel\ttask",))
    generate(file, pipeline, tmp_path / "made", "--task_column", "task", "--push_to_hub", "tester/tickets")
    with pytest.raises(SystemExit, match="no repository of their own"):
        alike = write_csv(
            tmp_path / "alike.csv",
            [(*row, task) for task in ("a b", "a-b") for row in ROWS],
            ("text", "label", "task"),
        )
        generate(alike, pipeline, tmp_path / "alike", "--task_column", "task", "--push_to_hub", "tester/tickets")
    for task in ("one", "two"):
        pushed = GeneratedAdapter.from_pretrained(f"tester/tickets-{task}")
        kept = GeneratedAdapter.from_pretrained(tmp_path / "made" / task)
        torch.testing.assert_close(pushed.tensors, kept.tensors, rtol=0, atol=0)


def test_a_folder_of_images(tmp_path: Path) -> None:
    pipe, _ = tiny_image_pipeline()
    pipe.save_pretrained(tmp_path / "generator")
    table = tiny_image_dataset()
    for number, (image, label) in enumerate(zip(table["image"], table["character"])):
        (tmp_path / "images" / f"class {label}").mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "images" / f"class {label}" / f"{number}.png")
    generate(tmp_path / "images", tmp_path / "generator", tmp_path / "made")
    assert GeneratedAdapter.from_pretrained(tmp_path / "made").labels == [f"class {label}" for label in range(4)]


def test_a_generator_is_evaluated_on_a_file(pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = write_csv(
        tmp_path / "rows.csv", [(f"{text} {letter}", label) for letter in "abcdefgh" for text, label in ROWS]
    )
    given = [
        "evaluate",
        "--pipeline",
        str(pipeline),
        "--dataset_name",
        str(file),
        "--num_episodes",
        "3",
        "--queries",
        "2",
    ]
    main([*given, "--shots", "1", "4", "--num_candidates", "1"])
    printed = capsys.readouterr().out
    rows = re.findall(r"^  (.+?) +(\d+\.\d ± \d+\.\d)", printed, re.MULTILINE)
    names = ["frozen backbone", "logistic regression", "gradient LoRA", "shared adapter", "generated"]
    assert [name for name, _ in rows] == names * 2 and "1 shots" in printed and "4 shots" in printed
    main([*given, "--num_candidates", "1"])
    assert (
        capsys.readouterr().out == printed
    )  # the same episodes and noise; 16 rows of a class leave none for 16 shots
    few = write_csv(tmp_path / "few.csv", ROWS)  # two rows of a class leave one to be judged on
    main(
        [
            "evaluate",
            "--pipeline",
            str(pipeline),
            "--dataset_name",
            str(few),
            "--num_episodes",
            "2",
            "--num_candidates",
            "1",
        ]
    )
    printed = capsys.readouterr().out
    assert "1 shots" in printed and "4 shots" not in printed


def test_wrong_files_are_one_line(pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def refused(content: str | bytes, name: str = "rows.csv", *options: str) -> str:
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return failing(capsys, "generate", file, "--pipeline", pipeline, "--output_dir", tmp_path / "made", *options)

    assert "is empty" in refused("")
    assert "another number of cells than the 2" in refused("text,label\na,b,c\n")
    assert "cannot be read" in refused("text,label\n\xff\xfe".encode("latin-1"))
    assert "field larger than field limit" in refused("text,label\n" + "a" * 200_000 + ",p\n")
    assert "Which column holds the labels?" in refused("text,sort\na,p\n")
    assert "Which column holds the examples?" in refused("one,two,label\na,b,p\n")
    assert "no column 'x'" in refused("text,label\na,p\n", "rows.csv", "--label_column", "x")
    assert "no column 'x'" in refused("text,label\na,p\n", "rows.csv", "--input_column", "x")
    assert "no column 'x'" in refused("text,label\na,p\nb,q\n", "rows.csv", "--task_column", "x")
    assert "2 rows have no example or no label, such as the rows [1, 3]" in refused("text,label\n,p\nb,q\nc, \n")
    assert "has one class" in refused("text,label\na,p\nb,p\n")
    assert "cannot be read" in refused('{"text": "a"\n', "rows.jsonl")
    assert "expected .csv" in refused("a", "rows.xlsx")
    assert "There is no file" in failing(capsys, "predict", pipeline, tmp_path / "no.csv")
    assert "generation.json is missing" in failing(
        capsys, "predict", pipeline, tmp_path / "rows.csv", "--split", "train"
    )
    assert not (tmp_path / "made").exists()


def test_another_file_in_the_same_folder_is_refused(pipeline: Path, tmp_path: Path, capsys) -> None:
    generate(write_csv(tmp_path / "one.csv", ROWS), pipeline, tmp_path / "made")
    other = write_csv(tmp_path / "two.csv", ROWS[:-1])
    said = failing(capsys, "generate", other, "--pipeline", pipeline, "--output_dir", tmp_path / "made")
    assert "was made otherwise (file: " in said and said.endswith("choose another output_dir.")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "made_with.json").write_text("{}")  # of a run that was refused before it made anything
    generate(other, pipeline, tmp_path / "begun")


def test_texts_that_look_like_something_else_stay_texts(pipeline: Path, tmp_path: Path) -> None:
    rows = [("007", "1"), ("null", "1"), ("=1+1", "NA"), ("nan", "NA")]
    generate(write_csv(tmp_path / "rows.csv", rows), pipeline, tmp_path / "made")
    assert GeneratedAdapter.from_pretrained(tmp_path / "made").labels == ["1", "NA"]


def test_the_command_is_there(tmp_path: Path) -> None:
    said = call(Path(sys.executable).parent / "mcdi-hf", "--help")
    assert all(name in said for name in ("generate", "predict", "evaluate", "collect", "train"))
