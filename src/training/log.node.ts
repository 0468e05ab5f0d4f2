/** The log of a training run on disk, which a run that goes on continues, and the report that is made of it. */

import { type FileHandle, open, readFile, stat } from 'node:fs/promises';
import { isAbsolute, join, relative, resolve } from 'node:path';
import sharp from 'sharp';
import { ioError, writeFileAtomically } from '../weights/atomic.node.ts';
import { comparePositions, parseTrainEvent, type RunPosition, type TrainEvent } from './log.ts';
import { reportHtml, shownPictures } from './report.ts';

export interface TrainLog {
  readonly path: string;
  /** What the file says, and what is still to be written to it. */
  readonly events: readonly TrainEvent[];
  /**
   * Adds an event. Never rejects: what cannot be written is kept and written later, before what follows. An event that
   * is known from before the run went on, at the position where it did, is not added again.
   */
  append(event: TrainEvent): Promise<void>;
  /** Calls a function with every event that is added. @returns a function that ends it */
  onAppend(listener: (event: TrainEvent) => void): () => void;
  /** Waits until everything is on the disk, as far as it can be. */
  flush(): Promise<void>;
  /** Tries a last time to write what is left. */
  close(): Promise<void>;
}

export interface TrainLogOptions {
  /**
   * Where the run goes on (default its beginning): what the log says of later steps is removed, so that it reads like
   * that of a run never interrupted. At the beginning of the run everything is.
   */
  readonly at?: RunPosition;
  /** Told in a sentence that the log cannot be written, once until it can be again. */
  readonly onProblem?: ((message: string) => void) | undefined;
  /** Characters that may wait to be written (default 2^26); what exceeds them is lost to the file. */
  readonly maxWaiting?: number;
}

const LINE_FEED = 10;

/**
 * Opens a log and removes what comes after `at`, and lines that are torn. Lines of earlier processes' starts stay.
 * @throws MmditxError `io` when the file cannot be read or written
 */
export async function openTrainLog(path: string, options: TrainLogOptions = {}): Promise<TrainLog> {
  const { at = { stage: 0, step: 0 }, onProblem, maxWaiting = 2 ** 26 } = options;
  const { events, known } = await trim(path, at);
  const listeners = new Set<(event: TrainEvent) => void>();
  const lines = lineWriter(path, maxWaiting, onProblem);
  await lines.open();

  return {
    path,
    events,
    append(event) {
      if (event.type !== 'start' && event.type !== 'end') {
        if (comparePositions(event, at) === 0 && known.has(identity(event))) return Promise.resolve();
      }
      events.push(event);
      for (const listener of listeners) listener(event);
      return lines.write(`${JSON.stringify(event)}\n`);
    },
    onAppend(listener) {
      listeners.add(listener);
      return () => void listeners.delete(listener);
    },
    flush: lines.flush,
    close: lines.close,
  };
}

/**
 * The events of a log; lines that are none are passed over.
 * @throws MmditxError `io` when it cannot be read
 */
export async function readTrainLog(path: string): Promise<TrainEvent[]> {
  const bytes = await readLog(path);
  if (!bytes) throw ioError('read', path, { code: 'ENOENT' });
  return [...linesOf(bytes)].flatMap(({ event }) => event ?? []);
}

/** Undefined where there is none. A device would have no end. */
async function readLog(path: string): Promise<Uint8Array | undefined> {
  try {
    if (!(await stat(path)).isFile()) throw new Error('it is not a file; give the log another path');
    return await readFile(path);
  } catch (cause) {
    if (cause instanceof Error && 'code' in cause && cause.code === 'ENOENT') return undefined;
    throw ioError('read', path, cause);
  }
}

interface Line {
  /** With its line feed. */
  readonly bytes: Uint8Array;
  readonly event: TrainEvent | undefined;
}

const utf8 = new TextDecoder();

/** Lines end at line feeds and nowhere else: a prompt may hold the other line separators of Unicode. */
function* linesOf(bytes: Uint8Array): Generator<Line> {
  for (let start = 0; start < bytes.length; ) {
    const feed = bytes.indexOf(LINE_FEED, start);
    const end = feed < 0 ? bytes.length : feed;
    const event = parseTrainEvent(utf8.decode(bytes.subarray(start, end)));
    yield { bytes: bytes.subarray(start, end + 1), event };
    start = end + 1;
  }
}

