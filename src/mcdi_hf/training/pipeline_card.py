"""The card of a trained pipeline, made of what training saw and found."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..adapters.card import is_hub_id
from .arguments import MCDiTrainingArguments
from .training_data import TrainingData


TOLD_ELSEWHERE = {
    "output_dir",
    "trajectories",
    "dataset_name",
    "pretrained_model_name_or_path",
    "cache_dir",
    "hub_model_id",
}


def pipeline_card(
    place: str, args: MCDiTrainingArguments, data: TrainingData, curve: list[dict[str, Any]]
) -> ModelCard:
    """Fill the card of a pipeline that is loaded from `place`, a folder or a Hub id. `curve` is the trainer's: its
    first point is the shared adapter, and the last one that was `kept` is the pipeline."""
    base = data.codec.config.base_model
    images = data.stacked.backbone.reads_images
    tags = ["mcdi", "lora", "peft", "weight-generation", f"{'image' if images else 'text'}-classification"]
    card = ModelCardData(library_name="diffusers", tags=tags)
    if is_hub_id(base["name_or_path"]):
        card.base_model = base["name_or_path"]
    settings = {
        name: value for name, value in asdict(args).items() if name not in TOLD_ELSEWHERE and value is not None
    }
    settings |= {"versions": json.dumps(data.description["versions"])}
    return ModelCard.from_template(
        card,
        template_path=str(Path(__file__).parent / "templates" / "pipeline_card.md"),
        place=place,
        name=place.split("/")[-1],
        base=public(base["name_or_path"]),
        public=public,
        max_length=base["max_length"],
        images=images,
        domains=data.domains,
        episodes=args.num_validation_episodes,
        kinds=list(data.validation),
        free=curve[0],
        best=next(point for point in reversed(curve) if point.get("kept")),
        sources=data.description["sources"],
        train_domains=data.description["train_domains"],
        excluded=list(map(public, data.description["exclude_texts_of"])),
        ways=data.description["tasks"]["ways"],
        shots=args.shots,
        settings=settings,
    )


def public(name: str) -> str:
    """A Hub id as it is, and of a folder the last name: a card should not tell where it lies."""
    return Path(name).name if Path(name).is_dir() else name
