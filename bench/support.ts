/** What the measurements share: settings, timing, child processes with their peak memory, tables and result files. */

import { spawn } from 'node:child_process';
import { mkdir, writeFile } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { availableParallelism, cpus, totalmem } from 'node:os';
import { basename, dirname, join, relative } from 'node:path';
import { text } from 'node:stream/consumers';
import { setTimeout as wait } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';

export const ROOT = join(dirname(fileURLToPath(import.meta.url)), '..');
/** Smallest sizes and fewest calls: shows that a script works; its figures mean nothing and are not kept. */
export const QUICK = process.env.BENCH_QUICK === '1';
/** Threads of both sides of a comparison. */
export const THREADS = Number(process.env.BENCH_THREADS ?? 2);

export const MIB = 2 ** 20;

export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
}

/** A number with as many digits as a measurement deserves. */
export function rounded(value: number, digits = 3): number {
  return Number(value.toPrecision(digits));
}

/** Such as `0.42 to 0.57`. */
export function range(values: readonly number[]): string {
  return `${rounded(Math.min(...values))} to ${rounded(Math.max(...values))}`;
}

/** Seconds of each of `count` calls in a row. */
export async function timeCalls(call: () => Promise<unknown>, count: number): Promise<number[]> {
  const seconds: number[] = [];
  for (let i = 0; i < count; i++) {
    const start = performance.now();
    await call();
    seconds.push((performance.now() - start) / 1000);
  }
  return seconds;
}

/** How many calls of `each` seconds fill about `seconds`. */
export function callsFor(each: number, seconds: number): number {
  return Math.min(Math.max(Math.round(seconds / each), 1), MOST_CALLS);
}
const MOST_CALLS = 50;

/** Makes calls and gives the seconds of each. */
export type Side = (calls: number) => Promise<number[]>;

export interface Comparison {
  /** Medians over all calls. */
  readonly ours: number;
  readonly theirs: number;
  /** `theirs / ours` by the medians: above 1, ours is faster. */
  readonly ratio: number;
  /** The same of each pair of turns, as a {@link range}. */
  readonly spread: string;
}

/** Turns of each side; seconds that a turn lasts. */
const [TURNS, TURN_SECONDS] = QUICK ? [1, 0] : [7, 0.5];
/** The thread pools of both sides keep spinning for up to 50 ms after a call. */
const SETTLE_MS = 150;

/** Takes turns: ours, theirs, ours, theirs, so that what slows the machine down for a while slows both. */
export async function takeTurns(ours: Side, theirs: Side): Promise<Comparison> {
  const sides = [ours, theirs].map((side) => ({ side, calls: 1, all: [] as number[], turns: [] as number[] }));
  const turn = async (side: Side, calls: number) => {
    await wait(SETTLE_MS);
    return side(calls);
  };
  for (const entry of sides) {
    await turn(entry.side, 1);
    entry.calls = callsFor((await turn(entry.side, 1))[0]!, TURN_SECONDS);
  }
  for (let i = 0; i < TURNS; i++) {
    for (const { side, calls, all, turns } of sides) {
      const seconds = await turn(side, calls);
      all.push(...seconds);
      turns.push(median(seconds));
    }
  }
  const [mine, other] = sides as [(typeof sides)[0], (typeof sides)[0]];
  const [a, b] = [median(mine.all), median(other.all)];
  return { ours: a, theirs: b, ratio: b / a, spread: range(mine.turns.map((own, i) => other.turns[i]! / own)) };
}

export interface ChildReport {
  readonly seconds: number;
  /** Largest resident set of the child in bytes. */
  readonly peakBytes: number;
  readonly stdout: string;
}

/** Run in a child before its own code: writes the largest resident set (KiB) to file descriptor 3 at its end. */
const PEAK_HOOK = `data:text/javascript,${encodeURIComponent(
  `import { writeSync } from 'node:fs';
   process.on('exit', () => writeSync(3, String(process.resourceUsage().maxRSS)));`,
)}`;

