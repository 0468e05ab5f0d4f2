/**
 * Networks converted once and kept in a folder of the user's cache, so that they can be mapped into memory in another
 * precision than their files have.
 */

import { createHash } from 'node:crypto';
import { mkdir, open, readFile, rm, stat, statfs, utimes } from 'node:fs/promises';
import { homedir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as wait } from 'node:timers/promises';
import { MmditxError } from '../errors.ts';
import { ioError, writeFileAtomically } from './atomic.node.ts';
import { type Checkpoint, openCheckpoint, type PartName, type PartWeights, partTitles } from './checkpoint.ts';
import { convertedMetadata, type Precision, partPrefixes, plannedTensors } from './convert.ts';
import { type FileSource, fileSource } from './files.node.ts';
import { plannedSafetensorsBytes, plannedSafetensorsChunks, readExactly } from './safetensors.ts';

/** Grows when a converted file has to be made anew. */
const FORMAT = 5;

/** Where converted networks are kept: MMDITX_CACHE, else the user's cache folder. */
export function conversionFolder(environment: NodeJS.ProcessEnv = process.env): string {
  const { MMDITX_CACHE, XDG_CACHE_HOME, LOCALAPPDATA } = environment;
  return MMDITX_CACHE || join(XDG_CACHE_HOME || LOCALAPPDATA || join(homedir(), '.cache'), 'mmditx');
}

/** A network is being converted. */
export interface ConversionProgress {
  readonly part: PartName;
  readonly precision: Precision;
  /** Bytes written of this network, and in all. */
  readonly written: number;
  readonly bytes: number;
}

export interface ConversionOptions {
  /** Default {@link conversionFolder}. */
  readonly folder?: string | undefined;
  readonly signal?: AbortSignal | undefined;
  onProgress?: ((progress: ConversionProgress) => void) | undefined;
}

/**
 * A checkpoint with some networks in another precision, from the cache where they are there already. Two processes
 * that want the same network at once write it once.
 * @returns the checkpoint, and `close` for the files it opened
 * @throws MmditxError `io` when there is not enough room or the folder cannot be written
 */
export async function convertParts(
  checkpoint: Checkpoint,
  parts: readonly PartName[],
  precision: Precision,
  { folder = conversionFolder(), signal, onProgress }: ConversionOptions = {},
): Promise<{ checkpoint: Checkpoint; close: () => Promise<void> }> {
  if (parts.length === 0) return { checkpoint, close: async () => undefined };
  const sources: FileSource[] = [];
  const close = async () => void (await Promise.all(sources.map((source) => source.close())));
  try {
    const jobs = await Promise.all(
      parts.map(async (part) => {
        const weights = checkpoint.parts[part]!;
        return { part, weights, path: join(folder, await fileName(part, weights, precision)) };
      }),
    );
    await makeCacheFolder(folder);
    await requireRoom(folder, jobs, precision);
    for (const { part, weights, path } of jobs) {
      if (await exists(path)) continue;
      await onlyOnce(path, signal, () => convert(path, part, weights, precision, { signal, onProgress }));
    }
    for (const { path } of jobs) sources.push(await fileSource(path));
    const converted = await openConverted(sources, jobs);
    return { checkpoint: { ...checkpoint, parts: { ...checkpoint.parts, ...converted } }, close };
  } catch (error) {
    await close();
    throw error;
  }
}

/**
 * The networks in converted files. What is known beside the weights comes from the originals: the same weights may lie
 * in files that say something else about them.
 * @throws MmditxError `bad-file` with the file to delete
 */
async function openConverted(sources: readonly FileSource[], jobs: readonly Job[]): Promise<Checkpoint['parts']> {
  const parts = await Promise.all(
    sources.map(async (source, i) => {
      const { part, weights, path } = jobs[i]!;
      const opened = await openCheckpoint([source]).catch((cause: unknown) => {
        throw cause instanceof MmditxError && cause.code !== 'io' ? damaged(path, cause) : cause;
      });
      const found = opened.parts[part];
      if (!found) throw damaged(path);
      return [part, { ...found, config: weights.config, metadata: weights.metadata }];
    }),
  );
  return Object.fromEntries(parts);
}

function damaged(path: string, cause?: MmditxError): MmditxError {
  return new MmditxError('bad-file', `The converted weights in ${path} are damaged; delete this file and try again.`, {
    cause,
  });
}

type Job = { readonly part: PartName; readonly weights: PartWeights<unknown>; readonly path: string };

/** Bytes of each sample of a tensor that is hashed: enough to tell a fine-tuned model from the original. */
const SAMPLE_BYTES = 4096;
/** Where samples lie: at its begin, in its middle, at its end. */
const SAMPLED_AT = [0, 0.5, 1];

