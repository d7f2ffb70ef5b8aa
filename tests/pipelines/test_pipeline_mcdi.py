"""The pipeline on a tiny BERT: what it takes, what it gives back, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from diffusers import AutoModel, DiffusionPipeline
from tiny import assert_close, seeded, tiny_backbone, tiny_lora_config, tiny_pipeline

from mcdi_hf import AdapterCodec, GeneratedAdapter, MCDiDenoiser, MCDiPipeline, TaskEncoder


SUPPORT = {"first": ["a b c", "a c", "b a"], "second": ["x y z", "z y"]}
TASKS = [
    SUPPORT,
    {"one": ["a x"], "two": ["b y b y"], "three": ["c z", "z c"], "four": ["a a a"]},
    {"left": ["c b a", "b", "c c", "a b", "b b c"], "middle": ["y x"], "right": ["z z z", "x"]},
]


def assert_same(one: GeneratedAdapter, other: GeneratedAdapter) -> None:
    assert one.labels == other.labels
    torch.testing.assert_close(one.tensors, other.tensors, rtol=0, atol=0)


@pytest.fixture(scope="module")
def pipe() -> MCDiPipeline:
    pipe, _ = tiny_pipeline()
    return pipe


@pytest.fixture(scope="module")
def saved(pipe: MCDiPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipe")
    pipe.save_pretrained(folder)
    return folder


def split(pipe: MCDiPipeline, adapter: GeneratedAdapter) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The LoRA matrices, and the head."""
    head = {key: adapter.tensors[key] for key in pipe.codec.layout.head_keys}
    return {key: value for key, value in adapter.tensors.items() if key not in head}, head


def starting_noise(pipe: MCDiPipeline, count: int, ways: int = 2) -> torch.Tensor:
    shape = (count, pipe.codec.num_lora_tokens + ways, pipe.codec.layout.token_dim)
    return torch.randn(shape, generator=seeded(5))


def test_texts_become_an_adapter(pipe: MCDiPipeline) -> None:
    (adapter,) = pipe(SUPPORT, generator=seeded(), num_candidates=2).adapters
    assert isinstance(adapter, GeneratedAdapter)
    assert adapter.labels == ["first", "second"]
    assert adapter.details["shots"] == [3, 2] and adapter.details["num_candidates"] == 2
    assert set(adapter.tensors) == set(pipe.codec.layout.keys)
    pipe.codec.layout.check({key: value.unsqueeze(0) for key, value in adapter.tensors.items()})
    assert all(value.isfinite().all() for value in adapter.tensors.values())


def test_saved_and_loaded(pipe: MCDiPipeline, saved: Path) -> None:
    one, other = MCDiPipeline.from_pretrained(saved), DiffusionPipeline.from_pretrained(saved)
    adapters = [loaded(SUPPORT, generator=seeded()).adapters[0] for loaded in (one, other)]
    assert isinstance(other, MCDiPipeline)
    assert_same(*adapters)
    for name in ("denoiser", "task_encoder", "codec"):
        weights = pipe.components[name].state_dict(), one.components[name].state_dict()
        torch.testing.assert_close(*weights, rtol=0, atol=0)
    # Not bit for bit: weights in a file are aligned otherwise than weights in memory, and matmuls then round otherwise.
    assert_close(adapters[0].tensors, pipe(SUPPORT, generator=seeded()).adapters[0].tensors)


def test_saved_files(saved: Path) -> None:
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == "MCDiPipeline"
    assert {name: value for name, value in index.items() if isinstance(value, list)} == {
        "denoiser": ["mcdi_hf", "MCDiDenoiser"],
        "task_encoder": ["mcdi_hf", "TaskEncoder"],
        "codec": ["mcdi_hf", "AdapterCodec"],
        "scheduler": ["mcdi_hf", "LocalConsistencyScheduler"],
    }
    assert {path.suffix for path in saved.rglob("*") if path.is_file()} == {".json", ".safetensors"}
    assert isinstance(AutoModel.from_pretrained(str(saved), subfolder="denoiser"), MCDiDenoiser)


def test_defaults_of_a_call_are_saved(pipe: MCDiPipeline, tmp_path: Path) -> None:
    other = MCDiPipeline(**pipe.components, num_inference_steps=3, strength=0.25)
    other.save_pretrained(tmp_path)
    loaded = MCDiPipeline.from_pretrained(tmp_path)
    loaded.backbone = pipe.backbone
    adapter = loaded(SUPPORT, generator=seeded()).adapters[0]
    assert loaded.num_timesteps == adapter.details["num_inference_steps"] == 3
    expected = pipe(SUPPORT, generator=seeded(), num_inference_steps=3, strength=0.25).adapters[0]
    assert_close(adapter.tensors, expected.tensors)


