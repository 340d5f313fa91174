# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""DCNv4 in place of the attention of a Swin or PVT block, which is told the size of the map.

Source:   "Efficient Deformable ConvNets", arXiv:2401.06197, section 4, which replaces attention by
          the layer unchanged (in a ViT; in these hosts nothing is published).
"""

from __future__ import annotations

from typing import Any, Optional

from torch import Tensor, nn

from ...ops import DCNv4


class DCNv4Attention(nn.Module):
    """Takes the tokens of a map, with its size, and mixes them by DCNv4.

    Called as `ShiftWindowMSA(query, hw_shape)` of mmdet and mmseg it returns the result; called as
    `SpatialReductionAttention(x, hw_shape, identity)` of PVT, the identity plus the result.

    Args:
        embed_dims: width C.
        drop: applied to the result: dropout and drop path of the attention that was there.
        adds_identity: whether the result is added to `identity`, or to the input without one.
        options: of :class:`mmdcnv4.ops.DCNv4`; `pad` follows from the kernel.

    Raises:
        ValueError: from DCNv4; the message names the argument, the rule and the value.
    """

    def __init__(self, embed_dims: int, drop: Optional[nn.Module] = None,
                 adds_identity: bool = False, **options: Any) -> None:
        super().__init__()
        kernel_size = options.pop('kernel_size', 3)
        if not isinstance(kernel_size, int) or kernel_size % 2 == 0:
            raise ValueError('DCNv4Attention: kernel_size must be an odd number, or the map would '
                             f'change its size, got {kernel_size!r}')
        self.embed_dims, self.adds_identity = embed_dims, adds_identity
        self.dcn = DCNv4(embed_dims, kernel_size, pad=kernel_size // 2, **options)
        self.drop = nn.Identity() if drop is None else drop

    def forward(self, query: Tensor, hw_shape: tuple[int, int],
                identity: Optional[Tensor] = None) -> Tensor:
        """Mixes the positions.

        Args:
            query: tokens, shape (N, H * W, C), row by row.
            hw_shape: (H, W).
            identity: shape of `query`; what the result is added to, with `adds_identity`.

        Returns:
            Shape of `query`.

        Raises:
            ValueError: the shapes do not belong together.
        """
        height, width = hw_shape
        if query.dim() != 3 or query.shape[1:] != (height * width, self.embed_dims):
            raise ValueError(f'DCNv4Attention: query must have shape (N, {height} * {width}, '
                             f'{self.embed_dims}), got {tuple(query.shape)}')
        out = self.drop(self.dcn(query.unflatten(1, (height, width))).flatten(1, 2))
        if not self.adds_identity:
            return out
        return (query if identity is None else identity) + out
