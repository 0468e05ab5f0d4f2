import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import sharp, { type Sharp } from 'sharp';
import { afterAll, beforeAll, describe, expect, it, test } from 'vitest';
import { MmditxError } from '../../src/errors.ts';
import { type PictureView, RESIZE_FILTERS, renderPicture, viewKey } from '../../src/training/pictures.node.ts';

let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'mmditx-'));
});
afterAll(() => rm(folder, { recursive: true, force: true }));

type Colour = readonly number[];
const red = [255, 0, 0];
const green = [0, 255, 0];
const blue = [0, 0, 255];
const white = [255, 255, 255];

const view = (width: number, height: number, change: Partial<PictureView> = {}): PictureView => ({
  width,
  height,
  fit: 'cover',
  crop: [0.5, 0.5],
  flip: false,
  background: [255, 255, 255],
  filter: 'lanczos3',
  ...change,
});

let files = 0;
async function fileOf(picture: Sharp, ending = 'png'): Promise<string> {
  const path = join(folder, `${files++}.${ending}`);
  await picture.toFile(path);
  return path;
}

/** Rows of colours as a picture. */
function pixels(rows: readonly (readonly Colour[])[]): Sharp {
  const channels = rows[0]![0]!.length as 3 | 4;
  const raw = { width: rows[0]!.length, height: rows.length, channels };
  return sharp(Buffer.from(rows.flat(2)), { raw });
}

/** The colours of a tensor, rounded to bytes, row by row. */
async function rendered(path: string, wanted: PictureView): Promise<Colour[][]> {
  const { shape, data } = await renderPicture({ path, name: 'picture' }, wanted);
  expect(shape).toEqual([1, 3, wanted.height, wanted.width]);
  const plane = wanted.width * wanted.height;
  return Array.from({ length: wanted.height }, (_, y) =>
    Array.from({ length: wanted.width }, (_, x) =>
      [0, 1, 2].map((channel) => Math.round((data[channel * plane + y * wanted.width + x]! + 1) * 127.5)),
    ),
  );
}

