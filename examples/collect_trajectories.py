"""Weight preparation, as `mcdi-hf collect` does it; `--help` has every argument.

    python examples/collect_trajectories.py --dataset_name CLINC150 --label_column intent --group_column domain \\
        --held_out_domains utility work small_talk meta oos --validation_domains utility --output_dir runs/intents
"""

import sys

from mcdi_hf.commands.main import main


main(["collect", *sys.argv[1:]])
