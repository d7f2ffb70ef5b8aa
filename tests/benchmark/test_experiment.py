"""Experiments: the smoke run, how a run goes on, configs, generators."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import report
import run
from datasets import ClassLabel, Dataset, Features, Value
from fold import Fold
from generators import OBJECTIVES, ROOT, fingerprint, generators_of
from memorisation import BETWEEN, NEW, memorisation_text
from methods import GROUPS, METHODS
from methods.base import SlowMethod
from report import accuracy_table, check_results
from run import Experiment, read_config
from smoke import DOMAINS
from splits import VALIDATION_SEED, Split, sources_below
from tiny import tiny_language_pipeline


CONFIGS = sorted((ROOT / "examples" / "benchmark" / "configs").glob("*.json"))


def test_every_method_is_measured_on_every_kind(smoke: argparse.Namespace) -> None:
    results = smoke.results
    check_results(results)
    known = [name for name in METHODS if "mean-pooled" not in name]  # the smoke run's backbone is so itself
    assert list(results["accuracy"]) == known and set(results["seconds"]) == {
        name for name in known if METHODS[name].group != "controls"
    }
    assert {method.group for method in METHODS.values()} == set(GROUPS)
    for name, kinds in results["accuracy"].items():
        assert list(kinds) == results["kinds"], name
        sizes = {len(own) for groups in kinds.values() for own in groups.values()}
        assert sizes == {1 if name == "SetFit" else 2 if isinstance(METHODS[name], SlowMethod) else 3}, name
    counts = {
        name: {group: len(own) for group, own in results["memorisation"][name].items()} for name in (NEW, BETWEEN)
    }
    assert counts == {NEW: {"all-0": 2 * 3}, BETWEEN: {"all": 4}}
    assert all(len(one["tried"]) <= 4 for one in json_of(smoke, "choices.json")["choices"].values() if "tried" in one)
    assert results["choices"]["gradient LoRA, 1-shot, all"]["tried"] == 2
    assert set(results["spent"]) == {"trajectories", "meta-training", "choices on validation", "test"}
    assert set(results["chain"]) == {"Mc-Di", "Mv-Di", "Tw-Di", "single level (OCD)"}
    assert "| **Mc-Di** |" in accuracy_table(results) and memorisation_text(results)


def json_of(smoke: argparse.Namespace, name: str) -> dict:
    return json.loads((smoke.runs_root / "experiments" / "smoke" / name).read_text())


def test_a_run_goes_on_where_it_stopped(smoke: argparse.Namespace) -> None:
    """What is missing is measured again, with the same numbers; what is there is not."""
    folder = smoke.runs_root / "experiments" / "smoke" / "test"
    missing, kept = sorted(folder.iterdir())
    before = json.loads(missing.read_text())
    missing.unlink()
    written = {path: path.stat().st_mtime_ns for path in smoke.runs_root.rglob("*.safetensors")}
    written[kept] = kept.stat().st_mtime_ns
    again = Experiment(smoke.config, smoke).run()
    assert json.loads(missing.read_text()) == before
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert {name: one for name, one in again.items() if name != "spent"} == {
        name: one for name, one in smoke.results.items() if name != "spent"
    }


def test_the_command_makes_results(
    smoke: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = smoke.data_root
    monkeypatch.setattr(sys, "argv", ["run.py", "--smoke", "--data_root", str(folder.parent)])
    run.main()
    results = json.loads((folder / "results" / "smoke.json").read_text())
    assert results["accuracy"] == smoke.results["accuracy"] and "smoke.json" in capsys.readouterr().out


def test_the_report_writes_page_pictures_and_figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a copy of what it writes to, all is as it is here."""
    names = ["README.md", *(f"model_cards/{name}/results.json" for name in ("mcdi-minilm-text", "mcdi-omniglot-vit"))]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    monkeypatch.setattr(sys, "argv", ["report.py", "--root", str(tmp_path)])
    report.main()
    for name in [*names, "docs/benchmark.md"]:
        assert (tmp_path / name).read_text() == (ROOT / name).read_text()
    for path in (tmp_path / "docs" / "images").iterdir():
        assert path.stat().st_size > 10_000 and (ROOT / "docs" / "images" / path.name).exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config", "any.json"], "--config needs --data_root"),
        ([], "one of the arguments --config --smoke is required"),
        (["--smoke", "--config", "any.json"], "not allowed with argument"),
        (["--smoke", "--runs_root", "kept"], "--smoke keeps all it makes below --data_root: take away ['runs_root']"),
    ],
)
def test_a_command_that_would_ignore_an_argument_is_refused(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    with pytest.raises(SystemExit):
        run.main()
    assert said in capsys.readouterr().err


def test_every_fold_chooses_on_its_own_validation_tasks(smoke: argparse.Namespace, tmp_path: Path) -> None:
    """The test domain of one fold may be the validation domain of another, whose choices are not the first's."""
    experiment, logistic = Experiment(smoke.config, smoke), "frozen + logistic regression"
    experiment.folder, experiment.config = (
        tmp_path,
        experiment.config | {"kinds": ["2x1"], "validation_kinds": ["2x1"]},
    )
    experiment.methods = {name: METHODS[name] for name in (logistic, "Mc-Di")}
    (first,) = experiment.generators
    other = replace(first, fold="other", validation_domains=first.test_domains, test_domains=first.validation_domains)
    experiment.generators.append(other)
    assert list(experiment.run()["accuracy"][logistic]["2x1"]) == ["all-0", "other-0"]
    tried = json.loads((tmp_path / "choices.json").read_text())["choices"][f"{logistic}, 1-shot, other"]["tried"]
    fold = Fold(other, experiment.config, experiment.sizes, smoke)
    split = fold.split("validation")
    tasks = split.tasks("2x1", VALIDATION_SEED, experiment.sizes.validation_episodes)
    assert set(split.table["domain"]) == {DOMAINS.index("white")}
    for one in tried:
        own = METHODS[logistic].accuracies(split, fold, tasks, 0, one["setting"])
        assert one["accuracy"] == pytest.approx(sum(own) / len(own))


def test_figures_of_a_release_are_no_part_of_its_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "codec").mkdir()
    for name in ("model_index.json", "codec/config.json", "results.json"):
        (tmp_path / name).write_text("{}")
    before = fingerprint(tmp_path)
    for name, same in {"results.json": True, "README.md": True, "codec/config.json": False}.items():
        (tmp_path / name).write_text('{"value": 1}')
        assert (fingerprint(tmp_path) == before) == same, name


