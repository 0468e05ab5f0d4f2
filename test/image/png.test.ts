import { deflateSync } from 'node:zlib';
import sharp from 'sharp';
import { describe, expect, test } from 'vitest';
import { MmditxError } from '../../src/errors.ts';
import type { RgbImage } from '../../src/image/image.ts';
import { decodePng, encodePng, pngText } from '../../src/image/png.ts';
import { torchGenerator } from '../../src/sampling/noise.ts';

const random = torchGenerator(1);

function noisePicture(width: number, height: number): RgbImage {
  return { width, height, data: Uint8Array.from(random.integers(0, 256, 3 * width * height)) };
}

/** CRC-32 bit by bit, to check the one by table against (Node has its own only from 20.15 on). */
function crc32(bytes: Uint8Array): number {
  let crc = -1;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return ~crc >>> 0;
}

function chunk(type: string, data: Uint8Array): Buffer {
  const typed = Buffer.concat([Buffer.from(type, 'latin1'), data]);
  const sizes = Buffer.alloc(8);
  sizes.writeUInt32BE(data.length, 0);
  sizes.writeUInt32BE(crc32(typed), 4);
  return Buffer.concat([sizes.subarray(0, 4), typed, sizes.subarray(4)]);
}

const headerEnd = 8 + 25;

/** A PNG file with extra chunks after its header. */
function pngWith(...chunks: Uint8Array[]): Buffer {
  const png = encodePng(noisePicture(3, 2));
  return Buffer.concat([png.subarray(0, headerEnd), ...chunks, png.subarray(headerEnd)]);
}

const latin1 = (text: string) => Buffer.from(text, 'latin1');

describe('pixels', () => {
  test('a picture survives, and another decoder reads the same', async () => {
    const image = noisePicture(37, 21);
    const png = encodePng(image);
    expect(decodePng(png)).toEqual(image);
    const { data, info } = await sharp(png).raw().toBuffer({ resolveWithObject: true });
    expect(info).toMatchObject({ width: 37, height: 21, channels: 3 });
    expect(new Uint8Array(data)).toEqual(image.data);
  });

  test('the same picture gives the same bytes', () => {
    const image = noisePicture(16, 16);
    const text = new Map([['a', 'b']]);
    expect(encodePng(image, { text })).toEqual(encodePng(image, { text }));
  });

  const source = () => sharp(Buffer.from(noisePicture(19, 13).data), { raw: { width: 19, height: 13, channels: 3 } });
  test.each([
    ['grey', () => source().greyscale().png()],
    ['palette', () => source().png({ palette: true, colours: 200 })],
    ['4-bit palette', () => source().png({ palette: true, colours: 11 })],
    ['1-bit palette', () => source().png({ palette: true, colours: 2 })],
    ['interlaced', () => source().png({ progressive: true })],
    ['interlaced palette', () => source().png({ progressive: true, palette: true, colours: 200 })],
    ['filtered', () => source().png({ adaptiveFiltering: true })],
    ['with a colour profile', () => source().withIccProfile('srgb').png()],
  ])('reads %s files as sharp does', async (_, make) => {
    const png = await make().toBuffer();
    const expected = await sharp(png).toColourspace('srgb').removeAlpha().raw().toBuffer();
    expect(decodePng(png).data).toEqual(new Uint8Array(expected));
  });

  test('16-bit samples are scaled to 8 bits', async () => {
    const raw = Uint16Array.of(0, 65535, 32896, 257, 514, 128);
    const png = await sharp(raw, { raw: { width: 2, height: 1, channels: 3 } })
      .toColourspace('rgb16')
      .png()
      .toBuffer();
    expect(png[24]).toBe(16);
    expect([...decodePng(png).data]).toEqual([0, 255, 128, 1, 2, 0]);
  });

  test('interlaced 16-bit samples are read, packed ones refused in words', async () => {
    const raw = Uint16Array.from({ length: 9 * 9 * 3 }, (_, i) => i * 257);
    const deep = sharp(raw, { raw: { width: 9, height: 9, channels: 3 } }).toColourspace('rgb16');
    const png = await deep.png({ progressive: true }).toBuffer();
    expect(png[24]).toBe(16);
    expect([...decodePng(png).data]).toEqual(Array.from({ length: 243 }, (_, i) => i));
    const packed = await source().png({ progressive: true, palette: true, colours: 11 }).toBuffer();
    expect(() => decodePng(packed)).toThrow('save it without interlacing');
  });

  test('transparency shows the background and is returned', async () => {
    const rgba = Buffer.from([10, 20, 30, 255, 200, 100, 0, 0, 100, 100, 100, 128, 1, 2, 3, 255]);
    const png = await sharp(rgba, { raw: { width: 2, height: 2, channels: 4 } })
      .png()
      .toBuffer();
    const white = decodePng(png);
    expect([...white.alpha!]).toEqual([255, 0, 128, 255]);
    expect([...white.data]).toEqual([10, 20, 30, 255, 255, 255, 177, 177, 177, 1, 2, 3]);
    expect([...decodePng(png, { background: [0, 0, 255] }).data.subarray(3, 6)]).toEqual([0, 0, 255]);
  });

  test('a colour declared transparent is transparent', () => {
    const png = encodePng({ width: 3, height: 1, data: Uint8Array.of(1, 2, 3, 1, 2, 4, 3, 2, 1) });
    const key = chunk('tRNS', Buffer.from([0, 1, 0, 2, 0, 3]));
    const image = decodePng(Buffer.concat([png.subarray(0, headerEnd), key, png.subarray(headerEnd)]));
    expect([...image.alpha!]).toEqual([0, 255, 255]);
    expect([...image.data]).toEqual([255, 255, 255, 1, 2, 4, 3, 2, 1]);
  });

  test('refuses more pixels than allowed before decoding them', () => {
    expect(() => decodePng(encodePng(noisePicture(10, 10)), { maxPixels: 99 })).toThrow('10 x 10 pixels, more than 99');
    expect(decodePng(encodePng(noisePicture(10, 10)), { maxPixels: 100 }).width).toBe(10);
  });

  test('stops a file that inflates to more than its header announces', () => {
    const header = encodePng(noisePicture(2, 2)).subarray(0, headerEnd);
    const bomb = deflateSync(Buffer.alloc(2 ** 24));
    const file = Buffer.concat([header, chunk('IDAT', bomb), chunk('IEND', Buffer.alloc(0))]);
    expect(() => decodePng(file)).toThrow('holds more than the 14 bytes');
  });

  test('a file cut anywhere is an error', () => {
    const png = encodePng(noisePicture(20, 20));
    for (let length = 0; length < png.length; length += 7) {
      expect(() => decodePng(png.subarray(0, length))).toThrow(expect.objectContaining({ code: 'bad-file' }));
    }
  });
});

