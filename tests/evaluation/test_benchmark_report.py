"""The benchmark's report on a small invented family, and what lies in docs/results."""

import json
import sys
from pathlib import Path

import pytest
from scripts import EXAMPLES


sys.path.insert(0, str(EXAMPLES))

import benchmark_report  # noqa: E402
from benchmark_report import BEST, family_page, pages, results_page, tally, tally_table  # noqa: E402
from benchmark_tables import (  # noqa: E402
    BETWEEN,
    GROUPS,
    NEW,
    NOISED_COPY,
    OVERLAP,
    accuracy_table,
    best_rival,
    choices_section,
    deviation_section,
    difference_table,
    episodes_text,
    memorisation_section,
    rival_table,
)
from benchmark_texts import ABOUT  # noqa: E402
from benchmark_ways import (  # noqa: E402
    CEILING,
    CONTROLS,
    FROZEN,
    GENERATED,
    GRADIENT,
    LOGISTIC,
    MC_DI,
    MV_DI,
    ONE_DRAW,
    RIVALS,
    SETFIT,
    SHARED,
    TW_DI,
    WAYS,
)


DOCS = EXAMPLES.parent / "docs"
KINDS = ["5x1", "style:2x5"]


def invented() -> dict:
    """Two kinds, two seeds of four episodes. Mc-Di: 0.9, 0.9, 0.7, 0.7. Others are 0.1 below it, but for those named.

    Gradient LoRA saw the first two episodes, which are easy; SetFit the first, of one kind.
    """
    own = [0.9, 0.9, 0.7, 0.7]
    values = {way: [round(one - 0.1, 4) for one in own] for way in WAYS}
    values |= {
        MC_DI: own,
        ONE_DRAW: own,
        LOGISTIC: [0.85, 0.85, 0.65, 0.65],
        GRADIENT: [0.82, 0.82],  # above the mean of logistic regression, and below it on the same episodes
        CEILING: [1.0, 1.0, 0.8, 0.8],
        TW_DI: [0.9, 0.8, 0.7, 0.6],
    }
    accuracy = {way: {kind: {"all-0": list(one), "all-1": list(one)} for kind in KINDS} for way, one in values.items()}
    accuracy[SETFIT] = {"5x1": {"all-0": [0.9]}}
    accuracy[MV_DI] = {kind: {"all-0": groups["all-0"]} for kind, groups in accuracy[MV_DI].items()}
    accuracy[SHARED]["5x1"]["all-1"] = [0.7, 0.7, 0.5, 0.5]
    table = {
        "name": "drawings",
        "title": "Drawings of a few",
        "backbone": "tiny",
        "note": "A note.",
        "kinds": KINDS,
        "accuracy": accuracy,
        "seconds": {MC_DI: 0.05, GRADIENT: 12.0},
        "time_kind": "5x1",
        "choices": {f"{GRADIENT}, 1-shot": "10 steps, learning rate 0.001", FROZEN: "mean"},
        "memorisation": {
            NEW: [0.5, 0.6, 0.7],
            BETWEEN: [1.0, 1.1, 1.2],
            NOISED_COPY: [0.1, 0.12, 0.11],
            OVERLAP: [0.2, None, 0.4],
        },
    }
    return {
        "family": "few_shot",
        "command": "python examples/benchmark.py --family few_shot --data_root DATA",
        "machine": "2 CPU cores",
        "versions": {"torch": "2.13.0"},
        "seal": "0123456789abcdef",
        "missing": ["Drawings of many"],
        "seconds": {"trajectories": 900.0, "test": 2700.0},
        "tables": [table],
    }


@pytest.fixture
def table() -> dict:
    return invented()["tables"][0]


def read(text: str) -> tuple[list[str], dict[str, list[str]]]:
    """Header and rows of the first Markdown table in a text."""
    lines = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line] for line in lines]
    return header, {cells[0]: cells[1:] for cells in rows}


