/**
 * States of a training run on disk: one safetensors file each, whose name says where in the run it belongs and ends in
 * the start of the SHA-256 of its bytes, so that a file that was torn or has decayed is noticed.
 */
import { createHash, type Hash } from 'node:crypto';
import { mkdir, open, readdir, rename, rm, stat } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { MmditxError } from '../errors.ts';
import type { TensorData } from '../tensor/data.ts';
import { ioError, writeFileAtomically } from '../weights/atomic.node.ts';
import { fileSource } from '../weights/files.node.ts';
import {
  type ByteSource,
  openSafetensors,
  readExactly,
  readTensor,
  safetensorsChunks,
} from '../weights/safetensors.ts';

/** Where in a run a state belongs. */
export interface CheckpointPosition {
  /** Number of the stage. */
  readonly stage: number;
  /** Steps taken in the stage. */
  readonly step: number;
}

/** A state of a run: everything it needs to go on. */
export interface Checkpoint extends CheckpointPosition {
  readonly tensors: ReadonlyMap<string, TensorData>;
  readonly metadata: Readonly<Record<string, string>>;
}

/** A file in a folder of checkpoints, by its name; it has not been read. */
export interface CheckpointFile extends CheckpointPosition {
  readonly path: string;
  /** First 16 hexadecimal digits of the SHA-256 of its bytes. */
  readonly digest: string;
}

export interface KeepOptions {
  /** The newest ones to keep, that just written among them (default 2). */
  readonly keep?: number;
  /** Keeps every checkpoint whose step is a multiple of this, too (default none). */
  readonly keepEvery?: number;
}

const DIGEST_DIGITS = 16;
const STEP_DIGITS = 8;
const checkpointName = new RegExp(`^stage-(\\d{1,15})-step-(\\d{1,15})-([0-9a-f]{${DIGEST_DIGITS}})\\.safetensors$`);

/** The file being written, also under the temporary name that `writeFileAtomically` gives it. */
const UNFINISHED_NAME = 'unfinished-checkpoint';
const unfinishedName = new RegExp(`^(${UNFINISHED_NAME}|\\.${UNFINISHED_NAME}\\.[-0-9a-f]{36}\\.tmp)$`);

/**
 * Writes a checkpoint and, once it is safe on the disk, removes older ones. Earlier ones stay as they are if writing
 * fails; for a moment the disk holds one more than are kept. The tensors are written as they lie in memory, without a
 * copy, and must not change meanwhile. One process writes into a folder at a time: what another left unfinished is
 * removed first.
 *
 * Checkpoints of a later position in the run, which can only be damaged ones that {@link latestCheckpoint} passed
 * over, are neither counted nor removed; the run replaces them when it gets there again.
 * @param folder made if it does not exist; files in it that are not checkpoints are left alone
 * @returns the path of the new file
 * @throws MmditxError `io` when it cannot be written, for instance because the disk is full; `bad-option`
 */
export async function saveCheckpoint(
  folder: string,
  checkpoint: Checkpoint,
  options: KeepOptions = {},
): Promise<string> {
  const { keep = 2, keepEvery } = options;
  requireWhole('number of checkpoints to keep', keep, 1);
  if (keepEvery !== undefined) requireWhole('number of steps between checkpoints that are kept', keepEvery, 1);
  requireWhole('stage of a checkpoint', checkpoint.stage, 0);
  requireWhole('step of a checkpoint', checkpoint.step, 0);
  const attempt = <T>(operation: Promise<T>): Promise<T> =>
    operation.catch((cause) => {
      throw ioError('write', folder, cause);
    });

  await attempt(mkdir(folder, { recursive: true }));
  for (const name of await attempt(readdir(folder))) {
    if (unfinishedName.test(name)) await attempt(rm(join(folder, name), { force: true }));
  }
  const unfinished = join(folder, UNFINISHED_NAME);
  const hash = createHash('sha256');
  await writeFileAtomically(unfinished, hashed(safetensorsChunks(checkpoint.tensors, checkpoint.metadata), hash));
  const path = join(folder, nameOf(checkpoint, digestOf(hash)));
  await attempt(rename(unfinished, path));
  await attempt(syncFolder(folder));

  const others = (await listCheckpoints(folder)).filter((file) => file.path !== path);
  const replaced = others.filter((file) => compare(file, checkpoint) === 0);
  const superseded = others
    .filter((file) => compare(file, checkpoint) < 0)
    .slice(keep - 1)
    .filter(({ step }) => keepEvery === undefined || step % keepEvery !== 0);
  for (const file of [...replaced, ...superseded]) await attempt(rm(file.path, { force: true }));
  return path;
}

/**
 * The newest checkpoint that is sound. One that is not is passed over for the one before, and stays where it is.
 * @param onProblem told in a sentence about each that is passed over
 * @returns undefined when the folder does not exist or holds no checkpoint
 * @throws MmditxError `bad-file` when it holds checkpoints but none is sound: a run should not start anew unasked;
 *   `io` when the folder cannot be read
 */