@pytest.mark.parametrize("support", TASKS)
def test_strength_zero_is_the_baseline(pipe: MCDiPipeline, support: dict[str, list[str]]) -> None:
    baseline = pipe.baseline(support)
    assert_same(pipe(support, strength=0.0, num_candidates=2).adapters[0], baseline)
    generated = pipe(support, generator=seeded()).adapters[0]
    assert all(not torch.allclose(generated.tensors[key], baseline.tensors[key]) for key in generated.tensors)


def test_strength_is_linear(pipe: MCDiPipeline) -> None:
    none, half, full = (pipe(SUPPORT, generator=seeded(), strength=s, output_type="pt").adapters for s in (0, 0.5, 1))
    assert_close(half, (none + full) / 2)


def test_without_temperature_nothing_is_random(pipe: MCDiPipeline) -> None:
    def twice(temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        settings = {"temperature": temperature, "num_inference_steps": 4, "output_type": "pt"}
        return pipe(SUPPORT, **settings).adapters, pipe(SUPPORT, **settings).adapters

    cold, warm = twice(0.0), twice(1.0)
    assert cold[0].equal(cold[1])
    assert not torch.allclose(*warm, atol=1e-3)


@pytest.mark.parametrize("combine", ["mean", "select"])
def test_batch_is_its_tasks_one_by_one(pipe: MCDiPipeline, combine: str) -> None:
    settings = {"num_candidates": 2, "combine": combine, "num_inference_steps": 4}
    batch = pipe(TASKS, generator=[seeded(seed) for seed in range(3)], **settings).adapters
    for seed, (task, adapter) in enumerate(zip(TASKS, batch, strict=True)):
        single = pipe(task, generator=seeded(seed), **settings).adapters[0]
        assert adapter.labels == single.labels == list(task)
        assert_close(adapter.tensors, single.tensors)
        losses, expected = (one.details.pop("support_losses") for one in (adapter, single))
        loss, expected_loss = (one.details.pop("support_loss") for one in (adapter, single))
        assert adapter.details == single.details
        if combine == "select":
            assert losses == pytest.approx(expected, rel=1e-4) and loss == pytest.approx(expected_loss, rel=1e-4)
        else:
            assert losses is expected is loss is expected_loss is None


def test_permuted_classes_permute_the_head_alone(pipe: MCDiPipeline) -> None:
    task, order = TASKS[1], [2, 0, 3, 1]
    permuted = {list(task)[index]: list(task.values())[index] for index in order}
    plain, other = (pipe(one, temperature=0.0).adapters[0] for one in (task, permuted))
    (plain_lora, plain_head), (other_lora, other_head) = split(pipe, plain), split(pipe, other)
    assert other.labels == [plain.labels[index] for index in order]
    assert_close(other_lora, plain_lora)
    assert_close(other_head, {key: value[order] for key, value in plain_head.items()})


def test_order_of_examples_does_not_matter(pipe: MCDiPipeline) -> None:
    turned = {label: examples[::-1] for label, examples in SUPPORT.items()}
    plain, other = (pipe(one, generator=seeded()).adapters[0] for one in (SUPPORT, turned))
    assert_close(other.tensors, plain.tensors)


def test_condition_takes_the_place_of_the_support_but_for_the_head(pipe: MCDiPipeline) -> None:
    condition = {"other": ["z", "y x"], "one": ["a a"]}
    plain = pipe(SUPPORT, generator=seeded()).adapters[0]
    assert_same(pipe(SUPPORT, condition=SUPPORT, generator=seeded()).adapters[0], plain)
    other = pipe(SUPPORT, condition=condition, generator=seeded()).adapters[0]
    assert other.labels == plain.labels
    assert all(not other.tensors[key].equal(plain.tensors[key]) for key in plain.tensors)
    assert_same(pipe(SUPPORT, condition=condition, strength=0.0).adapters[0], pipe.baseline(SUPPORT))


def test_output_types(pipe: MCDiPipeline) -> None:
    settings = {"num_candidates": 2, "num_inference_steps": 3}
    peft = pipe(TASKS, generator=seeded(), **settings).adapters
    flat = pipe(TASKS, generator=seeded(), output_type="pt", **settings).adapters
    latent = pipe(TASKS, generator=seeded(), output_type="latent", **settings).adapters
    layout, ways = pipe.codec.layout, max(map(len, TASKS))
    assert flat.shape == (3, layout.numel + ways * (layout.feature_dim + 1))
    assert latent.shape == (3, pipe.codec.num_lora_tokens + ways, layout.token_dim)
    assert flat[1].equal(torch.cat([peft[1].tensors[key].flatten() for key in layout.keys]))
    (as_tuple,) = pipe(TASKS, generator=seeded(), output_type="latent", return_dict=False, **settings)
    assert as_tuple.equal(latent)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20])
