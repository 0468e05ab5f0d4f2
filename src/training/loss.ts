/** Losses as tensor programs. */

import { TIMESTEP_SCALE, type TransformerConfig, type VaeConfig, vaeDownscale } from '../models/config.ts';
import { mmditxSegment, stageCount, type TransformerInputs, timestepEmbedding } from '../models/mmditx.ts';
import { decodeWithFeatures, encodeMoments, imageInput } from '../models/vae.ts';
import type { Weights } from '../models/weights.ts';
import * as t from '../tensor/index.ts';

/** What the transformer is trained on: the noised latent, the velocity there, and the timestep's embedding. */
export interface FlowBatch {
  /** (1 - sigma) latent + sigma noise: [batch, channels, height, width] */
  readonly latent: t.FloatTensor;
  /** noise - latent */
  readonly target: t.FloatTensor;
  /** [batch, timestepWidth] */
  readonly timestep: t.FloatTensor;
}

/**
 * A batch on the straight paths from latents to noise (rectified flow; SD3 paper, section 2).
 * @param latent clean latents in the transformer's scale: [batch, channels, height, width]
 * @param noise standard normal, of the same shape
 * @param sigma noise level of each item, 0 to 1
 */
export function flowBatch(
  latent: t.FloatTensor,
  noise: t.FloatTensor,
  sigma: ArrayLike<number>,
  { timestepWidth }: Pick<TransformerConfig, 'timestepWidth'>,
): FlowBatch {
  const { shape, data } = latent;
  const itemSize = data.length / sigma.length;
  const noisy = new Float32Array(data.length);
  const target = new Float32Array(data.length);
  for (let i = 0; i < data.length; i++) {
    const level = sigma[Math.floor(i / itemSize)]!;
    noisy[i] = (1 - level) * data[i]! + level * noise.data[i]!;
    target[i] = noise.data[i]! - data[i]!;
  }
  return {
    latent: t.floats(shape, noisy),
    target: t.floats(shape, target),
    timestep: timestepEmbedding(
      Float32Array.from(sigma, (level) => TIMESTEP_SCALE * level),
      timestepWidth,
    ),
  };
}

/**
 * The mean square of v - target over a batch, each item times its `weight` [batch] where the batch brings weights.
 * Takes the input `target` of {@link flowBatch}.
 */
export function velocityError(velocity: t.Tensor, { weighted = false }: { weighted?: boolean } = {}): t.Tensor {
  const square = t.square(t.subtract(velocity, t.input('target', 'float32', velocity.shape)));
  if (!weighted) return t.mean(square);
  const batch = t.size(velocity, 0);
  return t.mean(t.multiply(square, t.reshape(t.input('weight', 'float32', [batch]), [batch, 1, 1, 1])));
}

/**
 * The rectified-flow loss of the whole transformer: the mean square of v(z, sigma) - (noise - latent) (SD3 paper,
 * section 2). Inputs: those of {@link flowBatch}, `context`, `pooled` and `corner`.
 * @param given conditioning computed by text encoders in the same program
 */
export function velocityLoss(
  config: TransformerConfig,
  weights: Weights,
  given?: Pick<TransformerInputs, 'context' | 'pooled'>,
): t.Tensor {
  return velocityError(mmditxSegment(config, weights, 0, stageCount(config), given).outputs.velocity!);
}

export interface AutoencoderLossOptions {
  /** Weight of differences between neighbouring pixels, which keeps edges sharp (default 1). */
  edges?: number;
  /** Weight of differences between means of 8x8 blocks, which normalisation layers are slow to learn (default 2). */
  colour?: number;
  /** Weight of the posterior's divergence from a standard normal (default 1e-4). */
  divergence?: number;
  /**
   * Weight of pictures that are read off the latent and each level of the decoder by a linear map (default 0.5; deep
   * supervision, Lee et al. 2015). Without it the encoder learns what the decoder can draw already, and the decoder what
   * the encoder keeps, and both stay behind what principal components of 8 x 8 pixels keep.
   */
  readouts?: number;
}

/** What the names of the linear maps begin with; they are no part of the autoencoder. */
export const READOUTS = 'readouts.';

/** The weights that {@link autoencoderLoss} has besides those of the autoencoder, by name. */
export function readoutTensors(config: VaeConfig): ReadonlyMap<string, readonly number[]> {
  const { channels, multipliers, latentChannels, imageChannels } = config;
  const pixels = (level: number) => imageChannels * 4 ** level;
  const top = multipliers.length - 1;
  const shapes = new Map<string, readonly number[]>([
    [`${READOUTS}latent.weight`, [pixels(top), latentChannels, 3, 3]],
    [`${READOUTS}latent.bias`, [pixels(top)]],
  ]);
  for (let level = 1; level <= top; level++) {
    shapes.set(`${READOUTS}${level}.weight`, [pixels(level), channels * multipliers[level]!, 1, 1]);
    shapes.set(`${READOUTS}${level}.bias`, [pixels(level)]);
  }
  return shapes;
}

