/**
 * Fuzz tests of readers: each case gives a reader a mutated file and checks that it returns or refuses in words, in
 * time, and without asking for more memory than the file accounts for.
 *
 * | variable | meaning |
 * |---|---|
 * | `FUZZ_CASES` | cases for each reader, in place of the few of a normal run |
 * | `FUZZ_SEED` | other cases; what a failure prints repeats it |
 * | `FUZZ_PATH` | with the seed, the one case that failed |
 */
import { getHeapStatistics } from 'node:v8';
import { Worker } from 'node:worker_threads';
import fc from 'fast-check';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { MmditxError } from '../../src/errors.ts';
import type { ByteSource } from '../../src/weights/safetensors.ts';

const variable = (name: string) => process.env[name] || undefined;
const CASES = variable('FUZZ_CASES');
const SEED = Number(variable('FUZZ_SEED') ?? 1);
const PATH = variable('FUZZ_PATH');

/** Of the processor, so that a busy machine makes no difference. A case takes a millisecond or two. */
const MAX_CASE_MS = 3000;
/** When the process is ended: after this time in one case, or with this much memory, looked at so often. */
const HANG_MS = 30_000;
const MAX_PROCESS_BYTES = 2 ** 31;
const WATCH_MS = 200;
const MAX_MESSAGE = 1000;
/** Growth of the heap, garbage included: JSON takes twenty times its text when it is parsed. */
const SPARE_HEAP = 2 ** 26;
const HEAP_SHARE = 30;

/** One file for a reader. */
export interface FuzzCase {
  /** Bytes of the file, or of what it says that it unpacks to. */
  readonly size: number;
  /** Reads the file and checks what comes of it. */
  read(): unknown;
}

export interface FuzzLimits {
  /** Bytes that may be asked for beside `memory` times the size; default 1 MiB. */
  readonly spare?: number;
  /** Bytes of arrays, for each byte of the file; default 16. */
  readonly memory?: number;
  /** What is said of a case that does not end; default the test's name. */
  readonly title?: string;
}

export interface FuzzOptions extends Omit<FuzzLimits, 'title'> {
  /** Cases of a normal run; default 300. */
  readonly cases?: number;
  /** Whether the reader refuses anything at all; default true. */
  readonly refuses?: boolean;
}

/** A test that gives a reader many files. */
export function fuzz<Input>(
  reader: string,
  inputs: fc.Arbitrary<Input>,
  prepare: (input: Input) => FuzzCase | Promise<FuzzCase>,
  { cases = 300, refuses = true, ...limits }: FuzzOptions = {},
): void {
  const numRuns = CASES === undefined ? cases : Number(CASES);
  test(
    `${reader}: ${numRuns} mutated files are read or refused in words`,
    async () => {
      let refused = 0;
      let run = 0;
      const property = fc.asyncProperty(inputs, async (input) => {
        const title = `${reader}, FUZZ_SEED=${SEED} FUZZ_PATH=${PATH ?? run++}`;
        if (await isRefused(await prepare(input), { title, ...limits })) refused++;
      });
      await fc.assert(property, { numRuns, seed: SEED, ...(PATH !== undefined && { path: PATH }) });
      // Else the files are all refused for the same first fault, or not mutated at all.
      if (numRuns >= 100 && PATH === undefined) {
        if (refuses) expect(refused, 'cases that are refused').toBeGreaterThan(numRuns / 100);
        else expect(refused, 'cases that are refused').toBe(0);
        expect(refused, 'cases that are refused').toBeLessThan(numRuns * 0.99);
      }
    },
    60_000 + numRuns * 300,
  );
}

/**
 * Reads a file, and checks that it is read or refused in one sentence, in time and with memory in proportion to it.
 * @returns whether it is refused
 */
export async function isRefused(
  { size, read }: FuzzCase,
  { spare = 2 ** 20, memory = 16, title = String(expect.getState().currentTestName) }: FuzzLimits = {},
): Promise<boolean> {
  const allowance = spare + memory * size;
  const heap = heapBytes();
  const started = processorMs();
  watch(title);
  const { requested, error } = await countingArrays(read, allowance);
  unwatch();
  expect(processorMs() - started, 'milliseconds').toBeLessThan(MAX_CASE_MS);
  expect(requested, 'bytes of arrays').toBeLessThanOrEqual(allowance);
  expect(heapBytes() - heap, 'growth of the heap in bytes').toBeLessThanOrEqual(SPARE_HEAP + HEAP_SHARE * size);
  if (error === undefined) return false;
  if (!(error instanceof MmditxError)) throw error;
  expectSentence(error.message);
  return true;
}

function processorMs(): number {
  const { user, system } = process.cpuUsage();
  return (user + system) / 1000;
}

function heapBytes(): number {
  const { used_heap_size: objects, external_memory: buffers } = getHeapStatistics();
  return objects + buffers;
}

/** Checks that a text is one line that may be shown in a terminal, whatever the names in the file. */
export function expectLine(text: string): void {
  expect(text).toMatch(/^[^\p{Cc}\u2028\u2029\u202a-\u202e\u2066-\u2069]*$/u);
  expect(text.length, text.slice(0, 200)).toBeLessThan(MAX_MESSAGE);
}

