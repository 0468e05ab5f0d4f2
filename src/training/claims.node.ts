/**
 * Work shared out among processes that have nothing in common but a folder, on one machine or on many: who does a
 * piece of work claims it with a file. Claims save work and decide nothing: a piece that is done twice all the same is
 * written twice, alike.
 *
 * A claim is made by creating `KEY.0`, which only one process can. One whose process has died stays, and whoever takes
 * its place creates `KEY.1` beside it, which again only one can; so a claim is never replaced, and no process can take
 * a claim away that another has renewed in between.
 */

import { randomUUID } from 'node:crypto';
import { mkdir, open, readdir, readFile, readlink, rm, stat, writeFile } from 'node:fs/promises';
import { hostname } from 'node:os';
import { join } from 'node:path';
import { setTimeout as wait } from 'node:timers/promises';
import { Worker } from 'node:worker_threads';
import { z } from 'zod';
import { MmditxError } from '../errors.ts';
import type { TensorData } from '../tensor/data.ts';
import { ioError } from '../weights/atomic.node.ts';
import { type EncodedCache, isKey, requireKey } from './encoded-cache.node.ts';

export interface Claims {
  /** See {@link ClaimsOptions}. */
  readonly staleSeconds: number;
  /**
   * Claims a piece of work.
   * @returns undefined while another process has it
   * @throws MmditxError `io` when the folder cannot be written
   */
  claim(key: string): Promise<Claim | undefined>;
  /** Removes claims that processes have left behind which died when their work was done but not yet given back. */
  sweep(isDone: (key: string) => Promise<boolean>): Promise<void>;
  /** Gives all claims back. */
  close(): Promise<void>;
}

export interface Claim {
  /** Gives the claim back. */
  release(): Promise<void>;
}

export interface ClaimsOptions {
  /**
   * Seconds without a sign of life after which the claims of a process are taken over (default 60); the claims of a
   * process of the same machine that has ended, at once. Several times what the folder's file system needs to show one
   * machine what another has written, the same for all processes.
   */
  readonly staleSeconds?: number | undefined;
}

/** Signs of life in the time after which a claim counts as left behind. */
const SIGNS_OF_LIFE = 4;
/** More takeovers of one claim than there are processes to die with it. */
const MOST_TAKEOVERS = 1000;
/** Enough of a claim's start: it grows by a byte with each sign of life. */
const CLAIM_BYTES = 4096;

/** What stands in a claim: who made it, and what tells it from all others. */
const ownerSchema = z.object({ id: z.string(), pid: z.int().positive(), machine: z.string() });
type Owner = z.infer<typeof ownerSchema>;

