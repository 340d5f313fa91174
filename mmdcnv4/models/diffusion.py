# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The U-Net of latent diffusion with DCNv4, its training loss and its sampler; needs diffusers.

Source:   table 9 of "Efficient Deformable ConvNets", Xiong et al., CVPR 2024, arXiv:2401.06197; the
          network is that of "High-Resolution Image Synthesis with Latent Diffusion Models",
          Rombach et al., CVPR 2022, arXiv:2112.10752, the schedule that of "All are Worth Words",
          Bao et al., CVPR 2023, arXiv:2209.12152.
Differs:  which layers were replaced is inferred from the published number of parameters, 566M: the
          3x3 convolutions of the residual blocks, with 32 channels per group. The class enters as
          one context token, which is not published either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .replacement import ReplacementReport, replace_with_dcnv4

# parts of the U-Net by their names in diffusers
PARTS = {'res': '*.resnets.*.conv[12]', 'updown': '*samplers.0.conv'}
_STABLE_DIFFUSION = dict(
    sample_size=32, in_channels=4, out_channels=4, layers_per_block=2, attention_head_dim=8,
    block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768)


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise ImportError("the U-Net of latent diffusion is that of the package diffusers: pip "
                          f"install 'mmdcnv4[diffusion]' ({error})") from None
    return diffusers


def latent_diffusion_unet(replace: Sequence[str] = ('res',), *, group_channels: int = 32,
                          dw_kernel_size: Optional[int] = None, **sizes: Any
                          ) -> tuple[nn.Module, Optional[ReplacementReport]]:
    """Builds the U-Net, and replaces its 3x3 convolutions by DCNv4.

    Args:
        replace: 'res', those of the residual blocks, and 'updown', those that follow a change of
            the resolution; none for the original. Its attention does not know the size of the
            map and stays.
        group_channels, dw_kernel_size: of DCNv4.
        sizes: arguments of `diffusers.UNet2DConditionModel`; those of Stable Diffusion 1 if none.

    Returns:
        The network, and what was replaced, None without a replacement.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: a part has another name.
    """
    unknown = [name for name in replace if name not in PARTS]
    if isinstance(replace, str) or unknown:
        raise ValueError(f'latent_diffusion_unet: replace must be some of {tuple(PARTS)}, got '
                         f'{replace!r}')
    unet = _diffusers().UNet2DConditionModel(**(sizes or _STABLE_DIFFUSION))
    if not replace:
        return unet, None
    report = replace_with_dcnv4(
        unet, match=[PARTS[name] for name in replace], targets=('conv3x3',),
        cfg=dict(group_channels=group_channels, dw_kernel_size=dw_kernel_size))
    return unet, report


def noise_schedule(kind: str) -> Any:
    """The 1000 steps of latent diffusion, as a scheduler of diffusers.

    The noise of step t has the variance `linspace(sqrt(0.00085), sqrt(0.012), 1000)[t] ** 2`.

    Args:
        kind: 'DDPMScheduler' to train; 'DPMSolverMultistepScheduler' or 'DDIMScheduler' to sample.
    """
    return getattr(_diffusers(), kind)(num_train_timesteps=1000, beta_schedule='scaled_linear',
                                       beta_start=0.00085, beta_end=0.012)


class ClassConditionalDiffusion(nn.Module):
    """Predicts the noise of images of a class, with a token per class as the context.

    Args:
        unet: called as `unet(x, timesteps, encoder_hidden_states=context).sample`.
        classes: number of classes; one more token stands for none.
        context: width of a token.
        label_drop: share of the images whose class is hidden in training, for guidance.
    """

    def __init__(self, unet: nn.Module, classes: int, context: int,
                 label_drop: float = 0.15) -> None:
        super().__init__()
        self.unet, self.classes, self.label_drop = unet, classes, label_drop
        self.tokens = nn.Embedding(classes + 1, context)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.schedule = noise_schedule('DDPMScheduler')

    def predict(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        """The noise in `x` (N, C, H, W) at steps (N,) for classes (N,); `classes` means none."""
        return self.unet(x, timesteps, encoder_hidden_states=self.tokens(labels)[:, None]).sample

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean squared error of the predicted noise, at random steps.

        Args:
            images: shape (N, C, H, W), of about unit variance.
            labels: shape (N,).
        """
        noise = torch.randn_like(images)
        timesteps = torch.randint(1000, labels.shape, device=images.device)
        hidden = torch.rand(labels.shape, device=images.device) < self.label_drop
        labels = labels.masked_fill(hidden, self.classes)
        noisy = self.schedule.add_noise(images, noise, timesteps)
        return F.mse_loss(self.predict(noisy, timesteps, labels), noise)

    @torch.no_grad()
    def sample(self, labels: Tensor, shape: Sequence[int], *, steps: int = 50,
               guidance: float = 0.4, solver: str = 'DPMSolverMultistepScheduler',
               generator: Optional[torch.Generator] = None) -> Tensor:
        """Draws images of the classes.

        Args:
            labels: shape (N,).
            shape: of an image, (C, H, W).
            steps: of the solver.
            guidance: s in e(class) + s * (e(class) - e(none)).
            solver: see :func:`noise_schedule`.
            generator: of the noise.

        Returns:
            Shape (N, C, H, W).
        """
        schedule = noise_schedule(solver)
        schedule.set_timesteps(steps)
        x = torch.randn(len(labels), *shape, generator=generator).to(labels.device)
        none = torch.full_like(labels, self.classes)
        for timestep in schedule.timesteps:
            both = self.predict(torch.cat([x, x]), timestep.expand(2 * len(x)),
                                torch.cat([labels, none]))
            of_class, of_none = both.chunk(2)
            x = schedule.step(of_class + guidance * (of_class - of_none), timestep, x).prev_sample
        return x
