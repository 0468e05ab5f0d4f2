/** Losses as tensor programs. */

import { TIMESTEP_SCALE, type TransformerConfig, type VaeConfig, vaeDownscale } from '../models/config.ts';
import { mmditx, type TransformerInputs, timestepEmbedding, transformerInputs } from '../models/mmditx.ts';
import { decode, encodeMoments, imageInput } from '../models/vae.ts';
import type { Weights } from '../models/weights.ts';
import * as t from '../tensor/index.ts';

/** A batch of noised latents: what {@link velocityLoss} is computed on. */
export interface FlowInputs {
  /** Clean latents in the transformer's scale: [batch, channels, height, width] */
  latent: t.Tensor;
  /** Standard normal noise of the same shape. */
  noise: t.Tensor;
  /** Noise level of each item, 0 to 1: [batch] */
  sigma: t.Tensor;
}

/**
 * The rectified-flow loss (SD3 paper, section 2): the mean square of v(z, sigma) - (noise - latent) at
 * z = (1 - sigma) latent + sigma noise.
 * @param conditioning context and pooled text, given or computed by text encoders in the same program
 */
export function velocityLoss(
  config: TransformerConfig,
  weights: Weights,
  conditioning?: Pick<TransformerInputs, 'context' | 'pooled'>,
): t.Tensor {
  const inputs = { ...transformerInputs(config), ...conditioning };
  const latent = inputs.latent;
  const noise = t.input('noise', 'float32', latent.shape);
  const sigma = t.reshape(t.input('sigma', 'float32', [t.size(latent, 0)]), [t.size(latent, 0), 1, 1, 1]);
  const noisy = t.add(t.multiply(t.subtract(1, sigma), latent), t.multiply(sigma, noise));
  const predicted = mmditx(config, weights, { ...inputs, latent: noisy });
  return t.mean(t.square(t.subtract(predicted, t.subtract(noise, latent))));
}

/** What {@link velocityLoss} needs besides latent, noise, sigma and conditioning. */
export function timestepInput(sigma: ArrayLike<number>, { timestepWidth }: TransformerConfig): t.FloatTensor {
  return timestepEmbedding(
    Float32Array.from(sigma, (level) => TIMESTEP_SCALE * level),
    timestepWidth,
  );
}

export interface AutoencoderLossOptions {
  /** Weight of differences between neighbouring pixels, which keeps edges sharp (default 1). */
  edges?: number;
  /** Weight of differences between means of 8x8 blocks, which normalisation layers are slow to learn (default 2). */
  colour?: number;
  /** Weight of the posterior's divergence from a standard normal (default 1e-4). */
  divergence?: number;
}

/**
 * The autoencoder's loss: absolute error of pixels, of edges and of coarse colours, and the
 * posterior's divergence.
 * Inputs: `image` [batch, 3, height, width] in [-1, 1]; `noise` [batch, latentChannels, height / 8, width / 8].
 */
export function autoencoderLoss(
  config: VaeConfig,
  weights: Weights,
  { edges = 1, colour = 2, divergence = 1e-4 }: AutoencoderLossOptions = {},
): { loss: t.Tensor; pixels: t.Tensor; divergence: t.Tensor } {
  const image = imageInput(config);
  const [mean, logVariance] = t.split(encodeMoments(config, weights, image), 2, 1) as [t.Tensor, t.Tensor];
  const noise = t.input('noise', 'float32', mean.shape);
  const sample = t.add(mean, t.multiply(t.exponential(t.multiply(logVariance, 0.5)), noise));
  const latent = t.multiply(t.subtract(sample, config.latentShift), config.latentScale);
  const difference = t.subtract(decode(config, weights, latent), image);
  const pixels = t.mean(t.absolute(difference));
  const edgeError = t.add(t.mean(t.absolute(slope(difference, 2))), t.mean(t.absolute(slope(difference, 3))));
  const colourError = t.mean(t.absolute(blockMeans(difference, vaeDownscale(config))));
  const spread = t.subtract(t.add(t.square(mean), t.exponential(logVariance)), t.add(logVariance, 1));
  const kl = t.multiply(t.mean(spread), 0.5);
  const reconstruction = t.add(t.add(pixels, t.multiply(edgeError, edges)), t.multiply(colourError, colour));
  const loss = t.add(reconstruction, t.multiply(kl, divergence));
  return { loss, pixels, divergence: kl };
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
