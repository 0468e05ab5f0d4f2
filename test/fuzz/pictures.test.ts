/** Pictures from outside: PNG pixels and texts, the settings in them, and files of other formats. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { deflateSync, inflateSync } from 'node:zlib';
import fc from 'fast-check';
import sharp from 'sharp';
import { afterAll, expect, test } from 'vitest';
import { readImageFile } from '../../src/image/files.node.ts';
import { decodePng, encodePng, pngText } from '../../src/image/png.ts';
import {
  formatParameters,
  formatSettings,
  type GenerationSettings,
  parseParameters,
  parseSettings,
  settingsFromPng,
  settingsText,
} from '../../src/image/settings.ts';
import { MAX_STEPS } from '../../src/sampling/schedules.ts';
import { fuzz } from '../support/fuzz.ts';
import { byteChanges, changedBytes, changedJson, few, jsonChanges } from '../support/mutations.ts';
import { type Chunk, chunksOf, PNG_SIGNATURE, pngOf } from '../support/png.ts';

const settings: GenerationSettings = {
  version: 1,
  software: 'mmditx 0.1.0',
  model: { name: 'sd3.5_medium.safetensors', hash: null },
  device: 'cpu',
  precision: 'float32',
  prompt: 'a café, "quoted": 猫\nsecond line',
  negativePrompt: 'blurry, bad: worse',
  promptSyntax: 'comfy',
  longPrompt: 'chunk',
  t5Tokens: { minimum: 77 },
  width: 512,
  height: 768,
  steps: 28,
  cfg: 4.5,
  sampler: 'dpmpp_2m',
  scheduler: 'sgm_uniform',
  shift: 3,
  seed: 2n ** 63n,
  batch: { index: 1, size: 4 },
  skipLayerGuidance: { layers: [7, 8, 9], scale: 2.5, start: 0.01, end: 0.2, rule: 'steps' },
  stepCache: 0.1,
  loras: [{ name: 'ink', strength: 0.5, clipStrength: 1 }],
  initImage: { sha256: 'ab'.repeat(32), strength: 0.6, denoiseRule: 'stability' },
  mask: { sha256: 'cd'.repeat(32), channel: 'luminance' },
};

fuzz('the settings of a picture', jsonChanges, (changes) => {
  const text = changedJson(formatSettings(settings), changes);
  return {
    size: text.length,
    read() {
      const { steps, seed, width } = parseSettings(text);
      expect([steps <= MAX_STEPS, Number.isSafeInteger(width)]).toEqual([true, true]);
      expect(BigInt(seed)).toBeLessThan(2n ** 64n);
    },
  };
});

const parameters = [
  formatParameters(settings),
  'a cat\nNegative prompt: dog\nSteps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 1, Size: 512x512, Model: "a, b"',
];

fuzz(
  "another program's parameters",
  fc.record({ text: fc.nat({ max: 1 }), changes: byteChanges }),
  ({ text: which, changes }) => {
    const bytes = changedBytes(Buffer.from(parameters[which]!), changes, { others: parameters.map(Buffer.from) });
    const text = new TextDecoder().decode(bytes);
    return {
      size: text.length,
      read() {
        const read = parseParameters(text);
        const numbers = [read.width, read.height, read.steps, read.cfg, read.shift, read.strength, read.seed];
        for (const number of numbers) expect(number === undefined || Number.isFinite(Number(number))).toBe(true);
        expect(read.prompt.length + read.negativePrompt.length).toBeLessThanOrEqual(text.length);
      },
    };
  },
  { refuses: false },
);

const [WIDTH, HEIGHT] = [19, 13];
const noise = Buffer.from(Array.from({ length: 3 * WIDTH * HEIGHT }, (_, i) => (i * 7919) % 251));
const raw = () => sharp(noise, { raw: { width: WIDTH, height: HEIGHT, channels: 3 } });
const deep = sharp(
  Uint16Array.from(noise, (value) => value * 257),
  { raw: { width: WIDTH, height: HEIGHT, channels: 3 } },
);
const latin1 = (text: string) => Buffer.from(text, 'latin1');
const texts: Chunk[] = [
  { type: 'tEXt', data: latin1('one\0\xe9') },
  { type: 'zTXt', data: Buffer.concat([latin1('two\0\0'), deflateSync(latin1('zipped'.repeat(9)))]) },
  { type: 'iTXt', data: Buffer.concat([latin1('three\0\0\0de\0Wort\0'), Buffer.from('plain ✓')]) },
  { type: 'iTXt', data: Buffer.concat([latin1('parameters\0\x01\0\0\0'), deflateSync(Buffer.from(parameters[1]!))]) },
];
const plain = (
  await Promise.all([
    raw().greyscale().png().toBuffer(),
    raw().png({ palette: true, colours: 200 }).toBuffer(),
    raw().png({ palette: true, colours: 2 }).toBuffer(),
    raw().ensureAlpha(0.5).png({ adaptiveFiltering: true }).toBuffer(),
    raw().png({ progressive: true }).toBuffer(),
    deep.toColourspace('rgb16').png().toBuffer(),
    raw().withIccProfile('srgb').png().toBuffer(),
  ])
).map(chunksOf);
const pngs: readonly (readonly Chunk[])[] = [
  ...plain,
  chunksOf(encodePng({ width: WIDTH, height: HEIGHT, data: noise }, { text: settingsText(settings) })),
  plain[0]!.toSpliced(1, 0, ...texts, { type: 'tRNS', data: Buffer.of(0, 7) }),
];

test('the files are sound before they are changed', () => {
  for (const chunks of pngs) expect(decodePng(pngOf(chunks))).toMatchObject({ width: WIDTH, height: HEIGHT });
  expect(pngs.map((chunks) => settingsFromPng(pngOf(chunks))?.source).filter(Boolean)).toEqual([
    'mmditx',
    'parameters',
  ]);
});

const bomb = deflateSync(Buffer.alloc(2 ** 21), { level: 9 });

const chunkChange = fc.record({
  kind: fc.constantFrom('data', 'unpacked', 'header', 'drop', 'repeat', 'swap', 'type', 'bomb', 'foreign'),
  at: fc.nat({ max: 30 }),
  other: fc.nat({ max: 30 }),
  bytes: byteChanges,
  type: fc.constantFrom('IHDR', 'PLTE', 'tRNS', 'IDAT', 'IEND', 'tEXt', 'zTXt', 'iTXt', 'iCCP', 'fdAT', 'acTL', 'abcd'),
  count: fc.oneof(fc.nat({ max: 3 }), fc.nat({ max: 40 })),
  value: fc.nat({ max: 255 }),
});
type ChunkChange = typeof chunkChange extends fc.Arbitrary<infer Change> ? Change : never;

function changedChunks(chunks: readonly Chunk[], change: ChunkChange): readonly Chunk[] {
  const at = change.at % chunks.length;
  const chunk = chunks[at];
  if (!chunk) return chunks;
  const other = change.other % chunks.length;
  const withData = (data: Uint8Array) => chunks.with(at, { ...chunk, data });
  switch (change.kind) {
    case 'data':
      return withData(changedBytes(chunk.data, change.bytes));
    case 'unpacked': {
      // Of a text, what stands before the packed bytes stays.
      const start = chunk.type === 'IDAT' ? 0 : chunk.data.lastIndexOf(0, 20) + 1;
      try {
        const plain = inflateSync(chunk.data.subarray(start));
        return withData(Buffer.concat([chunk.data.subarray(0, start), deflateSync(changedBytes(plain, change.bytes))]));
      } catch {
        return chunks;
      }
    }
    case 'header': {
      const [header, ...rest] = chunks as [Chunk, ...Chunk[]];
      // Width and height, or one of the bytes behind them.
      const data = Uint8Array.from(header.data);
      const place = change.count % 7;
      if (place < 5) data[8 + place] = change.value % 17;
      else data[place === 5 ? 3 : 7] = change.value;
      return [{ ...header, data }, ...rest];
    }
    case 'drop':
      return chunks.toSpliced(at, 1);
    case 'repeat':
      return chunks.toSpliced(at, 0, ...Array.from({ length: change.count }, () => chunk));
    case 'swap':
      return chunks.with(at, chunks[other]!).with(other, chunk);
    case 'type':
      return chunks.with(at, { ...chunk, type: change.type });
    case 'bomb':
      return chunk.type === 'IDAT' ? withData(bomb) : chunks.toSpliced(at, 0, textBomb);
    case 'foreign':
      return chunks.toSpliced(at, 0, pngs[change.other % pngs.length]![change.count % 3]!);
  }
}

const textBomb: Chunk = { type: 'zTXt', data: Buffer.concat([latin1('k\0\0'), bomb]) };

const changedPng = fc.record({
  file: fc.nat({ max: pngs.length - 1 }),
  chunks: few(chunkChange),
  bytes: fc.oneof({ weight: 3, arbitrary: fc.constant([]) }, byteChanges),
});

function pngFile({ file, chunks, bytes }: typeof changedPng extends fc.Arbitrary<infer Input> ? Input : never) {
  return changedBytes(pngOf(chunks.reduce(changedChunks, pngs[file]!)), bytes);
}

/** Bytes that the pixel data of a file unpack to, whole or not; of more than a few MB, those. */
function unpackedBytes(png: Uint8Array): number {
  const end = png.length - 12;
  const view = new DataView(png.buffer);
  const parts: Uint8Array[] = [];
  for (let at = PNG_SIGNATURE.length; at <= end; at += 12 + view.getUint32(at)) {
    if (view.getUint32(at + 4) === 0x49444154) parts.push(png.subarray(at + 8, at + 8 + view.getUint32(at)));
  }
  try {
    return inflateSync(Buffer.concat(parts), { maxOutputLength: 2 ** 22 }).length;
  } catch {
    return 0;
  }
}

