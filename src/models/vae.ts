/**
 * The autoencoder of Stable Diffusion 3: pictures to latents of 16 channels at an eighth of the size, and back.
 * Architecture of latent diffusion (Rombach et al. 2022) without quantisation convolutions; names of weights are
 * those of the released checkpoint (Stability-AI/sd3.5, sd3_impls.py).
 */

import * as t from '../tensor/index.ts';
import { VAE_NORM_EPS, type VaeConfig, vaeDownscale } from './config.ts';
import { type Weights, within } from './weights.ts';

const batch = t.symbol('batch');
const rows = t.symbol('rows');
const columns = t.symbol('columns');

/** A picture in [-1, 1]: [batch, 3, height, width], sides multiples of 8. */
export function imageInput(config: VaeConfig): t.Tensor {
  const scale = vaeDownscale(config);
  return t.input('image', 'float32', [batch, config.imageChannels, t.times(rows, scale), t.times(columns, scale)]);
}

/** A latent in the transformer's scale: [batch, latentChannels, height / 8, width / 8]. */
export function latentInput(config: VaeConfig): t.Tensor {
  return t.input('latent', 'float32', [batch, config.latentChannels, rows, columns]);
}

/** Mean and log-variance of the posterior, side by side: [batch, 2 * latentChannels, height / 8, width / 8]. */
export function encodeMoments(config: VaeConfig, weights: Weights, image: t.Tensor): t.Tensor {
  const { multipliers, resBlocks, latentChannels } = config;
  const encoder = within(weights, 'encoder');
  let width = config.channels;
  let x = convolution3(within(encoder, 'conv_in'), image, config.imageChannels, width);
  for (const [level, multiplier] of multipliers.entries()) {
    const out = config.channels * multiplier;
    const down = within(encoder, `down.${level}`);
    for (let block = 0; block < resBlocks; block++) {
      x = residualBlock(config, within(down, `block.${block}`), x, width, out);
      width = out;
    }
    if (level < multipliers.length - 1) x = downsample(within(down, 'downsample.conv'), x, width);
  }
  x = middle(config, within(encoder, 'mid'), x, width);
  x = t.silu(normalize(config, within(encoder, 'norm_out'), x, width));
  return convolution3(within(encoder, 'conv_out'), x, width, 2 * latentChannels);
}

/** A latent in the transformer's scale to a picture, about [-1, 1], not clamped: [batch, 3, height, width]. */
export function decode(config: VaeConfig, weights: Weights, latent: t.Tensor): t.Tensor {
  const { multipliers, resBlocks, latentChannels, latentScale, latentShift } = config;
  const decoder = within(weights, 'decoder');
  let width = config.channels * multipliers.at(-1)!;
  const unscaled = t.add(t.divide(latent, latentScale), latentShift);
  let x = convolution3(within(decoder, 'conv_in'), unscaled, latentChannels, width);
  x = middle(config, within(decoder, 'mid'), x, width);
  for (let level = multipliers.length - 1; level >= 0; level--) {
    const out = config.channels * multipliers[level]!;
    const up = within(decoder, `up.${level}`);
    for (let block = 0; block <= resBlocks; block++) {
      x = residualBlock(config, within(up, `block.${block}`), x, width, out);
      width = out;
    }
    if (level > 0) x = convolution3(within(up, 'upsample.conv'), t.upsampleNearest(x), width, width);
  }
  x = t.silu(normalize(config, within(decoder, 'norm_out'), x, width));
  return convolution3(within(decoder, 'conv_out'), x, width, config.imageChannels);
}

/** Two convolutions around a shortcut. */
function residualBlock(config: VaeConfig, weights: Weights, x: t.Tensor, width: number, out: number): t.Tensor {
  let y = t.silu(normalize(config, within(weights, 'norm1'), x, width));
  y = convolution3(within(weights, 'conv1'), y, width, out);
  y = t.silu(normalize(config, within(weights, 'norm2'), y, out));
  y = convolution3(within(weights, 'conv2'), y, out, out);
  return t.add(width === out ? x : convolution1(within(weights, 'nin_shortcut'), x, width, out), y);
}

/** Residual block, attention, residual block at the lowest resolution. */
function middle(config: VaeConfig, weights: Weights, x: t.Tensor, width: number): t.Tensor {
  const before = residualBlock(config, within(weights, 'block_1'), x, width, width);
  const attended = selfAttention(config, within(weights, 'attn_1'), before, width);
  return residualBlock(config, within(weights, 'block_2'), attended, width, width);
}

/** Single-head attention between all positions, scaled by 1 / sqrt(channels). */
function selfAttention(config: VaeConfig, weights: Weights, x: t.Tensor, width: number): t.Tensor {
  const normal = normalize(config, within(weights, 'norm'), x, width);
  const tokens = t.transpose(t.reshape(normal, [...x.shape.slice(0, 2), -1]), [0, 2, 1]);
  // The checkpoint stores these projections as 1x1 convolutions.
  const project = (name: string, input: t.Tensor) =>
    t.linear(input, weights(`${name}.weight`, [width, width]), weights(`${name}.bias`, [width]));
  const [query, key, value] = ['q', 'k', 'v'].map((name) => project(name, tokens)) as [t.Tensor, t.Tensor, t.Tensor];
  const attended = project('proj_out', t.attention(query, key, value, { heads: 1 }));
  return t.add(x, t.reshape(t.transpose(attended, [0, 2, 1]), x.shape));
}

function normalize({ groups }: VaeConfig, weights: Weights, x: t.Tensor, width: number): t.Tensor {
  const scaled = t.multiply(t.groupNorm(x, groups, VAE_NORM_EPS), perChannel(weights, 'weight', width));
  return t.add(scaled, perChannel(weights, 'bias', width));
}

function perChannel(weights: Weights, name: string, width: number): t.Tensor {
  return t.reshape(weights(name, [width]), [width, 1, 1]);
}

/** Halves the size; zeros are added on the right and at the bottom only. */
function downsample(weights: Weights, x: t.Tensor, width: number): t.Tensor {
  return t.convolution(x, weights('weight', [width, width, 3, 3]), weights('bias', [width]), {
    stride: 2,
    padding: [0, 0, 1, 1],
  });
}

function convolution3(weights: Weights, x: t.Tensor, width: number, out: number): t.Tensor {
  return t.convolution(x, weights('weight', [out, width, 3, 3]), weights('bias', [out]), { padding: [1, 1, 1, 1] });
}

function convolution1(weights: Weights, x: t.Tensor, width: number, out: number): t.Tensor {
  return t.convolution(x, weights('weight', [out, width, 1, 1]), weights('bias', [out]));
}
