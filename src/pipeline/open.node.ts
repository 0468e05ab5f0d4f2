/** Opening a model: its weight files, and the tokenizers beside them. */

import { existsSync } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { MmditxError } from '../errors.ts';
import { clipTokenizerJson } from '../text/clip-vocabulary.ts';
import { ioError } from '../weights/atomic.node.ts';
import { type Checkpoint, openCheckpoint } from '../weights/checkpoint.ts';
import { type FileSource, fileSource } from '../weights/files.node.ts';
import { modelFiles } from '../weights/folder.node.ts';

/** Opens the files of a model, those of folders too; `close` lets go of them. */
export async function openFiles(
  paths: readonly string[],
  options: { readonly onNote?: ((text: string) => void) | undefined } = {},
): Promise<{ checkpoint: Checkpoint; sources: readonly FileSource[]; close: () => Promise<void> }> {
  if (paths.length === 0) throw new MmditxError('bad-option', 'No model file was given.');
  const sources: FileSource[] = [];
  const close = async () => void (await Promise.all(sources.map((source) => source.close())));
  try {
    for (const path of paths) {
      const files = await modelFiles(path, options.onNote ? { onNote: options.onNote } : {});
      for (const file of files) sources.push(await fileSource(file));
    }
    return { checkpoint: await openCheckpoint(sources), sources, close };
  } catch (error) {
    await close();
    throw error;
  }
}

/** Where tokenizers lie beside a model, in the layout of the models on Hugging Face. */
const TOKENIZER_PLACES = {
  clip: ['tokenizer/tokenizer.json', 'tokenizers/clip/tokenizer.json'],
  t5: ['tokenizer_3/tokenizer.json', 'tokenizers/t5/tokenizer.json'],
};

/** The released models have CLIP's tokenizer as these two. */
const CLIP_VOCABULARY = ['tokenizer/vocab.json', 'tokenizer/merges.txt'];

/** Paths of tokenizer.json files. */
export interface TokenizerPaths {
  readonly clipTokenizer?: string;
  readonly t5Tokenizer?: string;
}

/** Tokenizers beside a model, or given by path, where the checkpoint does not bring its own. */
export async function readTokenizers(
  { tokenizers }: Pick<Checkpoint, 'tokenizers'>,
  folder: string,
  { clipTokenizer, t5Tokenizer }: TokenizerPaths,
): Promise<Checkpoint['tokenizers']> {
  const find = (places: readonly string[]) => places.map((place) => join(folder, place)).find(existsSync);
  const clip = tokenizers.clip === undefined ? (clipTokenizer ?? find(TOKENIZER_PLACES.clip)) : undefined;
  const t5 = tokenizers.t5 === undefined ? (t5Tokenizer ?? find(TOKENIZER_PLACES.t5)) : undefined;
  const vocabulary = CLIP_VOCABULARY.map((place) => join(folder, place));
  const paired = tokenizers.clip === undefined && clip === undefined && vocabulary.every(existsSync);
  const [clipText, t5Text] = await Promise.all([
    paired ? readClipVocabulary(vocabulary) : clip && readText(clip),
    t5 && readText(t5),
  ]);
  return { ...(clipText && { clip: clipText }), ...(t5Text && { t5: t5Text }) };
}

async function readClipVocabulary(paths: readonly string[]): Promise<string> {
  const [vocabulary, merges] = await Promise.all(paths.map(readText));
  return clipTokenizerJson(vocabulary!, merges!);
}

async function readText(path: string): Promise<string> {
  try {
    return await readFile(path, 'utf8');
  } catch (error) {
    throw ioError('read', path, error);
  }
}