export async function latestCheckpoint(
  folder: string,
  { onProblem }: { onProblem?: (message: string) => void } = {},
): Promise<(Checkpoint & CheckpointFile) | undefined> {
  const files = await listCheckpoints(folder);
  for (const file of files) {
    try {
      return { ...file, ...(await readCheckpoint(file.path)) };
    } catch (error) {
      if (!(error instanceof MmditxError)) throw error;
      onProblem?.(error.message);
    }
  }
  if (!files.length) return undefined;
  throw new MmditxError(
    'bad-file',
    `None of the ${files.length} checkpoints in ${folder} can be used; restore one from a copy, or remove them to start anew.`,
  );
}

/**
 * The checkpoints in a folder by their names, newest first, by stage, step and time of writing.
 * @throws MmditxError `io` when the folder exists but cannot be read
 */
export async function listCheckpoints(folder: string): Promise<CheckpointFile[]> {
  const names = await readdir(folder).catch((cause: NodeJS.ErrnoException) => {
    if (cause.code === 'ENOENT') return [];
    throw ioError('read', folder, cause);
  });
  const files: (CheckpointFile & { written: number })[] = [];
  for (const name of names) {
    const [, stage, step, digest] = checkpointName.exec(name) ?? [];
    if (!digest) continue;
    const path = join(folder, name);
    const status = await stat(path).catch(() => undefined);
    if (status?.isFile())
      files.push({ path, stage: Number(stage), step: Number(step), digest, written: status.mtimeMs });
  }
  files.sort((a, b) => compare(b, a) || b.written - a.written);
  return files.map(({ written, ...file }) => file);
}

/**
 * Reads a checkpoint, in one pass and without a second copy of its tensors.
 * @throws MmditxError `bad-file` when its bytes are not those that were written; `io` when it cannot be read
 */
export async function readCheckpoint(path: string): Promise<Checkpoint> {
  const [, stage, step, digest] = checkpointName.exec(basename(path)) ?? [];
  if (!digest) {
    throw new MmditxError('bad-option', `${path} is not named like a checkpoint; give a file that training wrote.`);
  }
  const source = await fileSource(path);
  try {
    const { tensors, metadata, found } = await readAll(source);
    if (found !== digest) throw new MmditxError('bad-file', 'the SHA-256 in its name is not that of its bytes');
    return { stage: Number(stage), step: Number(step), tensors, metadata };
  } catch (cause) {
    if (!(cause instanceof MmditxError) || cause.code === 'io') throw cause;
    throw new MmditxError(
      'bad-file',
      `The checkpoint ${path} is damaged: its bytes are not those that were written; use another one.`,
      { cause },
    );
  } finally {
    await source.close();
  }
}

/** A whole file and its digest. Where the header is sound, the tensors follow it without gaps. */
async function readAll(source: ByteSource) {
  const file = await openSafetensors(source);
  const ordered = [...file.tensors.values()].sort((a, b) => a.offset - b.offset || a.byteLength - b.byteLength);
  const hash = createHash('sha256');
  update(hash, await readExactly(source, 0, ordered[0]?.offset ?? source.size));
  const tensors = new Map<string, TensorData>();
  for (const { name } of ordered) {
    const tensor = await readTensor(file, name);
    const { buffer, byteOffset, byteLength } = tensor.data;
    update(hash, new Uint8Array(buffer, byteOffset, byteLength));
    tensors.set(name, tensor);
  }
  return { tensors, metadata: file.metadata, found: digestOf(hash) };
}

/** Node hashes and writes less than 2 GiB at once, and other work gets its turn between two pieces. */
const MAX_PIECE = 2 ** 26;

function* pieces(bytes: Uint8Array): Generator<Uint8Array> {
  for (let start = 0; start < bytes.length; start += MAX_PIECE) yield bytes.subarray(start, start + MAX_PIECE);
}

function update(hash: Hash, bytes: Uint8Array): void {
  for (const piece of pieces(bytes)) hash.update(piece);
}

/** The same bytes, hashed as they go by. */
function* hashed(chunks: Iterable<Uint8Array>, hash: Hash): Generator<Uint8Array> {
  for (const chunk of chunks) {
    for (const piece of pieces(chunk)) {
      hash.update(piece);
      yield piece;
    }
  }
}

function digestOf(hash: Hash): string {
  return hash.digest('hex').slice(0, DIGEST_DIGITS);
}

function nameOf({ stage, step }: CheckpointPosition, digest: string): string {
  return `stage-${stage}-step-${String(step).padStart(STEP_DIGITS, '0')}-${digest}.safetensors`;
}

/** Negative when a comes before b in a run. */
function compare(a: CheckpointPosition, b: CheckpointPosition): number {
  return a.stage - b.stage || a.step - b.step;
}

/** Makes a new name in a folder survive a loss of power. Windows has no such call. */
async function syncFolder(folder: string): Promise<void> {
  if (process.platform === 'win32') return;
  const handle = await open(folder, 'r');
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
}

function requireWhole(name: string, value: number, least: number): void {
  if (Number.isSafeInteger(value) && value >= least) return;
  throw new MmditxError('bad-option', `The ${name} is ${value}; give a whole number from ${least} on.`);
}