describe('texts', () => {
  const texts = new Map([
    ['parameters', 'a café\nSteps: 3'],
    ['Titel groß', ''],
    ['other', '猫 🐈 and\nlines'],
    ['windows', '\u0080\u009f'],
  ]);

  test('come back as they were', () => {
    expect(pngText(encodePng(noisePicture(2, 2), { text: texts }))).toEqual(texts);
  });

  test('are tEXt where Latin-1 suffices, else iTXt, and stand before the pixels', () => {
    const png = Buffer.from(encodePng(noisePicture(2, 2), { text: texts }));
    const kinds = [...png.toString('latin1').matchAll(/tEXt|iTXt|IDAT/g)].map(([kind]) => kind);
    expect(kinds).toEqual(['tEXt', 'tEXt', 'iTXt', 'tEXt', 'IDAT']);
  });

  test('are read by libpng', async () => {
    const { comments } = await sharp(encodePng(noisePicture(2, 2), { text: texts })).metadata();
    expect(comments).toContainEqual({ keyword: 'other', text: '猫 🐈 and\nlines' });
    expect(comments?.find(({ keyword }) => keyword === 'parameters')?.text).toContain('Steps: 3');
  });

  test('lose NUL, which would end them', () => {
    expect(pngText(encodePng(noisePicture(1, 1), { text: new Map([['k', 'a\0b']]) })).get('k')).toBe('ab');
  });

  test('need a keyword that PNG allows', () => {
    for (const keyword of ['', 'x'.repeat(80), 'ключ', 'a\0b']) {
      expect(() => encodePng(noisePicture(1, 1), { text: new Map([[keyword, '']]) })).toThrow(RangeError);
    }
  });

  test('of every kind are read; the last of one keyword counts', () => {
    const file = pngWith(
      chunk('tEXt', latin1('one\0first')),
      chunk('tEXt', latin1('one\0\xe9')),
      chunk('zTXt', Buffer.concat([latin1('two\0\0'), deflateSync(latin1('zipped \xe9'))])),
      chunk('iTXt', Buffer.concat([latin1('three\0\0\0de\0Wort\0'), Buffer.from('plain ✓')])),
      chunk('iTXt', Buffer.concat([latin1('four\0\x01\0\0\0'), deflateSync(Buffer.from('zipped ✓'))])),
    );
    expect(Object.fromEntries(pngText(file))).toEqual({
      one: 'é',
      two: 'zipped é',
      three: 'plain ✓',
      four: 'zipped ✓',
    });
  });

  test('of a file that is cut short are read as far as they go', () => {
    const whole = pngWith(chunk('tEXt', latin1('a\0b')), chunk('tEXt', latin1('c\0d')));
    expect([...pngText(whole.subarray(0, headerEnd + 20))]).toEqual([['a', 'b']]);
  });

  const faulty: [string, Uint8Array][] = [
    ['no PNG signature', latin1('GIF89a')],
    ['nothing', new Uint8Array(0)],
    ['a text without NUL', pngWith(chunk('tEXt', latin1('keyword')))],
    ['an iTXt that ends early', pngWith(chunk('iTXt', latin1('keyword\0')))],
    ['an unknown compression', pngWith(chunk('zTXt', latin1('keyword\0\x07abc')))],
    ['a broken zlib stream', pngWith(chunk('zTXt', latin1('keyword\0\0abcdefgh')))],
    [
      'a zlib stream cut short',
      pngWith(chunk('zTXt', Buffer.concat([latin1('k\0\0'), deflateSync(latin1('abcabc')).subarray(0, 7)]))),
    ],
    ['a wrong CRC', pngWith(chunk('tEXt', latin1('a\0b')).fill(0, 14))],
    [
      'a text of more than 1 MiB',
      pngWith(chunk('zTXt', Buffer.concat([latin1('k\0\0'), deflateSync(Buffer.alloc(2 ** 20 + 1, 'a'))]))),
    ],
    [
      'many texts of more than 1 MiB together',
      pngWith(
        ...[0, 1, 2].map((i) =>
          chunk('zTXt', Buffer.concat([latin1(`k${i}\0\0`), deflateSync(Buffer.alloc(400_000, 'a'))])),
        ),
      ),
    ],
  ];
  test.each(faulty)('%s is a bad file', (_, file) => {
    expect(() => pngText(file)).toThrow(expect.objectContaining({ code: 'bad-file' }));
  });

  test('1 MiB of compressed text is still read', () => {
    const file = pngWith(chunk('zTXt', Buffer.concat([latin1('k\0\0'), deflateSync(Buffer.alloc(2 ** 20, 'a'))])));
    expect(pngText(file).get('k')).toHaveLength(2 ** 20);
  });
});