def test_number_of_steps(pipe: MCDiPipeline, steps: int) -> None:
    seen = []

    def callback(_: MCDiPipeline, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict:
        assert set(tensors) == {"latents"} and tensors["latents"].isfinite().all()
        seen.append((step, int(timestep)))
        return tensors

    plain = pipe(SUPPORT, generator=seeded(), num_inference_steps=steps).adapters[0]
    called = pipe(SUPPORT, generator=seeded(), num_inference_steps=steps, callback_on_step_end=callback).adapters[0]
    assert_same(called, plain)
    assert seen == list(enumerate(pipe.scheduler.timesteps.tolist()))
    assert len(seen) == pipe.num_timesteps == plain.details["num_inference_steps"] == steps


def test_callback_replaces_latents(pipe: MCDiPipeline) -> None:
    def callback(pipe: MCDiPipeline, step: int, _: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict:
        return {"latents": torch.zeros_like(tensors["latents"])} if step == pipe.num_timesteps - 1 else {}

    assert_same(pipe(SUPPORT, callback_on_step_end=callback).adapters[0], pipe.baseline(SUPPORT))


def test_latents_are_the_starting_noise(pipe: MCDiPipeline) -> None:
    noise = starting_noise(pipe, 1)
    drawn = torch.randn(noise.shape, generator=seeded(3))
    settings = {"eta": 0.0, "num_inference_steps": 4}
    expected = pipe(SUPPORT, generator=seeded(3), **settings).adapters[0]
    assert_same(pipe(SUPPORT, latents=drawn, **settings).adapters[0], expected)
    assert not torch.allclose(
        pipe(SUPPORT, latents=noise, output_type="pt", **settings).adapters,
        pipe(SUPPORT, latents=drawn, output_type="pt", **settings).adapters,
    )


def test_mean_is_that_of_the_candidates(pipe: MCDiPipeline) -> None:
    settings = {"eta": 0.0, "num_inference_steps": 4, "output_type": "pt"}
    noise = starting_noise(pipe, 3)
    singles = [pipe(SUPPORT, latents=row.unsqueeze(0), **settings).adapters for row in noise]
    together = pipe(SUPPORT, latents=noise, num_candidates=3, **settings).adapters
    assert_close(together, torch.stack(singles).mean(dim=0))


def test_features_in_place_of_texts(pipe: MCDiPipeline) -> None:
    features = pipe.embed(SUPPORT)
    width = pipe.codec.layout.feature_dim
    assert {label: value.shape for label, value in features.items()} == {"first": (3, width), "second": (2, width)}
    assert_close(
        pipe(features, generator=seeded()).adapters[0].tensors, pipe(SUPPORT, generator=seeded()).adapters[0].tensors
    )
    assert_close(pipe.baseline(features).tensors, pipe.baseline(SUPPORT).tensors)


def make_dataset(**columns: list) -> Dataset:
    features = {name: Value("string") for name in columns if name != "intent"}
    return Dataset.from_dict(columns, Features({**features, "intent": ClassLabel(names=["none", "first", "second"])}))


@pytest.mark.parametrize("first", [1, 2])
def test_dataset_is_the_dict_in_the_order_of_its_class_names(pipe: MCDiPipeline, first: int) -> None:
    rows = [(text, index) for index, examples in enumerate(SUPPORT.values(), start=1) for text in examples]
    rows.sort(key=lambda row: row[1] != first)
    texts, labels = (list(column) for column in zip(*rows))
    dataset = make_dataset(query=texts, intent=labels)
    assert_same(pipe(dataset, generator=seeded()).adapters[0], pipe(SUPPORT, generator=seeded()).adapters[0])


FEATURES = {"first": torch.zeros(1, 16), "second": torch.ones(1, 16)}


@pytest.mark.parametrize(
    ("support", "error", "message"),
    [
        ({"only": ["a"]}, ValueError, r"\['only'\].*at least two"),
        ([], ValueError, "empty"),
        ({"first": [], "second": ["a"]}, ValueError, "'first' has no example"),
        ({"first": ["a", " "], "second": ["a"]}, ValueError, "'first' holds ' '"),
        ({"first": ["a", 3], "second": ["a"]}, ValueError, "'first' holds 3"),
        ({"first": "a b", "second": ["a"]}, ValueError, "'first' are one string"),
        ({"": ["a"], "second": ["a"]}, ValueError, "'' is no label"),
        ({0: ["a"], 1: ["a"]}, ValueError, "0 is no label"),
        ({**FEATURES, "first": torch.full((1, 16), float("nan"))}, ValueError, "'first' hold NaN"),
        ({**FEATURES, "first": torch.full((1, 16), float("inf"))}, ValueError, "'first' hold NaN or inf"),
        ({**FEATURES, "first": torch.zeros(16)}, ValueError, r"'first' have shape \(16,\)"),
        ({**FEATURES, "first": torch.zeros(0, 16)}, ValueError, r"'first' have shape \(0, 16\)"),
        ({"first": torch.zeros(1, 99), "second": torch.zeros(1, 99)}, ValueError, "expected \\(shots, 16\\)"),
        ({**FEATURES, "first": ["a"]}, ValueError, "mixes texts and ready features"),
        ([SUPPORT, FEATURES], ValueError, "mixes texts and ready features"),
        ("a text", TypeError, "is a str"),
        ([["a"], ["b"]], TypeError, "is a list"),
        (
            make_dataset(text=["a", "b"], more=["c", "d"], intent=[1, 2]),
            ValueError,
            "one ClassLabel and one of strings",
        ),
        (make_dataset(intent=[1, 2]), ValueError, "one ClassLabel and one of strings"),
        (make_dataset(text=["a", "b", "c"], intent=[1, 2, -1]), ValueError, "without a label in 'intent'"),
    ],
)
def test_wrong_support_is_refused(pipe: MCDiPipeline, support: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pipe(support)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"combine": "best"}, "combine is 'best'.*'first', 'mean', 'select'"),
        ({"num_candidates": 0}, "num_candidates is 0"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"output_type": "np"}, "output_type is 'np'"),
        ({"generator": [seeded(), seeded()]}, "2 generators for 1 support sets"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"\['noise'\]"),
        ({"condition": TASKS[1]}, r"\[4\] classes, the support sets \[2\]"),
        ({"condition": [SUPPORT, SUPPORT]}, r"\[2, 2\] classes, the support sets \[2\]"),
        ({"condition": {"first": ["a"]}}, "at least two"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 10_000}, "num_inference_steps"),
    ],
)
def test_wrong_arguments_are_refused(pipe: MCDiPipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(SUPPORT, **arguments)


def test_select_refuses_features(pipe: MCDiPipeline) -> None:
    with pytest.raises(ValueError, match="need examples"):
        pipe(pipe.embed(SUPPORT), combine="select")


@pytest.mark.parametrize("change", [{"seed": 1}, {"pooling": "default"}])
def test_another_backbone_is_refused_by_name(pipe: MCDiPipeline, change: dict[str, Any]) -> None:
    other = tiny_backbone(**change)
    with pytest.raises(ValueError) as error:
        pipe.backbone = other
    wanted = pipe.codec.config.base_model
    for name in (wanted["name_or_path"], wanted["fingerprint"], other.name_or_path, other.fingerprint, other.pooling):
        assert name in str(error.value)


def test_another_backbone_is_refused_on_loading(pipe: MCDiPipeline) -> None:
    other = tiny_backbone(seed=1)
    misled = MCDiPipeline(**pipe.components, base_model_name_or_path=other.name_or_path)
    with pytest.raises(ValueError, match="Load the backbone"):
        misled(SUPPORT)


@pytest.mark.parametrize(
    ("overrides", "message"), [({"r": 8}, "tokens: "), ({"target_modules": ["query"]}, "tokens: ")]
)
def test_components_of_other_adapters_are_refused(pipe: MCDiPipeline, overrides: dict[str, Any], message: str) -> None:
    codec = AdapterCodec.from_backbone(pipe.backbone, tiny_lora_config(**overrides), token_dim=32)
    with pytest.raises(ValueError, match=f"another layout than the codec .*{message}"):
        MCDiPipeline(**pipe.components | {"codec": codec})


def test_a_task_encoder_of_another_width_is_refused(pipe: MCDiPipeline) -> None:
    with pytest.raises(ValueError, match="feature_dim: 7 there"):
        MCDiPipeline(**pipe.components | {"task_encoder": TaskEncoder(feature_dim=7, dim=16)})
