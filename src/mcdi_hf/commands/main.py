"""`mcdi-hf`: what the package does, in a shell."""

import argparse
import os
import sys
import warnings

from diffusers.utils import logging as diffusers
from huggingface_hub.errors import HfHubHTTPError
from transformers.utils import logging as transformers

from . import collect, evaluate, generate, predict, train


OWN = {
    "generate": (generate, "labelled examples in, adapters out"),
    "predict": (predict, "classify the examples of a file by an adapter"),
    "evaluate": (evaluate, "accuracy by shots on a data set, beside what is free and gradient LoRA"),
}
SETTINGS = {
    "collect": (collect, "weight preparation: a shared start and trajectories"),
    "train": (train, "meta-training of a generator"),
}


def main(argv: list[str] | None = None) -> None:
    """Run a command; whatever is wrong with what it was given ends it with one line."""
    argv = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # The loading of parts that take a second, a head that a backbone lacks because it is generated, what will be
    # renamed: nothing that the user of a command can mend.
    transformers.set_verbosity_error()
    transformers.disable_progress_bar()
    diffusers.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    if argv and argv[0] in SETTINGS:
        run, given = SETTINGS[argv[0]][0].main, argv[1:]
    else:
        parser = argparse.ArgumentParser(prog="mcdi-hf", description=__doc__)
        commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
        for name, (module, text) in (OWN | SETTINGS).items():
            own = commands.add_parser(name, help=text, description=module.__doc__)
            if name in OWN:
                module.add_arguments(own)
        given = parser.parse_args(argv)
        run = OWN[given.command][0].run
    try:
        run(given)
    except (ValueError, OSError, FloatingPointError, HfHubHTTPError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
