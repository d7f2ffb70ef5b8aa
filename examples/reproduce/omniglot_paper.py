"""Does local consistency earn its place in the regime that the paper describes? Measured on Omniglot, 5-way 1-shot.

    python examples/reproduce/omniglot_paper.py --dataset_name DATA/omniglot --output_dir runs/paper

A Conv-4 is pretrained on some alphabets; heads of five characters of others are trained from Gaussian starts; generators
learn from these trajectories by every objective, and write heads for 1,000 tasks of the official evaluation set. Then the
same with the last block, beside REPTILE. It writes what it measured into examples/reproduce/paper/results.json, docs/paper.md and
two pictures of it. The same command goes on where an interrupted run stopped.
"""

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path

from paper.block_runs import STEPS, prepare_blocks, run_blocks, run_start
from paper.conv4 import make_features, make_maps, make_network
from paper.generator import Setting
from paper.pictures import surface_picture, time_picture
from paper.report import IMAGES, PAGE, RESULTS, page, read_results
from paper.rivals import Reptile, run_frozen, run_reptile
from paper.runs import run, run_ddim
from paper.summary import SWEEP_SEEDS, SWEEPS, summary
from tqdm.auto import tqdm

from mcdi_hf.training.objective import OBJECTIVES
from mcdi_hf.utils.files import write_file


DDIM = list(product(OBJECTIVES, range(3), (False, True)))
REPTILES = [("whole", 0.3, 600), ("block", 0.1, 1500), ("block", 0.5, 1500), ("head", 0.02, 2000), ("head", 0.1, 2000)]


def settings() -> list[Setting]:
    """Every training: both levels and the control of the timesteps, coupled noise, and a sweep of each other setting."""
    found = [Setting(objective, "single", seed) for objective, seed in product(OBJECTIVES, range(4))]
    found += [Setting(objective, "bi", seed) for seed, objective in product(range(3), (*OBJECTIVES, "mv_times"))]
    found += [Setting("mv_times", "single", seed) for seed in range(4)]
    found += [Setting(objective, coupled=True, seed=seed) for seed, objective in product(range(3), OBJECTIVES)]
    for field, (values, objectives) in SWEEPS.items():
        some = product(values, range(SWEEP_SEEDS), objectives)
        found += [Setting(objective, seed=seed, **{field: value}) for value, seed, objective in some]
    return list(dict.fromkeys(found))  # each sweep passes the usual value


def block_settings() -> list[tuple[Setting, bool]]:
    """Those of last blocks: all from one Gaussian block, and each from its own."""
    found = [(Setting(objective, seed=seed, steps=STEPS), True) for seed, objective in product(range(3), OBJECTIVES)]
    return found + [(Setting("mc", coupled=coupled, steps=STEPS), False) for coupled in (False, True)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", required=True, help="Omniglot, a Hub id or a folder")
    parser.add_argument("--output_dir", type=Path, required=True, help="where features and runs are kept")
    parser.add_argument("--processes", type=int, default=2, help="trainings at once (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=10, help="of the Conv-4 (default: %(default)s)")
    return parser.parse_args()


def run_all(jobs: list[tuple[Callable, ...]], processes: int, name: str) -> None:
    """Each job, a function and its arguments, in one of some processes; the first that fails ends it."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for future in tqdm([pool.submit(*job) for job in jobs], desc=name):
            future.result()


def main() -> None:
    args = arguments()
    output = args.output_dir
    network = make_network(args.dataset_name, output / "conv4.safetensors", args.epochs)
    make_features(args.dataset_name, output / "features.safetensors", network)
    make_maps(args.dataset_name, output / "maps.safetensors", network)
    run_all([(run, setting, output) for setting in settings()], args.processes, "heads")
    run_all([(prepare_blocks, output, shared) for shared in (True, False)], args.processes, "trajectories of blocks")
    jobs = [(run_frozen, output), (run_start, output)]
    jobs += [(run_reptile, Reptile(*one), args.dataset_name, output) for one in REPTILES]
    jobs += [(run_ddim, Setting(one, seed=seed, coupled=coupled), output) for one, seed, coupled in DDIM]
    jobs += [(run_blocks, setting, shared, output) for setting, shared in block_settings()]
    run_all(jobs, args.processes, "blocks and REPTILE")
    publish(output)


def publish(output_dir: Path) -> None:
    """Put together what all runs measured, and write it and what is made of it."""
    found = json.dumps(summary(output_dir, [Reptile(*one) for one in REPTILES], STEPS))
    rounded = json.loads(found, parse_float=lambda number: round(float(number), 4))
    write_file(RESULTS, lambda stream: stream.write(f"{json.dumps(rounded, indent=1)}\n".encode()))
    results = read_results()
    for name, figure in {"time": time_picture(results), "surface": surface_picture(output_dir)}.items():
        write_file(IMAGES / f"paper_{name}.png", lambda stream, figure=figure: figure.savefig(stream, dpi=110))
    write_file(PAGE, lambda stream: stream.write(page(results).encode()))


if __name__ == "__main__":
    main()
