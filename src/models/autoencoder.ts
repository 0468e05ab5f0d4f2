/** Running the VAE. */

import type { RunOptions, Runtime } from '../runtime/runtime.ts';
import { elementCount, type FloatTensor, floats } from '../tensor/index.ts';
import type { PartWeights } from '../weights/checkpoint.ts';
import { bindWeights } from './bind.ts';
import { LOG_VARIANCE_RANGE, type VaeConfig } from './config.ts';
import { lazily } from './lazily.ts';
import { decode, encodeMoments, imageInput, latentInput } from './vae.ts';

export interface Autoencoder {
  readonly config: VaeConfig;
  /**
   * @param image [batch, 3, height, width] in [-1, 1], sides multiples of 8
   * @returns mean and log-variance side by side, [batch, 2 * latentChannels, height / 8, width / 8]
   */
  encode(image: FloatTensor, options?: RunOptions): Promise<FloatTensor>;
  /**
   * @param latent [batch, latentChannels, height, width] in the transformer's scale
   * @returns [batch, 3, 8 * height, 8 * width], about [-1, 1], not clamped
   */
  decode(latent: FloatTensor, options?: RunOptions): Promise<FloatTensor>;
  dispose(): Promise<void>;
}

/** Prepares a checkpoint's VAE; encoder and decoder load when they are first used. */
export function loadAutoencoder(
  runtime: Runtime,
  part: PartWeights<VaeConfig>,
  bytes?: ReadonlyMap<string, Uint8Array>,
): Autoencoder {
  const { config } = part;
  const encoder = lazily(() => {
    const bound = bindWeights(part, { bytes });
    return runtime.compile({ outputs: { moments: encodeMoments(config, bound.weights, imageInput(config)) } }, bound);
  });
  const decoder = lazily(() => {
    const bound = bindWeights(part, { bytes });
    return runtime.compile({ outputs: { image: decode(config, bound.weights, latentInput(config)) } }, bound);
  });
  return {
    config,
    async encode(image, options) {
      return (await (await encoder.get()).run({ image }, options)).moments as FloatTensor;
    },
    async decode(latent, options) {
      return (await (await decoder.get()).run({ latent }, options)).image as FloatTensor;
    },
    async dispose() {
      await Promise.all([encoder.dispose(), decoder.dispose()]);
    },
  };
}

/**
 * A latent in the transformer's scale from the posterior: its mean, as ComfyUI takes it, or a sample where noise is
 * given, as Stability's code and diffusers do (CompVis/latent-diffusion, `DiagonalGaussianDistribution`).
 * @param moments [batch, 2 * latentChannels, height, width]
 * @param noise [batch, latentChannels, height, width]
 */
export function latentOf(moments: FloatTensor, config: VaeConfig, noise?: FloatTensor): FloatTensor {
  const [batch, doubled, height, width] = moments.shape as [number, number, number, number];
  const shape = [batch, doubled / 2, height, width];
  const size = elementCount(shape.slice(1));
  const data = new Float32Array(batch * size);
  const [lowest, highest] = LOG_VARIANCE_RANGE;
  for (let i = 0; i < data.length; i++) {
    const item = Math.floor(i / size);
    const mean = moments.data[i + item * size]!;
    const logVariance = Math.min(Math.max(moments.data[i + (item + 1) * size]!, lowest), highest);
    const sample = noise ? mean + Math.exp(0.5 * logVariance) * noise.data[i]! : mean;
    data[i] = (sample - config.latentShift) * config.latentScale;
  }
  return floats(shape, data);
}
