/** A stage that makes the two tokenizers from the captions of data sets. */

import { mkdir } from 'node:fs/promises';
import { join } from 'node:path';
import { MmditxError } from '../errors.ts';
import { writeFileAtomically } from '../weights/atomic.node.ts';
import { type Entry, stepRandom } from './batches.ts';
import type { TokenizersStage } from './config.ts';
import { entryCaption, entryCaptions } from './datasets.node.ts';
import { trainClipTokenizer, trainT5Tokenizer } from './tokenizer-training.ts';

/** Texts that tokenizers are trained on: more change nothing but the time. */
const MOST_TEXTS = 20_000;
/** Drawn from each caption that can be shown in too many ways to list. */
const DRAWS = 8;

/** The files that the stage leaves behind. */
export const TOKENIZER_FILES = { clip: 'clip-tokenizer.json', t5: 't5-tokenizer.json' } as const;

/** @throws MmditxError `bad-file` when there are no captions */
export async function trainTokenizers(
  { clipVocabulary, t5Vocabulary, lowercase, name }: TokenizersStage,
  entries: readonly Entry[],
  folder: string,
): Promise<void> {
  const texts = captionTexts(entries);
  if (texts.length === 0) {
    throw new MmditxError(
      'bad-file',
      `The pictures of stage "${name}" have no captions to make tokenizers from; add .txt files.`,
    );
  }
  const clip = trainClipTokenizer(texts, { vocabularySize: clipVocabulary });
  const t5 = trainT5Tokenizer(texts, { vocabularySize: t5Vocabulary, lowercase });
  await mkdir(folder, { recursive: true });
  await writeFileAtomically(join(folder, TOKENIZER_FILES.clip), [new TextEncoder().encode(clip)]);
  await writeFileAtomically(join(folder, TOKENIZER_FILES.t5), [new TextEncoder().encode(t5)]);
}

/** Different texts, evenly chosen where there are too many; always the same in the same order. */
function captionTexts(entries: readonly Entry[]): string[] {
  const random = stepRandom(0);
  const all = new Set<string>();
  for (const entry of entries) {
    const texts = entryCaptions(entry) ?? Array.from({ length: DRAWS }, () => entryCaption(entry, random));
    for (const text of texts) if (text) all.add(text);
  }
  const texts = [...all].sort((a, b) => (a < b ? -1 : a > b ? 1 : 0));
  const stride = Math.max(1, texts.length / MOST_TEXTS);
  return Array.from({ length: Math.ceil(texts.length / stride) }, (_, i) => texts[Math.floor(i * stride)]!);
}
