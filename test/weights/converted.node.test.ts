import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, readdir, readFile, rm, stat, truncate, utimes, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { afterAll, beforeEach, describe, expect, it, test } from 'vitest';
import { type Checkpoint, openCheckpoint } from '../../src/weights/checkpoint.ts';
import {
  type ConversionOptions,
  type ConversionProgress,
  conversionFolder,
  conversionTitle,
  convertParts,
} from '../../src/weights/converted.node.ts';
import { type FileSource, fileSource } from '../../src/weights/files.node.ts';
import { readFloats } from '../../src/weights/stored.ts';
import { maxDifference } from '../support/run.ts';
import { bytesSource } from './sources.ts';

/** The smallest model at hand. */
const MODEL = resolve('test/fixtures/layouts/official.safetensors');
const sources: FileSource[] = [await fileSource(MODEL)];
const checkpoint = await openCheckpoint(sources);
const folders: string[] = [];
let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'mmditx-converted-'));
  folders.push(folder);
});
afterAll(async () => {
  await Promise.all(sources.map((source) => source.close()));
  await Promise.all(folders.map((path) => rm(path, { recursive: true })));
});

/** The parts converted to int8, and how many bytes of each were written for that. */
async function convert(options: ConversionOptions = {}, model: Checkpoint = checkpoint) {
  const written = new Map<string, ConversionProgress>();
  const onProgress = (progress: ConversionProgress) => {
    written.set(progress.part, progress);
    options.onProgress?.(progress);
  };
  const result = await convertParts(model, ['transformer', 'clipL'], 'int8', { folder, ...options, onProgress });
  await result.close();
  return { ...result, written };
}
const cacheFiles = async () => (await readdir(folder)).sort();

/** A process id that nothing runs under. */
const deadPid = () => spawnSync(process.execPath, ['--version']).pid;

test('networks are converted once, then taken from the folder', async () => {
  const first = await convert();
  expect(await cacheFiles()).toEqual([
    expect.stringMatching(/^clipl-int8-[0-9a-f]{24}\.safetensors$/),
    expect.stringMatching(/^transformer-int8-[0-9a-f]{24}\.safetensors$/),
  ]);
  expect([...first.written.keys()]).toEqual(['transformer', 'clipL']);
  for (const [part, { written, bytes, precision }] of first.written) {
    const [file] = (await cacheFiles()).filter((name) => name.startsWith(part.toLowerCase()));
    expect([written, precision]).toEqual([bytes, 'int8']);
    expect((await stat(join(folder, file!))).size).toBe(bytes);
  }
  const times = await Promise.all((await cacheFiles()).map(async (name) => (await stat(join(folder, name))).mtimeMs));
  const second = await convert();
  expect(second.written.size).toBe(0);
  expect(await Promise.all((await cacheFiles()).map(async (name) => (await stat(join(folder, name))).mtimeMs))).toEqual(
    times,
  );
});

test('what is not to be converted stays the original’s', async () => {
  const { checkpoint: converted } = await convert();
  expect(converted.parts.vae).toBe(checkpoint.parts.vae);
  expect(converted.parts.t5).toBe(checkpoint.parts.t5);
  expect(converted.parts.transformer!.config).toEqual(checkpoint.parts.transformer!.config);
  const layers = [...converted.parts.transformer!.tensors.values()].filter(({ quantized }) => quantized);
  expect(layers.length).toBeGreaterThan(10);
});

test('nothing is written where nothing is to be converted', async () => {
  const result = await convertParts(checkpoint, [], 'fp16', { folder: join(folder, 'none') });
  expect(result.checkpoint).toBe(checkpoint);
  expect(await cacheFiles()).toEqual([]);
});

test('each precision has a file of its own', async () => {
  await convert();
  await (await convertParts(checkpoint, ['transformer'], 'int4', { folder })).close();
  expect((await cacheFiles()).map((name) => name.split('-').slice(0, 2).join('-'))).toEqual([
    'clipl-int8',
    'transformer-int4',
    'transformer-int8',
  ]);
});

