/** The data sets of a configuration, read and divided into training and validation. */

import { MmditxError } from '../errors.ts';
import type { TorchGenerator } from '../sampling/noise.ts';
import { type Entry, entriesOf, isHeldOut } from './batches.ts';
import { type CaptionOptions, captionVariants, drawCaption } from './captions.ts';
import type { DatasetConfig, TrainConfig } from './config.ts';
import { type BrokenPicture, type DatasetPicture, readDataset } from './dataset.node.ts';

export interface ReadData {
  readonly config: DatasetConfig;
  readonly training: readonly DatasetPicture[];
  readonly heldOut: readonly DatasetPicture[];
  readonly broken: readonly BrokenPicture[];
}

/**
 * Reads data sets by their names in the configuration.
 * @throws MmditxError as `readDataset`; `bad-file` when nothing is left to train on
 */
export async function readData(
  { data, validation }: Pick<TrainConfig, 'data' | 'validation'>,
  resolve: (path: string) => string,
  {
    signal,
    onProgress,
  }: { signal?: AbortSignal | undefined; onProgress?: (name: string, read: number, total: number) => void } = {},
): Promise<Map<string, ReadData>> {
  const share = validation && validation.path === undefined ? validation.share : 0;
  const found = new Map<string, ReadData>();
  const read = new Map<string, Awaited<ReturnType<typeof readDataset>>>();
  for (const [name, config] of Object.entries(data)) {
    const path = resolve(config.path);
    const key = `${config.captions.extension} ${path}`;
    const set =
      read.get(key) ??
      (await readDataset(
        { path, captionExtension: config.captions.extension },
        { signal, onProgress: ({ read: done, total }) => onProgress?.(name, done, total) },
      ));
    read.set(key, set);
    const heldOut = set.pictures.filter((picture) => isHeldOut(picture, share));
    const training = set.pictures.filter((picture) => !heldOut.includes(picture));
    if (training.length === 0) {
      throw new MmditxError(
        'bad-file',
        `All ${set.pictures.length} pictures of the data set "${name}" would be kept for validation; lower validation.share.`,
      );
    }
    found.set(name, { config, training, heldOut, broken: set.broken });
  }
  return found;
}

/** Training and validation entries of the data sets that a stage names (default all). */
export function stageEntries(
  data: ReadonlyMap<string, ReadData>,
  names: readonly string[] = [...data.keys()],
): { training: Entry[]; heldOut: Entry[] } {
  const of = (which: 'training' | 'heldOut') =>
    names.flatMap((name) => {
      const set = data.get(name)!;
      return entriesOf(name, set.config, set[which]);
    });
  return { training: of('training'), heldOut: of('heldOut') };
}

function captionOptions({ config, background }: Entry): CaptionOptions {
  const { extension: _, ...options } = config.captions;
  return { ...options, words: config.backgrounds[background]!.words };
}

/** The text an entry is shown with this time. */
export function entryCaption(entry: Entry, random: TorchGenerator): string {
  return drawCaption(entry.picture.captions, captionOptions(entry), random);
}

/** Every text an entry can be shown with; undefined where there are too many. */
export function entryCaptions(entry: Entry): string[] | undefined {
  return captionVariants(entry.picture.captions, captionOptions(entry));
}
