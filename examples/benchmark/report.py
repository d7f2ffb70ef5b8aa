"""Tables and pictures of the benchmark's results, in one page.

    python examples/benchmark/report.py

reads every experiment's result in examples/benchmark/results and writes docs/results.md with its picture. Every number
is computed from the accuracies of single episodes, and every interval by [`bootstrap_interval`], in tables and picture
alike.
"""

import argparse
import json
import math
from collections import Counter
from pathlib import Path

from commands import HelpFormatter
from intervals import LEVEL, RESAMPLES, Estimate, Groups, bootstrap_interval, paired_difference, seed_deviation
from memorisation import BETWEEN, NEW, NOISED_COPY, OVERLAP
from methods import GROUPS, MAIN, METHODS
from pictures import time_picture

from mcdi_hf.utils.files import write_file


ROOT = Path(__file__).parents[2]
FAMILIES = {
    "few_shot": "Few-shot",
    "transfer": "Transfer: other data sets than the generators were trained on",
    "domain": "Domains left out",
    "language": "A language model",
    "released": "Released pipelines",
}
OTHER_TASK = "Mc-Di, another task's condition"
ABOUT = ("experiment", "family", "title", "note", "kinds", "command", "machine", "versions", "seal")
NEEDED = (*ABOUT, "accuracy", "seconds", "time_kind", "choices", "memorisation", "spent")
READING = f"""\
A row is a method, a column a kind of task: `5x1` is 5-way 1-shot, and a word before it names what the classes are
about. All methods of a table see the same test tasks; slow ones see the first of them, and ablations those of the
seeds that they were trained for. Behind such a mean stands the number of its episodes: it is of other tasks than the
means without one.

* **Intervals**: `±` is half the width of a {100 * LEVEL:g} % interval over test episodes: percentiles of {RESAMPLES}
  bootstrap draws of the episodes of each trained generator, never across generators. It says what other episodes would
  change. `±?` stands for a single episode. Intervals of few episodes are rough, and rather too narrow.
* **Differences** are paired, in points, on the episodes that both methods have. A `tie` is a difference whose interval
  includes zero; few episodes make ties, and of methods that are alike {100 * (1 - LEVEL):.0f} % are called otherwise
  by chance.
* **The best baseline** of a kind is the one that is highest beside {MAIN.name} on the episodes that both have. It is
  picked on the test episodes themselves, which flatters it: nobody could have picked it beforehand.
* **Times** are from a task's examples to its adapter, one task at a time; what was trained beforehand is not in them.
  A table's times are to be compared with each other only.
* **Settings** of a method, at most four, were chosen on validation tasks. Then all choices were sealed, and only
  behind the seal were the test tasks drawn, each once ([how](../examples/benchmark/README.md)).
"""


def read_results(folder: Path) -> list[dict]:
    """The results of all experiments, checked, in the order of their families and names."""
    found = []
    for path in sorted(folder.glob("*.json")):
        results = json.loads(path.read_text())
        if results.get("experiment") != path.stem:
            raise ValueError(f"{path} holds {results.get('experiment')!r}: expected {path.stem!r}, as its name.")
        check_results(results)
        found.append(results)
    return sorted(found, key=lambda results: list(FAMILIES).index(results["family"]))


def check_results(results: dict) -> None:
    """Refuse results that lack a part, or hold what no report can be made of."""
    name, accuracy = results.get("experiment"), results.get("accuracy", {})
    if missing := [key for key in NEEDED if key not in results]:
        raise ValueError(f"The results of {name!r} have no {missing}: expected {list(NEEDED)}.")
    if results["family"] not in FAMILIES:
        raise ValueError(f"{name!r} is of the family {results['family']!r}: expected one of {list(FAMILIES)}.")
    if unknown := sorted(set(accuracy) - set(METHODS)):
        raise ValueError(f"{name!r} has the methods {unknown}: expected some of {list(METHODS)}.")
    if missing := [kind for kind in results["kinds"] if kind not in accuracy.get(MAIN.name, {})]:
        raise ValueError(f"{name!r} has no accuracy of {MAIN.name} for {missing}: expected all of its kinds.")
    for method, kinds in accuracy.items():
        for kind, groups in kinds.items():
            for group, values in groups.items():
                longest = len(accuracy[MAIN.name].get(kind, {}).get(group, []))
                if not 1 <= len(values) <= longest or not all(0 <= one <= 1 for one in values):
                    raise ValueError(
                        f"{name!r}, {method!r}, {kind}, {group}: expected 1 to {longest} accuracies of 0 to 1, as "
                        f"{MAIN.name} has, got {values[:5]}."
                    )