def test_every_way_has_a_row_under_its_group_and_every_kind_a_column(table: dict) -> None:
    header, rows = read(accuracy_table(table))
    assert header == ["accuracy, %", "5x1", "style 2x5", "time"]
    expected = [name for group, ways in GROUPS.items() for name in (f"*{group}*", *ways)]
    assert [name.replace("**", "") for name in rows] == expected
    assert sorted(way for ways in GROUPS.values() for way in ways) == sorted(WAYS) == sorted(ABOUT)
    assert rows[SETFIT] == ["90.0 ±? (1)", "-", "-"]  # one episode; not run; not timed
    assert rows[GRADIENT] == ["82.0 ±0.0 (4)", "82.0 ±0.0 (4)", "12.00 s"]
    assert rows["**Mc-Di**"][0].startswith("80.0 ±") and rows["**Mc-Di**"][2] == "50.0 ms"
    assert "(" not in rows["**Mc-Di**"][0] + rows[FROZEN][0]


def test_differences_are_of_the_episodes_that_both_have(table: dict) -> None:
    header, rows = read(difference_table(table))
    assert header[1:] == ["5x1", "style 2x5"] and "**Mc-Di**" not in rows
    assert rows[FROZEN] == ["+10.0 ±0.0"] * 2 and rows[CEILING] == ["-10.0 ±0.0"] * 2
    assert rows[GRADIENT] == ["+8.0 ±0.0"] * 2  # 0.9 - 0.82, though the means are 0.80 and 0.82
    assert rows[SETFIT] == ["tie +0.0 ±?", "-"] and rows[ONE_DRAW] == ["tie +0.0 ±0.0"] * 2
    assert rows[SHARED] == ["+15.0 ±0.0", "+10.0 ±0.0"]


def test_the_best_rival_is_compared_on_its_own_episodes(table: dict) -> None:
    """Gradient LoRA has the higher mean, of two easy episodes, but logistic regression is better on those."""
    assert best_rival(table, "style:2x5") == LOGISTIC
    assert best_rival(table, "5x1") == SETFIT
    table["accuracy"][GRADIENT]["style:2x5"]["all-1"] = [0.95, 0.96]
    assert best_rival(table, "style:2x5") == GRADIENT


def test_generated_ways_are_above_below_or_tied_with_the_best_rival(table: dict) -> None:
    header, rows = read(rival_table(table))
    assert header == ["kind", "best rival", "its accuracy, %", *GENERATED]
    name, mean, *cells = rows["style 2x5"]
    found = dict(zip(GENERATED, cells))
    assert name == LOGISTIC and mean.startswith("75.0 ±")
    assert found[MC_DI] == "above +5.0 ±0.0" and found[MV_DI] == "below -5.0 ±0.0"
    assert found[TW_DI].startswith("tie +0.0 ±") and not found[TW_DI].endswith("±0.0")
    table["accuracy"][MV_DI]["style:2x5"] = {"all-1": [0.1]}
    table["accuracy"][LOGISTIC]["style:2x5"] = {"all-0": [0.9]}
    assert dict(zip(GENERATED, read(rival_table(table))[1]["style 2x5"][2:]))[MV_DI] == "-"


def test_the_deviation_over_seeds_is_that_of_their_means(table: dict) -> None:
    text = deviation_section(table)
    _, rows = read(text)
    assert "over 2 training seeds" in text and "different folds" not in text
    assert rows[SHARED] == [f"{100 * 0.1 / 2**0.5:.1f}", "0.0"] and rows[MC_DI] == ["0.0", "0.0"]
    assert rows[MV_DI] == ["-", "-"]
    for kinds in table["accuracy"].values():
        for kind, groups in kinds.items():
            kinds[kind] = {name.replace("all-1", "other-1"): values for name, values in groups.items()}
    assert "Seeds left out different folds" in deviation_section(table)
    one = {way: {kind: {"all-7": [0.5]} for kind in KINDS} for way in WAYS}
    assert deviation_section(table | {"accuracy": one}) == (
        "There is one training seed (7), so no deviation over seeds."
    )


def test_ways_that_saw_fewer_episodes_are_named(table: dict) -> None:
    assert episodes_text(table) == (
        f"Test episodes of a kind: 8 (trained generators: 2); fewer of the same: 4 for {GRADIENT}, {MV_DI}; 1 for {SETFIT}."
    )
    del table["accuracy"][SETFIT]
    for way in (GRADIENT, MV_DI):
        table["accuracy"][way] = table["accuracy"][MC_DI]
    assert episodes_text(table) == "Test episodes of a kind: 8 (trained generators: 2)."


