"""Check every released pipeline: it loads, it generates, its card is complete, and its figures are right.

    python examples/release_check.py                    # all that needs no data set
    python examples/release_check.py --data_root DATA   # some episodes of each card's table are measured again, too

With HF_HUB_OFFLINE=1 the Hub is not asked to validate the cards' metadata, and a backbone that is only there is missed.
"""

import argparse
import json
import math
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from benchmark_ways import MC_DI
from data import BACKBONE_ID, Source, installed_backbone
from families import ROOT, labelled, moved, read_families
from huggingface_hub import ModelCard, constants
from peft import PeftConfig
from PIL import Image
from training_data import Split, episodes

from mcdi_hf import MCDiPipeline
from mcdi_hf.training.validation import generated_accuracies


TAGS = {"mcdi", "lora", "peft", "weight-generation"}
SECTIONS = ("What it was trained on", "How good it is", "Limits")
GENERATED_ROWS = ("generated, mean of 8 draws", MC_DI)
TEXTS = {"good": ["works like a charm", "my favourite one"], "bad": ["broke after a day", "a waste of money"]}
MENTIONED = re.compile(r"\b(?:examples|docs|tests|model_cards)/[\w./-]*\w")
KIND = re.compile(r"(?:(\w+),? )?(?:(\d+)-way (\d+)-shot|(\d+)x(\d+))")
SHOTS = re.compile(r"(\d+) shots")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_cards", type=Path, default=ROOT / "model_cards", help="a folder of releases")
    parser.add_argument("--only", nargs="+", help="names of releases; all by default")
    parser.add_argument("--families", type=Path, default=ROOT / "examples" / "configs" / "benchmark.json")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results", help="a folder of result files")
    parser.add_argument("--runs_root", type=Path, default=Path("runs"), help="where the families' backbones are")
    parser.add_argument("--data_root", type=Path, help="where the families' data sets are; to measure again")
    parser.add_argument("--episodes", type=int, default=48, help="of each kind, to measure")
    parser.add_argument("--seed", type=int, default=1000)
    return parser.parse_args()


def check_card(card: ModelCard, folder: Path, base_model: str) -> list[str]:
    """What a card lacks, and what it names that is not there."""
    wrong = [f"its card has no {name}" for name in ("license", "library_name") if not card.data.get(name)]
    if not (folder / "backbone").is_dir() and card.data.get("base_model") != base_model:
        wrong.append(f"its card's base_model is {card.data.get('base_model')!r}: expected {base_model!r}")
    if missing := sorted(TAGS - set(card.data.get("tags") or [])):
        wrong.append(f"its card has no tags {missing}")
    wrong += [f"its card has no section {name!r}" for name in SECTIONS if f"\n## {name}\n" not in card.text]
    mentioned = sorted(set(MENTIONED.findall(card.text)))
    wrong += [f"its card names {name}, which is not there" for name in mentioned if not (ROOT / name).exists()]
    if f"`{folder.name}`" not in (folder.parent / "README.md").read_text():
        wrong.append(f"{folder.parent / 'README.md'} does not list it")
    if not constants.HF_HUB_OFFLINE:
        try:
            card.validate()
        except ValueError as error:
            wrong.append(f"the Hub refuses its card: {error}")
    return wrong


def kind_of(heading: str) -> str | None:
    """`5x1` of the heading "5-way 1-shot", `sentiment:2x5` of "sentiment, 2-way 5-shot", `2x4` of "4 shots"."""
    if match := SHOTS.fullmatch(heading):
        return f"2x{match[1]}"
    if match := KIND.fullmatch(heading):
        size = f"{match[2] or match[4]}x{match[3] or match[5]}"
        return f"{match[1]}:{size}" if match[1] else size
    return None