/**
 * The autoencoder's loss: absolute error of pixels, of edges and of coarse colours, and the
 * posterior's divergence.
 * Inputs: `image` [batch, 3, height, width] in [-1, 1]; `noise` [batch, latentChannels, height / 8, width / 8].
 */
export function autoencoderLoss(
  config: VaeConfig,
  weights: Weights,
  { edges = 1, colour = 2, divergence = 1e-4, readouts = 0.5 }: AutoencoderLossOptions = {},
): { loss: t.Tensor; pixels: t.Tensor; divergence: t.Tensor } {
  const image = imageInput(config);
  const [mean, logVariance] = t.split(encodeMoments(config, weights, image), 2, 1) as [t.Tensor, t.Tensor];
  const noise = t.input('noise', 'float32', mean.shape);
  const sample = t.add(mean, t.multiply(t.exponential(t.multiply(logVariance, 0.5)), noise));
  const latent = t.multiply(t.subtract(sample, config.latentShift), config.latentScale);
  const decoded = decodeWithFeatures(config, weights, latent);
  const difference = t.subtract(decoded.image, image);
  const pixels = t.mean(t.absolute(difference));
  const edgeError = t.add(t.mean(t.absolute(slope(difference, 2))), t.mean(t.absolute(slope(difference, 3))));
  const colourError = t.mean(t.absolute(blockMeans(difference, vaeDownscale(config))));
  const spread = t.subtract(t.add(t.square(mean), t.exponential(logVariance)), t.add(logVariance, 1));
  const kl = t.multiply(t.mean(spread), 0.5);
  const reconstruction = t.add(t.add(pixels, t.multiply(edgeError, edges)), t.multiply(colourError, colour));
  const alone = t.add(reconstruction, t.multiply(kl, divergence));
  if (readouts === 0) return { loss: alone, pixels, divergence: kl };
  const read = (name: string, features: t.Tensor) =>
    readoutError(config, weights, readoutTensors(config), name, features, image);
  const errors = [read('latent', latent)];
  for (const [level, features] of decoded.features.entries()) if (level > 0) errors.push(read(String(level), features));
  const sum = errors.reduce((a, b) => t.add(a, b));
  return { loss: t.add(alone, t.multiply(sum, readouts / errors.length)), pixels, divergence: kl };
}

/** Mean absolute error of a picture that is read off features, each place giving a square of pixels. */
function readoutError(
  { imageChannels }: VaeConfig,
  weights: Weights,
  shapes: ReadonlyMap<string, readonly number[]>,
  name: string,
  features: t.Tensor,
  image: t.Tensor,
): t.Tensor {
  const key = `${READOUTS}${name}.weight`;
  const [pixels, , side] = shapes.get(key) as [number, number, number];
  const kernel = weights(key, shapes.get(key)!);
  const bias = weights(`${READOUTS}${name}.bias`, [pixels]);
  const zeros = (side - 1) / 2;
  const squares = t.convolution(features, kernel, bias, { padding: [zeros, zeros, zeros, zeros] });
  const [batch, , rows, columns] = squares.shape as [t.Dimension, t.Dimension, t.Dimension, t.Dimension];
  const square = Math.sqrt(pixels / imageChannels);
  const pieces = t.reshape(squares, [batch, imageChannels, square, square, rows, columns]);
  const read = t.reshape(t.transpose(pieces, [0, 1, 4, 2, 5, 3]), image.shape);
  return t.mean(t.absolute(t.subtract(read, image)));
}

/** Means of square blocks of an image. */
function blockMeans(x: t.Tensor, side: number): t.Tensor {
  const [batch, channels, height, width] = x.shape as [t.Dimension, t.Dimension, t.Dimension, t.Dimension];
  const [rows, columns] = [t.exactQuotient(height, side)!, t.exactQuotient(width, side)!];
  return t.mean(t.reshape(x, [batch, channels, rows, side, columns, side]), [3, 5]);
}

/** Differences between neighbours along an axis. */
function slope(x: t.Tensor, axis: number): t.Tensor {
  const length = t.plus(t.size(x, axis), -1);
  return t.subtract(t.slice(x, axis, 1, length), t.slice(x, axis, 0, length));
}
