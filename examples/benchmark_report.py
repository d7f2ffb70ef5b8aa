"""The benchmark's results as Markdown: a page a family, and one for all.

    python examples/benchmark_report.py docs/results/*.json --output docs/results.md

Beside every JSON file it writes the family's page, with all that was measured; the output begins with what all families
together say. Every number is computed from the accuracies of single episodes in the JSON files.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmark_checks import check_results
from benchmark_tables import (
    GROUPS,
    accuracy_table,
    best_rival,
    choices_section,
    deviation_section,
    difference,
    difference_table,
    episodes_text,
    group_row,
    kind_text,
    memorisation_section,
    percent,
    points,
    rival_table,
    verdict,
    way_text,
)
from benchmark_texts import ABOUT, FAMILIES, READING, SEALING
from benchmark_ways import MC_DI, WAYS
from data import write_whole
from markdown_tables import duration, markdown_table

from mcdi_hf.evaluation.statistics import bootstrap_interval


PICTURES = {
    "time": "Accuracy against the time to an adapter",
    "shots": "Accuracy against shots",
    "steps": "Accuracy against steps, on validation tasks",
    "chain": "One chain of generation over the losses of a task",
}
BEST = "the best rival of each kind"


def family_title(family: str) -> str:
    return family.replace("_", "-").capitalize()


def picture_names(results: dict, folder: Path) -> list[str]:
    """The names of a family's pictures that are in a folder."""
    names = [f"{results['family']}_{picture}.png" for picture in PICTURES]
    return [name for name in names if (folder / name).is_file()]


def picture_links(names: Sequence[str], prefix: str = "") -> list[str]:
    return [f"![{PICTURES[Path(name).stem.rpartition('_')[2]]}]({prefix}{name})" for name in names]


def command_text(results: dict) -> str:
    return f"Made by `{results['command']}`."


def accuracy_part(results: dict, table: dict) -> list[str]:
    """A table's accuracies with what it takes to read and to repeat them."""
    note = [table["note"]] if table["note"] else []
    time = f"Times are of a {kind_text(table['time_kind'])} task."
    return [*note, accuracy_table(table), f"{episodes_text(table)} {time} {command_text(results)}"]


def table_part(results: dict, table: dict) -> list[str]:
    """All about one table."""
    made = command_text(results)
    return [
        f"## {table['title']}",
        *accuracy_part(results, table),
        f"{MC_DI} minus each way, points, on the episodes that both have:",
        difference_table(table),
        made,
        f"Each generated way minus the best rival of a kind, points. The best is the one that is highest beside {MC_DI} on the "
        f"episodes that both have: it is picked on the test episodes themselves, which flatters it.",
        rival_table(table),
        made,
        deviation_section(table),
        made,
        choices_section(table),
        f"How far weights are apart (Frobenius norm of the difference of all updates `B A`), and how much of their errors "
        f"{MC_DI} and the nearest training adapter share (1: all):",
        memorisation_section(table),
        made,
    ]


def budget_part(families: list[dict]) -> list[str]:
    """How the time of some families was spent, of all of them together if there are several."""
    spent = {family_title(results["family"]): results["seconds"] for results in families}
    if len(families) > 1:
        spent["all"] = dict(sum(map(Counter, spent.values()), Counter()))
    whole = {title: sum(seconds.values()) for title, seconds in spent.items()}
    rows = []
    for stage in families[0]["seconds"]:
        own = {title: seconds[stage] for title, seconds in spent.items()}
        share = 100 * list(own.values())[-1] / list(whole.values())[-1]
        rows.append([stage, *map(duration, own.values()), f"{share:.0f} %"])
    table = markdown_table(["stage", *spent, "share"], [*rows, ["all", *map(duration, whole.values()), ""]])
    return ["## Where the time went", "Sums over processes of one thread; several at once share the cores.", table]