/** Opens a folder of claims, which is made if there is none. Nothing else may lie in it. */
export function openClaims(folder: string, { staleSeconds = 60 }: ClaimsOptions = {}): Claims {
  if (!(staleSeconds > 0 && staleSeconds < 1e6)) {
    throw new MmditxError(
      'bad-option',
      `Claims cannot be stale after ${staleSeconds} seconds; give a positive number.`,
    );
  }
  const held = new Set<Claim>();
  const now = folderClock(folder, staleSeconds);
  let signs: Worker | undefined;
  let machine: Promise<string> | undefined;

  /** The claim at a path if its process has died; undefined where it lives, or has just given it back. */
  const leftBehind = async (path: string): Promise<FoundClaim | undefined> => {
    const found = await readClaim(path);
    if (!found) return undefined;
    const { signOfLife, owner } = found;
    const ended = owner && owner.machine === (await machine) && !isRunning(owner.pid);
    return ended || (await now()) - signOfLife > staleSeconds * 1000 ? found : undefined;
  };

  /** Removes a claim and those it took over, first the oldest: as long as one is left, the work counts as claimed. */
  const giveBack = async (pathOf: (turn: number) => string, own: number, id: string): Promise<void> => {
    if ((await readClaim(pathOf(own)))?.owner?.id !== id) return;
    let end = own + 1;
    for (; await readClaim(pathOf(end)); end++) {
      // A process that slept too long has been replaced, and its place is not its own any more.
      if (!(await leftBehind(pathOf(end)))) return;
    }
    for (let turn = 0; turn < end; turn++) await rm(pathOf(turn), { force: true }).catch(() => undefined);
  };

  const claim = async (key: string): Promise<Claim | undefined> => {
    requireKey(key);
    if (!machine) await makeFolder(folder);
    machine ??= machineName();
    const id = randomUUID();
    const text = JSON.stringify({ id, pid: process.pid, machine: await machine });
    const pathOf = (turn: number) => join(folder, `${key}.${turn}`);
    let last: FoundClaim | undefined;
    for (let turn = 0; turn < MOST_TAKEOVERS; turn++) {
      const path = pathOf(turn);
      if (!(await create(path, text))) {
        last = await leftBehind(path);
        if (last) continue;
        return undefined;
      }
      // Whoever took the last one over before may have given both back meanwhile: this one would stand beside a new one.
      if (last && !isSame(last, await readClaim(pathOf(turn - 1)))) {
        await rm(path, { force: true });
        return undefined;
      }
      signs ??= startSigns((staleSeconds * 1000) / SIGNS_OF_LIFE);
      signs.postMessage({ hold: path });
      const made: Claim = {
        async release() {
          if (!held.delete(made)) return;
          signs?.postMessage({ drop: path });
          await giveBack(pathOf, turn, id);
        },
      };
      held.add(made);
      return made;
    }
    return undefined;
  };

  return {
    staleSeconds,
    claim,
    async sweep(isDone) {
      const names = await readdir(folder).catch(() => []);
      for (const key of new Set(names.filter((name) => !name.startsWith('.')).map((name) => name.split('.')[0]!))) {
        if (isKey(key) && (await isDone(key))) await (await claim(key))?.release();
      }
    },
    async close() {
      await Promise.all([...held].map((made) => made.release()));
      await signs?.terminate();
      signs = undefined;
    },
  };
}

async function makeFolder(folder: string): Promise<void> {
  await mkdir(folder, { recursive: true }).catch((cause: unknown) => {
    throw ioError('write', folder, cause);
  });
}

/** Creates a file that does not exist yet; false where it does. */
async function create(path: string, text: string): Promise<boolean> {
  try {
    await writeFile(path, text, { flag: 'wx' });
    return true;
  } catch (cause) {
    const { code } = cause as NodeJS.ErrnoException;
    // Windows refuses the name of a file that is being removed.
    if (code === 'EEXIST' || (code === 'EPERM' && process.platform === 'win32')) return false;
    throw ioError('write', path, cause);
  }
}

interface FoundClaim {
  /** Of the last sign of life, in milliseconds of the folder's clock. */
  readonly signOfLife: number;
  /** Undefined where its process died before it wrote it. */
  readonly owner: Owner | undefined;
}

/** Reads a claim. It is opened for that: network file systems look anew then, and answer from memory otherwise. */
async function readClaim(path: string): Promise<FoundClaim | undefined> {
  const handle = await open(path, 'r').catch(() => undefined);
  if (!handle) return undefined;
  try {
    const { mtimeMs: signOfLife } = await handle.stat();
    const { buffer, bytesRead } = await handle.read(Buffer.alloc(CLAIM_BYTES), 0, CLAIM_BYTES, 0);
    return { signOfLife, owner: parseOwner(buffer.toString('utf8', 0, bytesRead)) };
  } catch {
    return undefined;
  } finally {
    await handle.close();
  }
}

function parseOwner(text: string): Owner | undefined {
  try {
    return ownerSchema.parse(JSON.parse(text));
  } catch {
    return undefined;
  }
}

function isSame(a: FoundClaim, b: FoundClaim | undefined): boolean {
  return b !== undefined && a.owner?.id === b.owner?.id;
}

/**
 * Names the processes among which an id means one process. A container has ids of its own, and may have its machine's
 * name, or the name of another.
 */
async function machineName(): Promise<string> {
  const boot = await readFile('/proc/sys/kernel/random/boot_id', 'utf8').catch(() => '');
  const processes = await readlink('/proc/self/ns/pid').catch(() => '');
  return [hostname(), boot.trim(), processes].join(' ').slice(0, CLAIM_BYTES / 4);
}

