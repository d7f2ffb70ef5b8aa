"""Meta-training, as `mcdi-hf train` does it; `--help` has every argument.

    accelerate launch examples/train_mcdi.py --config examples/reproduce/configs/text.json \\
        --trajectories runs/text/trajectories --output_dir runs/text/generator
"""

import sys

from mcdi_hf.commands.main import main


main(["train", *sys.argv[1:]])