def machine_text(results: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return f"{results['machine']}; {versions}. Seal `{results['seal']}`."


def not_measured(names: list[str]) -> list[str]:
    """What is planned and nobody has measured yet."""
    return [f"**Not measured yet:** {'; '.join(names)}."] if names else []


def family_page(results: dict, pictures: Sequence[str] = ()) -> str:
    """The page of one family, `docs/results/FAMILY.md`.

    Args:
        results (`dict`): What `benchmark.py` writes as `docs/results/FAMILY.json`.
        pictures (`Sequence[str]`, *optional*): Names of picture files that lie beside the page.

    Returns:
        `str`: Markdown.
    """
    check_results(results)
    parts = [
        f"# {family_title(results['family'])}",
        "[How to read this](../results.md), and what all families together say.",
        f"```bash\n{results['command']}\n```",
        machine_text(results),
        *not_measured(results["missing"]),
        *picture_links(pictures),
    ]
    for table in results["tables"]:
        parts += table_part(results, table)
    return "\n\n".join([*parts, *budget_part([results]), command_text(results)]) + "\n"


def tally(families: list[dict], other: str) -> list[Counter]:
    """For each family, how often Mc-Di is above, tied with and below another way, or the best rival."""
    counted = []
    for results in families:
        found = [
            difference(table, MC_DI, best_rival(table, kind) if other == BEST else other, kind)
            for table in results["tables"]
            for kind in table["kinds"]
        ]
        counted.append(Counter(verdict(one) for one in found if one is not None))
    return counted


def tally_table(families: list[dict]) -> str:
    """Wins, ties and losses of Mc-Di against every way, over all tables and kinds."""

    def row(name: str, other: str) -> list[str]:
        counted = tally(families, other)
        every = [*counted, sum(counted, Counter())] if len(families) > 1 else counted
        return [name, *(" / ".join(str(one[key]) for key in ("above", "tie", "below")) for one in every)]

    header = [f"{MC_DI} against", *(family_title(results["family"]) for results in families)]
    header += ["all"] if len(families) > 1 else []
    rows = [row(BEST, BEST)]
    for group, ways in GROUPS.items():
        rows += [group_row(group, len(header)), *(row(way, way) for way in ways if way != MC_DI)]
    return markdown_table(header, rows)


def summary_part(families: list[dict]) -> list[str]:
    """Mc-Di beside the best rival of every table and kind, and how often it is above."""
    rows = []
    for results in families:
        for table in results["tables"]:
            for kind in table["kinds"]:
                rival = best_rival(table, kind)
                found = difference(table, MC_DI, rival, kind)
                mean = percent(bootstrap_interval(table["accuracy"][MC_DI][kind]))
                rows.append([table["name"], kind_text(kind), mean, rival, points(found), str(found.count)])
    every = sum(tally(families, BEST), Counter())
    return [
        "## Summary",
        f"Against the best rival, {MC_DI} is above in {every['above']}, tied in {every['tie']} and below in "
        f"{every['below']} of {every.total()} kinds of task.",
        markdown_table(["table", "kind", f"{MC_DI}, %", "best rival", f"{MC_DI} minus it", "episodes"], rows),
        "`episodes` are those that both have. How often the difference is above zero / a tie / below zero, over all "
        "tables and kinds:",
        tally_table(families),
    ]


def results_page(families: list[dict], pictures: dict[str, list[str]]) -> str:
    """The page of all families, `docs/results.md`.

    Args:
        families (`list[dict]`): What `benchmark.py` writes, a family each.
        pictures (`dict[str, list[str]]`): Family -> names of its pictures in `results/`.

    Returns:
        `str`: Markdown.
    """
    for results in families:
        check_results(results)
    ways = markdown_table(["way", "what it is"], [[way_text(way), ABOUT[way]] for way in WAYS])
    parts = ["# The benchmark", "## How to read it", READING.rstrip(), ways]
    parts += ["## How test tasks are kept apart", SEALING.rstrip()]
    missing = set(FAMILIES) - {results["family"] for results in families}
    parts += summary_part(families)
    parts += not_measured([f"the family {family!r}" for family in sorted(missing)]) + budget_part(families)
    for results in families:
        name = results["family"]
        parts += [f"## {family_title(name)}", machine_text(results), *not_measured(results["missing"])]
        parts += picture_links(pictures[name], "results/")
        parts.append(
            f"All differences, deviations over seeds, choices, memorisation and the time spent: [results/{name}.md]"
            f"(results/{name}.md); every episode: [results/{name}.json](results/{name}.json)."
        )
        for table in results["tables"]:
            parts += [f"### {table['title']} (`{table['name']}`)", *accuracy_part(results, table)]
    return "\n\n".join(parts) + "\n"


def pages(paths: list[Path], output: Path) -> dict[Path, str]:
    """What the script writes: path -> Markdown of the page of all families, then of each."""
    families = {path: json.loads(path.read_text()) for path in paths}
    for path, results in families.items():
        if results.get("family") != path.stem:
            raise ValueError(
                f"{path} holds the family {results.get('family')!r}: expected {path.stem!r}, as its name."
            )
    pictures = {results["family"]: picture_names(results, path.parent) for path, results in families.items()}
    made = {output: results_page(list(families.values()), pictures)}
    return made | {
        path.with_suffix(".md"): family_page(results, pictures[results["family"]])
        for path, results in families.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="what benchmark.py wrote, FAMILY.json")
    parser.add_argument(
        "--output", type=Path, required=True, help="the page of all families, beside the folder results"
    )
    args = parser.parse_args()
    for path, page in pages(args.results, args.output).items():
        write_whole(path, lambda part, page=page: part.write_text(page))


if __name__ == "__main__":
    main()
