"""The task loss against adapters that PEFT runs, and against itself in other company."""

import math

import pytest
import torch
from tiny import in_peft, random_codec, tiny_backbone, tiny_dataset, tiny_language_pipeline, tiny_lora_config

from mcdi_hf import (
    EpisodeSampler,
    LabelledRows,
    LocalConsistencyScheduler,
    MCDiDenoiser,
    StackedLora,
    Task,
    TaskEncoder,
)
from mcdi_hf.adapters.condition import see_support
from mcdi_hf.data.episodes import SupportBatch, rows_and_labels
from mcdi_hf.training.objective import ConditionalDenoiser
from mcdi_hf.training.task_loss import TaskLoss


DIM, STEPS = 8, 3


class Setting:
    """A tiny backbone, a codec with some shared adapter, and tasks of different sizes."""

    def __init__(self) -> None:
        self.backbone, self.config = tiny_backbone(), tiny_lora_config()
        self.codec = random_codec(self.backbone, self.config)
        self.stacked = StackedLora(self.backbone, self.codec.layout)
        self.table = tiny_dataset()
        self.examples = self.stacked.encode(self.table["text"][:])
        sampler = EpisodeSampler(LabelledRows(self.table, "label", "domain"), (2, 4), (1, 3), 3)
        self.tasks = [sampler[number] for number in range(4)]

    def loss(self) -> TaskLoss:
        scheduler = LocalConsistencyScheduler(20, prediction_type="sample")
        scheduler.set_timesteps(STEPS)
        return TaskLoss(self.stacked, self.codec, scheduler, self.examples)

    def model(self, std: float) -> ConditionalDenoiser:
        """A network; with a deviation of 0 it answers zeros, which stand for the shared adapter."""
        torch.manual_seed(0)
        layout = self.codec.layout
        denoiser = MCDiDenoiser.from_layout(layout, cond_dim=DIM, dim=16, num_layers=1, num_heads=2)
        model = ConditionalDenoiser(TaskEncoder(layout.feature_dim + 16, *self.codec.filled.shape, DIM, 6), denoiser)
        for parameter in model.parameters() if std else []:
            torch.nn.init.normal_(parameter, std=std)
        return model

    def in_peft(self, task: Task, tensors: dict[str, torch.Tensor]) -> float:
        """The cross-entropy on the query of a plain PEFT model with one adapter, over log(classes)."""
        rows, labels = rows_and_labels(task.query)
        texts = [self.table["text"][row] for row in rows.tolist()]
        model = in_peft(self.backbone, self.config, tensors, 0)
        with torch.no_grad():
            logits = model(**self.backbone.inputs(texts)).logits
        return torch.nn.functional.cross_entropy(logits, labels).item() / math.log(len(task.classes))


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting()


def generators(tasks: list[Task]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(len(task.classes) + task.support[0][0]) for task in tasks]


def support_of(setting: Setting, task: Task) -> SupportBatch:
    support = SupportBatch.from_tasks([task])
    support.examples = setting.examples
    return support


def test_a_network_that_says_nothing_has_the_loss_of_the_shared_adapter(setting: Setting) -> None:
    losses = setting.loss()(setting.model(0.0), setting.tasks, STEPS - 1, generators(setting.tasks))
    for task, loss in zip(setting.tasks, losses.tolist(), strict=True):
        support = support_of(setting, task)
        tensors = setting.codec.complete(setting.codec.shared_adapter(), support, setting.stacked)
        assert loss == pytest.approx(setting.in_peft(task, tensors), rel=1e-4)


