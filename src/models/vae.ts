/**
 * The autoencoder of Stable Diffusion 3: pictures to latents of 16 channels at an eighth of the size, and back.
 * Architecture of latent diffusion (Rombach et al. 2022) without quantisation convolutions; names of weights are
 * those of the released checkpoint (Stability-AI/sd3.5, sd3_impls.py).
 *
 * Both networks come whole and in parts, for pictures that are too large to be done at once: a coarse part at low
 * resolution, and a fine part that can be run in tiles. All that a tile needs of the rest of the picture are the
 * statistics of its group norms.
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
  const norm = groupNorm(config);
  const features = encoderLevels(config, norm, weights, image, 0, levelCount(config));
  return encoderEnd(config, norm, weights, features);
}

/** A latent in the transformer's scale to a picture, about [-1, 1], not clamped: [batch, 3, height, width]. */
export function decode(config: VaeConfig, weights: Weights, latent: t.Tensor): t.Tensor {
  return decodeWithFeatures(config, weights, latent).image;
}

/**
 * The same with what the blocks of each level give, full resolution first:
 * [batch, channels of the level, height / 2 ** level, width / 2 ** level].
 */
export function decodeWithFeatures(
  config: VaeConfig,
  weights: Weights,
  latent: t.Tensor,
): { image: t.Tensor; features: t.Tensor[] } {
  const norm = groupNorm(config);
  const features: t.Tensor[] = [];
  let x = decoderStart(config, norm, weights, latent);
  for (let level = levelCount(config) - 1; level >= 0; level--) {
    x = decoderLevels(config, norm, weights, x, level + 1, level);
    features.unshift(x);
  }
  return { image: decoderEnd(config, norm, weights, x), features };
}

/**
 * What the coarse part of the decoder gives, for the fine part's levels below `level`:
 * [batch, channels of the level, height / 2 ** level, width / 2 ** level].
 */
export function decoderFeaturesInput(config: VaeConfig, level: number): t.Tensor {
  return t.input('features', 'float32', [batch, config.channels * config.multipliers[level]!, rows, columns]);
}

/** A sample of that: even numbers of rows and columns. */
export function decoderSampleInput(config: VaeConfig, level: number): t.Tensor {
  const shape = [batch, config.channels * config.multipliers[level]!, t.times(2, rows), t.times(2, columns)];
  return t.input('sample', 'float32', shape);
}

/** What the fine part of the encoder gives, levels below `level`: [batch, channels, height / 2 ** level, ...]. */
export function encoderFeaturesInput(config: VaeConfig, level: number): t.Tensor {
  const scale = 2 ** (levelCount(config) - 1 - level);
  const size = [t.times(rows, scale), t.times(columns, scale)];
  return t.input('features', 'float32', [batch, config.channels * config.multipliers[level - 1]!, ...size]);
}

/** Mean and variance of the groups, for each norm of a fine part in turn: [batch, groups, 2 * norms]. */
export function statisticsInput(config: VaeConfig): t.Tensor {
  return t.input('statistics', 'float32', [batch, config.groups, t.symbol('statistics')]);
}

/** The decoder down to the blocks of `level`, 1 to the number of levels - 1: from a latent to features. */
export function decodeCoarse(config: VaeConfig, weights: Weights, latent: t.Tensor, level: number): t.Tensor {
  const norm = groupNorm(config);
  const features = decoderStart(config, norm, weights, latent);
  return decoderLevels(config, norm, weights, features, levelCount(config), level);
}

/** The rest of the decoder, from features (or a tile of them) and the statistics of the whole to a picture. */
export function decodeFine(
  config: VaeConfig,
  weights: Weights,
  features: t.Tensor,
  statistics: t.Tensor,
  level: number,
): t.Tensor {
  const norm = givenGroupNorm(statistics);
  return decoderEnd(config, norm, weights, decoderLevels(config, norm, weights, features, level, 0));
}

/**
 * Statistics for {@link decodeFine}, from a sample of the features ({@link decoderSampleInput}): pairs of neighbours,
 * the first in an even place. After each upsampling, what an even pair has become is cut down to the pair in its
 * middle, which has seen nothing but true neighbours, so that the sample stays as small as it came.
 */
export function decodeStatistics(config: VaeConfig, weights: Weights, sample: t.Tensor, level: number): t.Tensor {
  const { norm, statistics } = measuringGroupNorm(config);
  decoderEnd(config, norm, weights, decoderLevels(config, norm, weights, sample, level, 0, middlePairs));
  return statistics();
}

/** The encoder's levels below `level`, 1 to the number of levels - 1: from a picture (or a tile) to features. */
export function encodeFine(
  config: VaeConfig,
  weights: Weights,
  image: t.Tensor,
  statistics: t.Tensor,
  level: number,
): t.Tensor {
  return encoderLevels(config, givenGroupNorm(statistics), weights, image, 0, level);
}

