import { mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { basename, join } from 'node:path';
import sharp from 'sharp';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { type OutputValues, outputPath, readImageFile, writePng } from '../../src/image/files.node.ts';

let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'mmditx-'));
});
afterEach(() => rm(folder, { recursive: true, force: true }));

/** Left half red, right half blue. */
const halves = (width = 32, height = 16) =>
  sharp({ create: { width, height, channels: 3, background: { r: 0, g: 0, b: 255 } } }).composite([
    {
      input: { create: { width: width / 2, height, channels: 3, background: { r: 255, g: 0, b: 0 } } },
      gravity: 'west',
    },
  ]);

describe('reading a picture', () => {
  test.each([
    ['png', () => halves().png()],
    ['jpeg', () => halves().jpeg({ quality: 100, chromaSubsampling: '4:4:4' })],
    ['webp', () => halves().webp({ quality: 100 })],
    ['avif', () => halves().avif({ quality: 95, effort: 0, chromaSubsampling: '4:4:4' })],
  ])('%s', async (format, make) => {
    const path = join(folder, `picture.${format}`);
    await make().toFile(path);
    const image = await readImageFile(path);
    expect(image).toMatchObject({ width: 32, height: 16 });
    expect(image.data).toHaveLength(32 * 16 * 3);
    expect(image.alpha).toBeUndefined();
    const near = (x: number, colour: number[]) =>
      colour.forEach((value, i) => {
        expect(Math.abs(image.data[3 * x + i]! - value)).toBeLessThan(12);
      });
    near(2, [255, 0, 0]);
    near(29, [0, 0, 255]);
  });

  test('is turned upright', async () => {
    const path = join(folder, 'turned.jpg');
    await sharp(await halves().png().toBuffer())
      .withMetadata({ orientation: 6 })
      .jpeg({ quality: 100 })
      .toFile(path);
    const image = await readImageFile(path);
    expect(image).toMatchObject({ width: 16, height: 32 });
    // Orientation 6 is shown turned clockwise: what was left is on top.
    expect(image.data[0]).toBeGreaterThan(200);
    expect(image.data.at(-1)).toBeGreaterThan(200);
  });

  test('grey and 16-bit pictures become 8-bit RGB', async () => {
    const grey = join(folder, 'grey.png');
    await sharp(Buffer.from([0, 100, 255]), { raw: { width: 3, height: 1, channels: 1 } })
      .png()
      .toFile(grey);
    expect([...(await readImageFile(grey)).data]).toEqual([0, 0, 0, 100, 100, 100, 255, 255, 255]);
    const deep = join(folder, 'deep.png');
    await sharp(Uint16Array.of(0, 65535, 32896), { raw: { width: 1, height: 1, channels: 3 } })
      .toColourspace('rgb16')
      .png()
      .toFile(deep);
    expect([...(await readImageFile(deep)).data]).toEqual([0, 255, 128]);
  });

  test('transparency shows the background and is returned', async () => {
    const path = join(folder, 'alpha.png');
    const rgba = Buffer.from([255, 0, 0, 255, 255, 0, 0, 0, 0, 0, 0, 128]);
    await sharp(rgba, { raw: { width: 3, height: 1, channels: 4 } })
      .png()
      .toFile(path);
    const image = await readImageFile(path);
    expect([...image.data]).toEqual([255, 0, 0, 255, 255, 255, 127, 127, 127]);
    expect([...image.alpha!]).toEqual([255, 0, 128]);
    expect([...(await readImageFile(path, { background: [0, 9, 0] })).data.subarray(3, 6)]).toEqual([0, 9, 0]);
  });

  test('at a size: scaled to cover it, cut about the centre', async () => {
    const path = join(folder, 'wide.png');
    await halves(64, 16).toFile(path);
    const image = await readImageFile(path, { size: { width: 8, height: 8 } });
    expect(image).toMatchObject({ width: 8, height: 8 });
    expect([...image.data.subarray(0, 3)]).toEqual([255, 0, 0]);
    expect([...image.data.subarray(21, 24)]).toEqual([0, 0, 255]);
  });

  test('a missing file, a folder, no picture, a damaged and a too large one: each says so', async () => {
    const fails = (path: string, code: string, words: string, options = {}) =>
      expect(readImageFile(path, options)).rejects.toMatchObject({
        name: 'MmditxError',
        code,
        message: expect.stringContaining(words),
      });
    await fails(join(folder, 'none.png'), 'io', 'no such file');
    await fails(folder, 'io', 'it is a folder');
    const text = join(folder, 'text.png');
    await writeFile(text, 'not a picture');
    await fails(text, 'bad-file', 'is not a picture');
    const vector = join(folder, 'vector.png');
    await writeFile(
      vector,
      '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>',
    );
    await fails(vector, 'bad-file', 'format svg');
    const good = join(folder, 'good.png');
    await halves().png().toFile(good);
    await fails(good, 'bad-file', '32 x 16 pixels, more than 100', { maxPixels: 100 });
    const cut = join(folder, 'cut.png');
    const noise = Buffer.from(Array.from({ length: 3000 }, (_, i) => (i * i * 31) % 251));
    const whole = await sharp(noise, { raw: { width: 50, height: 20, channels: 3 } })
      .png()
      .toBuffer();
    await writeFile(cut, whole.subarray(0, whole.length >> 1));
    await fails(cut, 'bad-file', 'damaged');
  });
});