function expectSentence(message: string): void {
  expectLine(message);
  expect(message).toMatch(/^\S.*\w.*\.$/);
}

/** Constructors of memory, and the bytes of an element of each. */
const arrays: readonly (readonly [string, number])[] = [
  ['ArrayBuffer', 1],
  ['SharedArrayBuffer', 1],
  ['Array', 8],
  ['Uint8Array', 1],
  ['Uint8ClampedArray', 1],
  ['Int8Array', 1],
  ['Uint16Array', 2],
  ['Int16Array', 2],
  ['Uint32Array', 4],
  ['Int32Array', 4],
  ['Float32Array', 4],
  ['Float64Array', 8],
  ['BigInt64Array', 8],
  ['BigUint64Array', 8],
];

/** Runs a reader and adds up what it asks of the constructors of arrays; what goes beyond the allowance it does not get. */
async function countingArrays(read: () => unknown, allowance: number): Promise<{ requested: number; error: unknown }> {
  let requested = 0;
  const count = (bytes: number) => {
    requested += bytes;
    if (requested > allowance) throw new RangeError(`${requested} bytes of arrays are asked for.`);
  };
  const originals = arrays.map(([name]) => [name, Object.getOwnPropertyDescriptor(globalThis, name)!] as const);
  for (const [name, bytesPerElement] of arrays) {
    const original = Reflect.get(globalThis, name) as new (...values: unknown[]) => object;
    const proxy: typeof original = new Proxy(original, {
      construct(target, values, newTarget) {
        count(bytesPerElement * lengthOf(values));
        return Reflect.construct(target, values, newTarget === proxy ? target : newTarget);
      },
    });
    Reflect.defineProperty(globalThis, name, { value: proxy, writable: true, configurable: true });
  }
  try {
    await read();
    return { requested, error: undefined };
  } catch (error) {
    return { requested, error };
  } finally {
    for (const [name, descriptor] of originals) Reflect.defineProperty(globalThis, name, descriptor);
  }
}

/** The length of an array from its constructor's arguments; views of existing memory ask for none. */
function lengthOf(values: readonly unknown[]): number {
  const [first] = values;
  if (typeof first === 'number') return first;
  if (values.length !== 1 || typeof first !== 'object' || first === null || first instanceof ArrayBuffer) return 0;
  return 'length' in first ? Number(first.length) : 0;
}

/** Bytes as a file that notes how they are read. */
export interface CountedSource extends ByteSource {
  /** Checks that what was read in all is no more than twice the file, and a little. */
  check(): void;
}

export function countedSource(bytes: Uint8Array, name = 'file.safetensors'): CountedSource {
  let requested = 0;
  return {
    name,
    size: bytes.length,
    async read(offset, length) {
      requested += length;
      const inside = Number.isInteger(offset) && Number.isInteger(length) && offset >= 0 && length >= 0;
      if (!inside || offset + length > bytes.length) throw new RangeError(`It reads ${length} bytes at ${offset}.`);
      return bytes.slice(offset, offset + length);
    },
    check: () => expect(requested, 'bytes read of the file').toBeLessThanOrEqual(2 * bytes.length + 2 ** 12),
  };
}

/**
 * A thread that ends the process when a case takes too long or too much memory: nothing in this thread stops a loop
 * without end. It reads what runs and looks at a counter that each case changes.
 */
const shared = new SharedArrayBuffer(8 + 1024);
const [count, titleLength] = [new Int32Array(shared, 0, 1), new Int32Array(shared, 4, 1)];
const title = new Uint8Array(shared, 8);

const watchdogCode = `
  const { workerData: shared } = require('node:worker_threads');
  const [count, titleLength] = [new Int32Array(shared, 0, 1), new Int32Array(shared, 4, 1)];
  const now = () => process.cpuUsage().user / 1000;
  let last = -1;
  let since = 0;
  for (;;) {
    Atomics.wait(count, 0, last, ${WATCH_MS});
    if (count[0] !== last) since = now();
    last = count[0];
    const fault = process.memoryUsage.rss() > ${MAX_PROCESS_BYTES} ? 'takes the memory' : 'does not end';
    if (titleLength[0] === 0 || (fault === 'does not end' && now() - since < ${HANG_MS})) continue;
    const text = Buffer.from(new Uint8Array(shared, 8, titleLength[0])).toString();
    require('node:fs').writeSync(2, 'A case ' + fault + ': ' + text + '\\n');
    process.kill(process.pid, 'SIGKILL');
  }`;
let watchdog: Worker | undefined;

beforeAll(() => {
  watchdog = new Worker(watchdogCode, { eval: true, workerData: shared });
  watchdog.unref();
});

afterAll(async () => {
  await watchdog?.terminate();
});

function watch(text: string): void {
  const { written } = new TextEncoder().encodeInto(text, title);
  Atomics.store(titleLength, 0, written);
  Atomics.add(count, 0, 1);
}

function unwatch(): void {
  Atomics.store(titleLength, 0, 0);
}
