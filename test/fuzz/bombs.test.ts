/**
 * Small files that were made to take much: each was found to, or is of a kind that has brought readers down. They are
 * refused, or read in time and with memory in proportion to their size.
 */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { deflateSync } from 'node:zlib';
import { afterAll, describe, expect, test } from 'vitest';
import { decodePng, encodePng, pngText } from '../../src/image/png.ts';
import { parseParameters, parseSettings } from '../../src/image/settings.ts';
import { clipTokenizerJson } from '../../src/text/clip-vocabulary.ts';
import { clipTokenizer, t5Tokenizer } from '../../src/text/tokenizer.ts';
import { trainClipTokenizer } from '../../src/training/tokenizer-training.ts';
import { openCheckpoint } from '../../src/weights/checkpoint.ts';
import { modelFiles } from '../../src/weights/folder.node.ts';
import { inspectCheckpoint } from '../../src/weights/inspect.ts';
import { openLora } from '../../src/weights/lora.ts';
import { openSafetensors } from '../../src/weights/safetensors.ts';
import { countedSource, type FuzzCase, isRefused } from '../support/fuzz.ts';
import { safetensorsFile, type TensorList } from '../support/mutations.ts';
import { type Chunk, chunksOf, pngOf } from '../support/png.ts';
import { rawSafetensors } from '../weights/sources.ts';

const repeated = (count: number, item: (i: number) => string, between = ',') =>
  Array.from({ length: count }, (_, i) => item(i)).join(between);

const empty = new Uint8Array(0);
const tensor = (name: string, shape: readonly number[] = [0], dtype = 'F32', data = empty) => ({
  name,
  shape,
  dtype,
  data,
});
const file = (tensors: TensorList['tensors'], metadata: Record<string, string> = {}) =>
  safetensorsFile({ metadata, tensors });

function weights(bytes: Uint8Array, read: (source: ReturnType<typeof countedSource>) => unknown): FuzzCase {
  return { size: bytes.length, read: () => read(countedSource(bytes)) };
}

describe('weights', () => {
  const headers: [string, string][] = [
    ['1,000,000 objects', `{"a":[${repeated(1_000_000, () => '{}')}]}`],
    ['1,000,000 lists', `{"a":[${repeated(1_000_000, () => '[]')}]}`],
    ['1,000,000 members', `{${repeated(1_000_000, (i) => `"${i}":0`)}}`],
    ['500,000 wrong sizes', `{"a":{"dtype":"F32","shape":[${repeated(500_000, () => '""')}],"data_offsets":[0,0]}}`],
    ['500,000 wrong texts', `{"__metadata__":{${repeated(500_000, (i) => `"${i}":0`)}}}`],
    ['a text that does not end', `{"${'a'.repeat(1_000_000)}`],
    ['lists in lists', '['.repeat(1_000_000)],
  ];
  test.each(headers)('a header of %s', async (_, header) => {
    expect(await isRefused(weights(rawSafetensors(header), openSafetensors))).toBe(true);
  });

  test('integers in 2^31 empty parts', async () => {
    const bytes = file([tensor('a.weight', [2 ** 31, 4, 0], 'I8'), tensor('a.weight.int8_scale')]);
    expect(await isRefused(weights(bytes, (source) => openCheckpoint([source])))).toBe(true);
  });

  test('a VAE of 256 levels of 256 blocks', async () => {
    const wide = (name: string) => tensor(name, [32, 1, 1, 1], 'U8', new Uint8Array(32));
    const bytes = file([
      ...Array.from({ length: 256 }, (_, level) => wide(`encoder.down.${level}.block.0.conv1.weight`)),
      wide('encoder.down.0.block.255.conv1.weight'),
      wide('encoder.conv_in.weight'),
      wide('decoder.conv_in.weight'),
    ]);
    expect(await isRefused(weights(bytes, (source) => inspectCheckpoint([source])))).toBe(false);
  });

  test('as many networks as tensors', async () => {
    const bytes = file(Array.from({ length: 20_000 }, (_, i) => tensor(`${i}.text_model.encoder.a`)));
    expect(await isRefused(weights(bytes, (source) => openCheckpoint([source])))).toBe(true);
  });

  test('networks inside each other', async () => {
    const bytes = file(Array.from({ length: 600 }, (_, i) => tensor(`${'a.'.repeat(i)}text_model.encoder.a`)));
    expect(await isRefused(weights(bytes, (source) => openCheckpoint([source])))).toBe(true);
  });

  test('names of a megabyte', async () => {
    const parts = [
      'enc.blk.1.',
      'lora_up.',
      '.lora_A',
      'lora_',
      'a.',
      'encoder.block.0.layer.',
      'quant_state.',
      '_layers_1',
    ];
    const bytes = file(parts.map((part) => tensor(part.repeat(2 ** 20 / part.length))));
    for (const read of [openLora, (source: ReturnType<typeof countedSource>) => openCheckpoint([source])]) {
      expect(await isRefused(weights(bytes, read))).toBe(true);
    }
  });

  test('scales of layers that a LoRA does not have', async () => {
    const layers = Array.from({ length: 600 }, (_, i) => `transformer_blocks.${i}.attn.to_q`);
    const byte = new Uint8Array(4);
    const tensors = layers.flatMap((name) => [
      tensor(`${name}.lora_A.weight`, [1, 1], 'F32', byte),
      tensor(`${name}.lora_B.weight`, [1, 1], 'F32', byte),
    ]);
    const pattern = `{${repeated(100_000, (i) => `"x${i}":1`)}}`;
    const bytes = file(tensors, {
      lora_adapter_metadata: `{"transformer.lora_alpha":1,"transformer.alpha_pattern":${pattern}}`,
    });
    expect(await isRefused(weights(bytes, openLora))).toBe(false);
  });

  test('a name from metadata that would command a terminal', async () => {
    const bytes = file(
      [tensor('a.attn.to_q.lora_A.weight', [1, 1], 'F32', new Uint8Array(4))].map((a) => ({
        ...a,
        name: `transformer_blocks.0.${a.name.slice(2)}`,
      })),
      {
        lora_adapter_metadata: JSON.stringify({
          'transformer.lora_alpha': 1,
          'transformer.alpha_pattern': { '\n\u001b[2J': {} },
        }),
      },
    );
    expect(await isRefused(weights(bytes, openLora))).toBe(true);
  });
});