describe('writing a picture', () => {
  test('creates the folders it lies in', async () => {
    const path = join(folder, 'a', 'b', 'picture.png');
    await writePng(path, Uint8Array.of(1, 2));
    expect([...(await readFile(path))]).toEqual([1, 2]);
    expect(await readdir(join(folder, 'a', 'b'))).toEqual(['picture.png']);
  });

  test('says why it cannot', async () => {
    await writeFile(join(folder, 'file'), '');
    await expect(writePng(join(folder, 'file', 'picture.png'), new Uint8Array(1))).rejects.toMatchObject({
      code: 'io',
      message: expect.stringContaining('Cannot write'),
    });
  });
});

describe('output patterns', () => {
  const values: OutputValues = { seed: 7, index: 0, count: 1, width: 64, height: 96, prompt: 'A cat, on: a/mat!' };
  const path = (pattern: string, change: Partial<OutputValues> = {}, options = {}) =>
    outputPath(join(folder, pattern), { ...values, ...change }, options).slice(folder.length + 1);

  test('fill in every placeholder', () => {
    expect(path('{seed}-{index}-{width}x{height}-{prompt}.png')).toBe('7-0-64x96-A-cat-on-a-mat.png');
    expect(path('{seed}.png', { seed: 2n ** 64n - 1n })).toBe('18446744073709551615.png');
  });

  test('may contain placeholders in folders', () => {
    expect(path('{prompt}/{seed}.png')).toBe(join('A-cat-on-a-mat', '7.png'));
  });

  test('number several pictures that they do not tell apart', () => {
    expect(path('out.png', { index: 2, count: 3 })).toBe('out-2.png');
    expect(path('{index}.png', { index: 2, count: 3 })).toBe('2.png');
    expect(path('out.png', { index: 0, count: 1 })).toBe('out.png');
  });

  test('get .png where it is missing, and keep a dot in the name', () => {
    expect(path('out')).toBe('out.png');
    expect(path('sd3.5')).toBe('sd3.5.png');
    expect(path('out.PNG')).toBe('out.PNG');
  });

  test('avoid existing files unless they may be replaced', async () => {
    await writeFile(join(folder, 'out.png'), '');
    expect(path('out.png')).toBe('out-1.png');
    await writeFile(join(folder, 'out-1.png'), '');
    expect(path('out.png')).toBe('out-2.png');
    expect(path('out.png', {}, { overwrite: true })).toBe('out.png');
    await mkdir(join(folder, 'folder.png'));
    expect(path('folder.png')).toBe('folder-1.png');
  });

  test('make any prompt a file name', () => {
    const name = (prompt: string) => path('{prompt}.png', { prompt });
    expect(name('')).toBe('untitled.png');
    expect(name('../../etc/passwd')).toBe('etc-passwd.png');
    expect(name('/\\:*?"<>|\0\n')).toBe('untitled.png');
    expect(name('猫と café')).toBe('猫と-café.png');
    expect(name('{seed}')).toBe('seed.png');
    expect(name('con')).toBe('con_.png');
    expect(Buffer.byteLength(basename(name('猫'.repeat(1000))))).toBeLessThan(130);
    expect(name('word '.repeat(1000))).toMatch(/^(word-)+\w+\.png$/);
  });

  test.each([
    ['{sed}.png', 'unknown placeholder {sed}'],
    ['out/', 'names no file'],
    ['out.jpg', 'written as .png'],
  ])('%s is refused', (pattern, words) => {
    expect(() => outputPath(pattern, values)).toThrow(
      expect.objectContaining({ code: 'bad-option', message: expect.stringContaining(words) }),
    );
  });
});
