"""The card of a generated adapter: what it is for, how to load it, how it was made."""

import json
import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..backbones.frozen import ANSWER_PROMPT


# By kind of adapter: what the Hub files it under, and a tag for those who search.
TASKS = {"images": ("image-classification",) * 2, "last_token": ("text-generation", "text-classification")}


def adapter_card(
    place: str, kind: str, labels: list, base_model: dict, details: dict, license: str | None, support: dict | None
) -> ModelCard:
    """Fill the card of a [`GeneratedAdapter`] that is loaded from `place`, a folder or a Hub id.

    `details` are the fields of its [`GenerationDetails`]; `support`, if given, is put on the card, and may be private.
    """
    base = base_model["name_or_path"]
    pipeline_tag, task = TASKS.get(kind, ("text-classification",) * 2)
    tags = ["peft", "lora", "mcdi", task]
    data = ModelCardData(library_name="peft", license=license, pipeline_tag=pipeline_tag, tags=tags)
    if is_hub_id(base):
        data.base_model, data.base_model_relation = base, "adapter"
    examples = json.dumps(support, ensure_ascii=False, indent=1)
    return ModelCard.from_template(
        data,
        template_path=str(Path(__file__).parent / "templates" / "adapter_card.md"),
        place=place,
        kind=kind,
        labels=labels,
        id2label=dict(enumerate(labels)),
        auto_class=f"AutoModelFor{'Image' if kind == 'images' else 'Sequence'}Classification",
        base=base,
        prompt=repr(ANSWER_PROMPT),
        examples=support and examples,
        fence="`" * max(3, 1 + max(map(len, re.findall("`+", examples)), default=0)),  # no text can close it
        **{name: base_model.get(name) for name in ("revision", "fingerprint", "max_length")},
        **details,
    )


def is_hub_id(name: str) -> bool:
    """Whether a card may name a backbone: the Hub refuses a folder there, and what is no id."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).is_dir()
