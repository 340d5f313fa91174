# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Trains a small class-conditional diffusion U-Net on handwritten digits, with and without DCNv4.

python tools/demo/diffusion_digits.py --work-dir work_dirs/diffusion-digits

The images are the 1797 digits that scikit-learn ships, 8 x 8, enlarged to 16 x 16. Both networks
see the same batches and the same noise. Written: `result.json`, `losses.png` and `samples.png`.

The Fréchet distance is that between two normal distributions fitted to the 8 x 8 pixels, reduced to
their 20 principal components: not the FID, which needs a network trained on photographs.
`accuracy` is the share of samples in which a support vector machine, trained on the real digits,
sees the class that was asked for.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mmdcnv4.models.diffusion import ClassConditionalDiffusion, latent_diffusion_unet

SIZE, CLASSES, COMPONENTS = 16, 10, 20
UNET = dict(
    sample_size=SIZE, in_channels=1, out_channels=1, layers_per_block=1, attention_head_dim=4,
    block_out_channels=(16, 32), cross_attention_dim=32, norm_num_groups=8,
    down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'),
    up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'))
NETWORKS: dict[str, tuple[str, ...]] = {'U-Net': (), 'U-Net + DCNv4': ('res',)}


def load_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images (1797, 1, 16, 16) in [-1, 1], and labels."""
    from sklearn.datasets import load_digits as load
    data = load()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, (SIZE, SIZE), mode='bilinear', align_corners=False)
    return images, torch.tensor(data.target)


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Distance of the normal distributions with the moments of two sets of vectors (N, D)."""
    from scipy.linalg import sqrtm
    means = [x.mean(0) for x in (first, second)]
    covariances = [np.cov(x, rowvar=False) for x in (first, second)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    return float(((means[0] - means[1])**2).sum()
                 + np.trace(covariances[0] + covariances[1] - 2 * root))


class Judge:
    """Measures how far images are from the real digits."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        from sklearn.decomposition import PCA
        from sklearn.svm import SVC
        pixels = self._pixels(images)
        self.reduction = PCA(COMPONENTS, random_state=0).fit(pixels)
        self.classifier = SVC().fit(pixels, labels.numpy())
        self.real = self.reduction.transform(pixels)

    @staticmethod
    def _pixels(images: torch.Tensor) -> np.ndarray:
        return F.avg_pool2d(images.clamp(-1, 1), 2).flatten(1).numpy()

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Distance to the real digits, and share of the right class."""
        pixels = self._pixels(images)
        seen = self.classifier.predict(pixels)
        return dict(frechet_distance=frechet_distance(self.real, self.reduction.transform(pixels)),
                    accuracy=float((seen == labels.numpy()).mean()))

    def between_halves(self) -> float:
        """The distance of one random half of the real digits to the other."""
        order = np.random.default_rng(0).permutation(len(self.real))
        return frechet_distance(self.real[order[::2]], self.real[order[1::2]])


def train(replace: Sequence[str], images: torch.Tensor, labels: torch.Tensor,
          args: argparse.Namespace) -> tuple[ClassConditionalDiffusion, dict[str, Any]]:
    """Trains one network; returns its moving average and the record."""
    torch.manual_seed(args.seed)
    unet, report = latent_diffusion_unet(replace, group_channels=args.group_channels, **UNET)
    if report is not None:
        print(report)
    model = ClassConditionalDiffusion(unet, CLASSES, UNET['cross_attention_dim'])
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema))
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.99),
                                  weight_decay=0.03)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=args.steps // 20 + 1)
    generator = torch.Generator().manual_seed(args.seed)
    losses, start = [], time.perf_counter()
    for step in range(args.steps):
        chosen = torch.randint(len(images), (args.batch,), generator=generator)
        torch.manual_seed(1_000_000 * args.seed + step)  # the same noise for all networks
        loss = model.loss(images[chosen], labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warm_up.step()
        average.update_parameters(model)
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            print(f'step {step + 1}: loss {np.mean(losses[-100:]):.4f}, '
                  f'{time.perf_counter() - start:.0f} s', flush=True)
    record = dict(parameters=sum(p.numel() for p in unet.parameters()), losses=losses,
                  seconds=round(time.perf_counter() - start, 1))
    return average.module, record


def plot(folder: Path, records: dict[str, dict[str, Any]],
         samples: dict[str, torch.Tensor]) -> None:
    """The two pictures."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(5, 3))
    for name, record in records.items():
        width = max(len(record['losses']) // 40, 1)
        smooth = np.convolve(record['losses'], np.ones(width) / width, 'valid')
        axes.plot(np.arange(len(smooth)) + width, smooth, label=name)
    axes.set(xlabel='step', ylabel=f'loss, mean of {width} steps', yscale='log')
    axes.legend()
    figure.tight_layout()
    figure.savefig(folder / 'losses.png', dpi=100)
    figure, grid = pyplot.subplots(1, len(samples), figsize=(3.2 * len(samples), 3.5))
    for axes, (name, images) in zip(grid, samples.items()):
        rows = images[:100].clamp(-1, 1).view(10, 10, SIZE, SIZE)
        axes.imshow(rows.permute(0, 2, 1, 3).reshape(10 * SIZE, 10 * SIZE), cmap='gray')
        axes.set_title(name)
        axes.axis('off')
    figure.tight_layout()
    figure.savefig(folder / 'samples.png', dpi=90)


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/diffusion-digits'))
    parser.add_argument('--steps', type=int, default=1500, help='of training, for each network')
    parser.add_argument('--batch', type=int, default=32)
    parser.add_argument('--lr', type=float, default=1e-3)
    parser.add_argument('--ema', type=float, default=0.99)
    parser.add_argument('--group-channels', type=int, default=16)
    parser.add_argument('--samples', type=int, default=200)
    parser.add_argument('--sampler-steps', type=int, default=20)
    parser.add_argument('--guidance', type=float, default=0.4)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args(argv)
    if min(args.steps, args.batch, args.sampler_steps) < 1 or args.samples < 100:
        parser.error('--steps, --batch and --sampler-steps must be positive, --samples >= 100')
    return args


def main(argv: Optional[Sequence[str]] = None) -> dict[str, Any]:
    """Trains, samples, measures and writes; returns what stands in result.json."""
    args = parse_args(argv)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    images, labels = load_digits()
    judge = Judge(images, labels)
    asked = torch.arange(args.samples) % CLASSES
    first = [int((labels == digit).nonzero()[row]) for row in range(10) for digit in range(10)]
    records, drawn = {}, {'real': images[first]}
    for name, replace in NETWORKS.items():
        print(name)
        model, record = train(replace, images, labels, args)
        start = time.perf_counter()
        drawn[name] = model.eval().sample(
            asked, (1, SIZE, SIZE), steps=args.sampler_steps, guidance=args.guidance,
            generator=torch.Generator().manual_seed(args.seed))
        record.update(judge(drawn[name], asked), sampling_seconds=time.perf_counter() - start,
                      loss_of_the_last_tenth=float(np.mean(record['losses'][-args.steps // 10:])))
        records[name] = record
        print({key: value for key, value in record.items() if key != 'losses'}, flush=True)
    result = dict(arguments={key: str(value) for key, value in vars(args).items()},
                  frechet_distance_between_halves_of_the_real=judge.between_halves(),
                  networks=records)
    (args.work_dir / 'result.json').write_text(json.dumps(result))
    plot(args.work_dir, records, drawn)
    return result


if __name__ == '__main__':
    main()