const folder = mkdtempSync(join(tmpdir(), 'mmditx-bombs-'));
afterAll(() => rmSync(folder, { recursive: true }));

test('an index of 500,000 wrong names', async () => {
  const text = `{"weight_map":{${repeated(500_000, (i) => `"${i}":0`)}}}`;
  writeFileSync(join(folder, 'model.safetensors.index.json'), text);
  expect(await isRefused({ size: text.length, read: () => modelFiles(folder) })).toBe(true);
});

describe('pictures', () => {
  const [header, pixels, end] = chunksOf(encodePng({ width: 8, height: 8, data: new Uint8Array(192) })) as [
    Chunk,
    Chunk,
    Chunk,
  ];
  const sized = (width: number, height: number, depth = 8, colour = 2): Chunk => {
    const data = Buffer.from(header.data);
    data.writeUInt32BE(width, 0);
    data.writeUInt32BE(height, 4);
    data[8] = depth;
    data[9] = colour;
    return { type: 'IHDR', data };
  };
  const zipped = (data: Uint8Array, keyword = 'k') => ({
    type: 'zTXt',
    data: Buffer.concat([Buffer.from(`${keyword}\0\0`), deflateSync(data, { level: 9 })]),
  });
  const decode = (...lists: readonly Chunk[][]): FuzzCase => {
    const png = pngOf(lists.flat());
    return { size: png.length, read: () => decodePng(png) };
  };
  const texts = (chunks: readonly Chunk[]): FuzzCase => {
    const png = pngOf([header, ...chunks, pixels, end]);
    return { size: png.length, read: () => pngText(png) };
  };

  const idat = (plain: Uint8Array): Chunk => ({ type: 'IDAT', data: deflateSync(plain, { level: 9 }) });
  const copies = (count: number, chunk: Chunk): Chunk[] => Array.from({ length: count }, () => chunk);

  test.each<[string, () => FuzzCase]>([
    ['of 2^31 pixels a side', () => decode([sized(2 ** 31 - 1, 2 ** 31 - 1), pixels, end])],
    ['of 2^26 pixels in few bytes', () => decode([sized(2 ** 13, 2 ** 13), pixels, end])],
    ['of 2^22 rows', () => decode([sized(1, 2 ** 22, 8, 0), idat(Buffer.alloc(2 ** 23)), end])],
    ['whose pixels unpack to 64 MiB', () => decode([header, idat(Buffer.alloc(2 ** 26)), end])],
    [
      'of a million colours',
      () => decode([sized(8, 8, 8, 3), { type: 'PLTE', data: Buffer.alloc(3_000_000) }, pixels, end]),
    ],
    ['of 300,000 empty chunks', () => decode([header], copies(300_000, { type: 'abcd', data: empty }), [pixels, end])],
  ])('a picture %s', async (_, picture) => {
    expect(await isRefused(picture())).toBe(true);
  });

  test('a picture whose pixels come in 100,000 pieces', async () => {
    const packed = deflateSync(Buffer.alloc(200 * (1 + 3 * 200)), { level: 0 });
    const pieces = Array.from({ length: 100_000 }, (_, i) => ({ type: 'IDAT', data: packed.subarray(i, i + 1) }));
    const rest = { type: 'IDAT', data: packed.subarray(pieces.length) };
    expect(await isRefused(decode([sized(200, 200)], pieces, [rest, end]))).toBe(false);
  });

  test('a colour profile of 64 MiB is left alone', async () => {
    const profile = { type: 'iCCP', data: zipped(Buffer.alloc(2 ** 26)).data };
    expect(await isRefused(decode([header, profile, pixels, end]))).toBe(false);
  });

  test.each<[string, () => FuzzCase]>([
    ['a text that unpacks to 64 MiB', () => texts([zipped(Buffer.alloc(2 ** 26))])],
    ['100 texts that unpack to 1 MB', () => texts(copies(100, zipped(Buffer.alloc(1_000_000))))],
    ['100,000 small packed texts', () => texts(copies(100_000, zipped(Buffer.from('a'))))],
  ])('%s', async (_, picture) => {
    expect(await isRefused(picture())).toBe(true);
  });

  test.each([
    ['layers', repeated(500_000, () => '{}')],
    ['numbers', repeated(500_000, () => '1e999')],
  ])('settings of 500,000 wrong %s', async (_, list) => {
    const text = `{"version":1,"skipLayerGuidance":{"layers":[${list}]},"loras":[${list}]}`;
    expect(await isRefused({ size: text.length, read: () => parseSettings(text) })).toBe(true);
  });

  test.each([
    ['commas', `Steps: 1, Skip layers: "${','.repeat(2_000_000)}"`],
    ['fields', `Steps: 1, ${repeated(200_000, (i) => `${i}: 1`)}`],
    ['quotes', `Steps: 1, a: ${'"'.repeat(1_000_000)}`],
    ['lines', 'Steps: 1\n'.repeat(200_000)],
  ])('a parameters text of many %s', async (_, text) => {
    expect(await isRefused({ size: text.length, read: () => parseParameters(text) })).toBe(false);
  });
});

