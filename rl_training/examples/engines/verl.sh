#!/usr/bin/env bash
# GRPO in verl (0.9) on the multi-level perplexity reward. Paths are absolute: they are opened in Ray's workers, which run
# elsewhere. More of verl's settings go behind it, such as
#
#   engines/verl.sh data.train_files=$PWD/train.parquet data.val_files=$PWD/test.parquet actor_rollout_ref.model.path=MODEL
#
# GDPO normalises the three levels apart instead of their mean (arXiv 2601.05242). In verl 0.9 its trainer is the old one:
#
#   engines/verl.sh ... algorithm.adv_estimator=gdpo reward.reward_manager.name=gdpo trainer.use_v1=False \
#       +algorithm.gdpo_reward_keys='[score_word,score_phrase,score_sentence]' \
#       +algorithm.gdpo_reward_weights='[0.2,0.3,0.5]'
set -euo pipefail

EXAMPLES=$(cd "$(dirname "$0")/.." && pwd)
PPL_REWARD_CONFIG=$(realpath "${PPL_REWARD_CONFIG:-$EXAMPLES/engines/reward.yaml}")

python -m verl.trainer.main_ppo \
    --config-path "$EXAMPLES/engines" --config-name verl \
    reward.custom_reward_function.path="$EXAMPLES/engines/reward.py" \
    +ray_kwargs.ray_init.runtime_env.env_vars.PPL_REWARD_CONFIG="$PPL_REWARD_CONFIG" "$@"
