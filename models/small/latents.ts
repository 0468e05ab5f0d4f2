/**
 * From the autoencoder to the transformer: the trained autoencoder is given the latent scale of the released one, and
 * every training picture is encoded over every background.
 */

import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { loadAutoencoder } from '../../src/models/autoencoder.ts';
import { nodeRuntime } from '../../src/runtime/node.node.ts';
import { elementCount, type FloatTensor, floats, type TensorData } from '../../src/tensor/data.ts';
import { openCheckpoint } from '../../src/weights/checkpoint.ts';
import { fileSource, writeSafetensorsFile } from '../../src/weights/files.node.ts';
import { configMetadata } from '../../src/weights/metadata.ts';
import { openSafetensors, readTensor } from '../../src/weights/safetensors.ts';
import { VAE } from './configs.ts';
import { BACKGROUNDS } from './data/captions.ts';
import { trainingPairs } from './data/held-out.ts';
import { compose, loadPictures, pictureAt } from './data/pictures.ts';
import { CACHE } from './paths.ts';

export const VAE_FILE = join(CACHE, 'vae.safetensors');
export const VAE_PREFIX = 'first_stage_model.';
/** Pictures encoded at once. */
const BATCH = 8;

/** All tensors of a safetensors file. */
export async function readAll(path: string): Promise<Map<string, TensorData>> {
  const source = await fileSource(path);
  try {
    const file = await openSafetensors(source);
    const tensors = new Map<string, TensorData>();
    for (const name of file.tensors.keys()) tensors.set(name, await readTensor(file, name));
    return tensors;
  } finally {
    await source.close();
  }
}

/** Saves the trained average of the autoencoder with latents of the standard deviation 1 / latentScale. */
export async function finishAutoencoder(): Promise<void> {
  const weights = new Map<string, FloatTensor>();
  for (const [key, tensor] of await readAll(join(CACHE, 'vae.state.safetensors'))) {
    if (key.startsWith('average.')) weights.set(VAE_PREFIX + key.slice('average.'.length), tensor as FloatTensor);
  }
  await writeSafetensorsFile(VAE_FILE, weights, configMetadata({ vae: VAE }));
  const factors = (await channelDeviations()).map((deviation) => 1 / (VAE.latentScale * deviation));
  rescaleLatents(weights, factors);
  await writeSafetensorsFile(VAE_FILE, weights, configMetadata({ vae: VAE }));
}

/** Standard deviation of each channel of the posterior's mean over a sample of pictures. */
async function channelDeviations(): Promise<number[]> {
  const sums = new Array<number>(VAE.latentChannels).fill(0);
  const squares = new Array<number>(VAE.latentChannels).fill(0);
  let count = 0;
  await encodePictures(128, 40, (moments) => {
    const [items, doubled, height, width] = moments.shape as [number, number, number, number];
    const pixels = height * width;
    for (let item = 0; item < items; item++) {
      for (let channel = 0; channel < VAE.latentChannels; channel++) {
        for (let i = 0; i < pixels; i++) {
          const value = moments.data[(item * doubled + channel) * pixels + i]!;
          sums[channel]! += value;
          squares[channel]! += value * value;
        }
      }
    }
    count += items * pixels;
  });
  return sums.map((sum, channel) => Math.sqrt(squares[channel]! / count - (sum / count) ** 2));
}

/** Multiplies each latent channel by a factor, in the encoder's last and against it in the decoder's first weights. */
function rescaleLatents(weights: ReadonlyMap<string, FloatTensor>, factors: readonly number[]): void {
  const kernel = weights.get(`${VAE_PREFIX}encoder.conv_out.weight`)!;
  const bias = weights.get(`${VAE_PREFIX}encoder.conv_out.bias`)!;
  const inputs = weights.get(`${VAE_PREFIX}decoder.conv_in.weight`)!;
  const perRow = elementCount(kernel.shape.slice(1));
  const [out, channels, side] = inputs.shape as [number, number, number];
  for (const [channel, factor] of factors.entries()) {
    for (let i = 0; i < perRow; i++) kernel.data[channel * perRow + i]! *= factor;
    bias.data[channel]! *= factor;
    bias.data[VAE.latentChannels + channel]! += 2 * Math.log(factor);
    for (let row = 0; row < out; row++) {
      for (let i = 0; i < side * side; i++) inputs.data[(row * channels + channel) * side * side + i]! /= factor;
    }
  }
}

/** Encodes each `every`-th picture over backgrounds, and gives the moments in order. */
async function encodePictures(size: number, every: number, take: (moments: FloatTensor) => void): Promise<void> {
  const pictures = await loadPictures({ size, cacheFolder: CACHE });
  const source = await fileSource(VAE_FILE);
  const vae = loadAutoencoder(nodeRuntime(), (await openCheckpoint([source])).parts.vae!);
  const wanted = trainingPairs()
    .flatMap((pair) => BACKGROUNDS.map((background) => ({ pair, background })))
    .filter((_, i) => i % every === 0);
  const pixels = 3 * size * size;
  for (let start = 0; start < wanted.length; start += BATCH) {
    const items = wanted.slice(start, start + BATCH);
    const image = new Float32Array(items.length * pixels);
    for (const [i, { pair, background }] of items.entries()) {
      const rgba = pictureAt(pictures, pair.objectIndex, pair.styleIndex);
      compose(rgba, background.rgb, image.subarray(i * pixels, (i + 1) * pixels));
    }
    take(await vae.encode(floats([items.length, 3, size, size], image)));
  }
  await vae.dispose();
  await source.close();
}

/** Moments of every training picture over every background: [pairs * backgrounds, 2 * channels, size / 8, size / 8]. */
export async function latentsOf(size: number): Promise<FloatTensor> {
  const path = join(CACHE, `latents-${size}.safetensors`);
  if (!existsSync(path)) {
    const count = trainingPairs().length * BACKGROUNDS.length;
    const shape = [count, VAE.latentChannels, size / 8, size / 8];
    const half = elementCount(shape.slice(1));
    const means = new Float32Array(count * half);
    let offset = 0;
    await encodePictures(size, 1, ({ data, shape: [items] }) => {
      for (let item = 0; item < items!; item++) {
        for (let i = 0; i < half; i++) {
          means[offset++] = (data[item * 2 * half + i]! - VAE.latentShift) * VAE.latentScale;
        }
      }
      if (offset % (half * BATCH * 100) === 0) console.log(`latents ${size}: ${offset / half}/${count}`);
    });
    await writeSafetensorsFile(path, new Map([['latents', floats(shape, means)]]));
  }
  return (await readAll(path)).get('latents') as FloatTensor;
}