def test_choices_are_listed(table: dict) -> None:
    text = choices_section(table)
    assert "(2 choices)" in text
    assert read(text)[1] == {f"{GRADIENT}, 1-shot": ["10 steps, learning rate 0.001"], FROZEN: ["mean"]}
    assert choices_section(table | {"choices": {}}) == "There was nothing to choose on validation tasks."


@pytest.mark.parametrize(
    ("new", "sentence"),
    [
        (
            [2.0, 2.1],
            "1.86 times as far from its nearest training adapter as training adapters from each other: farther",
        ),
        ([1.0, 1.2], "the intervals overlap"),
        ([0.5, 0.6], "nearer, but farther than a training adapter with noise"),
        ([0.11, 0.11], "nearer, and as near as a training adapter with noise"),
        ([0.01, 0.01], "nearer, and nearer than a training adapter with noise"),
    ],
)
def test_what_distances_say_about_memorisation(table: dict, new: list[float], sentence: str) -> None:
    table["memorisation"][NEW] = new
    assert sentence in memorisation_section(table)


def test_tasks_without_errors_say_nothing_about_their_overlap(table: dict) -> None:
    text = memorisation_section(table)
    _, rows = read(text)
    assert rows[OVERLAP][0].startswith("0.3 ±") and rows[OVERLAP][1] == "2" and rows[NEW][1] == "3"
    assert "both get 30 % wrong" in text and "Tasks without errors of either: 1." in text
    table["memorisation"][OVERLAP] = [None, None]
    text = memorisation_section(table)
    assert (
        read(text)[1][OVERLAP] == ["-", "0"]
        and "both get" not in text
        and "Tasks without errors of either: 2." in text
    )
    table["memorisation"][OVERLAP] = [0.5]
    assert read(memorisation_section(table))[1][OVERLAP] == ["0.5 ±?", "1"]


def test_a_family_page_has_every_part_with_the_command_under_each_table() -> None:
    results = invented()
    page = family_page(results, ["few_shot_time.png"])
    assert page.startswith("# Few-shot\n") and "![Accuracy against the time to an adapter](few_shot_time.png)" in page
    assert "\n## Drawings of a few\n" in page and "\nA note.\n" in page and "Seal `0123456789abcdef`" in page
    assert "few_shot_shots.png" not in page
    assert page.count(f"Made by `{results['command']}`.") == 6
    time = page[page.index("## Where the time went") :]
    assert read(time)[1] == {"trajectories": ["15 min", "25 %"], "test": ["45 min", "75 %"], "all": ["60 min", ""]}


