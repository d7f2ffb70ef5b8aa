"""Pretraining a small ViT as a user does, on a folder of tiny images."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from scripts import EXAMPLES, run_each, write_split
from tiny import tiny_image_dataset
from versions import VIT_QUERY, VIT_VALUE

from mcdi_hf import AdapterLayout, FrozenBackbone, StackedLora
from mcdi_hf.trajectories.shared import initial_adapter


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The folder of all runs, and how each ended."""
    root = tmp_path_factory.mktemp("pretraining")
    write_split(root / "omniglot", "train", tiny_image_dataset(rows_per_class=4))
    command = [
        EXAMPLES / "reproduce" / "pretrain_vit.py",
        "--dataset_name",
        root / "omniglot",
        "--label_column",
        "character",
    ]
    command += "--domain_column alphabet --image_size 8 --patch_size 4 --hidden_size 16 --num_layers 1".split()
    command += "--num_heads 2 --classes_per_step 4 --images_per_class 3 --lr_warmup_steps 1".split()
    command += "--max_train_steps 4 --checkpointing_steps 2 --checkpoints_total_limit 2".split()
    command += ["--train_domains", "greek", "hebrew", "--output_dir"]
    refused = {
        "domain": ["--train_domains", "greek", "latin"],
        "classes": ["--classes_per_step", 17],
        "images": ["--images_per_class", 5],
        "image": ["--images_per_class", 1],
        "column": ["--label_column", "drawer"],
    }
    # A run that was stopped after its second step has the first checkpoint, one that is run again has all.
    resumed = ["--resume_from_checkpoint", root / "straight" / "checkpoints" / "checkpoint_2"]
    commands = {
        "straight": [*command, root / "straight"],
        "resumed": [*command, root / "resumed", *resumed],
        "again": [*command, root / "straight", "--resume_from_checkpoint", "latest"],
    }
    return root, run_each(
        commands | {name: [*command, root / "refused", *changed] for name, changed in refused.items()}
    )


def test_the_saved_folder_is_a_backbone_for_images(ended: tuple[Path, dict]) -> None:
    root, found = ended
    assert found["straight"][0] == 0, found["straight"][2]
    backbone = FrozenBackbone.from_pretrained(root / "straight" / "model", pooling="default")
    config = LoraConfig(r=2, target_modules=[VIT_QUERY, VIT_VALUE], modules_to_save=["classifier"])
    layout = AdapterLayout.from_model(backbone.model, config, backbone.head_name)
    stacked = StackedLora(backbone, layout)
    features = stacked.features_of_all(initial_adapter(layout), stacked.encode(tiny_image_dataset()["image"][:2]))
    assert features.shape == (2, 16) and features.isfinite().all() and not torch.equal(features[0], features[1])


def test_a_resumed_run_is_the_straight_run_bit_for_bit(ended: tuple[Path, dict]) -> None:
    root, found = ended
    assert found["resumed"][0] == 0, found["resumed"][2]
    assert "2/4" in found["resumed"][2] and "0/4" not in found["resumed"][2]
    assert found["again"][0] == 0 and "4/4" in found["again"][2] and "3/4" not in found["again"][2]
    runs = root / "straight", root / "resumed"
    for files in ("model/model.safetensors", "checkpoints/checkpoint_4/model.safetensors"):
        one, two = (load_file(run / files) for run in runs)
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    before = load_file(root / "straight" / "checkpoints" / "checkpoint_2" / "model.safetensors")
    assert any(not torch.equal(one[key], before[key]) for key in one)
    texts = [(run / "model" / "preprocessor_config.json").read_text() for run in runs]
    assert texts[0] == texts[1]


def test_what_cannot_be_done_is_one_clear_error(ended: tuple[Path, dict]) -> None:
    root, found = ended
    wanted = {
        "domain": (1, "ValueError: There are no domains ['latin']: expected some of ['greek', 'hebrew']"),
        "classes": (1, "With rotations there are 16 classes, fewer than classes_per_step (17)"),
        "images": (1, "A class has 4 images, fewer than images_per_class (5)"),
        "image": (2, "--images_per_class is at least 2"),
        "column": (1, "has no ClassLabel column 'drawer'"),
    }
    for name, (code, text) in wanted.items():
        assert found[name][0] == code and text in found[name][2].splitlines()[-1]
    assert not (root / "refused" / "model").exists()