def test_generated_adapters_are_judged_as_peft_would(setting: Setting) -> None:
    """The network's first prediction, decoded here by hand, with a head of PEFT's own features."""
    task, model = setting.tasks[0], setting.model(0.2)
    (loss,) = setting.loss()(model, [task], 0, generators([task]))
    support = see_support(
        setting.stacked, setting.codec.shared_adapter(), setting.codec.head, support_of(setting, task)
    )
    noise = torch.randn(setting.codec.filled.shape, generator=generators([task])[0])
    with torch.no_grad():
        seen = model.task_encoder(support.features, support.gradients, support.labels, support.class_mask)
        tokens = model.denoiser(noise[None], 19, seen.class_tokens, seen.task_token, seen.proposal).sample
    tensors = setting.codec.matrices(setting.codec.coefficients(tokens))
    blank = {key: torch.zeros(1, *shape) for key, shape in setting.codec.layout.shapes(len(task.classes)).items()}
    peft_model = in_peft(setting.backbone, setting.config, blank | tensors, 0)
    peft_model.base_model.model.classifier = torch.nn.Identity()
    rows, labels = rows_and_labels(task.support)
    with torch.no_grad():
        features = peft_model(**setting.backbone.inputs([setting.table["text"][row] for row in rows.tolist()])).logits
    head = setting.codec.head(features[None], labels[None], support.class_mask)
    tensors |= dict(zip(setting.codec.layout.head_keys, head))
    assert loss.item() == pytest.approx(setting.in_peft(task, tensors), rel=1e-3)


def test_a_task_s_loss_does_not_depend_on_its_neighbours(setting: Setting) -> None:
    loss, model = setting.loss(), setting.model(0.2)
    together = loss(model, setting.tasks, 2, generators(setting.tasks))
    alone = torch.cat([loss(model, [task], 2, generators([task])) for task in setting.tasks])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert len(set(alone.tolist())) == len(alone)


@pytest.mark.parametrize("steps", range(STEPS))
def test_every_step_of_the_sampler_can_be_trained(setting: Setting, steps: int) -> None:
    model = setting.model(0.2)
    setting.loss()(model, setting.tasks, steps, generators(setting.tasks)).mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for part in ("task_encoder.example", "task_encoder.directions", "task_encoder.gradient", "denoiser.token_out"):
        assert any(name.startswith(part) and value.abs().max() > 0 for name, value in gradients.items()), part


def test_training_on_it_lowers_it(setting: Setting) -> None:
    loss, model = setting.loss(), setting.model(0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    found = []
    for step in range(40):
        found.append(loss(model, setting.tasks, step % STEPS, generators(setting.tasks)).mean())
        optimizer.zero_grad()
        found[-1].backward()
        optimizer.step()
    assert sum(found[-5:]) / 5 < 0.9 * found[0]


def test_a_language_model_is_judged_by_its_words() -> None:
    pipe, backbone = tiny_language_pipeline()
    texts = ["a b", "c a", "b c", "x y", "z y", "a x", "y b", "z c"]
    tasks = [
        Task(("p", "q"), ((0,), (1, 2)), ((3, 4), (5, 6, 7)), "all"),
        Task(("q", "r", "s"), ((0,), (3,), (5,)), ((1, 2), (4,), (6, 7)), "all"),
    ]
    examples = pipe.stacked.encode(texts)
    pipe.scheduler.set_timesteps(STEPS)
    loss = TaskLoss(pipe.stacked, pipe.codec, pipe.scheduler, examples)
    model = ConditionalDenoiser(pipe.task_encoder, pipe.denoiser)
    losses = loss(model, tasks, STEPS - 1, generators(tasks))
    losses.mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for part in ("task_encoder.example", "denoiser.class_in", "denoiser.token_out"):
        assert any(name.startswith(part) and value.abs().max() > 0 for name, value in gradients.items()), part
    torch.nn.init.zeros_(pipe.denoiser.norm_out.weight)
    torch.nn.init.zeros_(pipe.denoiser.norm_out.bias)
    torch.nn.init.zeros_(pipe.denoiser.token_out.bias)
    pipe.task_encoder.rescale(torch.zeros_like(pipe.codec.filled))
    pipe.scheduler.register_to_config(prediction_type="sample")  # the network now says zero: the shared adapter
    losses = loss(model, tasks, 0, generators(tasks))
    for task, found in zip(tasks, losses.tolist(), strict=True):
        support = {name: [texts[row] for row in rows] for name, rows in zip(task.classes, task.support)}
        mean = pipe(support, strength=0).adapters[0].load_into(backbone.classifier(num_labels=2))
        words = backbone.processor.convert_tokens_to_ids(list(task.classes))
        rows, labels = rows_and_labels(task.query)
        with torch.no_grad():
            logits = [mean(**backbone.inputs([texts[row]])).logits[0, -1, words] for row in rows.tolist()]
        expected = torch.nn.functional.cross_entropy(torch.stack(logits), labels).item() / math.log(len(words))
        assert found == pytest.approx(expected, rel=1e-4)