def test_wins_ties_and_losses_are_counted_over_families() -> None:
    first, second = invented(), invented() | {"family": "domain"}
    second["tables"] = second["tables"] * 2
    families = [first, second]
    assert [dict(one) for one in tally(families, LOGISTIC)] == [{"above": 2}, {"above": 4}]
    assert [dict(one) for one in tally(families, BEST)] == [{"above": 1, "tie": 1}, {"above": 2, "tie": 2}]
    header, rows = read(tally_table(families))
    assert header == ["Mc-Di against", "Few-shot", "Domain", "all"]
    assert rows[CEILING] == ["0 / 0 / 2", "0 / 0 / 4", "0 / 0 / 6"]
    assert rows[SETFIT] == ["0 / 1 / 0", "0 / 2 / 0", "0 / 3 / 0"]
    assert rows[BEST][2] == "3 / 3 / 0" and set(WAYS) - {MC_DI} <= set(rows)
    page = results_page(families, {"few_shot": [], "domain": []})
    header, rows = read(page[page.index("## Where the time went") : page.index("## Few-shot")])
    assert header == ["stage", "Few-shot", "Domain", "all", "share"]
    assert rows == {
        "trajectories": ["15 min", "15 min", "30 min", "25 %"],
        "test": ["45 min", "45 min", "90 min", "75 %"],
        "all": ["60 min", "60 min", "2.0 h", ""],
    }
    assert "Mc-Di is above in 3, tied in 3 and below in 0 of 6 kinds of task." in page
    assert read(tally_table([first]))[0] == ["Mc-Di against", "Few-shot"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: one.pop("seal"), r"The results of 'few_shot' have no \['seal'\]"),
        (lambda one: one.pop("family"), r"The results of 'a family' have no \['family'\]"),
        (lambda one: one["tables"].clear(), "'few_shot' have no tables: expected one at least"),
        (
            lambda one: one["tables"][0].pop("time_kind"),
            r"The table 'drawings' of 'few_shot' has no \['time_kind'\]: expected \('name'",
        ),
        (lambda one: one["tables"][0]["memorisation"].pop(OVERLAP), rf"no values of \['{OVERLAP}'\]"),
        (lambda one: one["tables"][0]["accuracy"].pop(MC_DI), r"lacks the ways \['Mc-Di'\]: every way but SetFit"),
        (lambda one: one["tables"][0]["accuracy"].update(Magic={}), r"has the ways \['Magic'\]: expected some of"),
        (
            lambda one: one["tables"][0]["accuracy"][CONTROLS[0]].pop("5x1"),
            rf"lacks the kinds \['5x1'\] of \"{CONTROLS[0]}\": expected all of \['5x1', 'style:2x5'\]",
        ),
        (
            lambda one: one["tables"][0]["accuracy"][SETFIT].update({"9x9": {}}),
            r"has the kinds \['9x9'\] of 'SetFit': expected some of",
        ),
        (
            lambda one: one["tables"][0]["accuracy"][RIVALS[0]]["5x1"].clear(),
            r"has no groups: expected some of \['all-0', 'all-1'\]",
        ),
        (
            lambda one: one["tables"][0]["accuracy"][FROZEN]["5x1"]["all-0"].append(0.5),
            "5x1: the group 'all-0' has 5 episodes: expected 1 to 4, as Mc-Di has",
        ),
        (
            lambda one: one["tables"][0]["accuracy"][FROZEN]["5x1"].update({"new-0": [0.5]}),
            "the group 'new-0' has 1 episodes: expected 1 to 0",
        ),
        (
            lambda one: one["tables"][0]["accuracy"][FROZEN]["5x1"].update({"all-0": [0.5, float("nan"), 80]}),
            r"the group 'all-0' has the accuracies \[nan, 80\]: expected shares in 0..1",
        ),
    ],
)
def test_results_that_are_not_whole_are_refused(change, message: str) -> None:
    results = invented()
    change(results)
    with pytest.raises(ValueError, match=message):
        family_page(results)


def test_the_script_writes_all_pages_and_links_the_pictures_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, output = tmp_path / "results", tmp_path / "results.md"
    folder.mkdir()
    second = invented() | {"family": "domain"}
    for results in (invented(), second):
        (folder / f"{results['family']}.json").write_text(json.dumps(results))
    for name in ("few_shot_steps", "domain_time", "other_time"):
        (folder / f"{name}.png").write_bytes(b"")
    paths = sorted(folder.glob("*.json"))
    monkeypatch.setattr(sys, "argv", ["benchmark_report.py", *map(str, paths), "--output", str(output)])
    benchmark_report.main()
    text = output.read_text()
    links = [line[line.index("(") + 1 : -1] for line in text.splitlines() if line.startswith("![")]
    assert links == ["results/domain_time.png", "results/few_shot_steps.png"]
    assert "benchmark_seal.py" in text and "### Drawings of a few (`drawings`)" in text
    for name, picture in (("few_shot", "few_shot_steps.png"), ("domain", "domain_time.png")):
        page = (folder / f"{name}.md").read_text()
        assert page == family_page(json.loads((folder / f"{name}.json").read_text()), [picture])
    (folder / "few_shot.json").rename(folder / "language.json")
    with pytest.raises(
        ValueError, match="language.json holds the family 'few_shot': expected 'language', as its name"
    ):
        pages([folder / "language.json"], output)


def test_the_pages_in_docs_are_what_the_script_makes_of_the_results_there() -> None:
    """After new results, or a change of the report: the command at the top of benchmark_report.py."""
    output, paths = DOCS / "results.md", sorted((DOCS / "results").glob("*.json"))
    there = [path for path in (output, *(DOCS / "results").glob("*.md")) if path.exists()]
    made = pages(paths, output) if paths else {}
    assert sorted(there) == sorted(made)
    for path, page in made.items():
        assert path.read_text() == page, f"{path} is not what examples/benchmark_report.py makes of {DOCS / 'results'}"
