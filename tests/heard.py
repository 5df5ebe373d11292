"""A reward function that keeps what its last call found."""

from multi_level_ppl_trl import MultiLevelPPLRewardFunction
from ppl.reward.terms import details_of


class Heard(MultiLevelPPLRewardFunction):
    """found: the details of the last call, as `compute_rewards` returns them."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.found = {}
        self.listen(lambda call: self.found.update(details_of(call.measured, call.earned, self.config.levels)))
