/** The folder of a run: what lies where in it, and that only one process works in it. */

import { createHash } from 'node:crypto';
import { link, mkdir, readFile, rename, rm, writeFile } from 'node:fs/promises';
import { hostname } from 'node:os';
import { join } from 'node:path';
import { z } from 'zod';
import { MmditxError } from '../errors.ts';
import { ioError, writeFileAtomically } from '../weights/atomic.node.ts';
import { parseJson } from '../weights/json.ts';
import type { StageConfig, TrainConfig } from './config.ts';
import type { StageFingerprints } from './stage.node.ts';

export interface RunFolder {
  readonly path: string;
  readonly checkpoints: string;
  readonly samples: string;
  readonly log: string;
  readonly report: string;
  /** Networks that begin at random. */
  readonly initial: string;
  /** Encoded pictures and texts. */
  readonly cache: string;
  /** What a stage made. */
  stage(index: number, stage: StageConfig): string;
}

export function runFolder(path: string): RunFolder {
  return {
    path,
    checkpoints: join(path, 'checkpoints'),
    samples: join(path, 'samples'),
    log: join(path, 'log.jsonl'),
    report: join(path, 'report.html'),
    initial: join(path, 'initial'),
    cache: join(path, 'cache'),
    stage: (index, { name }) => join(path, 'stages', `${String(index + 1).padStart(2, '0')}-${name}`),
  };
}

/**
 * Takes the folder for this process. A lock whose process is gone (killed, or of another boot) is taken over.
 * @returns lets go of it
 * @throws MmditxError `bad-option` when another process of this machine works there, `io`
 */
export async function lockRun(folder: RunFolder): Promise<() => Promise<void>> {
  const path = join(folder.path, 'run.lock');
  const own = `${path}.${process.pid}`;
  const identity = JSON.stringify({ pid: process.pid, host: hostname(), boot: await bootId() });
  try {
    await mkdir(folder.path, { recursive: true });
    await writeFile(own, identity);
  } catch (cause) {
    throw ioError('write', folder.path, cause);
  }
  try {
    for (let attempt = 0; ; attempt++) {
      // A link exists or not, and holds its content from the first moment on.
      const taken = await link(own, path).then(
        () => true,
        (cause: NodeJS.ErrnoException) => {
          if (cause.code === 'EEXIST') return false;
          throw ioError('write', path, cause);
        },
      );
      if (taken) {
        return async () => {
          if ((await readFile(path, 'utf8').catch(() => '')) === identity) await rm(path, { force: true });
        };
      }
      const holder = await readFile(path, 'utf8').catch(() => '');
      if (attempt > 1 || (await isRunning(holder))) {
        throw new MmditxError(
          'bad-option',
          `Another process trains in ${folder.path} (${holder}); wait for it, or remove ${path} if it is gone.`,
        );
      }
      // Moved, not removed: between the look and the move another process may have put a lock of its own there.
      const aside = `${own}.old`;
      await rename(path, aside).catch(() => undefined);
      const moved = await readFile(aside, 'utf8').catch(() => holder);
      if (moved !== holder) await link(aside, path).catch(() => undefined);
      await rm(aside, { force: true });
    }
  } finally {
    await rm(own, { force: true });
  }
}

/** Told apart by this, a process number of before the machine was started is that of another process. */
function bootId(): Promise<string | null> {
  return readFile('/proc/sys/kernel/random/boot_id', 'utf8').then(
    (text) => text.trim(),
    () => null,
  );
}

async function isRunning(holder: string): Promise<boolean> {
  const parsed = lockSchema.safeParse(jsonOr(holder));
  if (!parsed.success) return false;
  const { pid, host, boot } = parsed.data;
  if (host !== hostname()) return true;
  if (pid === process.pid || boot !== (await bootId())) return false;
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === 'EPERM';
  }
}
/** Undefined where it is no JSON: a lock is written whole, so this one is of something else. */
function jsonOr(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}
const lockSchema = z.object({ pid: z.int(), host: z.string(), boot: z.string().nullable() });

/** What a run works with besides its configuration. */
export interface RunMaterial {
  /** By data set: the bytes of pictures and their captions, as one digest. */
  readonly data: ReadonlyMap<string, string>;
  /** Of the model that the run begins with. */
  readonly model: string | null;
}

/**
 * What decides the course of a stage: its own configuration, that of the stages before, and what they work with. Reports
 * and saved states may be had at other intervals.
 */
export function stageFingerprints(config: TrainConfig, index: number, material: RunMaterial): StageFingerprints {
  const { networks, precision, seed, data, stages, validation, cache, clipTokenizer, t5Tokenizer } = config;
  const before = stages.slice(0, index);
  const stage = stages[index]!;
  const used = [...new Set([...before, stage].flatMap((each) => each.data ?? Object.keys(data)))].sort();
  const common = {
    before,
    model: material.model,
    networks: [...before, stage].every(({ train }) => train === 'tokenizers') ? null : networks,
    data: used.map((name) => [name, data[name], material.data.get(name)]),
    options: [precision, seed, cache === false, clipTokenizer, t5Tokenizer, validation?.share, validation?.path],
  };
  const digest = (own: object) =>
    createHash('sha256')
      .update(JSON.stringify({ ...common, own }))
      .digest('hex');
  if (stage.train === 'tokenizers') return { exact: digest(stage), resumable: digest(stage) };
  const { learningRate: _, optimizer: __, clip: ___, steps: ____, ...rest } = stage;
  return { exact: digest(stage), resumable: digest(rest) };
}

const fileName = z.string().regex(/^[\w.-]+$/);
const recordSchema = z.object({
  fingerprint: z.string(),
  /** Files of networks, in the stage's folder. */
  parts: z.array(fileName),
  lora: fileName.optional(),
  tokenizers: z.literal(true).optional(),
});
/** What a finished stage says about itself. */
export type StageRecord = z.infer<typeof recordSchema>;

const RECORD = 'stage.json';

/** The record of a finished stage: it is written last, so that a stage without one is not finished. */
export async function readStageRecord(folder: string): Promise<StageRecord | undefined> {
  const path = join(folder, RECORD);
  const text = await readFile(path, 'utf8').catch((cause: NodeJS.ErrnoException) => {
    if (cause.code === 'ENOENT') return undefined;
    throw ioError('read', path, cause);
  });
  if (text === undefined) return undefined;
  const record = recordSchema.safeParse(parseJson(text, (fault) => damaged(path, fault)));
  if (!record.success) throw damaged(path, 'has other entries than training writes');
  return record.data;
}

function damaged(path: string, fault: string): MmditxError {
  return new MmditxError('bad-file', `${path} ${fault}; remove the folder to train its stage again.`);
}

export async function writeStageRecord(folder: string, record: StageRecord): Promise<void> {
  await writeFileAtomically(join(folder, RECORD), [new TextEncoder().encode(`${JSON.stringify(record, null, 2)}\n`)]);
}
