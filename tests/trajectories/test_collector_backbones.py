"""Weight preparation of images, with rotations and views, and of a language model on a mixture."""

from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Value
from peft import LoraConfig, get_peft_model_state_dict
from scripts import collecting, save_backbone, write_split
from tiny import in_peft, tiny_image_backbone, tiny_image_dataset, tiny_language_model
from versions import VIT_QUERY, VIT_VALUE

from mcdi_hf import FrozenBackbone, Source, TrajectoryCollector, load_trajectories
from mcdi_hf.trajectories.dataset import local_targets


SMALL = {"train_domains": None, "num_tasks": 4}


def test_images_with_rotations_and_views(tmp_path: Path) -> None:
    folder = save_backbone(tiny_image_backbone(), tmp_path / "vit")
    write_split(tmp_path / "omniglot", "train", tiny_image_dataset(rows_per_class=8))
    own = {"pooling": "default", "rotations": True, "num_views": 2, "target_modules": [VIT_QUERY, VIT_VALUE]}
    own |= {"ways": [2, 2], "layers": [1, 2], "held_out_domains": ["hebrew"]}
    arguments = collecting(folder, tmp_path / "made", **SMALL, **own)
    source = Source(str(tmp_path / "omniglot"), "character", ("image",), "alphabet")
    TrajectoryCollector(arguments, [source]).collect()
    trajectories, made, codec = load_trajectories(str(tmp_path / "made" / "trajectories"))
    classes = {name for row in trajectories["classes"][:] for name in row}
    assert any(name.endswith("rotated 90") for name in classes) and not all("rotated" in name for name in classes)
    targets = local_targets(trajectories, codec)
    assert targets.shape == (4, 3, *codec.filled.shape) and not (targets[:, -1] == 1).all()
    trained = FrozenBackbone.from_pretrained(str(folder), pooling="default")
    tensors = codec.matrices(targets[:, -1])
    tensors |= {
        f"base_model.model.classifier.{name}": torch.zeros(4, *shape)
        for name, shape in (("weight", (2, 16)), ("bias", (2,)))
    }
    model = in_peft(trained, LoraConfig(**made["lora_config"]), tensors, -1)
    state = get_peft_model_state_dict(model)
    assert state.keys() == tensors.keys() and all(state[key].equal(tensors[key][-1]) for key in state)
    assert made["lora_config"]["modules_to_save"] == ["classifier"] and made["num_views"] == 2


def test_a_language_model_and_a_mixture_with_pairs(tmp_path: Path) -> None:
    folder = save_backbone(tiny_language_model(), tmp_path / "llama")
    random = np.random.default_rng(0)
    labels = [index % 2 for index in range(24)]
    for name, columns, names in (("single", ["text"], ["a", "b"]), ("pairs", ["one", "two"], ["x", "y"])):
        features = Features({column: Value("string") for column in columns} | {"label": ClassLabel(names=names)})
        rows = {column: [" ".join(random.choice(list("abcdefgh"), size=4)) for _ in labels] for column in columns}
        write_split(tmp_path / name, "train", Dataset.from_dict(rows | {"label": labels}, features=features))
    sources = [Source(str(tmp_path / "single")), Source(str(tmp_path / "pairs"), input_columns=("one", "two"))]
    sources.append(Source(str(tmp_path / "single"), name="held"))
    own = {"held_out_domains": ["held"]} | {
        "pooling": "last_token",
        "ways": [2, 2],
        "target_modules": ["q_proj", "v_proj"],
        "layers": [2],
    }
    TrajectoryCollector(collecting(folder, tmp_path / "made", **SMALL, **own), sources).collect()
    trajectories, made, codec = load_trajectories(str(tmp_path / "made" / "trajectories"))
    found = {(group, *sorted(classes)) for group, classes in zip(trajectories["group"][:], trajectories["classes"][:])}
    assert found == {("single", "a", "b"), ("pairs", "x", "y")}
    assert codec.layout.head_name is None and trajectories[0]["weights"].shape == (4, codec.filled.numel())
    assert made["lora_config"]["task_type"] == "CAUSAL_LM"
