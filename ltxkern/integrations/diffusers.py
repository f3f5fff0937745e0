"""diffusers: the res2s sampler as a scheduler of its pipelines."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch import Tensor

from ltxkern.integrations.samplers import Res2sRun, SeededNoise
from ltxkern.pipeline.sampling.state import fill_normal


class Res2sScheduler(FlowMatchEulerDiscreteScheduler):
    """`res2s_sample` in pipelines of diffusers that denoise with `FlowMatchEulerDiscreteScheduler`, the stock LTX-2 ones first.

    A schedule of n steps has 2n + 1 timesteps, one an evaluation: two a step, and one at the end. A token whose velocity is zero in
    every channel stays as it is, as the tokens of a given picture must, and gets no noise.

    Args:
        noise_seed: of the step noise; that of the substeps is 10000 higher. Each `set_timesteps` begins anew, so runs repeat. A
            deep copy draws from the same source in turn, as the stock pipeline's copy for audio must.
        eta, substep_eta, anchor_refinement: as in `res2s_sample`.
        num_train_timesteps, ...: of `FlowMatchEulerDiscreteScheduler`, which makes the schedule.

    Example:
        >>> pipe.scheduler = Res2sScheduler.from_config(pipe.scheduler.config)
    """

    # Two evaluations a step: pipelines that begin within a schedule begin at a whole step then.
    order = 2
    sigmas: Tensor

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        shift_terminal: float | None = None,
        time_shift_type: str = "exponential",
        noise_seed: int = -1,
        eta: float = 0.5,
        substep_eta: float = 0.5,
        anchor_refinement: bool = True,
    ) -> None:
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            shift=shift,
            use_dynamic_shifting=use_dynamic_shifting,
            base_shift=base_shift,
            max_shift=max_shift,
            base_image_seq_len=base_image_seq_len,
            max_image_seq_len=max_image_seq_len,
            shift_terminal=shift_terminal,
            time_shift_type=time_shift_type,
        )
        self._drawn = SeededNoise(noise_seed)
        self._run: Res2sRun | None = None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """As in `FlowMatchEulerDiscreteScheduler`; then a timestep for each evaluation.

        Raises:
            ValueError: a schedule that is not strictly decreasing.
        """
        super().set_timesteps(num_inference_steps, "cpu", sigmas, mu, timesteps)
        config, levels = self.config, self.sigmas
        self._run = Res2sRun(
            levels, eta=config.eta, substep_eta=config.substep_eta, anchor_refinement=config.anchor_refinement
        )
        self._drawn.restart()
        self.sigmas = torch.tensor([*self._run.sigmas, 0.0])
        self.timesteps = (self.sigmas[:-1] * config.num_train_timesteps).to(device)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """The state of the next evaluation.

        Args:
            model_output: velocity, (B, ...).
            timestep: one of `timesteps`; they are taken one after another.
            sample: the state that was evaluated.
            generator: source of the noise in the place of the seeded one; one, or one a sample.
            per_token_timesteps: not served; a token that stays has velocity zero.
            return_dict: False for a tuple.
        Returns:
            The state, shape and dtype of model_output.
        Raises:
            RuntimeError: before `set_timesteps`, or in the middle of a step.
            ValueError: per_token_timesteps is given.
        """
        if self._run is None:
            raise RuntimeError("step needs a schedule: call set_timesteps first")
        if per_token_timesteps is not None:
            raise ValueError("per_token_timesteps is not served: a token whose velocity is zero stays; give None")
        if self.step_index is None:
            self._init_step_index(timestep)
        index = self.step_index
        generators = generator if isinstance(generator, list) else [generator]

        def draw(buffer: Tensor, _: int) -> None:
            fill_normal(buffer, generators)

        state = sample.to(torch.promote_types(sample.dtype, torch.float32))
        x0 = state - float(self.sigmas[index]) * model_output.to(state.dtype)
        mask = None
        if index % 2 == 0:
            mask = model_output.reshape(len(sample), -1, sample.shape[-1]).any(dim=-1, keepdim=True).float()
        source = self._drawn if generator is None else draw
        result = self._run.take(index, state, x0, source, mask).to(model_output.dtype)
        self._step_index += 1
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=result) if return_dict else (result,)