/** Tells by its content what a file was converted from, and into what. */
async function fileName(part: PartName, { tensors }: PartWeights<unknown>, precision: Precision): Promise<string> {
  const hash = createHash('sha256').update(`${FORMAT} ${part} ${precision}\n`);
  for (const [name, { spans }] of tensors) {
    for (const { source, encoding, shape, offset, byteLength, scale } of spans) {
      hash.update(JSON.stringify([name, encoding, shape, byteLength, scale]));
      const length = Math.min(byteLength, SAMPLE_BYTES);
      for (const share of SAMPLED_AT) {
        hash.update(await readExactly(source, offset + Math.floor(share * (byteLength - length)), length));
      }
    }
  }
  return `${part.toLowerCase()}-${precision}-${hash.digest('hex').slice(0, 24)}.safetensors`;
}

async function makeCacheFolder(folder: string): Promise<void> {
  try {
    await mkdir(folder, { recursive: true });
  } catch (cause) {
    throw ioError('write', folder, cause);
  }
}

async function exists(path: string): Promise<boolean> {
  return (await stat(path).catch(() => undefined)) !== undefined;
}

/** Says how much room is missing before hours of work end in a full disk. */
async function requireRoom(folder: string, jobs: readonly Job[], precision: Precision): Promise<void> {
  let needed = 0;
  for (const { part, weights, path } of jobs) {
    if (!(await exists(path))) needed += plannedSafetensorsBytes(plannedTensors(part, weights, precision));
  }
  const { bavail, bsize } = await statfs(folder);
  if (needed <= bavail * bsize) return;
  const gigabytes = (bytes: number) => `${(bytes / 1e9).toFixed(1)} GB`;
  throw new MmditxError(
    'io',
    `Converting the model to ${precision} needs ${gigabytes(needed)} in ${folder}, where ${gigabytes(bavail * bsize)} is free; free some space, choose another folder with MMDITX_CACHE, or use --precision fp16.`,
  );
}

async function convert(
  path: string,
  part: PartName,
  weights: PartWeights<unknown>,
  precision: Precision,
  { signal, onProgress }: Pick<ConversionOptions, 'signal' | 'onProgress'>,
): Promise<void> {
  const plans = plannedTensors(part, weights, precision, partPrefixes[part]);
  const metadata = convertedMetadata({ [part]: weights });
  const bytes = plannedSafetensorsBytes(plans, metadata);
  let written = 0;
  const reported = async function* () {
    for await (const chunk of plannedSafetensorsChunks(plans, metadata)) {
      yield chunk;
      written += chunk.length;
      onProgress?.({ part, precision, written, bytes });
    }
  };
  try {
    await writeFileAtomically(path, reported(), signal ? { signal } : {});
  } catch (error) {
    if (error instanceof MmditxError && error.code === 'io') throw error;
    signal?.throwIfAborted();
    throw error;
  }
}

/** Time after which the lock of a process that shows no sign of life counts as left behind, in milliseconds. */
const STALE_AFTER = 60_000;
const POLL_EVERY = 500;

/** Does work that ends with a file at `path`, unless another process does it already: then waits for that one. */
async function onlyOnce(path: string, signal: AbortSignal | undefined, work: () => Promise<void>): Promise<void> {
  const lock = `${path}.lock`;
  for (;;) {
    signal?.throwIfAborted();
    if (await exists(path)) return;
    const handle = await open(lock, 'wx').catch((cause: NodeJS.ErrnoException) => {
      if (cause.code === 'EEXIST') return undefined;
      throw ioError('write', lock, cause);
    });
    if (handle) {
      await handle.writeFile(String(process.pid));
      await handle.close();
      break;
    }
    if (await isLeftBehind(lock)) await rm(lock, { force: true });
    else {
      await wait(POLL_EVERY, undefined, signal ? { signal } : {}).catch((error: unknown) => {
        // Its own error hides the reason.
        signal?.throwIfAborted();
        throw error;
      });
    }
  }
  const alive = setInterval(() => void utimes(lock, new Date(), new Date()).catch(() => undefined), STALE_AFTER / 4);
  try {
    if (!(await exists(path))) await work();
  } finally {
    clearInterval(alive);
    await rm(lock, { force: true });
  }
}

/** Whether a lock's process has ended without removing it. */
async function isLeftBehind(lock: string): Promise<boolean> {
  const [status, text] = await Promise.all([stat(lock).catch(() => undefined), readFile(lock, 'utf8').catch(() => '')]);
  if (!status) return false;
  const pid = Number(text);
  if (Number.isInteger(pid) && pid > 0 && !isRunning(pid)) return true;
  return Date.now() - status.mtimeMs > STALE_AFTER;
}

function isRunning(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === 'EPERM';
  }
}

/** Names a network in a progress line. */
export function conversionTitle({ part, precision }: ConversionProgress): string {
  return `Converting the ${partTitles[part]} to ${precision}`;
}
