"""How fast generation is: time to adapter beside accuracy, for the released pipelines, gradient LoRA and SetFit.

    python examples/benchmark_generation.py --data_root DATA --output runs/generation.json --pictures runs/pictures

All ways see the same test tasks, the slow ones the first of them, and are timed in turn, medians over repeats. Gradient LoRA's
setting is chosen on validation domains; SetFit runs with its documented defaults. Besides: where the time of a call
goes, the denoiser's bare matrix products as the floor, memory, and what serving the adapters costs. The output is written
whole, and the last lines are the bars.
"""

import argparse
import json
import os
from pathlib import Path

import torch
from data import write_whole
from families import ROOT, read_families
from generation_costs import floors, parts, peak_memory
from generation_pictures import save_pictures
from generation_report import USUAL_STEPS, print_report
from generation_serving import serving
from generation_tasks import Workload
from generation_ways import BATCHES, all_ways, choose_gradient_settings, measure, settings_as_dict

from mcdi_hf import package_versions


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    families = Path(__file__).parent / "configs" / "benchmark_generation.json"
    parser.add_argument("--families", type=Path, default=families, help="a JSON list of pipelines and their tasks")
    parser.add_argument("--data_root", type=Path, required=True, help="a folder that holds the data sets")
    parser.add_argument("--only", nargs="+", help="the families wanted, by name; all of them by default")
    parser.add_argument("--output", type=Path, default=Path("runs/generation.json"))
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs" / "images", help="a folder for the pictures")
    parser.add_argument("--episodes", type=int, default=100, help="test tasks of a row")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats of a call")
    parser.add_argument("--gradient_steps", type=int, nargs="+", default=[10, 30, 100])
    parser.add_argument("--gradient_learning_rates", type=float, nargs="+", default=[1e-3, 5e-3])
    parser.add_argument(
        "--validation_episodes", type=int, default=16, help="tasks to choose gradient LoRA's setting on"
    )
    parser.add_argument("--gradient_episodes", type=int, default=48, help="test tasks of gradient LoRA; it is slow")
    parser.add_argument("--setfit_episodes", type=int, default=4, help="test tasks of SetFit; it is slower")
    parser.add_argument("--adapters", type=int, default=100, help="adapters that are served in one batch")
    return parser.parse_args()


def measure_family(values: dict, args: argparse.Namespace) -> dict:
    """All numbers of one family; what costs are measured on is its first kind of tasks."""
    workload = Workload(values, args.data_root)
    pipe, kinds = workload.pipe, values["kinds"]
    gradient = choose_gradient_settings(
        workload, args.gradient_steps, args.gradient_learning_rates, args.validation_episodes
    )
    rows = {}
    for kind in kinds:
        task_set = workload.task_set(kind, seed=1000, count=args.episodes)
        ways = all_ways(workload, gradient, kind, args.gradient_episodes, args.setfit_episodes)
        rows[kind] = measure(ways, task_set, args.repeats, f"{values['name']}, {kind}")
    task_set = workload.task_set(kinds[0], seed=1000, count=args.episodes)
    examples = [task_set.query(number % args.episodes)[0][0] for number in range(args.adapters)]
    return {
        "name": values["name"],
        "gradient": settings_as_dict(gradient),
        "rows": rows,
        "cost_kind": kinds[0],
        "floors": floors(pipe, task_set, USUAL_STEPS, BATCHES, args.repeats),
        "parts": parts(pipe, task_set, USUAL_STEPS, 3 * args.repeats),
        "memory": peak_memory(values, args.data_root, kinds[0], BATCHES, USUAL_STEPS),
        "serving": serving(pipe, task_set.batch(0, args.adapters), examples, args.repeats),
    }


def main() -> None:
    args = arguments()
    families = read_families(args.families, args.only)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), **package_versions()}
    results = {"machine": machine, "families": [measure_family(values, args) for values in families]}
    write_whole(args.output, lambda part: part.write_text(json.dumps(results, indent=1)))
    save_pictures(results, args.pictures)
    print_report(results)


if __name__ == "__main__":
    main()
