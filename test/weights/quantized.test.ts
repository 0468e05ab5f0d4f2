import { describe, expect, it, test } from 'vitest';
import { type FloatTensor, floats, type QuantizedPrecision, type TensorData } from '../../src/tensor/index.ts';
import { fileWeights } from '../../src/weights/layouts.ts';
import { openWeightsFile } from '../../src/weights/open.ts';
import { quantize, quantizedPlan } from '../../src/weights/quantized.ts';
import { serializeSafetensors } from '../../src/weights/safetensors.ts';
import { readFloats, readWeight, storedBytes, type WeightTensor } from '../../src/weights/stored.ts';
import { maxDifference, randomFloats } from '../support/run.ts';
import { bytesSource, tensorsSource } from './sources.ts';

/** The tensors that a weight is written as, by name. */
function written(name: string, weight: FloatTensor, precision: QuantizedPrecision): Map<string, TensorData> {
  const values = quantize(name, weight, precision);
  const plan = [...quantizedPlan(name, weight.shape as [number, number], precision)];
  expect(values).toHaveLength(plan.length);
  return new Map(plan.map(([key, tensor], i) => [key, { ...tensor, data: values[i]! }]));
}

/** The same weight, out of a file. */
async function reopened(tensors: ReadonlyMap<string, TensorData>, name: string): Promise<WeightTensor> {
  const file = await openWeightsFile(bytesSource(serializeSafetensors(tensors)));
  const weights = await fileWeights(file);
  expect([...weights.keys()]).toEqual([name]);
  return weights.get(name)!;
}

describe.each([
  ['one piece', 'mlp.fc1.weight', [96, 64], 1],
  ['queries, keys and values', 'attn.qkv.weight', [96, 64], 3],
  ['a wide layer', 'mlp.fc1.weight', [4200, 32], 3],
  ['wide queries, keys and values', 'attn.qkv.weight', [3 * 2432, 32], 6],
  ['a layer that runs on one row', 'adaLN_modulation.1.weight', [4200, 32], 1],
  ['a width that no part divides', 'mlp.fc1.weight', [2053, 32], 1],
] as const)('int8 of %s', (_, name, shape, parts) => {
  const weight = randomFloats(shape, 3);

  it(`lies in ${parts} parts and is within half a step of each output`, async () => {
    const tensors = written(name, weight, 'int8');
    const [out, width] = shape;
    expect(tensors.get(name)!.shape).toEqual(parts > 1 ? [parts, width, out / parts] : [width, out]);
    const scales = tensors.get(`${name}.int8_scale`)!;
    expect(scales.shape).toEqual([out]);

    const stored = await reopened(tensors, name);
    expect(stored.shape).toEqual(shape);
    expect(stored.spans).toHaveLength(parts);
    expect(storedBytes(stored)).toBe(out * width + 4 * out);
    const { data } = await readFloats(stored);
    let worst = 0;
    for (let i = 0; i < data.length; i++) {
      const step = Number(scales.data[Math.floor(i / width)]);
      worst = Math.max(worst, Math.abs(data[i]! - weight.data[i]!) / step);
    }
    expect(worst).toBeLessThan(0.5 + 1e-4);
    expect(worst).toBeGreaterThan(0.4);
  });

  it('has the largest value of each output at 127', () => {
    const [values, scales] = quantize(name, weight, 'int8');
    expect((values as Int8Array).reduce((peak, value) => Math.max(peak, Math.abs(value)), 0)).toBe(127);
    for (const [row, scale] of scales.entries()) {
      const magnitudes = weight.data.subarray(row * shape[1], (row + 1) * shape[1]).map(Math.abs);
      expect(scale * 127).toBeCloseTo(Math.max(...magnitudes), 5);
    }
  });
});

describe.each([
  ['one piece', 'mlp.fc1.weight', [96, 64], 1],
  ['queries, keys and values', 'attn.qkv.weight', [96, 64], 3],
  ['an odd number of outputs', 'attn.qkv.weight', [7, 32], 1],
] as const)('int4 of %s', (_, name, shape, parts) => {
  it(`lies in ${parts} parts and is within a step of each block`, async () => {
    const weight = randomFloats(shape, 5);
    const tensors = written(name, weight, 'int4');
    const [out, width] = shape;
    expect(tensors.get(name)!.shape).toEqual([out, width / 32, 16]);
    const scales = tensors.get(`${name}.int4_scale`)!;
    expect(scales.shape).toEqual([out, width / 32]);

    const stored = await reopened(tensors, name);
    expect(stored.shape).toEqual(shape);
    expect(stored.spans).toHaveLength(parts);
    const { data } = await readFloats(stored);
    for (let block = 0; block < scales.data.length; block++) {
      const step = Number(scales.data[block]);
      const values = weight.data.subarray(32 * block, 32 * block + 32);
      const peak = values.reduce((a, b) => (Math.abs(b) > Math.abs(a) ? b : a), 0);
      // The largest is exact, whichever its sign; values near it on the other side are cut at 7 steps.
      expect(step).toBeCloseTo(peak / -8, 6);
      for (const [i, value] of values.entries()) {
        const error = Math.abs(data[32 * block + i]! - value) / Math.abs(step);
        expect(error).toBeLessThan((value * peak < 0 && Math.abs(value / step) > 7.5 ? 1 : 0.5) + 1e-4);
        if (value === peak) expect(error).toBeLessThan(1e-4);
      }
    }
  });
});