/** Removes what comes after a position. @returns what stays, and what is known at the position itself */
async function trim(path: string, at: RunPosition): Promise<{ events: TrainEvent[]; known: Set<string> }> {
  const bytes = (await readLog(path)) ?? new Uint8Array();
  const isBeginning = at.stage === 0 && at.step === 0;
  const stays = (event: TrainEvent) => event.type === 'start' || (!isBeginning && comparePositions(event, at) <= 0);
  const kept: Uint8Array[] = [];
  const events: TrainEvent[] = [];
  const known = new Set<string>();
  let keptBytes = 0;
  for (const { bytes: line, event } of linesOf(bytes)) {
    if (!event || !stays(event) || line.at(-1) !== LINE_FEED) continue;
    kept.push(line);
    keptBytes += line.length;
    events.push(event);
    if (event.type !== 'start' && comparePositions(event, at) === 0) known.add(identity(event));
  }
  if (keptBytes < bytes.length) await writeFileAtomically(path, joined(kept));
  return { events, known };
}

/** Tells the events of one position apart. */
function identity(event: Exclude<TrainEvent, { type: 'start' }>): string {
  return event.type === 'note' ? `note ${event.message}` : event.type;
}

/** Few large pieces of many small ones: a system call for each line would take long. */
function* joined(lines: readonly Uint8Array[]): Generator<Uint8Array> {
  const LINES_AT_ONCE = 10_000;
  for (let i = 0; i < lines.length; i += LINES_AT_ONCE) yield Buffer.concat(lines.slice(i, i + LINES_AT_ONCE));
}

/** Adds whole lines to a file, each with one call, in the order in which they come. */
function lineWriter(path: string, maxWaiting: number, onProblem: TrainLogOptions['onProblem']) {
  let handle: FileHandle | undefined;
  /** Bytes of the file up to the end of its last whole line. */
  let size: number | undefined;
  const waiting: string[] = [];
  let waitingLength = 0;
  let hasProblem = false;
  let isLosing = false;
  let turn = Promise.resolve();

  /** Opens the file, without the part of a line that was written when something failed. */
  const reopen = async (): Promise<FileHandle> => {
    const opened = await open(path, 'a');
    try {
      const found = (await opened.stat()).size;
      if (size !== undefined && found > size) await opened.truncate(size);
      size = Math.min(size ?? found, found);
      return opened;
    } catch (error) {
      await opened.close().catch(() => undefined);
      throw error;
    }
  };

  const writeWaiting = async (): Promise<void> => {
    let done = 0;
    try {
      handle ??= await reopen();
      for (; done < waiting.length; done++) {
        const bytes = Buffer.from(waiting[done]!);
        const { bytesWritten } = await handle.write(bytes);
        if (bytesWritten < bytes.length) throw ioError('write', path, { code: 'ENOSPC' });
        size = size! + bytes.length;
      }
      hasProblem = isLosing = false;
    } catch (cause) {
      await handle?.close().catch(() => undefined);
      handle = undefined;
      if (!hasProblem) {
        onProblem?.(`${ioError('write', path, cause).message} Training goes on; the log is completed when it can be.`);
      }
      hasProblem = true;
    }
    if (done === 0) return;
    const written = waiting.splice(0, done);
    waitingLength -= written.reduce((sum, { length }) => sum + length, 0);
  };

  const inTurn = (work: () => Promise<void>): Promise<void> => {
    turn = turn.then(work);
    return turn;
  };

  return {
    async open() {
      handle = await reopen().catch((cause) => {
        throw ioError('write', path, cause);
      });
    },
    write(line: string): Promise<void> {
      if (waitingLength + line.length <= maxWaiting) {
        waiting.push(line);
        waitingLength += line.length;
      } else if (!isLosing) {
        isLosing = true;
        onProblem?.(`The log ${path} could not be written for so long that what happens now will be missing in it.`);
      }
      return inTurn(writeWaiting);
    },
    flush: () =>
      inTurn(async () => {
        if (waiting.length) await writeWaiting();
        // Not every file system can; then its own schedule has to do.
        await handle?.datasync().catch(() => undefined);
      }),
    close: () =>
      inTurn(async () => {
        if (waiting.length) await writeWaiting();
        if (waiting.length) onProblem?.(`The last ${waiting.length} lines of ${path} could not be written.`);
        await handle?.close().catch(() => undefined);
        handle = undefined;
      }),
  };
}