test('another model of the same shapes has a file of its own, the same one under another name has not', async () => {
  await convert();
  const bytes = new Uint8Array(await readFile(MODEL));
  await convert({}, await openCheckpoint([bytesSource(bytes, 'other name.safetensors')]));
  expect(await cacheFiles()).toHaveLength(2);
  const { spans } = checkpoint.parts.transformer!.tensors.get('joint_blocks.0.x_block.attn.qkv.weight')!;
  bytes[spans[0]!.offset]! ^= 1;
  await convert({}, await openCheckpoint([bytesSource(bytes, 'changed.safetensors')]));
  expect(await cacheFiles()).toHaveLength(3);
});

test('what a file says about its weights counts, not what the one said that was converted', async () => {
  await convert();
  const said = { ...checkpoint.parts.transformer!, metadata: { 'mmditx.defaults': '{"steps":7}' } };
  const again = await convert({}, { ...checkpoint, parts: { ...checkpoint.parts, transformer: said } });
  expect(again.written.size).toBe(0);
  expect(again.checkpoint.parts.transformer!.metadata).toEqual(said.metadata);
});

describe('two at once', () => {
  it('write each file once', async () => {
    const results = await Promise.all([convert(), convert(), convert()]);
    expect(results.flatMap(({ written }) => [...written.keys()]).sort()).toEqual(['clipL', 'transformer']);
    expect(await cacheFiles()).toHaveLength(2);
  });

  it('wait for another process, which may end without a file', async () => {
    const [, lock] = await lockNames();
    const other = spawn(process.execPath, ['-e', 'setTimeout(() => {}, 60000)']);
    try {
      await writeFile(lock!, String(other.pid));
      let done = false;
      const waiting = convert().then((result) => {
        done = true;
        return result;
      });
      await new Promise((resolve) => setTimeout(resolve, 700));
      expect(done).toBe(false);
      other.kill();
      await once(other, 'exit');
      expect((await waiting).written.has('transformer')).toBe(true);
      expect(await cacheFiles()).toHaveLength(2);
    } finally {
      other.kill();
    }
  });

  it('stop waiting with the signal’s reason', async () => {
    const [, lock] = await lockNames();
    await writeFile(lock!, String(process.ppid));
    const stop = new AbortController();
    const reason = new Error('enough');
    setTimeout(() => stop.abort(reason), 100);
    await expect(convert({ signal: stop.signal })).rejects.toBe(reason);
    expect(await cacheFiles()).toEqual([lock!.slice(folder.length + 1)]);
  });
});

/** Paths of the locks of both networks, in the order of their names. */
async function lockNames(): Promise<string[]> {
  await convert();
  const names = await cacheFiles();
  await Promise.all(names.map((name) => rm(join(folder, name))));
  return names.map((name) => join(folder, `${name}.lock`));
}

describe('a lock that was left behind', () => {
  it('by a process that has ended is taken over', async () => {
    const locks = await lockNames();
    for (const lock of locks) await writeFile(lock, String(deadPid()));
    expect((await convert()).written.size).toBe(2);
    expect(await cacheFiles()).toHaveLength(2);
  });

  it('without a word in it is taken over once it is old', async () => {
    const [lock] = await lockNames();
    await writeFile(lock!, '');
    const old = new Date(Date.now() - 61_000);
    await utimes(lock!, old, old);
    expect((await convert()).written.size).toBe(2);
  });
});

describe('an abort', () => {
  it('leaves nothing half-written, and the next try succeeds', async () => {
    const stop = new AbortController();
    const reason = new Error('enough');
    const onProgress = ({ written }: ConversionProgress) => {
      if (written > 2000) stop.abort(reason);
    };
    await expect(convert({ signal: stop.signal, onProgress })).rejects.toBe(reason);
    expect(await cacheFiles()).toEqual([]);
    expect((await convert()).written.size).toBe(2);
  });
});

