import { mkdtemp, readdir, rm, truncate } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { ALL_OBJECTS } from '../../models/small/data/objects.ts';
import {
  compose,
  findPackageFolder,
  loadPictures,
  openPictureSource,
  type PictureSource,
  pictureAt,
  renderPicture,
  STYLES,
} from '../../models/small/data/pictures.ts';

describe('compose', () => {
  it('blends the picture over the background, channel by channel, into [-1, 1]', () => {
    // Opaque red, half transparent white, and nothing (whose hidden green must not show).
    const rgba = Uint8Array.of(255, 0, 0, 255, 255, 255, 255, 51, 0, 255, 0, 0);
    const image = compose(rgba, [0, 51, 255]);
    const values = Array.from(image, (value) => Math.round((value + 1) * 127.5 * 10) / 10);
    expect(values).toEqual([255, 51, 0, 0, 91.8, 51, 0, 255, 255]);
  });

  it('writes into a part of a batch', () => {
    const batch = new Float32Array(6);
    compose(Uint8Array.of(0, 0, 0, 0), [255, 255, 255], batch.subarray(3));
    expect([...batch]).toEqual([0, 0, 0, 1, 1, 1]);
  });
});

describe('loadPictures', () => {
  it('refuses sizes beyond the pictures', async () => {
    for (const size of [4, 257, 64.5]) {
      await expect(loadPictures({ size, cacheFolder: tmpdir() })).rejects.toThrow(`Picture size ${size}`);
    }
  });
});

const packageFolder = findPackageFolder();

describe.skipIf(packageFolder === undefined)('the picture packages (npm install in models/small)', () => {
  let source: PictureSource;
  let cacheFolder: string;
  beforeAll(async () => {
    source = await openPictureSource(packageFolder);
    cacheFolder = await mkdtemp(join(tmpdir(), 'mmditx-pictures-'));
  });
  afterAll(() => rm(cacheFolder, { recursive: true, force: true }));

  it('have every object in every style', async () => {
    for (const object of ALL_OBJECTS) {
      for (const style of STYLES) expect((await source.read(object, style)).length).toBeGreaterThan(100);
    }
  });

  it('say which picture a set lacks', async () => {
    const unknown = { name: 'nothing', codepoints: 'ffff', bare: false };
    await expect(source.read(unknown, 'noto')).rejects.toThrow('The noto set has no picture of nothing (ffff).');
    await expect(source.read(unknown, '3d')).rejects.toThrow('The 3d set has no picture of nothing (ffff).');
  });

  it('are drawn in the middle, with soft edges and a transparent border', async () => {
    const star = ALL_OBJECTS.find(({ name }) => name === 'star')!;
    for (const style of STYLES) {
      const rgba = await renderPicture(source, star, style, 64);
      const alpha = (x: number, y: number) => rgba[(y * 64 + x) * 4 + 3]!;
      expect(rgba.length).toBe(64 * 64 * 4);
      expect(alpha(32, 32)).toBe(255);
      // Yellow: red and green well above blue.
      const [red, green, blue] = rgba.subarray((32 * 64 + 32) * 4);
      expect(Math.min(red!, green!) - blue!).toBeGreaterThan(60);
      for (let i = 0; i < 64; i++) expect([alpha(i, 0), alpha(0, i), alpha(i, 63), alpha(63, i)]).toEqual([0, 0, 0, 0]);
      const soft = Array.from({ length: 64 * 64 }, (_, i) => rgba[i * 4 + 3]!).filter((a) => a > 32 && a < 224);
      expect(soft.length, style).toBeGreaterThan(50);
    }
  });

  it('are rendered once, and again where the cache is cut short', async () => {
    const objects = ALL_OBJECTS.slice(0, 2);
    let drawn = 0;
    const options = { size: 32, cacheFolder, objects, onProgress: () => drawn++ };
    const first = await loadPictures(options);
    expect(drawn).toBe(8);
    const files = await readdir(cacheFolder);
    expect(files).toHaveLength(1);
    expect(await loadPictures(options)).toEqual(first);
    expect(drawn).toBe(8);

    await truncate(join(cacheFolder, files[0]!), 100);
    expect(await loadPictures(options)).toEqual(first);
    expect(drawn).toBe(16);
    expect(Buffer.from(pictureAt(first, 1, 2)).equals(await renderPicture(source, objects[1]!, 'flat', 32))).toBe(true);
  });
});
