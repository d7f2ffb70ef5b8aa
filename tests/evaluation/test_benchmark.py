"""The benchmark's four families at their smoke size, as a user runs them."""

import json
import sys
from pathlib import Path

import pytest
from scripts import EXAMPLES, run_each


sys.path.insert(0, str(EXAMPLES))

from benchmark_ways import WAYS  # noqa: E402


# Of every family what is unlike the others: texts and images, turned images, folds, a language model.
TABLES = {
    "few_shot": ["omniglot_attributes"],
    "transfer": ["texts"],
    "domain": ["pacs"],
    "language": ["glue"],
}
CONFIGS = EXAMPLES / "configs" / "benchmark"


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The folder of everything, and how each command ended; `again` goes on behind a run that was cut."""
    root = tmp_path_factory.mktemp("smoke")
    command = [EXAMPLES / "benchmark.py", "--smoke", "--data_root", root, "--family"]
    return root, run_each(
        {family: [*command, family, "--tables", *tables] for family, tables in TABLES.items()}
        | {"again": [*command, "language"], "unknown": [*command, "domain", "--tables", "nothing"]}
    )


@pytest.mark.parametrize("family", TABLES)
def test_every_way_is_measured_on_every_table(ended: tuple[Path, dict], family: str) -> None:
    root, found = ended
    code, printed, said = found[family]
    assert code == 0, said
    results = json.loads((root / "results" / f"{family}.json").read_text())
    config = json.loads((CONFIGS / f"{family}.json").read_text())
    assert [table["name"] for table in results["tables"]] == TABLES[family]
    assert len(results["missing"]) == len(config["tables"]) - len(TABLES[family])
    for table in results["tables"]:
        images = any("image" in source.get("input_columns", ()) for source in _table(config, table["name"])["sources"])
        missing = {"SetFit"} if images or family == "language" else set()
        assert set(WAYS) - set(table["accuracy"]) == missing
        for way, kinds in table["accuracy"].items():
            assert list(kinds) == table["kinds"]
            values = [one for groups in kinds.values() for own in groups.values() for one in own]
            assert values and all(0 <= one <= 1 for one in values), way
        assert set(table["seconds"]) == set(table["accuracy"]) and min(table["seconds"].values()) > 0
        assert len(table["memorisation"]["generated to nearest training adapter"]) >= 3
        assert table["title"] in printed and table["time_kind"] in table["kinds"]
    for name in ("time", "steps", "shots", "chain"):
        picture = root / "results" / f"{family}_{name}.png"
        assert picture.exists() == (name != "shots"), picture  # the smoke size has one number of shots


def test_what_was_measured_is_not_measured_again(ended: tuple[Path, dict]) -> None:
    root, found = ended
    code, printed, said = found["again"]
    assert code == 0, said
    assert len(printed) > 1000 and found["language"][1].endswith(printed)  # the same page, and nothing else
    lines = (root / "runs" / "benchmark" / "language" / "glue" / "lines.jsonl").read_text().splitlines()
    assert len(lines) == 1


def test_a_table_that_there_is_not_is_refused(ended: tuple[Path, dict]) -> None:
    code, _, said = ended[1]["unknown"]
    assert code != 0 and "There are no tables ['nothing']: expected some of ['pacs', 'reviews']" in said


def _table(config: dict, name: str) -> dict:
    return next(table for table in config["tables"] if table["name"] == name)