describe('a damaged file in the folder', () => {
  const damages: Record<string, (path: string) => Promise<void>> = {
    'is cut off': async (path) => truncate(path, (await stat(path)).size - 10),
    'is empty': (path) => truncate(path, 0),
    'is something else': (path) => writeFile(path, 'nothing'),
  };
  it.each(Object.entries(damages))('that %s is told by its path, and can be deleted', async (_, damage) => {
    await convert();
    const [file] = await cacheFiles();
    const path = join(folder, file!);
    await damage(path);
    await expect(convert()).rejects.toMatchObject({
      code: 'bad-file',
      message: `The converted weights in ${path} are damaged; delete this file and try again.`,
    });
    await rm(path);
    expect((await convert()).written.size).toBe(1);
  });
});

test('a weight that is not finite stops the conversion with its name and leaves nothing', async () => {
  const bytes = new Uint8Array(await readFile(MODEL));
  const { spans } = checkpoint.parts.transformer!.tensors.get('joint_blocks.0.x_block.mlp.fc1.weight')!;
  const { offset, byteLength } = spans[0]!;
  bytes.fill(0xff, offset, offset + byteLength);
  const broken = await openCheckpoint([bytesSource(bytes, 'broken.safetensors')]);
  await expect(convert({}, broken)).rejects.toThrow(/mlp\.fc1\.weight.* in broken\.safetensors.*not finite/);
  expect(await cacheFiles()).toEqual([]);
});

test('too little room is told before anything is written', async () => {
  // A header alone announces weights that no disk holds.
  const weight = checkpoint.parts.clipL!.tensors.get('text_model.final_layer_norm.weight')!;
  const tensors = new Map([['text_model.huge', { ...weight, shape: [2 ** 26, 2 ** 26] }]]);
  const huge = { ...checkpoint, parts: { ...checkpoint.parts, clipL: { ...checkpoint.parts.clipL!, tensors } } };
  await expect(convert({}, huge)).rejects.toMatchObject({
    code: 'io',
    message: expect.stringMatching(/to int8 needs [\d.]+ GB in .* GB is free; free some space.*MMDITX_CACHE/),
  });
  expect(await cacheFiles()).toEqual([]);
});

test('a folder that cannot be made is told by its name', async () => {
  const file = join(folder, 'file');
  await writeFile(file, '');
  await expect(convert({ folder: join(file, 'cache') })).rejects.toMatchObject({
    code: 'io',
    message: expect.stringContaining(join(file, 'cache')),
  });
});

test.each([
  [{ MMDITX_CACHE: '/a', XDG_CACHE_HOME: '/b' }, '/a'],
  [{ XDG_CACHE_HOME: '/b' }, '/b/mmditx'],
  [{ LOCALAPPDATA: '/c' }, '/c/mmditx'],
  [{ MMDITX_CACHE: '', XDG_CACHE_HOME: '' }, /\.cache\/mmditx$/],
])('the folder with %o', (environment, expected) => {
  const found = conversionFolder(environment).replaceAll('\\', '/');
  if (typeof expected === 'string') expect(found).toBe(expected);
  else expect(found).toMatch(expected);
});

test('converted weights are read where they lie', async () => {
  const result = await convertParts(checkpoint, ['clipL'], 'int8', { folder });
  try {
    const name = 'text_model.encoder.layers.0.mlp.fc1.weight';
    const [weight, original] = [result.checkpoint, checkpoint].map(({ parts }) => parts.clipL!.tensors.get(name)!);
    expect(weight!.spans[0]!.source.path).toContain(folder);
    const [actual, expected] = [await readFloats(weight!), await readFloats(original!)];
    const peak = Math.max(...expected.data.map(Math.abs));
    expect(maxDifference(actual, expected)).toBeLessThanOrEqual(peak / 253);
  } finally {
    await result.close();
  }
});

test('progress names network and precision', () => {
  expect(conversionTitle({ part: 'clipG', precision: 'int4', written: 1, bytes: 2 })).toBe(
    'Converting the CLIP-G text encoder to int4',
  );
});
