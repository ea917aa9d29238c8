"""uint8 pixels -> the tokens of a vision transformer: the layers that transformers loaded, in an order that keeps a GPU
busy.

A module of its own because it is what is compiled, and because nothing else depends on how transformers arranges a
model. What differs from transformers' own forward pass, whose numbers these are (tests/test_model.py): pixels are
normalized here, the three projections of an attention are one matrix product, there is never a mask, and on a GPU
patches are multiplied instead of convolved. Of an H200's time for DeiT-small, attention with a mask that the compiler
could not leave out took more than half, and the convolution a tenth (tests/benchmarks/gpu.md).

Shapes: B images, H = W = input size in px, C = 3 channels, N patches, F values of a patch, S special tokens, T = S + N
tokens, D dimensions, E of them per head.
"""

from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from pipeline.checkpoint import PreprocessSpec


class Embedding(nn.Module):
    """uint8 (B, H, W, C) -> tokens (B, T, D) before the first layer, the special ones first, in the precision of its
    weights.
    """

    _mean: torch.Tensor
    _std: torch.Tensor

    def __init__(
        self, projection: nn.Conv2d, special_SD: nn.Parameter, positions_TD: nn.Parameter, spec: PreprocessSpec
    ) -> None:
        super().__init__()
        self.projection, self.special_SD, self.positions_TD = projection, special_SD, positions_TD
        self._rescale_divisor = 1 / spec.rescale_factor
        self._input_BCHW: torch.Tensor | None = None
        for name, values in (("_mean", spec.image_mean), ("_std", spec.image_std)):
            by_channel = torch.tensor(values, dtype=torch.float32, device=positions_TD.device).view(-1, 1, 1)
            self.register_buffer(name, by_channel, persistent=False)

    @classmethod
    def of(cls, embeddings: nn.Module, spec: PreprocessSpec) -> "Embedding":
        """From the embeddings of transformers' ViT or DeiT."""
        found: Any = embeddings
        special = [found.cls_token, *([found.distillation_token] if hasattr(found, "distillation_token") else [])]
        special_SD = nn.Parameter(torch.cat(special, dim=1)[0], requires_grad=False)
        positions_TD = nn.Parameter(found.position_embeddings[0], requires_grad=False)
        return cls(found.patch_embeddings.projection, special_SD, positions_TD, spec)

    def with_spec(self, spec: PreprocessSpec) -> "Embedding":
        """The same weights behind another normalization."""
        return Embedding(self.projection, self.special_SD, self.positions_TD, spec)

    def forward(self, pixels_BHWC: torch.Tensor) -> torch.Tensor:
        """See the class."""
        pixels_BCHW = self.normalized(pixels_BHWC).to(self.projection.weight.dtype)
        embed_patches = multiplied_patches if pixels_BCHW.is_cuda else convolved_patches
        patches_BND = embed_patches(self.projection, pixels_BCHW)
        special_BSD = self.special_SD.expand(len(pixels_BHWC), -1, -1)
        return torch.cat([special_BSD, patches_BND], dim=1) + self.positions_TD

    def normalized(self, pixels_BHWC: torch.Tensor) -> torch.Tensor:
        """Float32 (B, C, H, W), bit for bit that of the Hugging Face processors: they multiply by 1/255 in float64 and
        round. Dividing by 255 is rounded once, multiplying by a rounded 1/255 twice.
        """
        # In place, in a tensor that is kept: new ones cost 0.3 to 1.4 ms per image on CPU instead of 0.1.
        pixels_BCHW = self._kept_input(pixels_BHWC).copy_(pixels_BHWC.permute(0, 3, 1, 2))
        return pixels_BCHW.div_(self._rescale_divisor).sub_(self._mean).div_(self._std)

    def _kept_input(self, pixels_BHWC: torch.Tensor) -> torch.Tensor:
        num_images, height, width, channels = pixels_BHWC.shape
        shape = (num_images, channels, height, width)
        if pixels_BHWC.device.type != "cpu":  # whose allocator keeps memory itself
            return torch.empty(shape, dtype=torch.float32, device=pixels_BHWC.device)
        if self._input_BCHW is None or self._input_BCHW.shape != shape:
            self._input_BCHW = None  # before the other one is there
            self._input_BCHW = torch.empty(shape, dtype=torch.float32, device=pixels_BHWC.device)
        return self._input_BCHW


def convolved_patches(projection: nn.Conv2d, pixels_BCHW: torch.Tensor) -> torch.Tensor:
    """(B, N, D), as transformers does it. On CPU 0.3 ms per image cheaper than a product."""
    return cast("torch.Tensor", projection(pixels_BCHW).flatten(2).transpose(1, 2))


def multiplied_patches(projection: nn.Conv2d, pixels_BCHW: torch.Tensor) -> torch.Tensor:
    """The same as one matrix product, as patches do not overlap."""
    num_images, num_channels, height, width = pixels_BCHW.shape
    patch_height, patch_width = projection.kernel_size
    rows, columns = height // patch_height, width // patch_width
    whole = pixels_BCHW[:, :, : rows * patch_height, : columns * patch_width]  # as a convolution leaves out the rest
    patches = whole.reshape(num_images, num_channels, rows, patch_height, columns, patch_width)
    patches_BNF = patches.permute(0, 2, 4, 1, 3, 5).reshape(num_images, rows * columns, -1)
    return functional.linear(patches_BNF, projection.weight.flatten(1), projection.bias)


class Layer(nn.Module):
    """Tokens (B, T, D) -> tokens (B, T, D): attention, then two linear layers, both behind a norm and a shortcut."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        found: Any = layer
        attention = found.attention
        self.norm_before, self.norm_after, self.mlp = found.layernorm_before, found.layernorm_after, found.mlp
        self.query_key_value = _side_by_side([attention.q_proj, attention.k_proj, attention.v_proj])
        self.output = attention.o_proj
        self._head_dim: int = attention.head_dim

    def forward(self, tokens_BTD: torch.Tensor) -> torch.Tensor:
        """See the class."""
        projected = self.query_key_value(self.norm_before(tokens_BTD))
        query_BHTE, key_BHTE, value_BHTE = projected.unflatten(2, (3, -1, self._head_dim)).permute(2, 0, 3, 1, 4)
        attended_BHTE = functional.scaled_dot_product_attention(query_BHTE, key_BHTE, value_BHTE)
        tokens_BTD = tokens_BTD + self.output(attended_BHTE.transpose(1, 2).flatten(2))
        return cast("torch.Tensor", tokens_BTD + self.mlp(self.norm_after(tokens_BTD)))


def _side_by_side(parts: list[nn.Linear]) -> nn.Linear:
    joined = nn.Linear(parts[0].in_features, sum(part.out_features for part in parts), bias=parts[0].bias is not None)
    joined.weight = nn.Parameter(torch.cat([part.weight for part in parts]), requires_grad=False)
    if parts[0].bias is not None:
        joined.bias = nn.Parameter(torch.cat([part.bias for part in parts]), requires_grad=False)
    return joined


def run(stage: nn.Module, given: torch.Tensor) -> torch.Tensor:
    """`stage(given)`. Compiled it is two graphs, of the embedding and of one layer that stands for all, in a third of
    the time that a whole model takes.
    """
    return cast("torch.Tensor", stage(given))