/** Statistics of a picture or a tile of one, for {@link encodeFine}. */
export function encodeStatistics(config: VaeConfig, weights: Weights, image: t.Tensor, level: number): t.Tensor {
  const { norm, statistics } = measuringGroupNorm(config);
  encoderLevels(config, norm, weights, image, 0, level);
  return statistics();
}

/** The rest of the encoder, from features to moments. */
export function encodeCoarse(config: VaeConfig, weights: Weights, features: t.Tensor, level: number): t.Tensor {
  const norm = groupNorm(config);
  const x = encoderLevels(config, norm, weights, features, level, levelCount(config));
  return encoderEnd(config, norm, weights, x);
}

function levelCount({ multipliers }: VaeConfig): number {
  return multipliers.length;
}

/** Levels `from` up to but not including `to`, each but the last of all followed by its downsampling. */
function encoderLevels(
  config: VaeConfig,
  norm: GroupNorm,
  weights: Weights,
  x: t.Tensor,
  from: number,
  to: number,
): t.Tensor {
  const { channels, multipliers, resBlocks } = config;
  const encoder = within(weights, 'encoder');
  let width = from === 0 ? channels : channels * multipliers[from - 1]!;
  let features = from === 0 ? convolution3(within(encoder, 'conv_in'), x, config.imageChannels, width) : x;
  for (let level = from; level < to; level++) {
    const out = channels * multipliers[level]!;
    const down = within(encoder, `down.${level}`);
    for (let block = 0; block < resBlocks; block++) {
      features = residualBlock(norm, within(down, `block.${block}`), features, width, out);
      width = out;
    }
    if (level < multipliers.length - 1) features = downsample(within(down, 'downsample.conv'), features, width);
  }
  return features;
}

function encoderEnd(config: VaeConfig, norm: GroupNorm, weights: Weights, features: t.Tensor): t.Tensor {
  const encoder = within(weights, 'encoder');
  const width = config.channels * config.multipliers.at(-1)!;
  let x = middle(norm, within(encoder, 'mid'), features, width);
  x = t.silu(normalize(norm, within(encoder, 'norm_out'), x, width));
  return convolution3(within(encoder, 'conv_out'), x, width, 2 * config.latentChannels);
}

function decoderStart(config: VaeConfig, norm: GroupNorm, weights: Weights, latent: t.Tensor): t.Tensor {
  const decoder = within(weights, 'decoder');
  const width = config.channels * config.multipliers.at(-1)!;
  const unscaled = t.add(t.divide(latent, config.latentScale), config.latentShift);
  const x = convolution3(within(decoder, 'conv_in'), unscaled, config.latentChannels, width);
  return middle(norm, within(decoder, 'mid'), x, width);
}

/** Levels below `from` down to and including `to`, each but the first of all led by an upsampling. */
function decoderLevels(
  config: VaeConfig,
  norm: GroupNorm,
  weights: Weights,
  x: t.Tensor,
  from: number,
  to: number,
  afterUpsampling = (features: t.Tensor) => features,
): t.Tensor {
  const { channels, multipliers, resBlocks } = config;
  const decoder = within(weights, 'decoder');
  let width = channels * (multipliers[from] ?? multipliers.at(-1)!);
  let features = x;
  for (let level = from - 1; level >= to; level--) {
    const out = channels * multipliers[level]!;
    if (level < multipliers.length - 1) {
      const conv = within(decoder, `up.${level + 1}.upsample.conv`);
      features = afterUpsampling(convolution3(conv, t.upsampleNearest(features), width, width));
    }
    for (let block = 0; block <= resBlocks; block++) {
      features = residualBlock(norm, within(decoder, `up.${level}.block.${block}`), features, width, out);
      width = out;
    }
  }
  return features;
}

function decoderEnd(config: VaeConfig, norm: GroupNorm, weights: Weights, features: t.Tensor): t.Tensor {
  const decoder = within(weights, 'decoder');
  const x = t.silu(normalize(norm, within(decoder, 'norm_out'), features, config.channels));
  return convolution3(within(decoder, 'conv_out'), x, config.channels, config.imageChannels);
}

/** Two convolutions around a shortcut. */
function residualBlock(norm: GroupNorm, weights: Weights, x: t.Tensor, width: number, out: number): t.Tensor {
  let y = t.silu(normalize(norm, within(weights, 'norm1'), x, width));
  y = convolution3(within(weights, 'conv1'), y, width, out);
  y = t.silu(normalize(norm, within(weights, 'norm2'), y, out));
  y = convolution3(within(weights, 'conv2'), y, out, out);
  return t.add(width === out ? x : convolution1(within(weights, 'nin_shortcut'), x, width, out), y);
}

