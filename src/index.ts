/**
 * mmditx: Stable Diffusion 3.5 Medium in TypeScript. This is the entry for browsers; Node's adds loading by path.
 *
 * @example
 * const sd = await load([file]); // a File or Blob of a checkpoint
 * const [image] = await sd.generate({ prompt: 'a red apple' });
 */

import { modelIdentity } from './pipeline/identity.ts';
import { createPipeline, type PipelineSource, type StableDiffusion } from './pipeline/pipeline.ts';
import type { Runtime } from './runtime/runtime.ts';
import { type WebRuntimeOptions, webRuntime } from './runtime/web.ts';
import { openCheckpoint } from './weights/checkpoint.ts';
import { blobSource } from './weights/safetensors.ts';

export * from './api.ts';
export { type WebRuntimeOptions, webRuntime } from './runtime/web.ts';

export interface LoadOptions extends WebRuntimeOptions {
  /** Texts of tokenizer.json files, for checkpoints that do not bring their own. */
  tokenizers?: NonNullable<PipelineSource['tokenizers']>;
  /** Runs the networks (default: {@link webRuntime} with these options). */
  runtime?: Runtime;
}

/**
 * A model from files picked or fetched in a browser: one checkpoint, or the parts of one.
 * @throws MmditxError `bad-file`, `unsupported-model`, `missing-part`, `device-unavailable`
 */
export async function load(files: Blob | readonly Blob[], options: LoadOptions = {}): Promise<StableDiffusion> {
  const blobs = files instanceof Blob ? [files] : files;
  const names = blobs.map((blob, i) => (blob instanceof File ? blob.name : `file ${i + 1}`));
  // The files of one model may share a name, such as model.safetensors.
  const sources = blobs.map((blob, i) =>
    blobSource(blob, names.indexOf(names[i]!) === i ? names[i]! : `${names[i]} (${i + 1})`),
  );
  const checkpoint = await openCheckpoint(sources);
  const bytes = new Map<string, Uint8Array>();
  for (const [i, { name }] of sources.entries()) bytes.set(name, new Uint8Array(await blobs[i]!.arrayBuffer()));
  const { tokenizers, runtime = await webRuntime(options) } = options;
  const model = await modelIdentity(checkpoint);
  return createPipeline({ checkpoint, runtime, bytes, model, ...(tokenizers && { tokenizers }) });
}
