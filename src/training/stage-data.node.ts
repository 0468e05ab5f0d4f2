/** What a stage shows, made ready: encoded as far as it can be known before, and without pictures that are broken. */

import { MmditxError } from '../errors.ts';
import { partTitles } from '../weights/checkpoint.ts';
import { storedBytes } from '../weights/stored.ts';
import { allViews, type Entry } from './batches.ts';
import type { DiffusionStage, StageConfig } from './config.ts';
import { entryCaptions } from './datasets.node.ts';
import { openEncodedCache } from './encoded-cache.node.ts';
import { createEncodings } from './encodings.node.ts';
import type { TrainingModel } from './model.node.ts';
import { renderPicture } from './pictures.node.ts';
import type { RunContext } from './run-context.node.ts';

/** Encodes what a diffusion stage shows, as far as it can be known before; pictures that cannot be decoded are left out. */
export async function encodeStage(
  context: RunContext,
  model: TrainingModel,
  stage: DiffusionStage,
  entries: { training: readonly Entry[]; heldOut: readonly Entry[] },
) {
  const { config, folder, runtime, resolve, journal, options } = context;
  const { signal, onPreparation } = options;
  const cached = config.cache !== false;
  const cache = cached
    ? await openEncodedCache(typeof config.cache === 'string' ? resolve(config.cache) : folder.cache)
    : undefined;
  const { parts, files, tokenizers } = model;
  const all = [...entries.training, ...entries.heldOut];
  const { t5Tokens } = stage.text;
  const work = encodingWork(all, stage, model);
  const encodings = createEncodings({
    checkpoint: { parts, files, tokenizers },
    runtime,
    ...(cache && { cache }),
    keepTexts: work.texts.length > 0,
    ...(t5Tokens !== undefined && { tokens: { t5Tokens: { length: t5Tokens } } }),
  });
  if (!cached) return { encodings, usable: await decodable(context, entries), cached };
  const skipped = new Set<string>();
  await encodings.fill(work, {
    signal,
    onProgress: ({ part, done, total }) =>
      onPreparation?.({ what: `Encoding with the ${partTitles[part]}`, done, total }),
    onSkip: ({ picture }, error) => {
      if (!skipped.has(picture.path)) journal.note(error.message);
      skipped.add(picture.path);
    },
  });
  return { encodings, usable: without(skipped, entries, stage), cached };
}

type Entries = { readonly training: readonly Entry[]; readonly heldOut: readonly Entry[] };

function without(skipped: ReadonlySet<string>, { training, heldOut }: Entries, stage?: StageConfig): Entries {
  const usable = (list: readonly Entry[]) => list.filter(({ picture }) => !skipped.has(picture.path));
  const left = { training: usable(training), heldOut: usable(heldOut) };
  if (left.training.length > 0) return left;
  throw new MmditxError(
    'bad-file',
    `None of the pictures${stage ? ` of stage "${stage.name}"` : ''} can be decoded; repair them or give others.`,
  );
}

/** Leaves out pictures that cannot be decoded, which their headers do not tell. */
export async function decodable(
  { journal, options: { signal, onPreparation } }: RunContext,
  entries: Entries,
): Promise<Entries> {
  const first = new Map([...entries.training, ...entries.heldOut].map((entry) => [entry.picture.path, entry]));
  const skipped = new Set<string>();
  let done = 0;
  for (const [path, entry] of first) {
    signal?.throwIfAborted();
    await renderPicture(entry.picture, allViews(entry)[0]!).catch((error: unknown) => {
      if (!(error instanceof MmditxError) || error.code === 'bad-option') throw error;
      skipped.add(path);
      journal.note(error.message);
    });
    onPreparation?.({ what: 'Checking pictures', done: ++done, total: first.size });
  }
  return without(skipped, entries);
}

/** More texts than this are encoded when they are shown, where the encoders are small: each takes files. */
const MOST_TEXTS_AHEAD = 20_000;
/** Encoders with more weights are not kept beside the transformer. */
const SMALL_ENCODERS = 2 ** 30;

/** Every view that a stage can show, and its texts where they are not too many. */
export function encodingWork(
  entries: readonly Entry[],
  { textEncoders }: Pick<DiffusionStage, 'textEncoders'>,
  { parts }: Pick<TrainingModel, 'parts'>,
) {
  const texts = new Set<string>(['']);
  // Where captions are shuffled, no text may come again.
  let listed = true;
  const latents: { picture: Entry['picture']; view: ReturnType<typeof allViews>[number] }[] = [];
  const seen = new Set<Entry>();
  for (const entry of entries) {
    if (seen.has(entry)) continue;
    seen.add(entry);
    for (const view of allViews(entry)) latents.push({ picture: entry.picture, view });
    if (textEncoders === 'frozen' && listed) {
      const own = entryCaptions(entry);
      listed = own !== undefined;
      for (const text of own ?? []) texts.add(text);
    }
  }
  const weights = [parts.clipL, parts.clipG, parts.t5].flatMap((part) => [...(part?.tensors.values() ?? [])]);
  const small = weights.reduce((sum, weight) => sum + storedBytes(weight), 0) <= SMALL_ENCODERS;
  const ahead = textEncoders === 'frozen' && listed && (!small || texts.size <= MOST_TEXTS_AHEAD);
  return { latents, texts: ahead ? [...texts] : [] };
}