export interface TrainReporterOptions {
  /** Folder of the run: `report.html` is written there, and the files of sample pictures are relative to it. */
  readonly folder: string;
  readonly log: TrainLog;
  /** Heading of the report (default the name of the run). */
  readonly title?: string;
  /** Seconds between two reports at least (default 20). */
  readonly everySeconds?: number;
  /** Told in a sentence that the report cannot be written, once until it can be again. */
  readonly onProblem?: ((message: string) => void) | undefined;
}

export interface TrainReporter {
  /** Writes the last report. Never rejects. */
  close(): Promise<void>;
}

export const REPORT_NAME = 'report.html';

/** A report never takes more than this share of the time, however long the log is. */
const TIME_SHARE = 1 / 50;

/** Writes a report of a run whenever something has happened, but not too often. Failures do not stop training. */
export function trainReporter(options: TrainReporterOptions): TrainReporter {
  const { folder, log, title, everySeconds = 20, onProblem } = options;
  const path = join(folder, REPORT_NAME);
  const thumbnails = createThumbnails(folder);
  let notBefore = 0;
  let hasProblem = false;
  let timer: NodeJS.Timeout | undefined;
  let writing: Promise<void> | undefined;

  const write = async (running: boolean): Promise<void> => {
    const started = performance.now();
    try {
      const pictures = await thumbnails(shownPictures(log.events));
      const rewritten = running ? everySeconds : 0;
      const html = reportHtml(log.events, { pictures, running, title, everySeconds: rewritten });
      await writeFileAtomically(path, [Buffer.from(html)]);
      hasProblem = false;
    } catch (error) {
      const reason = error instanceof Error ? error.message : String(error);
      if (!hasProblem) onProblem?.(`The report could not be written; training goes on. ${reason}`);
      hasProblem = true;
    }
    const took = performance.now() - started;
    notBefore = started + Math.max(1000 * everySeconds, took / TIME_SHARE);
  };

  const schedule = () => {
    if (timer || writing) return;
    const wait = Math.max(0, notBefore - performance.now());
    timer = setTimeout(() => {
      timer = undefined;
      const seen = log.events.length;
      writing = write(true).finally(() => {
        writing = undefined;
        if (log.events.length > seen && !closed) schedule();
      });
    }, wait);
    // A report alone is no reason to keep a process alive.
    timer.unref();
  };

  let closed = false;
  const unsubscribe = log.onAppend(schedule);
  return {
    async close() {
      if (closed) return;
      closed = true;
      unsubscribe();
      clearTimeout(timer);
      await writing;
      await write(false);
    },
  };
}

/** Longest sides of thumbnails in pixels, by how many there are: a report stays small enough to be sent. */
const SIDE_OF_FEW = 512;
const FEW = 48;
const SIDE_OF_MANY = 256;
const QUALITY = 80;

/** Makes data URLs of sample pictures, each once. */
function createThumbnails(folder: string) {
  let known = new Map<string, string>();
  return async (files: readonly string[]): Promise<(file: string) => string | undefined> => {
    const side = files.length <= FEW ? SIDE_OF_FEW : SIDE_OF_MANY;
    const next = new Map<string, string>();
    for (const file of files) {
      const key = `${side} ${file}`;
      const url = known.get(key) ?? (await thumbnail(folder, file, side));
      if (url !== undefined) next.set(key, url);
    }
    known = next;
    return (file) => next.get(`${side} ${file}`);
  };
}

/** Undefined for a picture that is gone, damaged, or outside the folder. */
async function thumbnail(folder: string, file: string, side: number): Promise<string | undefined> {
  const path = resolve(folder, file);
  const inside = relative(folder, path);
  if (inside.startsWith('..') || isAbsolute(inside)) return undefined;
  try {
    const size = { width: side, height: side, fit: 'inside', withoutEnlargement: true } as const;
    const bytes = await sharp(path).resize(size).webp({ quality: QUALITY }).toBuffer();
    return `data:image/webp;base64,${bytes.toString('base64')}`;
  } catch {
    return undefined;
  }
}
