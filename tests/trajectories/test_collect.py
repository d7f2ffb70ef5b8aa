"""A stack of tasks is as many runs of peft and torch.optim.AdamW, for every family of backbones and every LoraConfig."""

import dataclasses
import string

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from PIL import Image
from tiny import (
    LORA_SETTINGS,
    tiny_backbone,
    tiny_dataset,
    tiny_image_backbone,
    tiny_language_model,
    tiny_lora_config,
)

from mcdi_hf import (
    AdapterLayout,
    EpisodeSampler,
    FrozenBackbone,
    LabelledRows,
    StackedLora,
    Task,
    TrajectorySettings,
    collect_trajectories,
    train_shared_adapter,
)
from mcdi_hf.adapters.gauge import canonical_factors
from mcdi_hf.adapters.head import class_means, imprint_head
from mcdi_hf.evaluation.gradient import frozen_features
from mcdi_hf.trajectories.augmentation import augmented_views
from mcdi_hf.trajectories.dataset import split_weights
from mcdi_hf.trajectories.shared import initial_adapter, rows_and_labels


START_SCALE = 5.0


def text_tasks(number: int = 4) -> tuple[list[str], list[Task]]:
    dataset = tiny_dataset()
    sampler = EpisodeSampler(LabelledRows(dataset, "label", "domain"), (2, 4), (4, 6), 2, seed=1)
    tasks = [sampler[index] for index in range(number)]
    assert len({len(task.classes) for task in tasks}) > 1
    # letters, so that a language model of letters has a word for every class
    return dataset["text"][:], [
        dataclasses.replace(task, classes=tuple(string.ascii_lowercase[: len(task.classes)])) for task in tasks
    ]


def image_tasks() -> tuple[list[Image.Image], list[Task]]:
    random = np.random.default_rng(4)
    images = [Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(24)]
    tasks = [
        Task(tuple("abc"), ((0, 1, 2), (3, 4, 5), (6, 7, 8)), ((9,), (10,), (11,)), "all"),
        Task(tuple("de"), ((12, 13, 14), (15, 16, 17)), ((18, 19, 20), (21, 22, 23)), "all"),
    ]
    return images, tasks


def vit_config(**overrides) -> LoraConfig:
    settings = {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "fc1"],
        "modules_to_save": ["classifier"],
        "layers_to_transform": [1, 2],
    }
    return LoraConfig(**(settings | overrides))