describe('renderPicture', () => {
  it('gives values from -1 to 1, channel by channel', async () => {
    const path = await fileOf(pixels([[red, [0, 51, 102]]]));
    const { dtype, shape, data } = await renderPicture({ path, name: 'a' }, view(2, 1));
    expect({ dtype, shape }).toEqual({ dtype: 'float32', shape: [1, 3, 1, 2] });
    const expected = [1, -1, -1, -0.6, -1, -0.2];
    expected.forEach((value, i) => {
      expect(data[i]).toBeCloseTo(value, 6);
    });
  });

  it('turns pictures upright before anything else', async () => {
    // Stored: red left, blue right. Orientation 6 is shown turned clockwise: red above blue. 3 is upside down.
    const stored = await pixels([
      [red, red, blue, blue],
      [red, red, blue, blue],
    ])
      .png()
      .toBuffer();
    const turned = await fileOf(sharp(stored).withMetadata({ orientation: 6 }));
    expect(await rendered(turned, view(2, 4))).toEqual([red, red, blue, blue].map((colour) => [colour, colour]));
    const over = await fileOf(sharp(stored).withMetadata({ orientation: 3 }));
    expect((await rendered(over, view(4, 2)))[0]).toEqual([blue, blue, red, red]);
    // The crop lies in the picture as it is shown.
    expect(await rendered(turned, view(2, 1, { crop: [0, 0] }))).toEqual([[red, red]]);
    expect(await rendered(turned, view(2, 1, { crop: [0, 1] }))).toEqual([[blue, blue]]);
  });

  it('crops where it is told, and mirrors after that', async () => {
    const path = await fileOf(pixels([[red, green, blue, white]]));
    expect(await rendered(path, view(1, 1, { crop: [0, 0] }))).toEqual([[red]]);
    expect(await rendered(path, view(1, 1, { crop: [1, 0] }))).toEqual([[white]]);
    // Three are cut: one at the left and two at the right, as in kohya.
    expect(await rendered(path, view(1, 1))).toEqual([[green]]);
    const tall = await fileOf(pixels([[red], [green], [blue]]));
    expect(await rendered(tall, view(1, 1))).toEqual([[green]]);
    const wide = await fileOf(
      pixels([
        [red, green, blue],
        [red, green, blue],
      ]),
    );
    expect(await rendered(wide, view(2, 2, { crop: [0, 0], flip: true }))).toEqual([
      [green, red],
      [green, red],
    ]);
  });

  it('pads where the whole picture is wanted', async () => {
    const path = await fileOf(pixels([[red, blue]]));
    const grey = [10, 20, 30] as const;
    const padded = (crop: [number, number], flip = false) =>
      rendered(path, view(2, 3, { fit: 'contain', background: grey, crop, flip }));
    const pad = [grey, grey];
    expect(await padded([0.5, 0])).toEqual([[red, blue], pad, pad]);
    expect(await padded([0.5, 0.5], true)).toEqual([pad, [blue, red], pad]);
    expect(await padded([0.5, 1])).toEqual([pad, pad, [red, blue]]);
    expect(await rendered(path, view(4, 4, { fit: 'contain', filter: 'nearest', crop: [0, 0] }))).toEqual([
      [red, red, blue, blue],
      [red, red, blue, blue],
      [white, white, white, white],
      [white, white, white, white],
    ]);
  });

  it('takes a size between for pictures that are not to be enlarged or shrunk', async () => {
    const path = await fileOf(pixels([[red, green, blue, white]]));
    expect(await rendered(path, view(2, 1, { resized: [4, 1] }))).toEqual([[green, blue]]);
    expect(await rendered(path, view(6, 1, { resized: [4, 1] }))).toEqual([[white, red, green, blue, white, white]]);
  });

  it('composes transparency on the background', async () => {
    const path = await fileOf(
      pixels([
        [
          [255, 0, 0, 255],
          [255, 0, 0, 0],
          [0, 0, 0, 51],
        ],
      ]),
    );
    expect(await rendered(path, view(3, 1))).toEqual([[red, white, [204, 204, 204]]]);
    expect(await rendered(path, view(3, 1, { background: [0, 100, 0] }))).toEqual([[red, [0, 100, 0], [0, 80, 0]]]);
  });

  it('lets no colour of invisible pixels into the edges', async () => {
    // A grey disc on transparent pure red: resized on grey, no red may show anywhere.
    const size = 64;
    const rgba = Array.from({ length: size }, (_, y) =>
      Array.from({ length: size }, (_, x) =>
        Math.hypot(x - 31.5, y - 31.5) < 20 ? [128, 128, 128, 255] : [255, 0, 0, 0],
      ),
    );
    const path = await fileOf(pixels(rgba));
    for (const filter of RESIZE_FILTERS) {
      for (const side of [23, 80]) {
        const colours = await rendered(path, view(side, side, { filter, background: [128, 128, 128] }));
        for (const [r, g, b] of colours.flat()) {
          expect(Math.max(Math.abs(r! - 128), Math.abs(g! - 128), Math.abs(b! - 128))).toBe(0);
        }
      }
    }
  });

  it('gives the edge of a transparent picture as if it were composed first', async () => {
    const size = 40;
    const rgba = Array.from({ length: size }, (_, y) =>
      Array.from({ length: size }, (_, x) => (x + 2 * y < 60 ? [200, 40, 90, 255] : [0, 255, 0, 0])),
    );
    const composed = rgba.map((line) => line.map(([r, g, b, a]) => (a ? [r!, g!, b!] : [20, 220, 250])));
    const background = [20, 220, 250] as const;
    const wanted = view(17, 17, { filter: 'linear', background });
    const transparent = await rendered(await fileOf(pixels(rgba)), wanted);
    const opaque = await rendered(await fileOf(pixels(composed)), wanted);
    transparent.flat(2).forEach((value, i) => {
      expect(Math.abs(value - opaque.flat(2)[i]!)).toBeLessThanOrEqual(1);
    });
  });

  test('16-bit, grey, palette and CMYK pictures, JPEG, WebP and AVIF become sRGB', async () => {
    const deep = Uint16Array.of(0, 65535, 32896, 65535, 0, 257);
    const deepPath = await fileOf(
      sharp(deep, { raw: { width: 2, height: 1, channels: 3 } })
        .toColourspace('rgb16')
        .png(),
    );
    expect((await sharp(deepPath).metadata()).depth).toBe('ushort');
    expect(await rendered(deepPath, view(2, 1))).toEqual([
      [
        [0, 255, 128],
        [255, 0, 1],
      ],
    ]);

    const grey = sharp(Buffer.from([0, 100]), { raw: { width: 2, height: 1, channels: 1 } });
    const greyPath = await fileOf(grey.toColourspace('b-w').png());
    expect((await sharp(greyPath).metadata()).channels).toBe(1);
    expect(await rendered(greyPath, view(2, 1))).toEqual([
      [
        [0, 0, 0],
        [100, 100, 100],
      ],
    ]);
    const greyAlpha = await fileOf(
      grey
        .clone()
        .joinChannel(Buffer.from([255, 0]), { raw: { width: 2, height: 1, channels: 1 } })
        .toColourspace('b-w')
        .png(),
    );
    expect((await sharp(greyAlpha).metadata()).channels).toBe(2);
    expect(await rendered(greyAlpha, view(2, 1, { background: [9, 8, 7] }))).toEqual([
      [
        [0, 0, 0],
        [9, 8, 7],
      ],
    ]);
    const deepGrey = await fileOf(
      sharp(Uint16Array.of(0, 32896), { raw: { width: 2, height: 1, channels: 1 } })
        .toColourspace('grey16')
        .png(),
    );
    expect(await sharp(deepGrey).metadata()).toMatchObject({ channels: 1, depth: 'ushort' });
    expect(await rendered(deepGrey, view(2, 1))).toEqual([
      [
        [0, 0, 0],
        [128, 128, 128],
      ],
    ]);

    const palette = await fileOf(pixels([[red, [0, 0, 255, 0].slice(0, 3)]]).png({ palette: true }));
    expect(await rendered(palette, view(2, 1))).toEqual([[red, blue]]);

    const flat = (colour: Colour) => pixels(Array.from({ length: 16 }, () => Array(16).fill(colour)));
    const others = [
      await fileOf(flat([200, 30, 60]).toColourspace('cmyk').jpeg({ quality: 100 }), 'cmyk.jpg'),
      await fileOf(flat([200, 30, 60]).jpeg({ quality: 100 }), 'jpg'),
      await fileOf(flat([200, 30, 60]).webp({ quality: 100 }), 'webp'),
      await fileOf(flat([200, 30, 60]).avif({ quality: 90, effort: 0 }), 'avif'),
    ];
    expect((await sharp(others[0]).metadata()).space).toBe('cmyk');
    for (const path of others) {
      for (const colour of (await rendered(path, view(8, 8))).flat()) {
        [200, 30, 60].forEach((value, i) => {
          expect(Math.abs(colour[i]! - value)).toBeLessThan(path === others[0] ? 30 : 6);
        });
      }
    }
  });

  it('shows 16-bit transparency on the very background', async () => {
    const raw = { width: 1, height: 1, channels: 4 } as const;
    const path = await fileOf(
      sharp(Uint16Array.of(0, 0, 0, 0), { raw })
        .toColourspace('rgb16')
        .png(),
    );
    expect(await rendered(path, view(1, 1))).toEqual([[white]]);
  });

  it('shows the first picture of an animation', async () => {
    const frames = Buffer.concat([Buffer.alloc(48, 255), Buffer.alloc(48, 0)]);
    const path = await fileOf(
      sharp(frames, { raw: { width: 4, height: 8, channels: 3, pageHeight: 4 } }).webp({ lossless: true }),
      'webp',
    );
    expect((await sharp(path).metadata()).pages).toBe(2);
    expect((await rendered(path, view(4, 4))).flat()).toEqual(Array(16).fill(white));
  });

  it('averages what it shrinks, in JPEG files, too', async () => {
    const stripes = Array.from({ length: 64 }, () =>
      Array.from({ length: 64 }, (_, x) => Array(3).fill(x % 2 ? 255 : 0)),
    );
    const path = await fileOf(pixels(stripes).jpeg({ quality: 100 }), 'jpg');
    for (const colour of (await rendered(path, view(8, 8, { filter: 'linear' }))).flat(2)) {
      expect(Math.abs(colour - 127.5)).toBeLessThan(8);
    }
  });

  it('refuses truncated pictures and what is none by their name, as bad files', async () => {
    const noise = Buffer.from(Array.from({ length: 3 * 96 * 96 }, (_, i) => (i * i * 31) % 251));
    const picture = () => sharp(noise, { raw: { width: 96, height: 96, channels: 3 } });
    const cut = (bytes: Buffer) => bytes.subarray(0, Math.floor(0.9 * bytes.length));
    const broken = {
      'cut.jpg': cut(await picture().jpeg().toBuffer()),
      'cut.png': cut(await picture().png().toBuffer()),
      'cut.webp': cut(await picture().webp().toBuffer()),
      'cut.avif': cut(await picture().avif({ effort: 0 }).toBuffer()),
      'text.png': Buffer.from('not a picture'),
      'empty.png': Buffer.alloc(0),
      'moved.png': await picture().gif().toBuffer(),
    };
    for (const [name, bytes] of Object.entries(broken)) {
      const path = join(folder, name);
      await writeFile(path, bytes);
      const failed = renderPicture({ path, name }, view(32, 32));
      await expect(failed, name).rejects.toThrow(MmditxError);
      await expect(failed, name).rejects.toMatchObject({
        code: 'bad-file',
        message: expect.stringContaining(`"${name}"`),
      });
    }
    const shrunk = renderPicture({ path: join(folder, 'cut.jpg'), name: 'cut.jpg' }, view(8, 8));
    await expect(shrunk).rejects.toThrow(/damaged/);
    await expect(renderPicture({ path: join(folder, 'no.png'), name: 'no' }, view(8, 8))).rejects.toMatchObject({
      code: 'io',
      message: expect.stringContaining('"no" is missing'),
    });
    await expect(renderPicture({ path: folder, name: 'folder' }, view(8, 8))).rejects.toMatchObject({ code: 'io' });
  });

  it('refuses to make a huge picture of a narrow one', async () => {
    const path = await fileOf(sharp({ create: { width: 20_000, height: 1, channels: 3, background: 'red' } }));
    await expect(renderPicture({ path, name: 'line' }, view(256, 256))).rejects.toMatchObject({
      code: 'bad-file',
      message: expect.stringContaining('20000 x 1 pixels, too narrow'),
    });
    expect((await rendered(path, view(256, 256, { fit: 'contain' })))[128]?.[0]).toBeDefined();
  });

  it('refuses views out of range', async () => {
    const path = await fileOf(pixels([[red]]));
    for (const change of [
      { width: 0 },
      { height: 1.5 },
      { width: 1e9 },
      { crop: [0, 1.1] as const },
      { background: [0, 0, 256] as const },
      { resized: [0, 4] as const },
    ]) {
      const failed = renderPicture({ path, name: 'a' }, view(8, 8, change));
      await expect(failed, JSON.stringify(change)).rejects.toMatchObject({ name: 'MmditxError', code: 'bad-option' });
    }
  });

  it('reads a file again that has changed', async () => {
    const path = await fileOf(pixels([[red]]));
    expect(await rendered(path, view(1, 1))).toEqual([[red]]);
    await writeFile(path, await readFile(await fileOf(pixels([[blue]]))));
    expect(await rendered(path, view(1, 1))).toEqual([[blue]]);
  });
});

describe('viewKey', () => {
  const picture = { digest: 'abc' };

  it('differs for all that decides the pixels', () => {
    const keys = [
      viewKey(picture, view(8, 8)),
      viewKey({ digest: 'abd' }, view(8, 8)),
      viewKey(picture, view(9, 8)),
      viewKey(picture, view(8, 9)),
      viewKey(picture, view(8, 8, { fit: 'contain' })),
      viewKey(picture, view(8, 8, { crop: [0, 0.5] })),
      viewKey(picture, view(8, 8, { flip: true })),
      viewKey(picture, view(8, 8, { background: [0, 0, 0] })),
      viewKey(picture, view(8, 8, { filter: 'cubic' })),
      viewKey(picture, view(8, 8, { resized: [8, 9] })),
    ].map((key) => JSON.stringify(key));
    expect(new Set(keys).size).toBe(keys.length);
    expect(keys).toContain(JSON.stringify(viewKey({ ...picture }, view(8, 8))));
  });

  it('survives JSON', () => {
    const key = viewKey(picture, view(8, 8));
    expect(JSON.parse(JSON.stringify(key))).toEqual(key);
  });
});
