import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { chmod, mkdtemp, readdir, readFile, rm, stat, truncate, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { afterAll, beforeEach, describe, expect, it, test } from 'vitest';
import { floats, type TensorData } from '../../src/tensor/data.ts';
import { cacheKey, openEncodedCache } from '../../src/training/encoded-cache.node.ts';

const folders: string[] = [];
let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'mmditx-encoded-'));
  folders.push(folder);
});
afterAll(() => Promise.all(folders.map((path) => rm(path, { recursive: true }))));

const key = cacheKey('a');
const fileOf = (name: string) => join(folder, name.slice(0, 2), `${name.slice(2)}.safetensors`);
const tensors = new Map<string, TensorData>([
  ['odd', { dtype: 'uint8', shape: [3], data: Uint8Array.of(1, 2, 3) }],
  ['hidden', { dtype: 'float16', shape: [1, 2, 2], data: Uint16Array.of(0x3c00, 0, 0xc000, 0x7bff) }],
  ['values', floats([2], [0.1, -7])],
  ['empty', floats([0], [])],
]);

describe('the cache', () => {
  it('gives back what was written, to other processes too', async () => {
    await openEncodedCache(folder).write(key, tensors);
    const cache = openEncodedCache(folder);
    expect(await cache.has(key)).toBe(true);
    const read = await cache.read(key);
    expect(new Map([...read!].sort())).toEqual(new Map([...tensors].sort()));
    expect((await stat(fileOf(key))).isFile()).toBe(true);
  });

  it('has nothing of a key that was not written', async () => {
    const cache = openEncodedCache(join(folder, 'none'));
    expect(await cache.has(key)).toBe(false);
    expect(await cache.read(key)).toBeUndefined();
    expect(await readdir(folder)).toEqual([]);
  });

  it('replaces what it has', async () => {
    const cache = openEncodedCache(folder);
    await cache.write(key, tensors);
    await cache.write(key, new Map([['other', floats([1], [5])]]));
    expect([...(await cache.read(key))!.keys()]).toEqual(['other']);
    expect(await readdir(dirname(fileOf(key)))).toHaveLength(1);
  });

  it.each(['', '../../etc/passwd', `../${'a'.repeat(61)}`, 'A'.repeat(64), 'a'.repeat(63), `${'a'.repeat(64)}\n`])(
    'refuses the key %j',
    async (bad) => {
      const cache = openEncodedCache(folder);
      await expect(cache.has(bad)).rejects.toThrow(RangeError);
      await expect(cache.read(bad)).rejects.toThrow(RangeError);
      await expect(cache.write(bad, tensors)).rejects.toThrow(RangeError);
    },
  );
});

describe('a damaged file', () => {
  const damages: Record<string, (path: string) => Promise<void>> = {
    'is cut off': async (path) => truncate(path, (await stat(path)).size - 1),
    'is too long': (path) => writeFile(path, 'x', { flag: 'a' }),
    'is empty': (path) => truncate(path, 0),
    'is something else': (path) => writeFile(path, 'nothing'),
    'has a wrong bit in a value': async (path) => {
      const bytes = await readFile(path);
      bytes[bytes.length - 1]! ^= 1;
      await writeFile(path, bytes);
    },
    'has another shape of the same size': async (path) => {
      const text = (await readFile(path)).toString('latin1');
      expect(text).toContain('"shape":[1,2,2]');
      await writeFile(path, text.replace('"shape":[1,2,2]', '"shape":[2,2,1]'), 'latin1');
    },
  };
  it.each(Object.entries(damages))('that %s counts as absent and is removed', async (_, damage) => {
    const cache = openEncodedCache(folder);
    await cache.write(key, tensors);
    await damage(fileOf(key));
    expect(await cache.read(key)).toBeUndefined();
    expect(await cache.has(key)).toBe(false);
    await cache.write(key, tensors);
    expect((await cache.read(key))!.size).toBe(tensors.size);
  });
});

describe('a folder that cannot be written', () => {
  it('because a file has its name is told by its name', async () => {
    const path = join(folder, 'file');
    await writeFile(path, '');
    await expect(openEncodedCache(path).write(key, tensors)).rejects.toMatchObject({
      code: 'io',
      message: expect.stringContaining(path),
    });
  });

  it('because its disk is full is told, and nothing is left behind', async ({ skip }) => {
    // A file system of 64 KiB, in which a tensor of 256 KiB ends in the middle.
    const mounted = spawnSync('mount', ['-t', 'tmpfs', '-o', 'size=64k', 'tmpfs', folder]).status === 0;
    if (!mounted) return skip();
    try {
      const large = new Map([['large', floats([2 ** 16], new Float32Array(2 ** 16))]]);
      await expect(openEncodedCache(folder).write(key, large)).rejects.toMatchObject({
        code: 'io',
        message: expect.stringMatching(/the disk is full; free some space/),
      });
      expect(await readdir(dirname(fileOf(key)))).toEqual([]);
    } finally {
      spawnSync('umount', [folder]);
    }
  });

  it('for lack of permission is told', async ({ skip }) => {
    // Root may write everywhere.
    if (process.getuid?.() === 0) return skip();
    await chmod(folder, 0o500);
    await expect(openEncodedCache(folder).write(key, tensors)).rejects.toMatchObject({ code: 'io' });
    await chmod(folder, 0o700);
  });
});

describe('a key', () => {
  test('is the SHA-256 of the value as JSON with sorted members', () => {
    const sha256 = (text: string) => createHash('sha256').update(text).digest('hex');
    expect(cacheKey({ b: [1, 'x', null], a: { d: true, c: 0.5 } })).toBe(
      sha256('{"a":{"c":0.5,"d":true},"b":[1,"x",null]}'),
    );
  });

  test('does not depend on the order of members, nor on undefined ones', () => {
    expect(cacheKey({ a: 1, b: { c: 2, d: 3 } })).toBe(cacheKey({ b: { d: 3, c: 2, e: undefined }, a: 1 }));
  });

  test.each([
    [{ a: 1 }, { a: '1' }],
    [['a', 'b'], ['a,b']],
    [{ a: ['b'] }, { a: { 0: 'b' } }],
    [{ a: null }, {}],
  ])('tells %j from %j', (a, b) => expect(cacheKey(a)).not.toBe(cacheKey(b)));

  test('cannot be made of what JSON would write as null', () => {
    expect(() => cacheKey({ a: Number.NaN })).toThrow(RangeError);
  });
});
