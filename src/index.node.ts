/**
 * mmditx in Node.
 *
 * @example
 * const sd = await load(); // the small model that ships with this package
 * const [image] = await sd.generate({ prompt: '3d fox on a teal background' });
 * await writeFile('fox.png', image.png());
 */

import { stat } from 'node:fs/promises';
import { freemem } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { modelIdentity } from './pipeline/identity.ts';
import { openFiles, readTokenizers } from './pipeline/open.node.ts';
import { createPipeline, type StableDiffusion } from './pipeline/pipeline.ts';
import { choosePrecision, partsToConvert } from './pipeline/precision.ts';
import { fastestRuntime } from './runtime/fastest.node.ts';
import { type NodeRuntimeOptions, nodeRuntime } from './runtime/node.node.ts';
import type { Runtime } from './runtime/runtime.ts';
import type { Precision } from './weights/convert.ts';
import { type ConversionProgress, convertParts } from './weights/converted.node.ts';
import { fileSource } from './weights/files.node.ts';
import { type Lora, openLora } from './weights/lora.ts';

export * from './api.ts';
export { openFiles } from './pipeline/open.node.ts';
export { availableDevices, type NodeRuntimeOptions, nodeRuntime } from './runtime/node.node.ts';
export type { TrainEvent } from './training/log.ts';
export { describeData, encodeData, type TrainOptions, type TrainResult, train } from './training/train.node.ts';
export type { ConversionProgress } from './weights/converted.node.ts';
export {
  type Download,
  type DownloadOptions,
  type DownloadPlan,
  type DownloadProgress,
  downloadModel,
} from './weights/download.node.ts';

/** The small model that ships with this package. */
export const SMALL_MODEL = join(dirname(fileURLToPath(import.meta.url)), '../models/small/mmditx-small.safetensors');

export interface LoadOptions extends NodeRuntimeOptions {
  /**
   * What the weights are kept as. Default: fp32 for small models; for large ones int8 on a processor (int4 where memory
   * is short) and the stored 16 bits on a graphics device.
   */
  precision?: Precision;
  /**
   * Give each network's memory back once it has done its work for a picture: best for a single picture. Default: only
   * where all networks together do not fit into memory.
   */
  release?: boolean;
  /** Folder of converted networks (default: `mmditx` in the user's cache folder, or MMDITX_CACHE). */
  cacheFolder?: string;
  /** Folder of the LoRAs that prompts name, as in `<lora:name:0.8>`: name.safetensors in it. */
  loraFolder?: string;
  /** Called while networks are converted to the precision, which happens once for each model. */
  onConversion?: (progress: ConversionProgress) => void;
  /** Called with one line each: which precision was chosen and why, which of several copies of weights are taken. */
  onNote?: (text: string) => void;
  /** Stops the conversion. */
  signal?: AbortSignal;
  /** Paths of tokenizer.json files, for checkpoints that do not bring their own (default: found beside the model). */
  clipTokenizer?: string;
  t5Tokenizer?: string;
  /** Runs the networks (default: {@link nodeRuntime} with these options, on the fastest device that works). */
  runtime?: Runtime;
}

/**
 * A model from weight files: one checkpoint, the parts of one (ComfyUI's split files), or a folder of them (diffusers'
 * layout, a snapshot of the hub's cache); safetensors or GGUF, told apart by their contents.
 * @param paths default: the small model that ships with this package
 * @throws MmditxError `io`, `bad-file`, `unsupported-model`, `missing-part`, `device-unavailable`; `bad-option` when the
 *   memory does not suffice for the precision
 */
export async function load(
  paths: string | readonly string[] = SMALL_MODEL,
  options: LoadOptions = {},
): Promise<StableDiffusion> {
  const places = typeof paths === 'string' ? [paths] : paths;
  const { onNote, onConversion, cacheFolder: folder, loraFolder, signal } = options;
  const opened = await openFiles(places, { onNote });
  const closing = [opened.close];
  const close = async () => void (await Promise.all(closing.map((end) => end())));
  try {
    const { checkpoint } = opened;
    const [first] = places as [string];
    const home = (await stat(first)).isDirectory() ? first : dirname(first);
    const tokenizers = await readTokenizers(checkpoint, home, options);
    const runtime = options.runtime ?? (options.device ? nodeRuntime(options) : await fastestRuntime(options));
    const choice = choosePrecision(checkpoint, {
      wanted: options.precision,
      device: runtime.device,
      freeBytes: freeMemory(),
    });
    if (choice.reason !== undefined) onNote?.(choice.reason);
    const parts = partsToConvert(checkpoint, choice.precision);
    const converted = await convertParts(checkpoint, parts, choice.precision, {
      folder,
      signal,
      onProgress: onConversion,
    });
    closing.push(converted.close);
    const pipeline = createPipeline({
      checkpoint: converted.checkpoint,
      runtime,
      model: await modelIdentity(checkpoint),
      tokenizers,
      precision: choice.precision,
      release: options.release ?? choice.release,
      ...(loraFolder !== undefined && {
        findLora: lorasIn(loraFolder),
      }),
    });
    return { ...pipeline, dispose: async () => void (await Promise.all([pipeline.dispose(), close()])) };
  } catch (error) {
    await close();
    throw error;
  }
}

/** Finds LoRAs by name in a folder, and reads each once. */
function lorasIn(folder: string): (name: string) => Promise<Lora> {
  const read = new Map<string, Promise<Lora>>();
  return (name) => {
    const known = read.get(name) ?? readLora(join(folder, `${name}.safetensors`));
    read.set(name, known);
    known.catch(() => read.delete(name));
    return known;
  };
}

/** Bytes of memory that can be had without taking them from others; containers may have less than their machine. */
function freeMemory(): number {
  const available = (process as { availableMemory?: () => number }).availableMemory?.() ?? freemem();
  return Math.min(available, freemem());
}

/**
 * Reads a LoRA, to be given to `generate`.
 * @throws MmditxError `io`, `bad-file`, `unsupported-model`
 */
export async function readLora(path: string): Promise<Lora> {
  const source = await fileSource(path);
  try {
    return await openLora(source);
  } finally {
    await source.close();
  }
}
