#!/usr/bin/env bash
# GRPO in OpenRLHF (0.11; since 0.10 its flags have dots) on the multi-level perplexity reward. What is about the reward are the
# variable PPL_REWARD_CONFIG and the flags --reward.remote_url and --data.label_key; the rest is an example for 8 GPUs.
# A data set's rows are {"prompt": ..., "reference": ...}.
set -euo pipefail

EXAMPLES=$(cd "$(dirname "$0")/.." && pwd)
# Absolute, and set before `ray start` too, for its workers.
PPL_REWARD_CONFIG=$(realpath "${PPL_REWARD_CONFIG:-$EXAMPLES/engines/reward.yaml}")
export PPL_REWARD_CONFIG

python -m openrlhf.cli.train_ppo_ray \
    --reward.remote_url "$EXAMPLES/engines/reward.py" \
    --data.prompt_dataset "${DATASET:?a data set on the hub or a .jsonl file}" \
    --data.input_key prompt \
    --data.label_key reference \
    --actor.model_name_or_path "${MODEL:?the policy}" \
    --algo.advantage.estimator group_norm \
    --rollout.n_samples_per_prompt 8 \
    --rollout.batch_size 128 \
    --rollout.max_new_tokens 512 \
    --train.batch_size 1024 \
    --train.colocate_all \
    --actor.num_nodes 1 --actor.num_gpus_per_node 8 \
    --ref.num_nodes 1 --ref.num_gpus_per_node 8 \
    --vllm.num_engines 8 --vllm.tensor_parallel_size 1 \
    --ckpt.output_dir output_openrlhf "$@"