def difference(results: dict, method: str, other: str, kind: str) -> Estimate | None:
    """One method minus another, on the episodes of a kind that both have; nothing if there are none."""
    own, others = (results["accuracy"].get(name, {}).get(kind, {}) for name in (method, other))
    return paired_difference(own, others) if set(own) & set(others) else None


def best_baseline(results: dict, kind: str) -> str:
    """The baseline that is highest beside Mc-Di on the episodes that both have."""
    baselines = [name for name, method in METHODS.items() if method.group == "baselines"]
    found = {name: difference(results, MAIN.name, name, kind) for name in baselines}
    return min((name for name in baselines if found[name] is not None), key=lambda name: found[name].mean)


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def kind_text(kind: str) -> str:
    """A kind as a heading says it: `sentiment:2x5` may be broken behind its group."""
    return kind.replace(":", " ")


def name_text(method: str) -> str:
    return f"**{method}**" if method == MAIN.name else method


def points(estimate: Estimate | None) -> str:
    """A difference in points, with two decimals where one would make a zero of it."""
    if estimate is None:
        return "-"
    tie = "tie " if estimate.verdict == "tie" else ""
    return tie + estimate.text(signed=True, digits=1 if round(100 * estimate.mean, 1) else 2)


def accuracy_table(results: dict) -> str:
    """Mean accuracy of every method and kind, and its time to an adapter."""
    kinds, rows = results["kinds"], []
    every = {kind: count(groups) for kind, groups in results["accuracy"][MAIN.name].items()}
    for group in GROUPS:
        own = [name for name, method in METHODS.items() if method.group == group and name in results["accuracy"]]
        if own:
            rows.append([f"*{group}*", *[""] * (1 + len(kinds))])
        for name in own:
            found = results["accuracy"][name]
            cells = [_cell(found[kind], every[kind]) if kind in found else "-" for kind in kinds]
            seconds = results["seconds"].get(name)
            rows.append([name_text(name), *cells, "-" if seconds is None else duration(seconds)])
    return markdown_table(["accuracy, %", *map(kind_text, kinds), "time"], rows)


def _cell(groups: Groups, every: int) -> str:
    found = bootstrap_interval(groups)
    return f"{found.text()} ({found.count})" if found.count < every else found.text()


def count(groups: Groups) -> int:
    return sum(map(len, groups.values()))


def spread_text(results: dict) -> str:
    """How many episodes there are, and how far seeds lie apart: of trained generators, or of a released one's tasks."""
    kinds = results["accuracy"][MAIN.name]
    counts = sorted({count(kinds[kind]) for kind in results["kinds"]})
    groups = len(kinds[results["kinds"][0]])
    released = results["family"] == "released"
    of = f"{groups} seeds of episodes and noise, one generator" if released else f"{groups} generators"
    text = f"Test episodes of a kind: {' to '.join(map(str, counts[:: max(1, len(counts) - 1)]))}, of {of}"
    if groups > 1:
        deviations = ", ".join(f"{100 * seed_deviation(kinds[kind]):.1f}" for kind in results["kinds"])
        over = "those seeds" if released else "their seeds"
        text += f"; standard deviation of {MAIN.name} over {over}, points: {deviations}"
    return f"{text}. Times are of a {kind_text(results['time_kind'])} task."


