"""A reward function that keeps what it last measured."""

from mlppl.reward.terms import details_of, earned
from multi_level_ppl_trl import MultiLevelPPLRewardFunction


class Heard(MultiLevelPPLRewardFunction):
    def measure(self, *args, **kwargs):
        self.measured = super().measure(*args, **kwargs)
        return self.measured

    @property
    def found(self):
        """The details of the last call, as `compute_rewards` returns them."""
        one = earned(self.measured, self.config, by_level=self.level is not None)
        return details_of(self.measured, one, self.config.levels)