fuzz('PNG pixels', changedPng, (input) => {
  const png = pngFile(input);
  return {
    // A pixel of one bit becomes three bytes of colour and one of opacity.
    size: png.length + 4 * unpackedBytes(png),
    read() {
      const { width, height, data, alpha } = decodePng(png, { maxPixels: 2 ** 20 });
      expect([data.length, alpha?.length ?? width * height]).toEqual([3 * width * height, width * height]);
    },
  };
});

fuzz('PNG texts', changedPng, (input) => {
  const png = pngFile(input);
  return {
    size: png.length + 2 ** 20,
    read() {
      for (const text of pngText(png).values()) expect(text.length).toBeLessThanOrEqual(png.length + 2 ** 20);
      settingsFromPng(png);
    },
  };
});

const folder = mkdtempSync(join(tmpdir(), 'mmditx-fuzz-'));
afterAll(() => rmSync(folder, { recursive: true }));
const pictures = await Promise.all([
  raw().jpeg().withMetadata({ orientation: 6 }).toBuffer(),
  raw().webp({ lossless: true }).toBuffer(),
  raw().avif({ effort: 0 }).toBuffer(),
  raw().png().toBuffer(),
]);

test('a file that has changed is read anew', async () => {
  for (const format of ['png', 'jpeg', 'webp', 'avif'] as const) {
    const path = join(folder, `changed.${format}`);
    for (const width of [8, 16]) {
      writeFileSync(path, await raw().resize(width, 8, { fit: 'fill' }).toFormat(format).toBuffer());
      expect((await readImageFile(path)).width, format).toBe(width);
    }
  }
});

fuzz(
  'a picture file',
  fc.record({ file: fc.nat({ max: pictures.length - 1 }), changes: byteChanges }),
  ({ file, changes }) => {
    const bytes = changedBytes(pictures[file]!, changes, { others: pictures });
    const path = join(folder, 'picture');
    writeFileSync(path, bytes);
    return {
      size: bytes.length + 2 ** 22,
      async read() {
        const { width, height, data } = await readImageFile(path, { maxPixels: 2 ** 20 });
        expect(data.length).toBe(3 * width * height);
      },
    };
  },
  { cases: 150 },
);
