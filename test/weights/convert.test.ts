import { resolve } from 'node:path';
import { afterAll, describe, expect, it, test } from 'vitest';
import { T5_XXL } from '../../src/models/config.ts';
import { elementCount, type FloatTensor, floats, toFloat16, toFloat32 } from '../../src/tensor/data.ts';
import { type Checkpoint, openCheckpoint, type PartName, partNames } from '../../src/weights/checkpoint.ts';
import {
  convertedMetadata,
  needsConversion,
  type Precision,
  partPrefixes,
  plannedTensors,
} from '../../src/weights/convert.ts';
import { t5Tensors } from '../../src/weights/expected.ts';
import { type FileSource, fileSource } from '../../src/weights/files.node.ts';
import { modelFiles } from '../../src/weights/folder.node.ts';
import { fileWeights } from '../../src/weights/layouts.ts';
import { openWeightsFile } from '../../src/weights/open.ts';
import { openSafetensors, plannedSafetensorsBytes, plannedSafetensorsChunks } from '../../src/weights/safetensors.ts';
import { readFloats, type WeightTensor, wholeTensor } from '../../src/weights/stored.ts';
import { goldenCheckpoint } from '../support/models.ts';
import { maxDifference, randomFloats } from '../support/run.ts';
import { bytesSource, tensorsSource } from './sources.ts';

const sources: FileSource[] = [];
afterAll(() => Promise.all(sources.map((source) => source.close())));

async function open(...paths: string[]): Promise<Checkpoint> {
  const opened = await Promise.all(paths.map((path) => fileSource(resolve(path))));
  sources.push(...opened);
  return openCheckpoint(opened);
}

/** All networks of a checkpoint in a precision, as the bytes of one file. */
async function convertedBytes({ parts }: Checkpoint, precision: Precision): Promise<Uint8Array> {
  const plans = partNames.flatMap((part) =>
    parts[part] ? plannedTensors(part, parts[part], precision, partPrefixes[part]) : [],
  );
  const metadata = convertedMetadata(parts);
  const chunks: Uint8Array[] = [];
  for await (const chunk of plannedSafetensorsChunks(plans, metadata)) chunks.push(chunk);
  const bytes = new Uint8Array(await new Blob(chunks as BlobPart[]).arrayBuffer());
  expect(bytes.length).toBe(plannedSafetensorsBytes(plans, metadata));
  return bytes;
}

async function converted(checkpoint: Checkpoint, precision: Precision): Promise<Checkpoint> {
  return openCheckpoint([bytesSource(await convertedBytes(checkpoint, precision), 'converted.safetensors')]);
}

function* weightsOf({ parts }: Checkpoint): Generator<[PartName, string, WeightTensor]> {
  for (const part of partNames) for (const [name, weight] of parts[part]?.tensors ?? []) yield [part, name, weight];
}

/** Linear layers of the blocks, told by what stands in the released files. */
const LINEAR = [
  /^joint_blocks\.\d+\.(x|context)_block\.(attn2?\.(qkv|proj)|mlp\.fc[12]|adaLN_modulation\.1)\.weight$/,
  /^text_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])\.weight$/,
  /^encoder\.block\.\d+\.layer\.(0\.SelfAttention\.[qkvo]|1\.DenseReluDense\.w[io](_[01])?)\.weight$/,
];

/** The most that a value may differ: half of a 127th of its output's largest, or an eighth of its block's. */
function allowedError(values: Float32Array, start: number, length: number, steps: number): number {
  return values.subarray(start, start + length).reduce((peak, value) => Math.max(peak, Math.abs(value)), 0) / steps;
}

async function expectConverted(actual: Checkpoint, expected: Checkpoint, precision: 'int8' | 'int4'): Promise<void> {
  expect(Object.keys(actual.parts)).toEqual(Object.keys(expected.parts));
  for (const [part, name, weight] of weightsOf(expected)) {
    const stored = actual.parts[part]!.tensors.get(name)!;
    expect(stored.shape, name).toEqual(weight.shape);
    const [values, wanted] = [(await readFloats(stored)).data, (await readFloats(weight)).data];
    if (part === 'vae' || !LINEAR.some((pattern) => pattern.test(name))) {
      expect(stored.quantized, name).toBeUndefined();
      expect(maxDifference({ data: values }, { data: wanted }), name).toBe(0);
      continue;
    }
    const width = weight.shape[1]!;
    const is4 = precision === 'int4' && width % 32 === 0 && !name.includes('adaLN_modulation');
    expect(stored.quantized?.precision, name).toBe(is4 ? 'int4' : 'int8');
    const [length, steps] = is4 ? [32, 8] : [width, 254];
    for (let start = 0; start < wanted.length; start += length) {
      const allowed = allowedError(wanted, start, length, steps) * 1.0001;
      const error = maxDifference(
        { data: values.subarray(start, start + length) },
        { data: wanted.subarray(start, start + length) },
      );
      expect(error, name).toBeLessThanOrEqual(allowed);
    }
  }
}

