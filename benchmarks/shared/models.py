"""The networks of the papers' larger experiments, in Flax linen; images are (batch, h, w, c)."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp


class Block(nn.Module):
    """A transformer's block, normalised before attention and before its two layers."""

    heads: int
    causal: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        h = nn.LayerNorm(name="norm1")(x)
        mask = nn.make_causal_mask(h[..., 0]) if self.causal else None
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="attention")(h, mask=mask)
        h = nn.gelu(nn.Dense(4 * width, name="up")(nn.LayerNorm(name="norm2")(x)))
        return x + nn.Dense(width, name="down")(h)


class Blocks(nn.Module):
    """Blocks one after the other, or one that a `scan` goes through with each one's weights."""

    depth: int
    heads: int
    causal: bool = False
    scanned: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if not self.scanned:
            for i in range(self.depth):
                x = Block(self.heads, self.causal, name=f"block{i}")(x)
            return x
        step = nn.scan(
            lambda block, carry, _: (block(carry), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth,
        )
        return step(Block(self.heads, self.causal, name="blocks"), x, None)[0]


class LanguageModel(nn.Module):
    """Logits of the next token, from (batch, tokens) numbers of tokens."""

    vocabulary: int
    depth: int
    width: int
    heads: int
    scanned: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(self.vocabulary, self.width, name="embed")(tokens)
        shape = (1, tokens.shape[1], self.width)
        x = x + self.param("positions", nn.initializers.normal(0.02), shape)
        x = Blocks(self.depth, self.heads, True, self.scanned, name="blocks")(x)
        return nn.Dense(self.vocabulary, name="out")(nn.LayerNorm(name="norm")(x))


class ViT(nn.Module):
    """A vision transformer: patches, a class token, learned positions."""

    classes: int
    patch: int = 4
    depth: int = 6
    width: int = 64
    heads: int = 4

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        size = (self.patch, self.patch)
        x = nn.Conv(self.width, size, size, "VALID", name="patches")(images)
        x = x.reshape(len(x), -1, self.width)
        token = self.param("token", nn.initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, self.width)), x], 1)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        x = Blocks(self.depth, self.heads, name="blocks")(x)
        return nn.Dense(self.classes, name="out")(nn.LayerNorm(name="norm")(x[:, 0]))


class ResidualBlock(nn.Module):
    """Two convolutions around which the input goes, as one 1x1 convolution if its shape changes."""

    features: int
    stride: int
    normalised: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, window: int, stride: int, name: str) -> jax.Array:
            size, strides = (window, window), (stride, stride)
            is_biased = not self.normalised
            x = nn.Conv(self.features, size, strides, use_bias=is_biased, name=name)(x)
            groups = math.gcd(self.features, 32)
            return nn.GroupNorm(groups, name=f"{name}_norm")(x) if self.normalised else x

        h = nn.relu(layer(x, 3, self.stride, "first"))
        h = layer(h, 3, 1, "second")
        if h.shape != x.shape:
            x = layer(x, 1, self.stride, "around")
        return nn.relu(x + h)


class ResNet(nn.Module):
    """ResNet18 for small images, wider by the widths; each has two blocks."""

    classes: int
    widths: Sequence[int] = (128, 256, 512, 1024)
    normalised: bool = True

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(self.widths[0], (3, 3), name="stem")(images))
        for i, width in enumerate(self.widths):
            for j in range(2):
                stride = 2 if i and not j else 1
                x = ResidualBlock(width, stride, self.normalised, name=f"block{i}{j}")(x)
        return nn.Dense(self.classes, name="out")(x.mean((1, 2)))


class Bottleneck(nn.Module):
    """Three convolutions around which the input goes, the middle one narrower than its output."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, features: int, window: int, stride: int, name: str) -> jax.Array:
            size, strides = (window, window), (stride, stride)
            x = nn.Conv(features, size, strides, use_bias=False, name=name)(x)
            return nn.GroupNorm(math.gcd(features, 32), name=f"{name}_norm")(x)

        wide = 4 * self.features
        h = nn.relu(layer(x, self.features, 1, 1, "narrow"))
        h = nn.relu(layer(h, self.features, 3, self.stride, "middle"))
        h = layer(h, wide, 1, 1, "widen")
        if h.shape != x.shape:
            x = layer(x, wide, 1, self.stride, "around")
        return nn.relu(x + h)


class ResNet50(nn.Module):
    """ResNet50 for images of 224 x 224, with group normalisation."""

    classes: int
    widths: Sequence[int] = (64, 128, 256, 512)
    depths: Sequence[int] = (3, 4, 6, 3)

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.Conv(self.widths[0], (7, 7), (2, 2), use_bias=False, name="stem")(images)
        x = nn.relu(nn.GroupNorm(math.gcd(self.widths[0], 32), name="stem_norm")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for i, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            for j in range(depth):
                stride = 2 if i and not j else 1
                x = Bottleneck(width, stride, name=f"block{i}_{j}")(x)
        return nn.Dense(self.classes, name="out")(x.mean((1, 2)))


class VGG(nn.Module):
    """VGG11 for small images, without normalisation; a zero halves the image."""

    classes: int
    widths: Sequence[int] = (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0)

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images
        for i, width in enumerate(self.widths):
            if width:
                x = nn.relu(nn.Conv(width, (3, 3), name=f"conv{i}")(x))
            elif min(x.shape[1:3]) > 1:
                x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(self.classes, name="out")(x.reshape(len(x), -1))


class UNet(nn.Module):
    """Convolutions down and up again, each size's result passed across; logits of each pixel."""

    classes: int
    widths: Sequence[int] = (64, 128, 256)

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        def twice(x: jax.Array, width: int, name: str) -> jax.Array:
            for i in range(2):
                x = nn.relu(nn.Conv(width, (3, 3), name=f"{name}_{i}")(x))
            return x

        *outer, inner = self.widths
        across, x = [], images
        for i, width in enumerate(outer):
            x = twice(x, width, f"down{i}")
            across.append(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = twice(x, inner, "inner")
        for i, width in reversed(list(enumerate(outer))):
            x = jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)
            x = nn.Conv(width, (2, 2), name=f"grow{i}")(x)
            x = twice(jnp.concatenate([across[i], x], -1), width, f"up{i}")
        return nn.Conv(self.classes, (1, 1), name="out")(x)
