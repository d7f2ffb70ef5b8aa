"""From twenty labelled sentences to a working adapter, on the released pipeline and the real backbone.

    python examples/quickstart.py

Generates an adapter for four classes of messages to a public library, a subject that the generator never saw, saves
it, loads it back with PEFT and classifies twenty other sentences; then does the same without and with training.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from data import installed_backbone
from peft import LoraConfig, PeftModel
from tqdm.auto import tqdm

from mcdi_hf import MCDiPipeline
from mcdi_hf.adapters.head import class_means, imprint_head
from mcdi_hf.evaluation.gradient import frozen_features, gradient_lora


SUPPORT = {
    "renew a loan": [
        "can I keep this novel for two more weeks",
        "please extend my loan, I have not finished reading",
        "I need to renew the books on my card",
        "the due date is tomorrow, may I hold on to it longer",
        "give me another month with the atlas",
    ],
    "find a book": [
        "do you have anything by Ursula Le Guin",
        "which shelf are the gardening books on",
        "I am looking for a biography of Marie Curie",
        "is there a copy of Moby Dick in the building",
        "where would I find poetry in Portuguese",
    ],
    "book a room": [
        "is there a quiet room for six people on Friday",
        "I want to reserve the study space upstairs",
        "can our reading circle meet in the hall next week",
        "how do I sign up for a desk with a projector",
        "we need a place to rehearse on Saturday morning",
    ],
    "dispute a fine": [
        "why was I charged, I returned it on time",
        "this late fee must be a mistake",
        "I already paid for the damaged cover",
        "take the penalty off my account, the drop box was closed",
        "you billed me for a disc that I never borrowed",
    ],
}

QUERY = {
    "renew a loan": [
        "could I have the cookbook a little longer",
        "my books are due but I am on holiday, extend them please",
        "renew everything I have out",
        "another fortnight with this thriller would be lovely",
        "is it possible to push back the return date",
    ],
    "find a book": [
        "I cannot see any travel guides to Japan",
        "what do you have about the history of maps",
        "help me locate the third volume of the series",
        "are there audiobooks for children",
        "which floor has the law collection",
    ],
    "book a room": [
        "I would like the seminar room on Tuesday evening",
        "any free spaces for a group of four this afternoon",
        "reserve a booth for my video call",
        "our chess club needs tables every Thursday",
        "can I get the conference room for an hour",
    ],
    "dispute a fine": [
        "I should not owe anything for that magazine",
        "the overdue charge is wrong",
        "please cancel the fee, your scanner was broken",
        "I was fined twice for the same book",
        "there is a bill here that is not mine",
    ],
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default=str(Path(__file__).parents[1] / "model_cards" / "mcdi-minilm-intents"))
    parser.add_argument(
        "--pretrained_model_name_or_path", help="the backbone; by default the wheel's all-MiniLM-L6-v2"
    )
    parser.add_argument("--num_candidates", type=int, default=8)
    parser.add_argument("--gradient_steps", type=int, default=10, help="the default is what the benchmark chose")
    parser.add_argument("--gradient_learning_rate", type=float, default=1e-3)
    return parser.parse_args()


def predict(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits.argmax(dim=-1)


def main() -> None:
    args = parse_args()
    pipe = MCDiPipeline.from_pretrained(
        args.pipeline,
        base_model_name_or_path=args.pretrained_model_name_or_path or installed_backbone(),
    )
    backbone = pipe.backbone
    pipe(SUPPORT, num_inference_steps=1)  # the first call of anything is slow
    texts = [text for examples in QUERY.values() for text in examples]
    labels = torch.tensor([index for index, examples in enumerate(QUERY.values()) for _ in examples])
    inputs = backbone.inputs(texts)
    rows = []

    start = time.perf_counter()
    adapter = pipe(SUPPORT, num_candidates=args.num_candidates, generator=torch.manual_seed(0)).adapters[0]
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        adapter.save_pretrained(folder)
        model = PeftModel.from_pretrained(backbone.classifier(num_labels=len(SUPPORT)), folder)
    predicted = predict(model, inputs)
    rows.append(("generated adapter, saved and loaded", predicted, seconds))

    start = time.perf_counter()
    support = [text for examples in SUPPORT.values() for text in examples]
    support_labels = torch.tensor([index for index, examples in enumerate(SUPPORT.values()) for _ in examples])
    means = class_means(frozen_features(backbone, support)[None], support_labels[None], len(SUPPORT))
    weight, bias = imprint_head(means, 1.0)
    seconds = time.perf_counter() - start
    rows.append(
        (
            "frozen backbone, imprinted head",
            (frozen_features(backbone, texts) @ weight[0].T + bias[0]).argmax(-1),
            seconds,
        )
    )

    config = LoraConfig(**pipe.codec.config.lora_config)
    start = time.perf_counter()
    with tqdm(total=1, desc=f"gradient LoRA, {args.gradient_steps} steps") as bar:
        model = gradient_lora(backbone, SUPPORT, config, args.gradient_steps, args.gradient_learning_rate)
        bar.update()
    seconds = time.perf_counter() - start
    rows.append(("gradient LoRA on the same examples", predict(model, inputs), seconds))

    print("\nWhat the generated adapter says")
    for text, index in zip(texts, predicted.tolist()):
        print(f"  {adapter.labels[index]:<15} {text}")
    print(f"\n{'':<36} accuracy   time to adapter")
    for name, found, seconds in rows:
        print(f"{name:<36} {(found == labels).float().mean():8.2f} {1000 * seconds:14.0f} ms")


if __name__ == "__main__":
    main()