def test_trajectories_that_there_are_not_are_named(tmp_path: Path) -> None:
    path = CONFIGS[0].with_name("text.json")
    args = argparse.Namespace(runs_root=tmp_path, backbones_root=tmp_path)
    with pytest.raises(ValueError, match="no folder .*text/trajectories: collect the trajectories"):
        generators_of(read_config(path), path.parent, args)


def test_other_sizes_and_another_recipe_are_refused(smoke: argparse.Namespace) -> None:
    config, recipe = smoke.config.read_text(), (smoke.data_root / "recipe.json").read_text()
    try:
        smoke.config.write_text(config.replace('"episodes": 3', '"episodes": 4', 1))
        with pytest.raises(ValueError, match="sizes.episodes is 3 there, 4 here"):
            Experiment(smoke.config, smoke).run()
        (smoke.data_root / "recipe.json").write_text(recipe.replace('"dim": 32', '"dim": 64'))
        with pytest.raises(ValueError, match="training.dim is 32 there, 64 here"):
            Experiment(smoke.config, smoke).run()
    finally:
        smoke.config.write_text(config)
        (smoke.data_root / "recipe.json").write_text(recipe)


def test_domains_that_were_trained_on_are_no_test(smoke: argparse.Namespace) -> None:
    experiment = Experiment(smoke.config, smoke)
    config = experiment.config | {"test_domains": ["white", "red"]}
    fold = Fold(experiment.generators[0], config, experiment.sizes, smoke)
    with pytest.raises(ValueError, match=r"were trained on \['red'\]: judge on others"):
        fold.split("test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kinds": ["2x1", "2x3"]}, r"has kinds of \[3\] shots, but no validation_kinds of as many"),
        ({"methods": ["Mc-Di", "guessing"]}, r"has the methods \['guessing'\]: expected some of"),
        ({"pipeline": "model_cards/mcdi-minilm-text"}, "either a generator to train or a released pipeline"),
        ({"sizs": {}}, r"has \['sizs'\]: expected some of"),
        ({"sizes": {"episode": 3}}, r"has the sizes \['episode'\]: expected some of \['episodes'"),
        ({"split": None}, r"has no \['split'\]"),
    ],
)
def test_a_config_that_could_not_come_to_its_end_is_refused(
    smoke: argparse.Namespace, tmp_path: Path, change: dict, message: str
) -> None:
    config = {name: one for name, one in (json.loads(smoke.config.read_text()) | change).items() if one is not None}
    (tmp_path / "wrong.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path / "wrong.json")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_one(path: Path, tmp_path: Path) -> None:
    """Its generators are there, released or with a recipe; its domains are apart."""
    config = read_config(path)
    (tmp_path / config.get("trajectories", "none")).mkdir(parents=True)
    found = generators_of(config, path.parent, argparse.Namespace(runs_root=tmp_path, backbones_root=tmp_path))
    for generator in found:
        train = generator.recipe.get("trajectories", {}).get("train_domains", [])
        assert not set(train) & {*generator.validation_domains, *generator.test_domains}
        assert generator.seeds and (generator.recipe or ("Mc-Di", 0) in generator.pipelines)
        assert {objective for objective, _ in generator.pipelines} <= set(OBJECTIVES)
        assert config.get("test_domains", generator.test_domains)


def test_a_config_extends_another(tmp_path: Path) -> None:
    """It has what the other has, but for what it says itself, and not what it says is null."""
    base = json.loads(CONFIGS[0].with_name("text.json").read_text())
    (tmp_path / "base.json").write_text(json.dumps(base))
    (tmp_path / "own.json").write_text(json.dumps({"extends": "base.json", "title": "Mine", "training": None}))
    expected = base | {"title": "Mine"}
    del expected["training"]
    assert read_config(tmp_path / "own.json") == expected


def test_beside_a_released_pipeline_what_is_asked_for_is_trained(tmp_path: Path) -> None:
    path = CONFIGS[0].with_name("text.json")
    config = read_config(path)
    (tmp_path / config["trajectories"]).mkdir(parents=True)
    args = argparse.Namespace(runs_root=tmp_path, backbones_root=tmp_path)
    (found,) = generators_of(config | {"methods": ["Mc-Di", "Tw-Di"]}, path.parent, args)
    released = ROOT / config["pipeline"]
    assert found.pipelines == {
        ("Mc-Di", 0): released,
        ("Tw-Di", 0): found.folder / "Tw-Di-0" / "pipeline",
        ("Mc-Di", 1): found.folder / "Mc-Di-1" / "pipeline",
    }
    assert found.recipe == {"training": json.loads((ROOT / config["training"]).read_text())}
    del config["training"]
    (found,) = generators_of(config, path.parent, args)
    assert set(found.pipelines.values()) == {released} and not found.recipe


def test_a_backbone_that_there_is_not_is_named(smoke: argparse.Namespace, tmp_path: Path) -> None:
    args = argparse.Namespace(**vars(smoke) | {"backbones_root": tmp_path})
    with pytest.raises(ValueError, match="has no folder 'backbone': say with --backbones_root"):
        Experiment(smoke.config, args)


def test_a_released_pipeline_is_measured_without_what_needs_its_training_tasks(
    smoke: argparse.Namespace, tmp_path: Path
) -> None:
    pipeline = next(iter(Experiment(smoke.config, smoke).generators[0].pipelines.values()))
    config = json.loads(smoke.config.read_text()) | {
        "pipeline": str(pipeline),
        "backbone": "backbone",
        "seeds": [0, 1],
    }
    config |= {"validation_domains": ["blue"], "test_domains": ["white"], "kinds": ["2x1"]}
    config["methods"] = [name for name in METHODS if name != "SetFit"]
    del config["generator"]
    (tmp_path / "released.json").write_text(json.dumps(config))
    args = argparse.Namespace(**vars(smoke) | {"runs_root": tmp_path / "runs"})
    results = Experiment(tmp_path / "released.json", args).run()
    assert list(results["accuracy"]["Mc-Di"]["2x1"]) == ["all-0", "all-1"]
    ablations = {"Mv-Di", "Tw-Di", "single level (OCD)", "SetFit", "frozen, mean-pooled + logistic regression"}
    training = {name for name, method in METHODS.items() if method.needs_training}
    assert set(METHODS) - set(results["accuracy"]) == training | ablations and results["memorisation"] == {}


def test_a_language_model_is_judged_by_its_verbalizers(smoke: argparse.Namespace, tmp_path: Path) -> None:
    """The methods that a language model shares with others, on single letters as words."""
    (tmp_path / "letters" / "data").mkdir(parents=True)
    features = Features({"text": Value("string"), "label": ClassLabel(names=["p", "q", "r"])})
    rows = {"text": [f"{a} {b}" for a in "abc" for b in "uvwxyz"], "label": [i for i in range(3) for _ in range(6)]}
    path = tmp_path / "letters" / "data" / "train-00000-of-00001.parquet"
    Dataset.from_dict(rows, features=features).to_parquet(path)
    pipe, backbone = tiny_language_pipeline()
    sources = sources_below(tmp_path, [{"dataset_name": "letters"}])
    split = Split("test", pipe.stacked, pipe.codec, 1, sources, ["all"], ["train"])
    tasks, shared = split.tasks("3x2", 0, 3), pipe.codec.shared_adapter()
    found = split.free(split.features("shared adapter", shared), tasks, pipe.codec.head)
    repeated = {key: value.repeat(3, 1, 1) for key, value in shared.items()}
    assert found == pytest.approx(split.headed(repeated, tasks))
    assert found == pytest.approx(split.whole(repeated, tasks))
    words = [backbone.processor.convert_tokens_to_ids(list(task.classes)) for task in tasks]
    adapters = pipe(
        [{n: split.inputs(list(r)) for n, r in zip(one.classes, one.support)} for one in tasks], strength=0.0
    )
    for task, word, adapter, accuracy in zip(tasks, words, adapters.adapters, found):
        model, right = adapter.load_into(backbone.classifier(num_labels=3)), []
        for label, own in enumerate(task.query):
            for text in split.inputs(list(own)):
                right.append(int(model(**backbone.inputs([text])).logits[0, -1, word].argmax()) == label)
        assert accuracy == pytest.approx(sum(right) / len(right))