def figures(text: str) -> dict[tuple[str, str], tuple[float, float]]:
    """Row and kind of a card's accuracies -> the accuracy, and half a unit of its last digit."""
    found, kinds = {}, {}
    for line in text.splitlines():
        cells = [cell.strip().strip("*").strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            kinds = {}
        elif not kinds:
            kinds = {place: kind for place, cell in enumerate(cells) if (kind := kind_of(cell))}
        else:
            for place, kind in kinds.items():
                if match := re.match(r"(\d+)\.(\d+)", cells[place]):
                    value, half = float(match[0]), 0.5 * 10.0 ** -len(match[2])
                    scale = 100 if value > 1 or "±" in cells[place] else 1
                    found[cells[0], kind] = value / scale, half / scale
    return found


def check_results(card: ModelCard, results: Path) -> list[str]:
    """Figures that a result file, which the card names, has otherwise: those of rows that are called as its ways are."""
    wrong = []
    for path in sorted(results.glob("*.json")):
        if not re.search(rf"\b{path.stem}\.(json|md)\b", card.text):
            continue
        tables = json.loads(path.read_text())["tables"]
        for (row, kind), (value, half) in figures(card.text).items():
            values = [table["accuracy"][row][kind] for table in tables if kind in table["accuracy"].get(row, {})]
            means = [float(np.mean(np.concatenate(list(one.values())))) for one in values]
            if means and min(abs(value - mean) for mean in means) > 1.01 * half:
                measured = ", ".join(f"{mean:.4f}" for mean in means)
                wrong.append(f"its card says {value:.4g} for {row}, {kind}; {path.name} says {measured}")
    return wrong


def backbone_of(folder: Path, base_model: str, family: dict | None, runs_root: Path) -> Path | None:
    """The backbone's folder, if it is on this machine."""
    places = [folder / "backbone"]
    if base_model == BACKBONE_ID:
        places.append(Path(installed_backbone()))
    if family and "backbone" in family:
        places.append(runs_root / family["backbone"])
    return next((place for place in places if place.is_dir()), None)


def check_generation(pipe: MCDiPipeline, with_backbone: bool) -> str:
    """Generate an adapter, save it, read its config; what it was generated from."""
    width, seed = pipe.codec.layout.feature_dim, torch.Generator().manual_seed(0)
    support, made_of = {name: torch.randn(2, width, generator=seed) for name in TEXTS}, "features"
    if with_backbone and pipe.backbone.reads_images:
        noise = np.random.default_rng(0)
        support = {name: [Image.fromarray(noise.integers(0, 256, (28, 28), dtype=np.uint8))] * 2 for name in TEXTS}
        made_of = "images"
    elif with_backbone:
        support, made_of = TEXTS, "texts"
    (adapter,) = pipe(support, num_candidates=2, generator=seed).adapters
    with tempfile.TemporaryDirectory() as place:
        adapter.save_pretrained(place)
        if PeftConfig.from_pretrained(place).base_model_name_or_path != pipe.codec.config.base_model["name_or_path"]:
            raise ValueError("The saved adapter names another backbone.")
    return made_of


def measure(
    pipe: MCDiPipeline, card: ModelCard, family: dict, args: argparse.Namespace
) -> tuple[list[str], list[str]]:
    """Generate for fresh test episodes of each kind in the card's table: what was found, and what is not as it says."""
    sources = [Source.from_dict(one) for one in moved(family["sources"], args.data_root)]
    table, rows = labelled(sources, family["test_domains"], family["split"], family.get("query_split"))
    split = Split(table, pipe.stacked, pipe.codec, support_views=pipe.config.support_views)
    numbers = [re.search(pattern, card.text) for pattern in (r"num_candidates=(\d+)", r"(\d+) episodes (?:a|of) ")]
    if None in numbers:
        return [], [
            "its card does not say how many candidates and how many `episodes of` or `episodes a` a figure is of"
        ]
    candidates, count = (int(match[1]) for match in numbers)
    said, wrong = [], []
    for (row, kind), (value, half) in figures(card.text).items():
        if row not in GENERATED_ROWS:
            continue
        tasks = episodes(kind, *rows, seed=args.seed, count=args.episodes)
        generator = torch.Generator().manual_seed(args.seed)
        found = generated_accuracies(
            pipe, split.examples, split.features, tasks, num_candidates=candidates, generator=generator
        )
        interval = half + 1.96 * float(np.std(found, ddof=1)) * math.sqrt(1 / len(found) + 1 / count)
        text = f"{kind}: {value:.3f} on the card, {np.mean(found):.3f} measured, {interval:.3f} apart by chance"
        (said if abs(np.mean(found) - value) <= interval else wrong).append(text)
    return said, wrong


def check_release(folder: Path, family: dict | None, args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """What was found of one release, and what is wrong with it."""
    base_model = json.loads((folder / "codec" / "config.json").read_text())["base_model"]["name_or_path"]
    backbone = backbone_of(folder, base_model, family, args.runs_root)
    pipe = MCDiPipeline.from_pretrained(folder, base_model_name_or_path=backbone and str(backbone))
    pipe.set_progress_bar_config(disable=True)
    card = ModelCard.load(folder / "README.md")
    wrong = check_card(card, folder, base_model) + check_results(card, args.results)
    at_hand = backbone is not None or not constants.HF_HUB_OFFLINE
    said = [f"loads, and generates from {check_generation(pipe, at_hand)}"]
    said.append(f"{len(figures(card.text))} figures on its card")
    if args.data_root and family and at_hand:
        found, other = measure(pipe, card, family, args)
        said, wrong = said + found, wrong + other
    elif args.data_root:
        said.append("not measured: its backbone or its family is not here")
    return said, wrong


def main() -> int:
    args = arguments()
    families: dict[str, dict] = {}
    for values in read_families(args.families, None):
        families.setdefault(Path(values["pipeline"]).name, values)  # its own; others judge it further away
    folders = {path.parent.name: path.parent for path in sorted(args.model_cards.glob("*/model_index.json"))}
    if unknown := sorted(set(args.only or []) - set(folders)):
        raise ValueError(f"There are no releases {unknown}: expected some of {sorted(folders)}.")
    failures = 0
    for folder in (folders[name] for name in args.only or folders):
        said, wrong = check_release(folder, families.get(folder.name), args)
        print(f"{folder.name}: {'; '.join(said)}")
        for text in wrong:
            print(f"  WRONG: {text}")
        failures += len(wrong)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