test('the first of two values of int4 lies in the low bits', () => {
  const weight = floats(
    [1, 32],
    Array.from({ length: 32 }, (_, i) => (i % 16) - 8),
  );
  const [values, scales] = quantize('w', weight, 'int4');
  expect([...scales]).toEqual([1]);
  expect([...values.subarray(0, 8)]).toEqual([0x10, 0x32, 0x54, 0x76, 0x98, 0xba, 0xdc, 0xfe]);
});

test.each(['int8', 'int4'] as const)('%s of zeros are zeros, and of one value that value', async (precision) => {
  const data = new Float32Array(2 * 64);
  data[70] = -3.5;
  const { data: read } = await readFloats(
    await reopened(written('w.weight', floats([2, 64], data), precision), 'w.weight'),
  );
  expect(maxDifference({ data: read }, { data })).toBeLessThan(1e-6);
});

test.each(['int8', 'int4'] as const)(
  '%s keeps the rest of a row beside a huge value as well as its scale allows',
  async (precision) => {
    const weight = randomFloats([2, 64], 4);
    weight.data[3] = 1000;
    const stored = await reopened(written('w.weight', weight, precision), 'w.weight');
    const { data } = await readFloats(stored);
    const error = (start: number, end: number) =>
      maxDifference({ data: data.subarray(start, end) }, { data: weight.data.subarray(start, end) });
    // Its row of int8, its block of int4.
    expect(error(0, precision === 'int8' ? 64 : 32)).toBeGreaterThan(0.5);
    expect(error(precision === 'int8' ? 64 : 32, 128)).toBeLessThan(precision === 'int8' ? 0.005 : 0.13);
  },
);

test.each(['int8', 'int4'] as const)('%s of a negated weight is the negated weight', async (precision) => {
  const weight = randomFloats([4, 32], 6);
  const negated = floats(
    [4, 32],
    weight.data.map((value) => -value),
  );
  const of = async (tensor: FloatTensor) =>
    (await readFloats(await reopened(written('w.weight', tensor, precision), 'w.weight'))).data;
  expect([...(await of(negated))]).toEqual([...(await of(weight))].map((value) => -value));
});

test('readWeight gives the values of a quantised weight, too', async () => {
  const stored = await reopened(written('attn.qkv.weight', randomFloats([6, 32], 2), 'int8'), 'attn.qkv.weight');
  expect(await readWeight(stored)).toEqual(await readFloats(stored));
});

describe('a tensor beside a scale that does not belong to it stays as it is', () => {
  const int8: TensorData = { dtype: 'int8', shape: [4, 6], data: new Int8Array(24) };
  const uint8: TensorData = { dtype: 'uint8', shape: [3, 2, 16], data: new Uint8Array(96) };
  const scales = (...shape: number[]) => randomFloats(shape);
  it.each([
    ['int8 with scales of another number', int8, 'int8_scale', scales(4)],
    ['int8 with a scale of another shape', int8, 'int8_scale', scales(6, 1)],
    ['int8 with the scales of int4', int8, 'int4_scale', scales(6)],
    ['int8 of four axes', { ...int8, shape: [1, 2, 2, 6] }, 'int8_scale', scales(12)],
    ['int8 of one axis', { ...int8, shape: [24] }, 'int8_scale', scales(24)],
    ['int8 with scales of another type', int8, 'int8_scale', { ...int8, shape: [6], data: new Int8Array(6) }],
    ['uint8 as int8', uint8, 'int8_scale', scales(48)],
    ['int4 in blocks of another size', { ...uint8, shape: [6, 2, 8] }, 'int4_scale', scales(6, 2)],
    ['int4 with scales of another number', uint8, 'int4_scale', scales(3)],
    ['a plain weight', randomFloats([6, 4]), 'int8_scale', scales(6)],
  ] as const)('%s', async (_, values, companion, scale) => {
    const source = tensorsSource({ 'w.weight': values, [`w.weight.${companion}`]: scale });
    const weights = await fileWeights(await openWeightsFile(source));
    expect([...weights.keys()].sort()).toEqual(['w.weight', `w.weight.${companion}`]);
    expect(weights.get('w.weight')!.quantized).toBeUndefined();
  });

  it('nor one of no values in more parts than anyone can hold', async () => {
    const empty: TensorData = { dtype: 'int8', shape: [2 ** 40, 4, 0], data: new Int8Array(0) };
    const source = tensorsSource({ 'w.weight': empty, 'w.weight.int8_scale': floats([0], []) });
    const weights = await fileWeights(await openWeightsFile(source));
    expect(weights.get('w.weight')!.quantized).toBeUndefined();
  });

  it('nor one in a part for each output', async () => {
    const thin: TensorData = { dtype: 'int8', shape: [5000, 4, 1], data: new Int8Array(20_000) };
    const source = tensorsSource({ 'w.weight': thin, 'w.weight.int8_scale': randomFloats([5000]) });
    const weights = await fileWeights(await openWeightsFile(source));
    expect(weights.get('w.weight')!.quantized).toBeUndefined();
  });
});
