/** The folder of a run: what lies where in it, and that only one process works in it. */

import { createHash } from 'node:crypto';
import { link, mkdir, readFile, rm, writeFile } from 'node:fs/promises';
import { hostname } from 'node:os';
import { join } from 'node:path';
import { MmditxError } from '../errors.ts';
import { ioError, writeFileAtomically } from '../weights/atomic.node.ts';
import type { StageConfig, TrainConfig } from './config.ts';

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
  try {
    await mkdir(folder.path, { recursive: true });
    await writeFile(own, JSON.stringify({ pid: process.pid, host: hostname() }));
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
      if (taken) return () => rm(path, { force: true });
      const holder = await readFile(path, 'utf8').catch(() => '');
      if (attempt > 0 || isRunning(holder)) {
        throw new MmditxError(
          'bad-option',
          `Another process trains in ${folder.path} (${holder}); wait for it, or remove ${path} if it is gone.`,
        );
      }
      await rm(path, { force: true });
    }
  } finally {
    await rm(own, { force: true });
  }
}

function isRunning(holder: string): boolean {
  try {
    const { pid, host } = JSON.parse(holder) as { pid: number; host: string };
    if (host !== hostname()) return true;
    if (pid === process.pid) return false;
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === 'EPERM';
  }
}

/** What decides the course of a stage: reports and saved states may be had at other intervals. */
export function stageFingerprint(config: TrainConfig, index: number, digests: readonly string[]): string {
  const { model, networks, precision, seed, data, stages, validation } = config;
  const decisive = {
    model,
    networks,
    precision,
    seed,
    data,
    stages: stages.slice(0, index + 1),
    share: validation?.share,
  };
  return createHash('sha256')
    .update(JSON.stringify([decisive, digests]))
    .digest('hex');
}

/** What a finished stage says about itself. */
export interface StageRecord {
  readonly fingerprint: string;
  /** Files of networks, relative to the stage's folder. */
  readonly parts: readonly string[];
  readonly lora?: string;
  readonly tokenizers?: true;
}

const RECORD = 'stage.json';

/** The record of a finished stage: it is written last, so that a stage without one is not finished. */
export async function readStageRecord(folder: string): Promise<StageRecord | undefined> {
  const text = await readFile(join(folder, RECORD), 'utf8').catch(() => undefined);
  return text === undefined ? undefined : (JSON.parse(text) as StageRecord);
}

export async function writeStageRecord(folder: string, record: StageRecord): Promise<void> {
  await writeFileAtomically(join(folder, RECORD), [new TextEncoder().encode(`${JSON.stringify(record, null, 2)}\n`)]);
}
