import { resolve } from 'node:path';
import { afterAll, describe, expect, test } from 'vitest';
import { loadT5 } from '../../src/models/text-encoders.ts';
import { floats, type TensorData, toFloat32 } from '../../src/tensor/data.ts';
import { openCheckpoint, surveyFiles } from '../../src/weights/checkpoint.ts';
import { t5Tensors } from '../../src/weights/expected.ts';
import { type FileSource, fileSource } from '../../src/weights/files.node.ts';
import { fileWeights } from '../../src/weights/layouts.ts';
import { openWeightsFile } from '../../src/weights/open.ts';
import { readFloats, readWeight } from '../../src/weights/stored.ts';
import { cpu, maxDifference } from '../support/run.ts';
import { shapesSource, tensorsSource } from './sources.ts';

const sources: FileSource[] = [];
afterAll(() => Promise.all(sources.map((source) => source.close())));

async function fixture(name: string): Promise<FileSource> {
  const source = await fileSource(resolve(`test/fixtures/layouts/${name}.safetensors`));
  sources.push(source);
  return source;
}
const weightsOf = async (name: string) => fileWeights(await openWeightsFile(await fixture(name)));

describe('numbers that PyTorch wrote', async () => {
  const stored = await weightsOf('numbers');
  const expected = await weightsOf('numbers-values');

  test.each(['F8_E4M3', 'F8_E5M2', 'F16', 'BF16', 'F32'])('%s', async (name) => {
    const { data } = await readFloats(expected.get(name)!);
    // NaN equals NaN, and zeros have their signs.
    expect([...(await readFloats(stored.get(name)!)).data]).toEqual([...data]);
    expect([...toFloat32(await readWeight(stored.get(name)!))]).toEqual([...data]);
  });
});

describe('scaled fp8', async () => {
  const { parts: plain } = await openCheckpoint([await fixture('scaled-values')]);

  describe.each(['scaled-older', 'scaled-newer'])('%s', async (name) => {
    const { parts } = await openCheckpoint([await fixture(name)]);

    test('has the values that PyTorch computes', async () => {
      expect(parts.t5?.config).toEqual(plain.t5?.config);
      for (const [weight, shape] of t5Tensors(plain.t5!.config)) {
        const expected = await readFloats(plain.t5!.tensors.get(weight)!);
        expect(parts.t5!.tensors.get(weight)!.shape).toEqual(shape);
        expect(maxDifference(await readFloats(parts.t5!.tensors.get(weight)!), expected), weight).toBe(0);
      }
    });

    test('computes what the plain values compute', async () => {
      const ids: TensorData = { dtype: 'int32', shape: [1, 4], data: Int32Array.of(3, 17, 5, 1) };
      const encode = async (part: NonNullable<typeof parts.t5>) => {
        const encoder = loadT5(cpu, part);
        try {
          return await encoder.encode(ids);
        } finally {
          await encoder.dispose();
        }
      };
      const [scaled, expected] = [await encode(parts.t5!), await encode(plain.t5!)];
      expect(Math.max(...expected.data)).toBeGreaterThan(0.1);
      expect(maxDifference(scaled, expected)).toBeLessThan(1e-6);
    });

    test('leaves no scale and no mark unused', async () => {
      expect((await surveyFiles([await fixture(name)])).unused).toBe(0);
    });
  });

  const text = (value: string): TensorData => {
    const bytes = new TextEncoder().encode(value);
    return { dtype: 'uint8', shape: [bytes.length], data: bytes };
  };
  const weight: TensorData = { dtype: 'float8e4m3', shape: [2, 2], data: Uint8Array.of(0x38, 0x40, 0xb8, 0) };
  async function read(tensors: Record<string, TensorData>, metadata: Record<string, string> = {}) {
    const file = await openWeightsFile(tensorsSource({ 'x.weight': weight, ...tensors }, metadata));
    return readFloats((await fileWeights(file)).get('x.weight')!);
  }

  test('reads a scale in half precision', async () => {
    const scale: TensorData = { dtype: 'float16', shape: [], data: Uint16Array.of(0x3800) };
    expect((await read({ 'x.scale_weight': scale })).data).toEqual(Float32Array.of(0.5, 1, -0.5, 0));
  });

  test('reads a file whose metadata tells the formats', async () => {
    const metadata = { _quantization_metadata: '{"layers": {"x": {"format": "float8_e4m3fn", "extra": true}}}' };
    const { data } = await read({ 'x.weight_scale': floats([1], [3]) }, metadata);
    expect(data).toEqual(Float32Array.of(3, 6, -3, 0));
  });

  test.each<[string, Record<string, TensorData>, RegExp]>([
    ['a scale for each row', { 'x.weight_scale': floats([2, 1], [1, 2]) }, /a scale for each row or block of a weight/],
    ['no scale', { 'x.weight_scale': floats([0], []) }, /a scale for each row or block of a weight/],
    ['two scales', { 'x.weight_scale_2': floats([], [1]) }, /several scales for a weight/],
    ['another format', { 'x.comfy_quant': text('{"format": "nvfp4"}') }, /weights in the format "nvfp4"/],
  ])('%s is refused', async (_, tensors, message) => {
    await expect(read(tensors)).rejects.toMatchObject({ code: 'unsupported-model', message });
  });

  test('another format in the metadata is refused', async () => {
    const metadata = { _quantization_metadata: '{"layers": {"x": {"format": "int8_blockwise", "group_size": 128}}}' };
    await expect(read({}, metadata)).rejects.toMatchObject({
      code: 'unsupported-model',
      message:
        'file.safetensors has weights in the format "int8_blockwise", a quantisation this version does not read; use the fp16 file or one in fp8 with a scale for each weight.',
    });
  });

  test.each<[string, Record<string, TensorData>, RegExp]>([
    [
      'that is infinite',
      { 'x.scale_weight': floats([], [Number.POSITIVE_INFINITY]) },
      /"x\.scale_weight" is not a fin/,
    ],
    ['that is no number', { 'x.scale_weight': floats([], [Number.NaN]) }, /"x\.scale_weight" is not a finite number/],
    ['of a missing weight', { 'y.scale_weight': floats([], [1]) }, /the weight of its scale "y\.scale_weight" is miss/],
  ])('a scale %s is refused', async (_, tensors, message) => {
    await expect(read(tensors)).rejects.toMatchObject({ code: 'bad-file', message });
  });

  test.each([
    ['broken JSON', '{'],
    ['no object', 'null'],
    ['no format', '{}'],
    ['a text too long', `{"format": "${'x'.repeat(5000)}"}`],
  ])('a description that is %s is refused', async (_, json) => {
    await expect(read({ 'x.comfy_quant': text(json) })).rejects.toMatchObject({
      code: 'bad-file',
      message: /^file\.safetensors cannot be used: .*"x\.comfy_quant".*; download it again\.$/,
    });
  });

  test('metadata that lists no formats is refused', async () => {
    await expect(read({}, { _quantization_metadata: '[]' })).rejects.toMatchObject({ code: 'bad-file' });
  });

  test('scales without end are not read', async () => {
    const shapes = new Map<string, readonly number[]>();
    for (let i = 0; i < 10_001; i++) {
      shapes.set(`${i}.weight`, [1]);
      shapes.set(`${i}.scale_weight`, []);
    }
    const source = shapesSource(shapes);
    const file = await openWeightsFile(source);
    const read = () => Promise.reject(new Error('read'));
    await expect(fileWeights({ ...file, source: { ...source, read } })).rejects.toThrow(/has 10001 scales/);
  });
});