/** Residual block, attention, residual block at the lowest resolution. */
function middle(norm: GroupNorm, weights: Weights, x: t.Tensor, width: number): t.Tensor {
  const before = residualBlock(norm, within(weights, 'block_1'), x, width, width);
  const attended = selfAttention(norm, within(weights, 'attn_1'), before, width);
  return residualBlock(norm, within(weights, 'block_2'), attended, width, width);
}

/** Single-head attention between all positions, scaled by 1 / sqrt(channels). */
function selfAttention(norm: GroupNorm, weights: Weights, x: t.Tensor, width: number): t.Tensor {
  const normal = normalize(norm, within(weights, 'norm'), x, width);
  const tokens = t.transpose(t.reshape(normal, [...x.shape.slice(0, 2), -1]), [0, 2, 1]);
  // The checkpoint stores these projections as 1x1 convolutions.
  const project = (name: string, input: t.Tensor) =>
    t.linear(input, weights(`${name}.weight`, [width, width]), weights(`${name}.bias`, [width]));
  const [query, key, value] = ['q', 'k', 'v'].map((name) => project(name, tokens)) as [t.Tensor, t.Tensor, t.Tensor];
  const attended = project('proj_out', t.attention(query, key, value, { heads: 1 }));
  return t.add(x, t.reshape(t.transpose(attended, [0, 2, 1]), x.shape));
}

/** Normalises an image [B,C,H,W] in groups of its channels, then applies a weight and a bias [C,1,1]. */
type GroupNorm = (x: t.Tensor, weight: t.Tensor, bias: t.Tensor) => t.Tensor;

function normalize(norm: GroupNorm, weights: Weights, x: t.Tensor, width: number): t.Tensor {
  return norm(x, perChannel(weights, 'weight', width), perChannel(weights, 'bias', width));
}

function perChannel(weights: Weights, name: string, width: number): t.Tensor {
  return t.reshape(weights(name, [width]), [width, 1, 1]);
}

/** By the statistics of the image itself. */
function groupNorm({ groups }: VaeConfig): GroupNorm {
  return (x, weight, bias) => t.add(t.multiply(t.groupNorm(x, groups, VAE_NORM_EPS), weight), bias);
}

/** The same, keeping the statistics. */
function measuringGroupNorm({ groups }: VaeConfig): { norm: GroupNorm; statistics(): t.Tensor } {
  const measured: t.Tensor[] = [];
  return {
    norm(x, weight, bias) {
      const [batch, ...size] = x.shape as [t.Dimension, t.Dimension, t.Dimension, t.Dimension];
      const grouped = t.reshape(x, [batch, groups, t.exactQuotient(t.times(...size), groups)!]);
      const mean = t.mean(grouped, [-1], { keepAxes: true });
      const variance = t.mean(t.square(t.subtract(grouped, mean)), [-1], { keepAxes: true });
      const statistics = t.concat([mean, variance], 2);
      measured.push(statistics);
      return applyStatistics(x, statistics, weight, bias);
    },
    statistics: () => t.concat(measured, 2),
  };
}

/** By statistics that are given, those of each norm after those of the one before it. */
function givenGroupNorm(statistics: t.Tensor): GroupNorm {
  let next = 0;
  return (x, weight, bias) => applyStatistics(x, t.slice(statistics, 2, 2 * next++, 2), weight, bias);
}

/** (x - mean) / sqrt(variance + eps) * weight + bias, with mean and variance [batch, groups, 2]. */
function applyStatistics(x: t.Tensor, statistics: t.Tensor, weight: t.Tensor, bias: t.Tensor): t.Tensor {
  const [batch, channels] = x.shape as [t.Dimension, number];
  const groups = statistics.shape[1] as number;
  const [mean, variance] = [0, 1].map((place) => {
    const ofGroups = t.slice(statistics, 2, place, 1);
    return t.reshape(t.expand(ofGroups, [batch, groups, channels / groups]), [batch, channels, 1, 1]);
  }) as [t.Tensor, t.Tensor];
  const scale = t.divide(weight, t.squareRoot(t.add(variance, VAE_NORM_EPS)));
  return t.add(t.multiply(x, scale), t.subtract(bias, t.multiply(mean, scale)));
}

/** Of every four rows, and columns, the two in the middle. */
function middlePairs(x: t.Tensor): t.Tensor {
  const [batch, channels, height, width] = x.shape as [t.Dimension, t.Dimension, t.Dimension, t.Dimension];
  const [fourths, half] = [t.exactQuotient(height, 4)!, t.exactQuotient(height, 2)!];
  const some = t.slice(t.reshape(x, [batch, channels, fourths, 4, width]), 3, 1, 2);
  const columns = t.reshape(some, [batch, channels, half, t.exactQuotient(width, 4)!, 4]);
  return t.reshape(t.slice(columns, 4, 1, 2), [batch, channels, half, t.exactQuotient(width, 2)!]);
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
