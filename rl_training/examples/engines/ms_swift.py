"""The reward as an ORM of ms-swift (4.6): a plugin that `swift rlhf --external_plugins engines/ms_swift.py` imports.

PPL_REWARD_CONFIG names the YAML file that describes the reward; a name that is wrong in it is said on import. The rows'
column `reference` arrives under its name. The scorer reads the prompt as chat messages, so it needs a chat template.
"""

from swift.rewards import ORM, orms

from mlppl.reward.configured import multi_level_ppl, read_settings

read_settings()


class MultiLevelPPL(ORM):
    def __call__(self, completions, messages, **columns):
        # The last message is the completion.
        return multi_level_ppl([one[:-1] for one in messages], completions, **columns)


orms["multi_level_ppl"] = MultiLevelPPL