def memorisation_text(results: dict) -> str:
    """What distances of weights and shared errors say about copying."""
    known = results["memorisation"]
    if NEW not in known:
        return ""
    new, between = bootstrap_interval(known[NEW]), bootstrap_interval(known[BETWEEN])
    ratio = new.mean / between.mean if between.mean else math.inf
    text = (
        f"A generated adapter lies {ratio:.2f} times as far from its nearest training adapter as training adapters lie "
        f"from each other"
    )
    if new.low > between.high:
        text += ", so it is no copy"
    elif new.high >= between.low:
        text += ": as far as a newly trained one would"
    elif paired_difference(known[NEW], known[NOISED_COPY]).verdict == "above":  # of the same tasks
        text += ", but farther than a training adapter with noise"
    else:
        text += ", no farther than a training adapter with noise, as a copy would"
    shared = {name: [one for one in own if one is not None] for name, own in known[OVERLAP].items()}
    if shared := {name: own for name, own in shared.items() if own}:
        text += f"; they share {100 * bootstrap_interval(shared).mean:.0f} % of their errors"
    return f" {text}."


def summary(experiments: list[dict]) -> list[str]:
    """Mc-Di beside the best baseline and the control of every kind, and how often it is above."""
    rows, verdicts = [], {"baseline": Counter(), "control": Counter()}
    for results in experiments:
        for kind in results["kinds"]:
            best = best_baseline(results, kind)
            own = bootstrap_interval(results["accuracy"][MAIN.name][kind]).text()
            found = difference(results, MAIN.name, best, kind), difference(results, MAIN.name, OTHER_TASK, kind)
            rows.append([results["experiment"], kind_text(kind), own, best, *map(points, found)])
            for counter, one in zip(verdicts.values(), found):
                counter.update([one.verdict] if one else [])
    lines = [
        f"{MAIN.name} is above {what} in {own['above']} of {own.total()} kinds, tied in {own['tie']}, and below in "
        f"{own['below']}."
        for what, own in zip(["the best baseline", "itself with another task's condition"], verdicts.values())
    ]
    header = [
        "experiment",
        "kind",
        f"{MAIN.name}, %",
        "best baseline",
        f"{MAIN.name} minus it",
        "minus wrong condition",
    ]
    return ["## Summary", " ".join(lines), markdown_table(header, rows)]


def page(experiments: list[dict], picture: str) -> str:
    """The page: Markdown with a link to the picture, which lies at `picture` seen from the page."""
    known = [method for name, method in METHODS.items() if any(name in one["accuracy"] for one in experiments)]
    about = markdown_table(["method", "what it is"], [[name_text(one.name), one.about] for one in known])
    parts = ["# The benchmark", "Made by `python examples/benchmark/report.py`."]
    parts += summary(experiments)
    parts += [
        f"![Differences from Mc-Di against the time to an adapter]({picture})",
        "## How to read it",
        READING.rstrip(),
        about,
    ]
    for family, title in FAMILIES.items():
        own = [results for results in experiments if results["family"] == family]
        parts += [f"## {title}"] if own else []
        for results in own:
            parts += [f"### {results['title']} (`{results['experiment']}`)", *filter(None, [results["note"]])]
            parts += [accuracy_table(results), spread_text(results) + memorisation_text(results)]
            parts.append(f"`{results['command']}`, {results['machine']}, seal `{results['seal']}`.")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    results_dir, output = Path(__file__).parent / "results", ROOT / "docs" / "results.md"
    parser.add_argument("--results_dir", type=Path, default=results_dir, help="the results of run.py, a file each")
    parser.add_argument(
        "--output", type=Path, default=output, help="the page; its picture goes into images/ beside it"
    )
    args = parser.parse_args()
    experiments = read_results(args.results_dir)
    images = args.output.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    time_picture(experiments).savefig(images / "benchmark_time.png", dpi=80)
    text = page(experiments, "images/benchmark_time.png")
    write_file(args.output, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main()
