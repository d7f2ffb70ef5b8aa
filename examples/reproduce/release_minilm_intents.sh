#!/usr/bin/env bash
# Makes the files of model_cards/mcdi-minilm-intents from CLINC150: trajectories, then the generator.
#   examples/release_minilm_intents.sh DATASET     DATASET is a folder or Hub id with text, intent, domain
set -euo pipefail
cd "$(dirname "$0")/.."
dataset=${1:?name the data set: a folder or Hub id of CLINC150 with the columns text, intent and domain}
runs=runs/mcdi-minilm-intents

.venv/bin/python examples/collect_trajectories.py --dataset_name "$dataset" --label_column intent --group_column domain \
    --train_domains banking credit_cards kitchen_and_dining home auto_and_commute travel \
    --query_split validation --ways 3 15 --num_tasks 256 --shared_steps 300 --output_dir "$runs"
.venv/bin/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
    examples/train_mcdi.py --config examples/configs/minilm_intents.json --trajectories "$runs/trajectories" \
    --dataset_name "$dataset" --output_dir "$runs/generator"
cp -r "$runs/generator/pipeline/." model_cards/mcdi-minilm-intents/
