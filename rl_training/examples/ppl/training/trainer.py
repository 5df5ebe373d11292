"""TRL's GRPOTrainer, with what a resumed run needs to go on as if it had never stopped. Import Unsloth before this."""

from collections.abc import Callable, Mapping

import torch
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from ..errors import InputError
from ..sampling import GivenIds, own_settings, prompt_ids


class ResumableGRPOTrainer(GRPOTrainer):
    """Seven differences: prompts are read as the scorer reads them, of the model's generation_config.json only the
    special tokens act on the sampling, reward functions get the `prompt_ids` that the policy was given, adapters keep
    their precision, an epoch's order follows from its number, a resumed run with `beta` takes up the trained adapter,
    too, the model card says what the run was.

    chat: what the chat template is given, keywords of `ppl.chat.render_prompt`. card: called with the trainer's state
    when TRL has written README.md into the output folder.

    On 4-bit weights TRL turns adapters into bfloat16, where a step of 5e-5 is lost beside a weight of 0.1, and where a
    checkpoint that is loaded again makes them float32; Unsloth's own trainer leaves them in float32, and so does this.
    """

    def __init__(self, model, *args, chat: Mapping | None = None, card: Callable | None = None, **kwargs) -> None:
        trained = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
        try:
            super().__init__(model, *args, **kwargs)
        except (ValueError, TypeError, ImportError, NotImplementedError, OSError) as error:
            raise InputError(f"TRL's GRPOTrainer does not take these settings: {error}") from error
        for parameter, data in trained:
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)
        self.chat = chat or {}
        self.card = card
        if self.chat_template is not None:  # TRL's own, for tools: the scorer reads it, too
            self.processing_class.chat_template = self.chat_template

    def _tokenize_prompts(self, prompts: list):
        if self.environment_factories is not None:  # it brings tools of its own for each prompt
            return super()._tokenize_prompts(prompts)
        return prompt_ids(prompts, self.processing_class, **self.chat), None, {}

    def _generate(self, prompts: list):
        with own_settings(self.model):
            generated = super()._generate(prompts)
        self._given_ids = generated[0]  # also where a `rollout_func` makes other ones of the prompts
        return generated

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        inputs = [{**row, "prompt_ids": GivenIds(ids)} for row, ids in zip(inputs, self._given_ids, strict=True)]
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def create_model_card(self, *args, **kwargs) -> None:
        super().create_model_card(*args, **kwargs)
        if self.card is not None and self.is_world_process_zero():
            self.card(self.state)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        model = self.model if model is None else model
        # With --beta TRL adds an adapter `ref`, a copy of the start, which is saved in a folder of its own. Where there
        # are such folders, transformers loads from them alone: the adapter in training would begin anew.
        if "ref" in getattr(model, "peft_config", {}):
            model.load_adapter(resume_from_checkpoint, "default", is_trainable=True)

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        return _OrderOfEpoch(sampler, lambda: int(self.state.epoch or 0))


class _OrderOfEpoch(RepeatSampler):
    """TRL's sampler draws each epoch's order after the last one's: a new process would begin with the first again."""

    def __init__(self, sampler: RepeatSampler, epoch: Callable[[], int]) -> None:
        shape = (sampler.mini_repeat_count, sampler.batch_size, sampler.repeat_count)
        super().__init__(sampler.data_source, *shape, sampler.shuffle, sampler.seed)
        self.epoch = epoch

    def __iter__(self):
        if self.shuffle:
            self.generator.manual_seed(self.seed)
            for _ in range(self.epoch()):
                torch.randperm(self.num_samples, generator=self.generator)
        return super().__iter__()