test('600 mutated files are read or refused as bad, quickly', () => {
  const original = pngWith(
    chunk('tEXt', latin1('parameters\0a cat')),
    chunk('zTXt', Buffer.concat([latin1('two\0\0'), deflateSync(latin1('zipped'.repeat(9)))])),
    chunk('iTXt', Buffer.concat([latin1('three\0\x01\0\0\0'), deflateSync(Buffer.from('zipped ✓'))])),
  );
  let refused = 0;
  const started = performance.now();
  for (let round = 0; round < 600; round++) {
    let file = Buffer.from(original);
    const [kind, at, byte, count] = [
      ...random.integers(0, 3, 1),
      ...random.integers(0, file.length, 1),
      ...random.integers(0, 256, 1),
      ...random.integers(1, 5, 1),
    ] as [number, number, number, number];
    if (kind === 0) file.fill(byte, at, Math.min(at + count, file.length));
    if (kind === 1) file = Buffer.concat([file.subarray(0, at), file.subarray(at + count)]);
    if (kind === 2) file = Buffer.concat([file.subarray(0, at), file.subarray(at >> 1)]);
    for (const read of [pngText, decodePng]) {
      try {
        read(file);
      } catch (error) {
        expect(error).toBeInstanceOf(MmditxError);
        expect(error).toMatchObject({ code: 'bad-file' });
        refused++;
      }
    }
  }
  expect(refused).toBeGreaterThan(300);
  expect(performance.now() - started).toBeLessThan(10_000);
});
