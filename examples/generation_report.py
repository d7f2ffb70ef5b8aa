"""The tables and the bars of `benchmark_generation.py`, from its raw numbers."""

import operator
import statistics

import numpy as np
from generation_costs import floor_ratio
from generation_ways import BATCHES, GRADIENT, STEPS, generated_name, median_seconds
from markdown_tables import duration, markdown_table


USUAL_STEPS = 4
USUAL = generated_name(USUAL_STEPS)
SIGNS = {">=": operator.ge, "<=": operator.le}


def interval(values: list[float]) -> tuple[float, float]:
    """The mean, and half its 95 % interval over episodes."""
    return float(np.mean(values)), 1.96 * float(np.std(values)) / len(values) ** 0.5


def points_over(row: dict, other: dict) -> float:
    """How many points one way is over another, on the episodes that both were judged on."""
    pairs = list(zip(row["accuracy"], other["accuracy"]))
    return 100 * float(np.mean([own - rival for own, rival in pairs]))


def print_markdown(title: str, header: list[str], rows: list[list[str]]) -> None:
    print(f"\n{title}\n\n{markdown_table(header, rows)}")


def print_ways(title: str, rows: list[dict]) -> None:
    """Accuracy and time to adapter of every way; for those in batches the adapters a second, too."""
    gradient = median_seconds(rows[0])
    header = ["way", "accuracy (95 % interval; episodes)", "time to adapter", "share of gradient LoRA's"]
    header += [f"adapters a second, batch {batch}" for batch in BATCHES]
    cells = []
    for row in rows:
        mean, half = interval(row["accuracy"])
        own = [row["way"], f"{mean:.4f} (+-{half:.4f}; {len(row['accuracy'])})"]
        own += [duration(median_seconds(row)), f"{median_seconds(row) / gradient:.3f}"]
        own += [
            f"{batch / median_seconds(row, batch):.3g}" if str(batch) in row["seconds"] else "" for batch in BATCHES
        ]
        cells.append(own)
    print_markdown(title, header, cells)


def print_costs(family: dict) -> None:
    """Where the time goes, the floor, the memory and serving, of one family."""
    name, kind, whole = family["name"], family["cost_kind"], family["parts"]["call"]
    print_markdown(
        f"{name}, {kind}: where the time of a call for one task goes, {USUAL_STEPS} steps",
        ["part", "time", "share"],
        [[part, duration(spent), f"{100 * spent / whole:.0f} %"] for part, spent in family["parts"].items()],
    )
    medians = [{key: statistics.median(row[key]) for key in ("call", "features", "floor")} for row in family["floors"]]
    print_markdown(
        f"{name}, {kind}: a call beside its features and the denoiser's bare matrix products, {USUAL_STEPS} steps",
        ["batch", "call", "features", "matrix products (how many)", "call / (features + products)"],
        [
            [
                str(row["batch"]),
                duration(one["call"]),
                duration(one["features"]),
                f"{duration(one['floor'])} ({row['products']})",
                f"{floor_ratio(row):.2f}",
            ]
            for row, one in zip(family["floors"], medians)
        ],
    )
    print_markdown(
        f"{name}, {kind}: memory beyond the loaded pipeline, {USUAL_STEPS} steps",
        ["batch", "MiB"],
        [[batch, f"{peak:.0f}"] for batch, peak in family["memory"].items()],
    )
    serving = family["serving"]
    print_markdown(
        f"{name}, {kind}: serving {serving['adapters']} adapters",
        ["", "median"],
        [
            ["a swap into a live PEFT model", f"{1000 * statistics.median(serving['swap']):.3f} ms"],
            ["a batch in which each row has its own adapter", duration(statistics.median(serving["mixed"]))],
            ["the same batch through the plain backbone", duration(statistics.median(serving["plain"]))],
        ],
    )


def bars(families: list[dict]) -> list[tuple[str, float, str, float]]:
    """Name, value, sign and goal of every bar, each at its worst row."""
    tables = [{row["way"]: row for row in rows} for family in families for rows in family["rows"].values()]
    most, first, last = generated_name(max(STEPS)), min(BATCHES), max(BATCHES)
    share = max(median_seconds(rows[USUAL]) / median_seconds(rows[GRADIENT]) for rows in tables)
    rates = [first * median_seconds(rows[USUAL], last) / median_seconds(rows[USUAL], first) for rows in tables]
    served = [family["serving"] for family in families]
    mixed = [statistics.median(one["mixed"]) / statistics.median(one["plain"]) for one in served]
    return [
        ("time_over_gradient_lora_worst_row", share, "<=", 0.01),
        (
            "points_over_gradient_lora_worst_row",
            min(points_over(rows[USUAL], rows[GRADIENT]) for rows in tables),
            ">=",
            0,
        ),
        (
            f"points_{max(STEPS)}_steps_over_{USUAL_STEPS}_worst_row",
            max(points_over(rows[most], rows[USUAL]) for rows in tables),
            "<=",
            0.5,
        ),
        (f"adapters_a_second_batch_{last}_over_{first}_worst_row", min(last / rate for rate in rates), ">=", 8),
        (
            "call_over_floor_and_features_worst_family",
            max(floor_ratio(one["floors"][0]) for one in families),
            "<=",
            1.5,
        ),
        ("swap_ms_worst_family", max(1000 * statistics.median(one["swap"]) for one in served), "<=", 0.1),
        (f"mixed_batch_of_{served[0]['adapters']}_over_plain_backbone_worst_family", max(mixed), "<=", 2),
    ]


def print_report(results: dict) -> None:
    """All tables, then a line a bar."""
    machine = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    print(f"\n{machine}. Times are medians, all ways in turn.")
    for family in results["families"]:
        print(f"\nGradient LoRA's setting in {family['name']}, chosen on validation domains: {family['gradient']}")
        for kind, rows in family["rows"].items():
            print_ways(f"{family['name']}, {kind}: accuracy and time to adapter", rows)
        print_costs(family)
    print()
    for name, value, sign, goal in bars(results["families"]):
        met = "met" if SIGNS[sign](value, goal) else "missed"
        print(f"bar {name}: {value:.4g} (goal {sign} {goal:g}) {met}")