def llama_config(**overrides) -> LoraConfig:
    settings = {"task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]}
    return LoraConfig(**(settings | overrides))


def dinov2() -> FrozenBackbone:
    return tiny_image_backbone("dinov2")


PATTERNS = {"r": 4, "rank_pattern": {"q_proj": 1}, "alpha_pattern": {r"layers\.2\..*q_proj": 9}}
FAMILIES = {
    **{f"bert {index}": (tiny_backbone, tiny_lora_config(**settings)) for index, settings in enumerate(LORA_SETTINGS)},
    "bert, CLS": (lambda: tiny_backbone("default"), tiny_lora_config()),
    "bert without a head": (tiny_backbone, tiny_lora_config(task_type=None)),
    "vit": (tiny_image_backbone, vit_config()),
    "vit, patterns": (tiny_image_backbone, vit_config(**PATTERNS)),
    "vit, rslora without a head": (tiny_image_backbone, vit_config(use_rslora=True, modules_to_save=None)),
    "dinov2": (dinov2, vit_config(layers_to_transform=None)),
    "dinov2 without a head": (dinov2, vit_config(modules_to_save=None, lora_alpha=1)),
    "llama": (tiny_language_model, llama_config()),
    "llama, patterns": (tiny_language_model, llama_config(layers_to_transform=[1, 2], **PATTERNS)),
    "llama, rslora": (tiny_language_model, llama_config(use_rslora=True, layers_to_transform=[2])),
}


class SequentialRun:
    """What a person with peft would write for one task: the whole model, every step, in a plain loop."""

    def __init__(self, backbone: FrozenBackbone, config: LoraConfig, layout: AdapterLayout, task: Task, start) -> None:
        self.backbone, self.task = backbone, task
        ways = len(task.classes)
        self.model = get_peft_model(backbone.classifier(ways), config).eval()
        head_start = dict(zip(layout.head_keys, (torch.zeros(ways, layout.feature_dim), torch.zeros(ways))))
        set_peft_model_state_dict(self.model, {key: value[0] for key, value in start.items()} | head_start)
        if not backbone.is_causal_lm:
            wrapper = getattr(self.model.base_model.model, backbone.head_name)
            head = wrapper.modules_to_save["default"] if layout.head_keys else wrapper
            for parameter, value in zip(head.parameters(), self.imprinted(wrapper)):
                parameter.data.copy_(value[0])
        self.parameters = {
            name.replace(".default", "").replace(".modules_to_save", ""): value
            for name, value in self.model.named_parameters()
            if value.requires_grad
        }

    def inputs(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.backbone.inputs([EXAMPLES[self.backbone.reads_images][row] for row in rows])

    def imprinted(self, head: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        rows, labels = rows_and_labels(self.task.support)
        seen = []
        hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        self.model(**self.inputs(rows))
        hook.remove()
        return imprint_head(class_means(seen[0][None], labels[None], len(self.task.classes)), START_SCALE)

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        inputs = self.inputs(rows)
        logits = self.model(**inputs).logits
        if not self.backbone.is_causal_lm:
            return logits
        words = [self.backbone.processor.convert_tokens_to_ids(name) for name in self.task.classes]
        return logits[torch.arange(len(rows)), inputs["attention_mask"].sum(dim=1) - 1][:, words]


EXAMPLES = {False: text_tasks()[0], True: image_tasks()[0]}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stack_equals_sequential_runs_of_peft_and_adamw(family: str) -> None:
    make, config = FAMILIES[family]
    backbone = make()
    layout = AdapterLayout.from_model(backbone.model, config, backbone.head_name)
    assert bool(layout.head_keys) == bool(config.modules_to_save or config.task_type == "SEQ_CLS")
    stacked = StackedLora(backbone, layout)
    tasks = (image_tasks() if backbone.reads_images else text_tasks())[1]
    examples = stacked.encode(EXAMPLES[backbone.reads_images])
    settings = TrajectorySettings(
        num_steps=7, batch_size=6, learning_rate=0.02, weight_decay=0.1, lr_warmup_steps=2, imprint_scale=START_SCALE
    )
    start = {key: value + 0.1 for key, value in initial_adapter(layout, seed=3).items()}
    found = collect_trajectories(
        stacked, examples, start, stacked.features_of_all(start, examples), tasks, list(range(len(tasks))), settings
    )
    for number, (task, row) in enumerate(zip(tasks, found)):
        run = SequentialRun(backbone, config, layout, task, start)
        support, labels = rows_and_labels(task.support)
        optimizer = torch.optim.AdamW(run.parameters.values(), lr=0.02, weight_decay=0.1)
        warm_and_down = lambda step: min(step / 2, (7 - step) / 5)  # noqa: E731
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_and_down)
        random = np.random.default_rng((0, number))
        kept, losses = [{key: value.detach().clone() for key, value in run.parameters.items()}], []
        for step in range(1, 8):
            pick = random.choice(len(support), size=6, replace=len(support) < 6)
            loss = torch.nn.functional.cross_entropy(run.logits(support[pick]), labels[pick])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step in (2, 5, 7):
                kept.append({key: value.detach().clone() for key, value in run.parameters.items()})
                losses.append(loss.item())
        tensors = split_weights(torch.from_numpy(row["weights"]), len(task.classes), layout)
        assert row["steps"] == [0, 2, 5, 7] and row["classes"] == list(task.classes)
        assert row["losses"] == pytest.approx(losses, rel=1e-3, abs=1e-5)
        for target, expected in enumerate(kept):
            assert expected.keys() == tensors.keys()
            for key, value in expected.items():
                torch.testing.assert_close(tensors[key][target], value, rtol=2e-4, atol=2e-4)
        query, query_labels = rows_and_labels(task.query)
        with torch.no_grad():
            said = run.logits(query).argmax(dim=-1)
        assert row["accuracy"] == pytest.approx((said == query_labels).float().mean().item())


@pytest.fixture(scope="module")
def setting():
    texts, tasks = text_tasks()
    backbone = tiny_backbone()
    stacked = StackedLora(backbone, AdapterLayout.from_model(backbone.model, tiny_lora_config()))
    return stacked, texts, stacked.encode(texts), tasks


def shifted_start(layout: AdapterLayout) -> dict[str, torch.Tensor]:
    """A start whose `lora_B` is not zero, as that of a trained shared adapter."""
    return {key: value + 0.1 * torch.randn(value.shape) for key, value in initial_adapter(layout, seed=3).items()}


def test_target_steps_for_any_number_of_steps() -> None:
    assert TrajectorySettings(30, 3).target_steps == [10, 20, 30]
    assert TrajectorySettings(20, 3).target_steps == [7, 13, 20]
    assert TrajectorySettings(5, 1).target_steps == [5]
    for steps in range(1, 40):
        for targets in range(1, steps + 1):
            found = TrajectorySettings(steps, targets).target_steps
            assert len(set(found)) == targets and found[-1] == steps and found[0] >= 1


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_steps": 3, "num_targets": 4}, "num_targets is 4: expected 1 to num_steps"),
        ({"gauge": "fixed"}, "gauge is 'fixed': expected one of 'shared_start'"),
        ({"lr_scheduler": "step"}, "lr_scheduler is 'step': expected one of linear"),
        ({"sam_rho": -1.0}, "sam_rho is -1.0"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrajectorySettings(**settings)


def test_sam_is_sam_on_each_task_alone(setting) -> None:
    """A stack of four gives each task what it gets in a stack of its own: the step uphill has a norm for each."""
    stacked, _, examples, tasks = setting
    start = shifted_start(stacked.layout)
    settings = TrajectorySettings(num_steps=4, num_targets=1, batch_size=4, learning_rate=0.02, sam_rho=0.5)
    together = collect_trajectories(
        stacked, examples, start, stacked.features_of_all(start, examples), tasks, list(range(4)), settings
    )
    plain = dataclasses.replace(settings, sam_rho=0.0)
    for number, task in enumerate(tasks):
        (alone,) = collect_trajectories(
            stacked, examples, start, stacked.features_of_all(start, examples), [task], [number], settings
        )
        np.testing.assert_allclose(together[number]["weights"], alone["weights"], rtol=1e-4, atol=1e-4)
        (without,) = collect_trajectories(
            stacked, examples, start, stacked.features_of_all(start, examples), [task], [number], plain
        )
        assert np.abs(without["weights"][-1] - alone["weights"][-1]).max() > 1e-2


def test_a_frozen_a_stays_and_everything_else_moves(setting) -> None:
    stacked, _, examples, tasks = setting
    start = shifted_start(stacked.layout)
    settings = TrajectorySettings(num_steps=3, batch_size=4, learning_rate=0.02, gauge="frozen_a")
    for task, row in zip(
        tasks,
        collect_trajectories(
            stacked, examples, start, stacked.features_of_all(start, examples), tasks, list(range(4)), settings
        ),
    ):
        tensors = split_weights(torch.from_numpy(row["weights"]), len(task.classes), stacked.layout)
        for key, value in tensors.items():
            moved = [not value[0].equal(snapshot) for snapshot in value[1:]]
            assert moved == [("lora_A" not in key)] * 3, key


def test_the_canonical_gauge_changes_factors_and_no_update(setting) -> None:
    stacked, _, examples, tasks = setting
    start = shifted_start(stacked.layout)
    settings = TrajectorySettings(num_steps=6, batch_size=4, learning_rate=0.02)
    canonical = dataclasses.replace(settings, gauge="canonical")
    plain, fixed = (
        collect_trajectories(
            stacked, examples, start, stacked.features_of_all(start, examples), tasks, list(range(4)), one
        )
        for one in (settings, canonical)
    )
    for task, left, right in zip(tasks, plain, fixed):
        left, right = (
            split_weights(torch.from_numpy(row["weights"]), len(task.classes), stacked.layout) for row in (left, right)
        )
        for key in stacked.layout.head_keys:
            assert left[key].equal(right[key])
        for module in stacked.layout.modules:
            a, b = module.key("lora_A"), module.key("lora_B")
            assert not left[a].allclose(right[a], atol=1e-2)
            torch.testing.assert_close(right[b] @ right[a], left[b] @ left[a], rtol=1e-4, atol=1e-5)
            last = canonical_factors(left[a][-1], left[b][-1])
            torch.testing.assert_close((right[a][-1], right[b][-1]), last, rtol=1e-5, atol=1e-6)


def test_views_are_drawn_and_only_the_plain_one_is_judged(setting) -> None:
    stacked, texts, plain, tasks = setting
    views = stacked.encode(augmented_views(texts, 3, seed=0), num_views=3)
    assert len(views) == len(texts) and len(views.hidden_states) == 3 * len(texts)
    torch.testing.assert_close(views[torch.arange(4)], plain[torch.arange(4)], rtol=1e-5, atol=1e-6)
    start = shifted_start(stacked.layout)
    # A learning rate of next to nothing: what is judged is the start, which must not depend on the views.
    settings = TrajectorySettings(num_steps=2, num_targets=1, batch_size=6, learning_rate=1e-12)
    features = stacked.features_of_all(start, plain)
    found = [
        collect_trajectories(stacked, one, start, features, tasks, list(range(4)), settings) for one in (plain, views)
    ]
    assert [row["accuracy"] for row in found[0]] == [row["accuracy"] for row in found[1]]
    assert [row["losses"] for row in found[0]] != [row["losses"] for row in found[1]]


def test_training_accuracy_is_that_of_the_last_segment(setting) -> None:
    """Letters tell the classes of a task apart: trained long enough, all are right, which they are not at the start."""
    stacked, _, examples, tasks = setting
    start = shifted_start(stacked.layout)
    first = TrajectorySettings(num_steps=1, num_targets=1, batch_size=16, learning_rate=0.05, imprint_scale=0.0)
    long = dataclasses.replace(first, num_steps=60, num_targets=3)
    early, late = (
        collect_trajectories(
            stacked, examples, start, stacked.features_of_all(start, examples), tasks, list(range(4)), one
        )
        for one in (first, long)
    )
    assert [row["train_accuracy"] for row in late] == [1.0] * 4
    for row, task in zip(early, tasks):
        assert row["losses"] == pytest.approx([np.log(len(task.classes))]) and row["train_accuracy"] < 1


def test_a_first_adapter_is_as_peft_makes_it(setting) -> None:
    layout = setting[0].layout
    tensors, again, other = (initial_adapter(layout, seed) for seed in (0, 0, 1))
    for key, shape in layout.lora_shapes.items():
        assert tensors[key].shape == (1, *shape) and tensors[key].equal(again[key])
        if "lora_B" in key:
            assert (tensors[key] == 0).all()
        else:  # uniform within 1 / sqrt(16)
            assert 0.2 < tensors[key].abs().max() <= 0.25 and not tensors[key].equal(other[key])


def test_divergence_is_an_error(setting) -> None:
    stacked, _, examples, tasks = setting
    settings = TrajectorySettings(num_steps=3, num_targets=1, batch_size=4, learning_rate=1e30)
    start = initial_adapter(stacked.layout)
    with pytest.raises(ValueError, match="diverged"):
        collect_trajectories(
            stacked, examples, start, stacked.features_of_all(start, examples), tasks[:1], [0], settings
        )


@pytest.mark.parametrize("make, config", [(tiny_backbone, tiny_lora_config()), (tiny_language_model, llama_config())])
def test_the_shared_adapter_learns(make, config) -> None:
    backbone = make()
    stacked = StackedLora(backbone, AdapterLayout.from_model(backbone.model, config, backbone.head_name))
    texts, tasks = text_tasks(80)
    # For a language model the classes are always the same words, so that there is something to learn.
    tasks = [task for task in tasks if task.group == "north" and len(task.classes) == 2] * 60
    losses = []
    tensors, scale = train_shared_adapter(
        stacked, stacked.encode(texts), tasks, 60, 0.02, on_step=lambda step, loss: losses.append(loss)
    )
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    assert tensors.keys() == stacked.layout.lora_shapes.keys()
    assert (abs(scale - 10) > 0.1) == (not backbone.is_causal_lm)  # learnt along, where there is one


def test_language_model_classes_need_words_that_differ() -> None:
    backbone = tiny_language_model()
    weight, bias = backbone.word_head(("b", "a"))
    ids = backbone.processor.convert_tokens_to_ids(["b", "a"])
    assert weight.equal(backbone.model.lm_head.weight[ids]) and bias.equal(torch.zeros(2))
    with pytest.raises(ValueError, match=r"\['one', 'two'\] begin with the same token"):
        backbone.word_head(("a", "one", "two"))


def test_frozen_features_of_an_image_backbone_are_those_of_its_upper_layers() -> None:
    backbone = dinov2()
    layout = AdapterLayout.from_model(backbone.model, vit_config())
    stacked = StackedLora(backbone, layout)
    found = stacked.features_of_all(initial_adapter(layout), stacked.encode(EXAMPLES[True]), torch.tensor([5, 2]))
    expected = frozen_features(backbone, [EXAMPLES[True][5], EXAMPLES[True][2]])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
