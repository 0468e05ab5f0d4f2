/**
 * Running the VAE. Pictures of more than one tile are done in parts (`vae.ts`): the coarse part of the network sees the
 * whole picture, the fine part tile after tile. All tiles share statistics for their group norms: with statistics of
 * their own, tiles differ in tone (ComfyUI and diffusers decode like that); pkuliyi2015's Tiled VAE shares them too.
 */

import { MmditxError } from '../errors.ts';
import type { RunOptions, Runtime } from '../runtime/runtime.ts';
import { oneAtATime } from '../runtime/turns.ts';
import { elementCount, type FloatTensor, floats, type Tensor, type TensorData } from '../tensor/index.ts';
import type { PartWeights } from '../weights/checkpoint.ts';
import { batchItems, joinBatches } from './batches.ts';
import { bindWeights, compileBound } from './bind.ts';
import { LOG_VARIANCE_RANGE, type VaeConfig, vaeDownscale } from './config.ts';
import { type Lazy, lazily } from './lazily.ts';
import { evenSample, inTiles, type TileSize, tilesOf } from './tiles.ts';
import {
  decode,
  decodeCoarse,
  decodeFine,
  decoderFeaturesInput,
  decoderSampleInput,
  decodeStatistics,
  encodeCoarse,
  encodeFine,
  encodeMoments,
  encoderFeaturesInput,
  encodeStatistics,
  imageInput,
  latentInput,
  statisticsInput,
} from './vae.ts';
import type { Weights } from './weights.ts';

/**
 * Whether a picture is done in tiles: `off` never, `auto` with {@link DEFAULT_TILE} where it has a longer side, or with
 * tiles of a given size and overlap, in pixels. A picture no larger than a tile is done at once, exactly.
 */
export type Tiling = 'auto' | 'off' | TileSize;

export interface AutoencoderOptions extends RunOptions {
  /** Default `auto`. */
  tile?: Tiling | undefined;
}

/**
 * Tiles that decode 1024 x 1024 pixels with the released VAE in less than 2 GiB (`bench/vae-tiles.ts`). Convolutions
 * at the two highest resolutions carry a tile's edge 22 pixels inwards, so that in the middle of this overlap nothing
 * of it is left.
 */
export const DEFAULT_TILE: TileSize = { size: 512, overlap: 48 };
/** Smallest side of a tile in pixels, as in ComfyUI (`VAEDecodeTiled`). */
const SMALLEST_TILE = 64;

export interface Autoencoder {
  readonly config: VaeConfig;
  /**
   * @param image [batch, 3, height, width] in [-1, 1], sides multiples of 8
   * @returns mean and log-variance side by side, [batch, 2 * latentChannels, height / 8, width / 8]
   * @throws MmditxError `bad-option` for tiles that cannot be
   */
  encode(image: FloatTensor, options?: AutoencoderOptions): Promise<FloatTensor>;
  /**
   * @param latent [batch, latentChannels, height, width] in the transformer's scale
   * @returns [batch, 3, 8 * height, 8 * width], about [-1, 1], not clamped
   * @throws MmditxError `bad-option` for tiles that cannot be
   */
  decode(latent: FloatTensor, options?: AutoencoderOptions): Promise<FloatTensor>;
  dispose(): Promise<void>;
}

/** Prepares a checkpoint's VAE; its programs load when they are first used. */
export function loadAutoencoder(
  runtime: Runtime,
  part: PartWeights<VaeConfig>,
  bytes?: ReadonlyMap<string, Uint8Array>,
): Autoencoder {
  const { config } = part;
  const programs = new Map<string, Lazy>();
  // Work in tiles gives programs back that other such work may be about to run, and takes as much memory as is allowed.
  const inTurn = oneAtATime();

  /**
   * A program, which is recorded and compiled when it is first run. Programs for tiles follow each other: kept, the
   * buffers of all of them would add up.
   */
  const program = (name: string, record: (weights: Weights) => Tensor, keepBuffers = false): Program => {
    const known = programs.get(name);
    const loaded =
      known ??
      lazily(() => {
        const bound = bindWeights(part, { bytes, keepBuffers });
        return compileBound(runtime, { outputs: { result: record(bound.weights) } }, bound);
      });
    if (!known) programs.set(name, loaded);
    return {
      run: async (inputs, options) => (await (await loaded.get()).run(inputs, options)).result as FloatTensor,
      release: loaded.dispose,
    };
  };
  const encoder = program('encode', (weights) => encodeMoments(config, weights, imageInput(config)), true);
  const decoder = program('decode', (weights) => decode(config, weights, latentInput(config)), true);

  const encodeInTiles = async (image: FloatTensor, { tile, level }: Plan, options: RunOptions) => {
    const statistics = program(`encode statistics ${level}`, (weights) =>
      encodeStatistics(config, weights, imageInput(config), level),
    );
    const fine = program(`encode fine ${level}`, (weights) =>
      encodeFine(config, weights, imageInput(config), statisticsInput(config), level),
    );
    const coarse = program(`encode coarse ${level}`, (weights) =>
      encodeCoarse(config, weights, encoderFeaturesInput(config, level), level),
    );
    const cut = { unit: vaeDownscale(config), signal: options.signal };
    const shared = await thenRelease(statistics, async () => {
      const measured: FloatTensor[] = [];
      for (const { tile: piece } of tilesOf(image, { ...cut, tile: { ...tile, overlap: 0 } })) {
        measured.push(await statistics.run({ image: piece }, options));
      }
      return pooledStatistics(measured);
    });
    const features = await inTiles(image, { ...cut, tile }, (piece) =>
      fine.run({ image: piece, statistics: shared }, options),
    );
    return thenRelease(coarse, () => coarse.run({ features }, options));
  };

  const decodeInTiles = async (latent: FloatTensor, { tile, level, share }: Plan, options: RunOptions) => {
    const coarse = program(`decode coarse ${level}`, (weights) =>
      decodeCoarse(config, weights, latentInput(config), level),
    );
    const statistics = program(`decode statistics ${level}`, (weights) =>
      decodeStatistics(config, weights, decoderSampleInput(config, level), level),
    );
    const fine = program(`decode fine ${level}`, (weights) =>
      decodeFine(config, weights, decoderFeaturesInput(config, level), statisticsInput(config), level),
    );
    const features = await thenRelease(coarse, () => coarse.run({ latent }, options));
    const sample = evenSample(features, share);
    const shared = await thenRelease(statistics, () => statistics.run({ sample }, options));
    const unit = features.shape[3]! / latent.shape[3]!;
    return inTiles(features, { tile, unit, signal: options.signal }, (piece) =>
      fine.run({ features: piece, statistics: shared }, options),
    );
  };

  return {
    config,
    async encode(image, { tile, ...options } = {}) {
      const [height, width] = image.shape.slice(2) as [number, number];
      const plan = planTiles(config, tile, height, width, 'encode');
      if (!plan) return encoder.run({ image }, options);
      return inTurn(() => eachItem(image, (item) => encodeInTiles(item, plan, options)));
    },
    async decode(latent, { tile, ...options } = {}) {
      const [height, width] = latent.shape.slice(2).map((size) => size * vaeDownscale(config)) as [number, number];
      const plan = planTiles(config, tile, height, width, 'decode');
      if (!plan) return decoder.run({ latent }, options);
      return inTurn(() => eachItem(latent, (item) => decodeInTiles(item, plan, options)));
    },
    async dispose() {
      await inTurn(() => Promise.all([...programs.values()].map((loaded) => loaded.dispose())));
    },
  };
}