/** Runs a script in a Node process of its own; rejects with what it wrote to standard error when it fails. */
export async function runNode(args: readonly string[], options: { typescript?: boolean } = {}): Promise<ChildReport> {
  const start = performance.now();
  // This process's own arguments are what makes Node run TypeScript.
  const own = options.typescript ? process.execArgv : [];
  const child = spawn(process.execPath, [...own, '--import', PEAK_HOOK, ...args], {
    cwd: ROOT,
    stdio: ['ignore', 'pipe', 'pipe', 'pipe'],
  });
  const ended = new Promise<number | null>((resolve, reject) => child.on('error', reject).on('close', resolve));
  const [, stdout, stderr, peak] = child.stdio;
  const [output, errors, kibibytes, code] = await Promise.all([
    text(stdout!),
    text(stderr!),
    text(peak as NodeJS.ReadableStream),
    ended,
  ]);
  if (code !== 0) throw new Error(`${args.join(' ')} ended with ${code}: ${errors.trim()}`);
  return { seconds: (performance.now() - start) / 1000, peakBytes: Number(kibibytes) * 1024, stdout: output };
}

export type Row = Readonly<Record<string, string | number>>;

/** Rows as a Markdown table; the columns are those of the first row. */
export function table(rows: readonly Row[]): string {
  const columns = Object.keys(rows[0] ?? {});
  const line = (cells: readonly (string | number)[]) => `| ${cells.join(' | ')} |`;
  const align = columns.map((column) => (typeof rows[0]![column] === 'number' ? '---:' : '---'));
  return [line(columns), line(align), ...rows.map((row) => line(columns.map((column) => row[column] ?? '')))].join(
    '\n',
  );
}

/** What the figures were taken on. Nothing in it tells where the files lie. */
export function machine(): Record<string, string | number> {
  const { version } = createRequire(import.meta.url)('onnxruntime-node/package.json') as { version: string };
  return {
    cpu: cpus()[0]?.model.trim() ?? 'unknown',
    cores: availableParallelism(),
    memoryGiB: Math.round(totalmem() / 2 ** 30),
    system: `${process.platform} ${process.arch}`,
    node: process.version,
    onnxruntime: version,
  };
}

/** Share of the processors that is in use while this process waits, in percent: what a measurement shared them with. */
async function otherLoad(): Promise<number> {
  const times = () => cpus().map(({ times: { idle, ...busy } }) => ({ idle, busy: sum(Object.values(busy)) }));
  await wait(SETTLE_MS + ENDING_MS);
  const before = times();
  await wait(SAMPLE_MS);
  const after = times();
  const passed = (key: 'idle' | 'busy') => sum(after.map((entry, i) => entry[key] - before[i]![key]));
  return Math.round((100 * passed('busy')) / (passed('busy') + passed('idle')));
}
/** Time for child processes to end; time over which the load is taken. */
const [ENDING_MS, SAMPLE_MS] = [500, 1000];
/** Percent that a system needs for itself. */
const IDLE_LOAD = 10;

function sum(values: readonly number[]): number {
  return values.reduce((total, value) => total + value, 0);
}

export interface Publication {
  /** One sentence: what was measured. */
  title: string;
  rows: readonly Row[];
  /** Settings that the rows do not name, such as threads or the peer's version. */
  settings?: Readonly<Record<string, string | number>>;
}

/** Prints a measurement as Markdown and keeps it as JSON in `bench/results/`, or `bench/data/` with BENCH_QUICK=1. */
export async function publish({ title, rows, settings = {} }: Publication): Promise<void> {
  const script = relative(ROOT, process.argv[1]!).replaceAll('\\', '/');
  const load = await otherLoad();
  const result = {
    title,
    command: `npx tsx ${script}`,
    date: new Date().toISOString().slice(0, 10),
    machine: { ...machine(), 'other load, %': load },
    settings,
    rows,
  };
  const folder = join(ROOT, 'bench', QUICK ? 'data' : 'results');
  await mkdir(folder, { recursive: true });
  await writeFile(join(folder, `${basename(script, '.ts')}.json`), `${JSON.stringify(result, undefined, 2)}\n`);
  const facts = Object.entries({ ...result.machine, ...settings }).map(([key, value]) => `${key} ${value}`);
  console.log(`\n## ${title}\n\n${table(rows)}\n\n${facts.join(', ')}`);
  if (load > IDLE_LOAD) console.log('The machine was not idle: do not keep these figures.');
}