describe.each(['int8', 'int4'] as const)('the golden model in %s', async (precision) => {
  const original = await goldenCheckpoint();
  const checkpoint = await converted(original, precision);

  it('has integers in the linear layers of its blocks and all other values as they were', async () => {
    await expectConverted(checkpoint, original, precision);
  });

  it('has the same configurations, those that no shape tells, too', () => {
    for (const part of partNames) expect(checkpoint.parts[part]!.config).toEqual(original.parts[part]!.config);
  });

  it('has queries, keys and values apart', () => {
    for (const [, name, { spans }] of weightsOf(checkpoint)) {
      expect(spans.length, name).toBe(name.endsWith('qkv.weight') ? 3 : 1);
    }
  });

  it.each(['int8', 'int4', 'fp16'] as const)('stays as it is when it is converted to %s', async (other) => {
    const again = await convertedBytes(checkpoint, other);
    expect(Buffer.compare(again, await convertedBytes(original, precision))).toBe(0);
    for (const part of partNames) expect(needsConversion(part, checkpoint.parts[part]!, other)).toBe(false);
  });
});

test('integers in other parts than this version writes keep their values', async () => {
  // Queries, keys and values in one piece.
  const data = Int8Array.from({ length: 6 * 32 }, (_, i) => (i % 255) - 127);
  const name = 'joint_blocks.0.x_block.attn.qkv.weight';
  const file = tensorsSource({
    [name]: { dtype: 'int8', shape: [32, 6], data },
    [`${name}.int8_scale`]: randomFloats([6]),
  });
  const tensors = await fileWeights(await openWeightsFile(file));
  const part = { config: {}, file: '', prefix: '', metadata: {}, tensors };
  const chunks: Uint8Array[] = [];
  for await (const chunk of plannedSafetensorsChunks(plannedTensors('transformer', part, 'int8'))) chunks.push(chunk);
  const again = new Uint8Array(await new Blob(chunks as BlobPart[]).arrayBuffer());
  const reread = await fileWeights(await openWeightsFile(bytesSource(again)));
  expect(await readFloats(reread.get(name)!)).toEqual(await readFloats(tensors.get(name)!));
});

test('fp16 leaves a file in half precision as it is, and puts vectors into float32', async () => {
  const original = await goldenCheckpoint();
  const checkpoint = await converted(original, 'fp16');
  for (const [part, name, weight] of weightsOf(original)) {
    const stored = checkpoint.parts[part]!.tensors.get(name)!;
    expect(stored.spans[0]!.encoding, name).toBe(weight.shape.length < 2 ? 'float32' : 'float16');
    expect(maxDifference(await readFloats(stored), await readFloats(weight)), name).toBe(0);
  }
});

/** A T5 as a GGUF file with Q8_0 blocks, put together by hand, and its values. */
function ggufT5(): { file: Uint8Array; values: Record<string, FloatTensor> } {
  const config = { ...T5_XXL, width: 64, layers: 1, heads: 2, headDim: 32, mlpWidth: 96, vocabSize: 8 };
  const values: Record<string, FloatTensor> = {};
  const infos: number[] = [];
  const data: number[] = [];
  const uint32 = (value: number) => [...new Uint8Array(Uint32Array.of(value).buffer)];
  const uint64 = (value: number) => [...uint32(value), ...uint32(0)];
  const shapes = t5Tensors(config);
  for (const [name, shape] of shapes) {
    const count = elementCount(shape);
    const [F32, Q8_0] = [0, 8];
    const blocks = LINEAR.some((pattern) => pattern.test(name));
    infos.push(...uint64(name.length), ...new TextEncoder().encode(name), ...uint32(shape.length));
    for (const size of shape.toReversed()) infos.push(...uint64(size));
    infos.push(...uint32(blocks ? Q8_0 : F32), ...uint64(data.length));
    if (!blocks) {
      values[name] = randomFloats(shape, name.length);
      data.push(...new Uint8Array(values[name].data.buffer));
    } else {
      const integers = Int8Array.from({ length: count }, (_, i) => ((i * 31 + name.length) % 255) - 127);
      // 2^-7 and 2^-6 in half precision.
      const scales = Array.from({ length: count / 32 }, (_, block) => (block % 2 === 0 ? 0x2000 : 0x2400));
      for (const [block, scale] of scales.entries()) {
        data.push(scale % 256, Math.floor(scale / 256));
        data.push(...new Uint8Array(integers.buffer, 32 * block, 32));
      }

      values[name] = floats(
        shape,
        Array.from(integers, (value, i) => value * (Math.floor(i / 32) % 2 === 0 ? 2 ** -7 : 2 ** -6)),
      );
    }
    while (data.length % 32 !== 0) data.push(0);
  }
  const start = [...new TextEncoder().encode('GGUF'), ...uint32(3), ...uint64(shapes.size), ...uint64(0), ...infos];
  while (start.length % 32 !== 0) start.push(0);
  return { file: Uint8Array.from([...start, ...data]), values };
}

