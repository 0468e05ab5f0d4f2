/** The data sets of a configuration, read and divided into training and validation. */

import { MmditxError } from '../errors.ts';
import type { TorchGenerator } from '../sampling/noise.ts';
import type { ClipTokenizer, T5Tokenizer } from '../text/tokenizer.ts';
import { type Entry, entriesOf, isHeldOut, sizeChoice } from './batches.ts';
import { type BucketFit, coverFit } from './buckets.ts';
import { type CaptionOptions, captionVariants, drawCaption } from './captions.ts';
import type { DatasetConfig, TrainConfig } from './config.ts';
import { type BrokenPicture, type DatasetPicture, readDataset } from './dataset.node.ts';
import { datasetReport, reportText, type TokenCounter } from './dataset-report.ts';

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
  const own =
    validation?.path === undefined ? undefined : await readDataset({ path: resolve(validation.path) }, { signal });
  const validationPictures = own?.pictures;
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
    const heldOut = validationPictures ?? set.pictures.filter((picture) => isHeldOut(picture, share));
    const training = set.pictures.filter((picture) => !isHeldOut(picture, share));
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

/** What is known of the text encoders before training: lengths that captions are cut to. */
export interface CaptionLimits {
  readonly clip?: { readonly tokenizer: ClipTokenizer; readonly positions: number } | undefined;
  readonly t5?: { readonly tokenizer: T5Tokenizer; readonly tokens: number } | undefined;
}

/** What was found in data sets, as text for a terminal: sizes, captions, what is cut, what is broken. */
export function dataText(data: ReadonlyMap<string, ReadData>, { clip, t5 }: CaptionLimits): string {
  const counters: TokenCounter[] = [
    // Begin and end count, too.
    ...(clip
      ? [{ name: 'CLIP', limit: clip.positions, count: (text: string) => clip.tokenizer.encode(text).length + 2 }]
      : []),
    ...(t5 ? [{ name: 'T5', limit: t5.tokens, count: (text: string) => t5.tokenizer.encode(text).length + 1 }] : []),
  ];
  const texts = [...data].map(([name, { config, training, heldOut, broken }]) => {
    const choices = config.sizes.map((size) => sizeChoice(size, config));
    const fits = (picture: Pick<DatasetPicture, 'width' | 'height'>): BucketFit[] =>
      choices.map((choose) => {
        const { size } = choose(picture);
        const covered = coverFit([picture.width, picture.height], size);
        return config.fit === 'cover' ? covered : { ...covered, cropped: 0 };
      });
    const report = datasetReport({ pictures: [...training, ...heldOut], broken }, { fits, counters });
    const kept = heldOut.length > 0 ? `, ${heldOut.length} of them kept for validation` : '';
    return `${name}: ${config.path}${kept}\n${reportText(report)}`;
  });
  return texts.join('\n\n');
}