function isRunning(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === 'EPERM';
  }
}

/**
 * Shows signs of life for the claims that are held, with a byte at the end of each, so that the time is that of the
 * folder's file system. In a thread of its own, as a large network keeps the main one busy for minutes at a time
 * (ONNX Runtime's Node binding runs it there); written as text, because a thread cannot load TypeScript by itself.
 */
function startSigns(milliseconds: number): Worker {
  const code = `
    const { parentPort, workerData } = require('node:worker_threads');
    const { constants, open, write, close } = require('node:fs');
    const held = new Set();
    const ignore = () => undefined;
    parentPort.on('message', ({ hold, drop }) => {
      if (hold !== undefined) held.add(hold);
      held.delete(drop);
    });
    setInterval(() => {
      for (const path of held) {
        open(path, constants.O_WRONLY | constants.O_APPEND, (error, file) => {
          if (!error) write(file, '\\n', () => close(file, ignore));
        });
      }
    }, workerData);
  `;
  // Options of the process, such as loaders, are not for this.
  const worker = new Worker(code, { eval: true, workerData: milliseconds, execArgv: [] });
  worker.unref();
  return worker;
}

/**
 * The time of a folder's file system in milliseconds, which all machines read alike; their own clocks may be wrong. It
 * is read off a file that is written anew every so often.
 */
function folderClock(folder: string, staleSeconds: number): () => Promise<number> {
  const path = join(folder, '.clock');
  let measured: { at: number; time: number } | undefined;
  return async () => {
    const at = performance.now();
    if (!measured || at - measured.at > staleSeconds * 100) {
      try {
        await writeFile(path, '.');
        measured = { at, time: (await stat(path)).mtimeMs };
      } catch (cause) {
        throw ioError('write', path, cause);
      }
    }
    return measured.time + (at - measured.at);
  };
}

/** A piece of work whose result the cache keeps under a key. */
export interface Work<Item> {
  readonly key: string;
  readonly item: Item;
}

export interface DoOnceOptions<Item> {
  /** Where results are kept. */
  readonly cache: EncodedCache;
  readonly claims: Claims;
  /**
   * Does some pieces of work together, and gives a result for each. What it throws ends all work, but for MmditxError
   * `bad-file`: then the pieces are tried one by one, and those that fail are skipped.
   */
  batch(items: readonly Item[]): Promise<readonly ReadonlyMap<string, TensorData>[]>;
  /** Pieces in a batch (default 16). */
  readonly batchSize?: number | undefined;
  /** Batches at the same time, so that one can read pictures while another computes (default 1). */
  readonly atOnce?: number | undefined;
  readonly signal?: AbortSignal | undefined;
  /** Called after each batch, and when work that others did has been found done. */
  onProgress?: ((progress: { readonly done: number; readonly total: number }) => void) | undefined;
  /** Called with each piece of work that is left undone. */
  onSkip?: ((item: Item, error: MmditxError) => void) | undefined;
}

/** Keys that are looked for in the cache at the same time. */
const LOOKUPS = 64;
/** Milliseconds between two looks at what others do: first, and at most. */
const FIRST_WAIT = 100;
const LONGEST_WAIT = 5000;

/**
 * Does work that any number of processes share, each piece once; ends when all of it is done, also what the others had
 * begun. The work of a process that dies is done by the others.
 * @throws MmditxError `io` when the folder cannot be written; what `batch` throws; the signal's reason
 */