describe('other formats', async () => {
  const layouts = (name: string) => `test/fixtures/layouts/${name}`;
  const official = await open(layouts('official.safetensors'));
  const scaledValues = await open(layouts('scaled-values.safetensors'));
  const { file, values } = ggufT5();
  const gguf = await openCheckpoint([bytesSource(file, 't5.gguf')]);
  const ggufValues = await openCheckpoint([tensorsSource(values)]);

  const cases = [
    ["diffusers' folders", await open(...(await modelFiles(resolve(layouts('diffusers'))))), official],
    ['scaled fp8 with older names', await open(layouts('scaled-older.safetensors')), scaledValues],
    ['scaled fp8 with newer names', await open(layouts('scaled-newer.safetensors')), scaledValues],
    ['GGUF', gguf, ggufValues],
  ] as const;

  it.each(cases)('%s become int8', async (_, source, expected) => {
    await expectConvertedWithin(await converted(source, 'int8'), expected);
  });

  it.each(cases)('%s become half precision, the same configurations', async (_, source, expected) => {
    const checkpoint = await converted(source, 'fp16');
    for (const part of partNames) expect(checkpoint.parts[part]?.config).toEqual(expected.parts[part]?.config);
    for (const [part, name, weight] of weightsOf(expected)) {
      const { data } = await readFloats(weight);
      const halves = toFloat32({ dtype: 'float16', shape: weight.shape, data: toFloat16(data) });
      const actual = (await readFloats(checkpoint.parts[part]!.tensors.get(name)!)).data;
      // Vectors and what was in full precision keep all their digits.
      expect(maxDifference({ data: actual }, { data }), name).toBeLessThanOrEqual(
        maxDifference({ data: halves }, { data }),
      );
      const encodings = checkpoint.parts[part]!.tensors.get(name)!.spans.map(({ encoding }) => encoding);
      expect(['float32', 'float16', 'bfloat16', 'float8e4m3', 'float8e5m2'], name).toContain(encodings[0]);
    }
  });

  async function expectConvertedWithin(actual: Checkpoint, expected: Checkpoint): Promise<void> {
    let quantized = 0;
    for (const [part, name, weight] of weightsOf(expected)) {
      const stored = actual.parts[part]!.tensors.get(name)!;
      const [values, wanted] = [(await readFloats(stored)).data, (await readFloats(weight)).data];
      const peak = allowedError(wanted, 0, wanted.length, 1);
      if (stored.quantized) quantized++;
      const allowed = stored.quantized ? peak / 254 : peak * 2 ** -11;
      expect(maxDifference({ data: values }, { data: wanted }), name).toBeLessThanOrEqual(allowed * 1.001);
    }
    expect(quantized).toBeGreaterThan(5);
  }
});

describe('needsConversion', async () => {
  const plain = await goldenCheckpoint();
  const int8 = await converted(plain, 'int8');
  const gguf = await openCheckpoint([bytesSource(ggufT5().file, 't5.gguf')]);
  const fp8 = await open('test/fixtures/layouts/scaled-older.safetensors');

  it.each([
    ['plain weights', plain, 'transformer', { fp32: false, fp16: false, int8: true, int4: true }],
    ['a VAE', plain, 'vae', { fp32: false, fp16: false, int8: false, int4: false }],
    ['integers', int8, 'transformer', { fp32: false, fp16: false, int8: false, int4: false }],
    ['blocks of GGUF', gguf, 't5', { fp32: true, fp16: true, int8: true, int4: true }],
    ['scaled fp8', fp8, 't5', { fp32: false, fp16: false, int8: true, int4: true }],
  ] as const)('of %s', (_, { parts }, part, expected) => {
    for (const [precision, needs] of Object.entries(expected) as [Precision, boolean][]) {
      expect(needsConversion(part, parts[part]!, precision), precision).toBe(needs);
    }
  });
});

test.each([
  ['int8', Number.NaN],
  ['int8', Number.POSITIVE_INFINITY],
  ['int4', Number.NaN],
  ['int4', Number.NEGATIVE_INFINITY],
] as const)('%s of a weight with %d is refused by its name', async (precision, value) => {
  const name = 'joint_blocks.0.x_block.mlp.fc1.weight';
  const weight = randomFloats([4, 64]);
  weight.data[90] = value;
  const file = await openWeightsFile(tensorsSource({ [name]: weight }));
  const tensors = new Map([[name, wholeTensor(file, file.tensors.get(name)!)]]);
  const part = { config: {}, file: '', prefix: '', metadata: {}, tensors };
  const [plan] = plannedTensors('transformer', part, precision);
  await expect(plan!.values()).rejects.toMatchObject({
    code: 'bad-file',
    message: expect.stringMatching(/fc1\.weight.*file\.safetensors has values that are not finite/),
  });
});

test('what the files say about themselves stays', async () => {
  const path = resolve('models/small/mmditx-small.safetensors');
  const checkpoint = await open(path);
  const metadata = convertedMetadata(checkpoint.parts);
  const { metadata: before } = await openSafetensors(sources.at(-1)!);
  expect(Object.keys(before).length).toBeGreaterThan(3);
  for (const key of Object.keys(before)) {
    if (key === 'mmditx.config') expect(JSON.parse(metadata[key]!)).toMatchObject(JSON.parse(before[key]!));
    else expect(metadata[key]).toBe(before[key]);
  }
});
