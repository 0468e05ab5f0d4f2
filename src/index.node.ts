/**
 * mmditx in Node.
 *
 * @example
 * const sd = await load(); // the small model that ships with this package
 * const [image] = await sd.generate({ prompt: '3d fox on a teal background' });
 * await writeFile('fox.png', image.png());
 */

import { existsSync } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { MmditxError } from './errors.ts';
import { modelIdentity } from './pipeline/identity.ts';
import { createPipeline, type PipelineSource, type StableDiffusion } from './pipeline/pipeline.ts';
import { fastestRuntime } from './runtime/fastest.node.ts';
import { type NodeRuntimeOptions, nodeRuntime } from './runtime/node.node.ts';
import type { Runtime } from './runtime/runtime.ts';
import { ioError } from './weights/atomic.node.ts';
import { type Checkpoint, openCheckpoint } from './weights/checkpoint.ts';
import { type FileSource, fileSource } from './weights/files.node.ts';

export * from './api.ts';
export { availableDevices, type NodeRuntimeOptions, nodeRuntime } from './runtime/node.node.ts';

/** The small model that ships with this package. */
export const SMALL_MODEL = join(dirname(fileURLToPath(import.meta.url)), '../models/small/mmditx-small.safetensors');

export interface LoadOptions extends NodeRuntimeOptions {
  /** Paths of tokenizer.json files, for checkpoints that do not bring their own (default: found beside the model). */
  clipTokenizer?: string;
  t5Tokenizer?: string;
  /** Runs the networks (default: {@link nodeRuntime} with these options, on the fastest device that works). */
  runtime?: Runtime;
}

/** Where tokenizers lie beside a model, in the layout of the models on Hugging Face. */
const TOKENIZER_PLACES = {
  clip: ['tokenizer/tokenizer.json', 'tokenizers/clip/tokenizer.json'],
  t5: ['tokenizer_3/tokenizer.json', 'tokenizers/t5/tokenizer.json'],
};

/**
 * A model from safetensors files: one checkpoint, or the parts of one (ComfyUI's split files), told apart by their
 * contents.
 * @param paths default: the small model that ships with this package
 * @throws MmditxError `io`, `bad-file`, `unsupported-model`, `missing-part`, `device-unavailable`
 */
export async function load(
  paths: string | readonly string[] = SMALL_MODEL,
  options: LoadOptions = {},
): Promise<StableDiffusion> {
  const files = typeof paths === 'string' ? [paths] : paths;
  const { checkpoint, close } = await openFiles(files);
  try {
    const tokenizers = await readTokenizers(checkpoint, dirname(files[0]!), options);
    const runtime = options.runtime ?? (options.device ? nodeRuntime(options) : await fastestRuntime(options));
    const pipeline = createPipeline({ checkpoint, runtime, model: await modelIdentity(checkpoint), tokenizers });
    return { ...pipeline, dispose: async () => void (await Promise.all([pipeline.dispose(), close()])) };
  } catch (error) {
    await close();
    throw error;
  }
}

/** Opens checkpoint files; `close` lets go of them. */
export async function openFiles(
  paths: readonly string[],
): Promise<{ checkpoint: Checkpoint; sources: readonly FileSource[]; close: () => Promise<void> }> {
  if (paths.length === 0) throw new MmditxError('bad-option', 'No model file was given.');
  const sources: FileSource[] = [];
  const close = async () => void (await Promise.all(sources.map((source) => source.close())));
  try {
    for (const path of paths) sources.push(await fileSource(path));
    return { checkpoint: await openCheckpoint(sources), sources, close };
  } catch (error) {
    await close();
    throw error;
  }
}

async function readTokenizers(
  { tokenizers }: Checkpoint,
  folder: string,
  { clipTokenizer, t5Tokenizer }: LoadOptions,
): Promise<NonNullable<PipelineSource['tokenizers']>> {
  const find = (places: readonly string[]) => places.map((place) => join(folder, place)).find(existsSync);
  const clip = tokenizers.clip === undefined ? (clipTokenizer ?? find(TOKENIZER_PLACES.clip)) : undefined;
  const t5 = tokenizers.t5 === undefined ? (t5Tokenizer ?? find(TOKENIZER_PLACES.t5)) : undefined;
  const [clipText, t5Text] = await Promise.all([clip, t5].map((path) => path && readText(path)));
  return { ...(clipText && { clip: clipText }), ...(t5Text && { t5: t5Text }) };
}

async function readText(path: string): Promise<string> {
  try {
    return await readFile(path, 'utf8');
  } catch (error) {
    throw ioError('read', path, error);
  }
}
