/**
 * Which pictures make a batch, and how each is shown: functions of the seed and the number of the batch alone, so that
 * a run that goes on after a kill sees what it would have seen.
 */

import { type TorchGenerator, torchGenerator } from '../sampling/noise.ts';
import { aspectBuckets } from './buckets.ts';
import type { DatasetConfig, PictureSize } from './config.ts';
import type { DatasetPicture } from './dataset.node.ts';
import type { PictureView } from './pictures.node.ts';

/** A picture over one background at one size. */
export interface Entry {
  readonly picture: DatasetPicture;
  readonly config: DatasetConfig;
  /** Of the data set in the configuration. */
  readonly dataset: string;
  readonly size: PictureSize;
  /** What the picture is resized to before the crop, where buckets say so. */
  readonly resized?: PictureSize;
  /** Index into the data set's backgrounds. */
  readonly background: number;
}

/** What training goes through in an epoch. */
export function entriesOf(dataset: string, config: DatasetConfig, pictures: readonly DatasetPicture[]): Entry[] {
  const sizeOf = config.sizes.map((size) => sizeChoice(size, config));
  const entries: Entry[] = [];
  for (const [index, picture] of pictures.entries()) {
    for (let background = 0; background < config.backgrounds.length; background++) {
      const chosen = config.assign === 'every' ? sizeOf : [sizeOf[(index + background) % sizeOf.length]!];
      for (const size of chosen) {
        const entry: Entry = { picture, config, dataset, ...size(picture), background };
        for (let repeat = 0; repeat < config.repeats; repeat++) entries.push(entry);
      }
    }
  }
  return entries;
}

/** How a picture is shown at one of the sizes of its data set: in its bucket, or as all others. */
export function sizeChoice(
  size: number | PictureSize,
  { buckets }: DatasetConfig,
): (picture: Pick<DatasetPicture, 'width' | 'height'>) => Pick<Entry, 'size' | 'resized'> {
  if (!buckets) {
    const fixed: PictureSize = typeof size === 'number' ? [size, size] : size;
    return () => ({ size: fixed });
  }
  const { fit: bucketOf } = aspectBuckets({ resolution: size, ...buckets });
  return ({ width, height }) => {
    const { bucket, resized } = bucketOf([width, height]);
    return { size: bucket, resized };
  };
}

/** The order of batches, each of one size. */
export interface BatchOrder {
  /** Batches of an epoch; the last of each size may be smaller than the others. */
  readonly perEpoch: number;
  /** The entries of a batch, counted from 0 through all epochs. */
  at(index: number): { readonly epoch: number; readonly entries: readonly Entry[] };
}

/** Shuffles entries anew in each epoch. */
export function batchOrder(entries: readonly Entry[], batch: number, seed: number): BatchOrder {
  const groups = new Map<string, Entry[]>();
  for (const entry of entries) {
    const group = groups.get(entry.size.join('x')) ?? [];
    groups.set(entry.size.join('x'), group);
    group.push(entry);
  }
  const perEpoch = [...groups.values()].reduce((sum, group) => sum + Math.ceil(group.length / batch), 0);
  let known: { epoch: number; batches: Entry[][] } | undefined;
  const shuffled = (epoch: number): Entry[][] => {
    if (known?.epoch === epoch) return known.batches;
    const random = stepRandom(seed, ORDER_STREAM, epoch);
    const batches: Entry[][] = [];
    for (const group of groups.values()) {
      const order = random.permutation(group.length);
      for (let start = 0; start < group.length; start += batch) {
        batches.push([...order.subarray(start, start + batch)].map((i) => group[i]!));
      }
    }
    const mixed = [...random.permutation(batches.length)].map((i) => batches[i]!);
    known = { epoch, batches: mixed };
    return mixed;
  };
  return {
    perEpoch,
    at(index) {
      const epoch = Math.floor(index / perEpoch);
      return { epoch, entries: shuffled(epoch)[index % perEpoch]! };
    },
  };
}

/** First numbers of the random streams of a run, so that none repeats another. */
export const [ORDER_STREAM, STEP_STREAM, VALIDATION_STREAM, INITIAL_STREAM] = [1, 2, 3, 4] as const;

/** A generator of its own for each use: the run's seed and some numbers, mixed as in SplitMix (Steele et al. 2014). */
export function stepRandom(seed: number, ...path: readonly number[]): TorchGenerator {
  let state = 0n;
  for (const number of [seed, ...path]) {
    state = BigInt.asUintN(64, (state ^ BigInt(number)) + 0x9e3779b97f4a7c15n);
    state = BigInt.asUintN(64, (state ^ (state >> 30n)) * 0xbf58476d1ce4e5b9n);
    state = BigInt.asUintN(64, (state ^ (state >> 27n)) * 0x94d049bb133111ebn);
    state ^= state >> 31n;
  }
  return torchGenerator(Number(BigInt.asUintN(32, state)));
}

/** How an entry is shown this time. */
export function drawView(entry: Entry, random: TorchGenerator, { cached }: { cached: boolean }): PictureView {
  const { crop, cropVariants, flip } = entry.config;
  const flipped = flip && random.integers(0, 2, 1)[0] === 1;
  if (crop === 'centre') return viewOf(entry, flipped, CENTRE);
  if (cached) return viewOf(entry, flipped, cropVariant(random.integers(0, cropVariants, 1)[0]!));
  const [x, y] = random.uniform(2) as unknown as [number, number];
  return viewOf(entry, flipped, [x, y]);
}

/** Every view that {@link drawView} draws from where latents are cached. */
export function allViews(entry: Entry): PictureView[] {
  const { crop, cropVariants, flip } = entry.config;
  const crops = crop === 'centre' ? [CENTRE] : Array.from({ length: cropVariants }, (_, i) => cropVariant(i));
  return crops.flatMap((at) => (flip ? [false, true] : [false]).map((flipped) => viewOf(entry, flipped, at)));
}

type Place = readonly [x: number, y: number];
const CENTRE: Place = [0.5, 0.5];

/** Places spread evenly over the unit square: the R2 sequence (Roberts 2018), which begins in the middle. */
function cropVariant(index: number): Place {
  const root = 1.324717957244746;
  return [(0.5 + index / root) % 1, (0.5 + index / root ** 2) % 1];
}

function viewOf(
  { size: [width, height], resized, config, background }: Entry,
  flip: boolean,
  crop: Place,
): PictureView {
  const { fit, filter, backgrounds } = config;
  return {
    width,
    height,
    fit,
    crop,
    flip,
    filter,
    background: rgb(backgrounds[background]!.colour),
    ...(resized && fit === 'cover' && { resized }),
  };
}

/** #rrggbb as numbers from 0 to 255. */
function rgb(colour: string): [number, number, number] {
  const value = Number.parseInt(colour.slice(1), 16);
  return [value >> 16, (value >> 8) & 255, value & 255];
}

/**
 * Whether a picture is kept out of training for validation: by its own digest, so that the choice stays when others are
 * added.
 */
export function isHeldOut({ digest }: Pick<DatasetPicture, 'digest'>, share: number): boolean {
  return Number.parseInt(digest.slice(0, 8), 16) / 2 ** 32 < share;
}