export async function doOnce<Item>(
  work: readonly Work<Item>[],
  { cache, claims, batch, batchSize = 16, atOnce = 1, signal, onProgress, onSkip }: DoOnceOptions<Item>,
): Promise<void> {
  const unique = [...new Map(work.map((piece) => [piece.key, piece])).values()];
  // Processes that begin at different places rarely want the same.
  const start = Math.floor(Math.random() * unique.length);
  let pending = [...unique.slice(start), ...unique.slice(0, start)];
  let done = 0;
  const count = (finished: number) => {
    done += finished;
    if (finished > 0) onProgress?.({ done, total: unique.length });
  };
  const running = new Set<Promise<void>>();
  const failures: unknown[] = [];
  let claimed: Claimed<Item>[] = [];

  const begin = async () => {
    const pieces = claimed;
    claimed = [];
    const job: Promise<void> = finish(pieces)
      .then(() => count(pieces.length))
      .catch((error: unknown) => void failures.push(error))
      .finally(() => running.delete(job));
    running.add(job);
    while (running.size >= atOnce) await Promise.race(running);
    if (failures.length > 0) throw failures[0];
  };

  const finish = async (pieces: readonly Claimed<Item>[]) => {
    try {
      signal?.throwIfAborted();
      const results = await trySeparately(
        pieces.map(({ item }) => item),
        batch,
        onSkip,
      );
      await Promise.all(
        pieces.map(async ({ key }, i) => {
          const result = results[i];
          // There already where this process slept too long, and another took its claim over.
          if (result && !(await cache.has(key))) await cache.write(key, result);
        }),
      );
    } finally {
      await Promise.all(pieces.map(({ claim }) => claim.release()));
    }
  };

  /** Does what nobody else does. @returns what others do */
  const goThrough = async (pieces: readonly Work<Item>[]): Promise<Work<Item>[]> => {
    const busy: Work<Item>[] = [];
    for (let first = 0; first < pieces.length; first += LOOKUPS) {
      const some = pieces.slice(first, first + LOOKUPS);
      const present = await Promise.all(some.map(({ key }) => cache.has(key)));
      count(present.filter(Boolean).length);
      for (const piece of some.filter((_, i) => !present[i])) {
        signal?.throwIfAborted();
        const claim = await claims.claim(piece.key);
        if (!claim) busy.push(piece);
        else claimed.push({ ...piece, claim });
        if (claimed.length >= batchSize) await beginUndone();
      }
    }
    await beginUndone();
    while (running.size > 0) await Promise.race(running);
    if (failures.length > 0) throw failures[0];
    return busy;
  };

  /** Begins with what was claimed, less what another process finished just before. */
  const beginUndone = async () => {
    const present = await Promise.all(claimed.map(({ key }) => cache.has(key)));
    const finished = claimed.filter((_, i) => present[i]);
    claimed = claimed.filter((_, i) => !present[i]);
    await Promise.all(finished.map(({ claim }) => claim.release()));
    count(finished.length);
    if (claimed.length > 0) await begin();
  };

  try {
    for (let idle = 0; pending.length > 0; idle++) {
      const before = done;
      pending = await goThrough(pending);
      if (done > before) idle = 0;
      if (pending.length === 0) break;
      const pause = Math.min(FIRST_WAIT * 2 ** idle, LONGEST_WAIT, (claims.staleSeconds * 1000) / SIGNS_OF_LIFE);
      await wait(pause, undefined, signal ? { signal } : {}).catch((error: unknown) => {
        // Its own error hides the reason.
        signal?.throwIfAborted();
        throw error;
      });
    }
    await claims.sweep((key) => cache.has(key));
  } finally {
    await Promise.all(running);
    await Promise.all(claimed.map(({ claim }) => claim.release()));
  }
}

interface Claimed<Item> extends Work<Item> {
  readonly claim: Claim;
}

/** The results of a batch; of its pieces one by one where one is bad, without those that are. */
async function trySeparately<Item>(
  items: readonly Item[],
  batch: DoOnceOptions<Item>['batch'],
  onSkip: DoOnceOptions<Item>['onSkip'],
): Promise<readonly (ReadonlyMap<string, TensorData> | undefined)[]> {
  try {
    const results = await batch(items);
    if (results.length !== items.length) throw new RangeError(`${items.length} items gave ${results.length} results.`);
    return results;
  } catch (error) {
    if (!(error instanceof MmditxError && error.code === 'bad-file')) throw error;
    if (items.length === 1) {
      onSkip?.(items[0]!, error);
      return [undefined];
    }
    const results: (ReadonlyMap<string, TensorData> | undefined)[] = [];
    for (const item of items) results.push(...(await trySeparately([item], batch, onSkip)));
    return results;
  }
}