interface Program {
  run(inputs: Readonly<Record<string, TensorData>>, options: RunOptions): Promise<FloatTensor>;
  /** Gives its memory back. */
  release(): Promise<void>;
}

async function thenRelease<Result>(program: Program, work: () => Promise<Result>): Promise<Result> {
  try {
    return await work();
  } finally {
    await program.release();
  }
}

/** How a picture is done in tiles. */
interface Plan {
  /** In latent pixels. */
  readonly tile: TileSize;
  /** The level of the network that parts coarse from fine. */
  readonly level: number;
  /** Part of the rows, and of the columns, that the decoder's statistics are measured on. */
  readonly share: number;
}

/**
 * The coarse part is as much of the network as has no tensor larger than the largest of a tile, where the network
 * allows that; the largest are the features that are upsampled to full resolution.
 */
function planTiles(
  config: VaeConfig,
  tiling: Tiling = 'auto',
  height: number,
  width: number,
  direction: 'encode' | 'decode',
): Plan | undefined {
  const downscale = vaeDownscale(config);
  const top = config.multipliers.length - 1;
  const tile = tiling === 'auto' ? DEFAULT_TILE : tiling;
  if (tile === 'off') return undefined;
  requireTile(tile, downscale);
  // A picture that does not divide is refused where it is done at once.
  const divides = height % downscale === 0 && width % downscale === 0;
  if (top === 0 || !divides || Math.max(height, width) <= tile.size) return undefined;
  const channels = (level: number) => config.channels * config.multipliers[Math.min(level, top)]!;
  const largest = tile.size ** 2 * channels(1);
  // A level of the decoder starts with as many channels as the one above it has.
  const startOf = (level: number) => channels(direction === 'decode' ? level + 1 : level);
  let level = top;
  while (level > 1 && (startOf(level - 1) * height * width) / 4 ** (level - 1) <= largest) level--;
  const upsampled = (channels(level) * height * width) / 4 ** (level - 1);
  return {
    tile: { size: Math.floor(tile.size / downscale), overlap: Math.ceil(tile.overlap / downscale) },
    level,
    share: Math.min(Math.sqrt(largest / upsampled), 1),
  };
}

function requireTile({ size, overlap }: TileSize, downscale: number): void {
  const whole = [size, overlap].every((value) => Number.isSafeInteger(value) && value >= 0 && value % downscale === 0);
  if (whole && size >= SMALLEST_TILE && overlap <= size / 2) return;
  throw new MmditxError(
    'bad-option',
    `Tiles of ${size} pixels that overlap by ${overlap} cannot be; both must be multiples of ${downscale}, ` +
      `the size from ${SMALLEST_TILE} and the overlap up to half of it.`,
  );
}

/** Means and variances of tiles of one size as those of all together: [batch, groups, 2 * norms], mean before variance. */
function pooledStatistics(tiles: readonly FloatTensor[]): FloatTensor {
  const { shape } = tiles[0]!;
  const data = new Float32Array(elementCount(shape));
  for (let i = 0; i < data.length; i += 2) {
    const average = (value: (mean: number, variance: number) => number) =>
      tiles.reduce((sum, { data }) => sum + value(data[i]!, data[i + 1]!), 0) / tiles.length;
    const mean = average((mean) => mean);
    data[i] = mean;
    data[i + 1] = average((own, variance) => variance + (own - mean) ** 2);
  }
  return floats(shape, data);
}

/** The items of a batch one after the other: together they would need as many times the memory. */
async function eachItem(batch: FloatTensor, work: (item: FloatTensor) => Promise<FloatTensor>): Promise<FloatTensor> {
  const results: FloatTensor[] = [];
  for (let i = 0; i < batch.shape[0]!; i++) results.push(await work(batchItems(batch, i, 1)));
  return joinBatches(results);
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