describe('a tokenizer.json', () => {
  const clip = JSON.parse(trainClipTokenizer(['a red apple'], { vocabularySize: 514 }));
  const prompt = `${'a'.repeat(40)} b`;
  const encoded = (json: object): FuzzCase => {
    const text = JSON.stringify(json);
    return { size: text.length, read: () => clipTokenizer(text).encode(prompt) };
  };
  const model = (changed: object) => encoded({ ...clip, model: { ...clip.model, ...changed } });
  const steps = (normalizers: object[]) => encoded({ ...clip, normalizer: { type: 'Sequence', normalizers } });
  const replace = (pattern: object, content: string) => ({ type: 'Replace', pattern, content });
  const ids = (count: number, id: unknown) => Object.fromEntries(Array.from({ length: count }, (_, i) => [i, id]));

  test.each<[string, () => FuzzCase]>([
    ['with an expression that takes for ever', () => steps([replace({ Regex: '(a+)+$' }, '')])],
    ['that makes a text longer at each step', () => steps(Array(16).fill(replace({ String: 'a' }, 'a'.repeat(30))))],
    ['that replaces nothing', () => steps([replace({ String: '' }, 'a')])],
    ['of 300,000 steps', () => steps(Array(300_000).fill({ type: 'NFC' }))],
    ['with pieces of no length', () => encoded({ ...clip, pre_tokenizer: { type: 'FixedLength', length: 0 } })],
    ['with a token like a list', () => encoded({ ...clip, added_tokens: [{ id: 1, content: { length: 2 ** 32 } }] })],
    ['with a vocabulary like a list', () => model({ type: 'Unigram', unk_id: 0, vocab: { length: 2 ** 32 - 1 } })],
    ['with 500,000 wrong ids', () => model({ vocab: ids(500_000, '') })],
    ['with ids beyond integers', () => model({ vocab: ids(600, 2 ** 40) })],
    ['with an unknown token that is unknown', () => model({ unk_token: 'nonsense' })],
  ])('%s', async (_, tokenizer) => {
    expect(await isRefused(tokenizer())).toBe(true);
  });

  test('deep in itself', async () => {
    const text = `${'{"model":'.repeat(200_000)}0${'}'.repeat(200_000)}`;
    for (const read of [clipTokenizer, t5Tokenizer]) {
      expect(await isRefused({ size: text.length, read: () => read(text) })).toBe(true);
    }
  });

  test('from a vocabulary of 500,000 wrong ids', async () => {
    const vocabulary = `{${repeated(500_000, (i) => `"${i}":""`)}}`;
    expect(await isRefused({ size: vocabulary.length, read: () => clipTokenizerJson(vocabulary, '') })).toBe(true);
  });
});
