#!/usr/bin/env bash
# Which gauge of the trajectories a generator learns best from: the same tasks and the same training in each of the three.
#   examples/compare_gauges.sh DATASET [OUTPUT_DIR]     DATASET is a folder or Hub id of CLINC150 with text, intent, domain
# Prints, for each gauge and seed, the validation accuracy of what is free (step 0, strength 0) and the best that the
# generator reached; `train.jsonl` beside each run holds every validation.
set -euo pipefail
cd "$(dirname "$0")/.."
dataset=${1:?name the data set: a folder or Hub id of CLINC150 with the columns text, intent and domain}
runs=${2:-runs/gauges}
for gauge in shared_start frozen_a canonical; do
    mkdir -p "$runs/$gauge"
    # One start for all: it does not depend on the gauge.
    [ -f "$runs/shared_start/shared_adapter.safetensors" ] && cp -n "$runs/shared_start/shared_adapter.safetensors" "$runs/$gauge/"
    .venv/bin/python examples/collect_trajectories.py --dataset_name "$dataset" --label_column intent \
        --group_column domain --held_out_domains utility work small_talk meta oos --query_split validation \
        --ways 3 15 --num_tasks 128 --shared_steps 300 --gauge "$gauge" --output_dir "$runs/$gauge"
    for seed in 0 1; do
        run="$runs/$gauge/seed-$seed"
        .venv/bin/python examples/train_mcdi.py --trajectories "$runs/$gauge/trajectories" --validation_domains utility \
            --max_train_steps 100 --validation_steps 50 --seed "$seed" --output_dir "$run" > "$run.log"
        grep '^{' "$run.log" > "$run.jsonl"
        echo "$gauge, seed $seed: free $(head -n 1 "$run.jsonl"); $(tail -n 1 "$run.log")"
    done
done
