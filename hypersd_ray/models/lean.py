"""diffusers' residual and feed-forward blocks, keeping less for the backward pass.

Norms and activations cost little beside the products that follow them, but autograd keeps what they make: two of the
three tensors that each half of a residual block keeps. A feed-forward block keeps 16 times its input's size, for a
fifth of a UNet's multiplications. Here both are handed to the product that follows, which makes them again
(`RoleLoRA.play`'s `before`). The operations and their order are diffusers', so the numbers are too.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.activations import GEGLU
from diffusers.models.attention import FeedForward
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn


class LeanResnetBlock2D(ResnetBlock2D):
    """`ResnetBlock2D` with `RoleLoRA` layers, without resampling, dropout and scale-shift.

    Shapes: input_tensor (B, in_channels, h, w); temb (B, temb_channels); result (B, out_channels, h, w).
    """

    @staticmethod
    def fits(block: Any, layer: type[nn.Module]) -> bool:
        """Whether `block` computes what this class does and its convolutions are of type `layer`."""
        return (
            type(block) is ResnetBlock2D
            and isinstance(block.conv1, layer)
            and isinstance(block.conv2, layer)
            and block.upsample is None
            and block.downsample is None
            and block.dropout.p == 0
            and block.time_emb_proj is not None
            and block.time_embedding_norm == "default"
            and not block.skip_time_act
        )

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        h = self.conv1(input_tensor, lambda x: self.nonlinearity(self.norm1(x)))
        h = h + self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
        h = self.conv2(h, lambda x: self.nonlinearity(self.norm2(x)))
        shortcut = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        h = shortcut + h
        return h if self.output_scale_factor == 1 else h / self.output_scale_factor


class LeanFeedForward(FeedForward):
    """`FeedForward` of GEGLU and a `RoleLoRA`, without dropout: (B, L, dim) to (B, L, dim_out)."""

    @staticmethod
    def fits(block: Any, layer: type[nn.Module]) -> bool:
        """Whether `block` computes what this class does and its products are of type `layer`."""
        return (
            type(block) is FeedForward
            and len(block.net) == 3
            and type(block.net[0]) is GEGLU
            and isinstance(block.net[0].proj, layer)
            and isinstance(block.net[2], layer)
            and block.net[1].p == 0
        )

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        first, second = self.net[0].proj, self.net[2]
        role = first.switch.role  # bound now: the backward pass runs when the switch may stand elsewhere

        def gated(x: Tensor) -> Tensor:
            value, gate = first.play(role, x).chunk(2, dim=-1)
            return value * self.net[0].gelu(gate)

        return second(hidden_states, gated, first.factors(role))


def slim(network: nn.Module, layer: type[nn.Module]) -> None:
    """Let the blocks of `network` whose products are of type `layer` keep less; names and tensors stay as they are."""
    for block in network.modules():
        for lean in (LeanResnetBlock2D, LeanFeedForward):
            if lean.fits(block, layer):
                block.__class__ = lean
