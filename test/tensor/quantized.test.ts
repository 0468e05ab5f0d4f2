import { InferenceSession, Tensor } from 'onnxruntime-node';
import { describe, expect, it } from 'vitest';
import { createRuntime, type Runtime } from '../../src/runtime/runtime.ts';
import * as t from '../../src/tensor/index.ts';
import { cpu, inputLike, maxDifference, randomFloats } from '../support/run.ts';

/** The forms that other devices get, on ONNX Runtime's CPU kernels. */
const other = createRuntime({
  device: 'webgpu',
  Tensor,
  remedy: '',
  createSession: ({ bytes }) => InferenceSession.create(bytes, { executionProviders: ['cpu'], logSeverityLevel: 3 }),
});

interface Quantized {
  readonly weight: t.Tensor;
  readonly values: Readonly<Record<string, t.TensorData>>;
  /** What the integers stand for, [out, in]. */
  readonly expected: t.FloatTensor;
}

function quantized(
  precision: t.QuantizedPrecision,
  name: string,
  integers: t.TensorData,
  scales: t.FloatTensor,
  expected: t.FloatTensor,
): Quantized {
  const values = { [name]: integers, [`${name}.scales`]: scales };
  const [first, second] = Object.entries(values).map(([key, { dtype, shape }]) => t.parameter(key, dtype, shape));
  return { weight: t.dequantize(precision, first!, second!), values, expected };
}

/** Integers of 8 bits [in, out] and a scale for each output, all values of the type among them. */
function int8Weight(out: number, width: number, name = 'w'): Quantized {
  const data = Int8Array.from({ length: out * width }, (_, i) => ((i * 37 + 11) % 256) - 128);
  const scales = randomFloats([out], out).data.map((value) => 0.01 * (1.5 + value));
  const expected = new Float32Array(out * width);
  for (let row = 0; row < out; row++) {
    for (let column = 0; column < width; column++) {
      expected[row * width + column] = data[column * out + row]! * scales[row]!;
    }
  }
  const integers: t.TensorData = { dtype: 'int8', shape: [width, out], data };
  return quantized('int8', name, integers, t.floats([out], scales), t.floats([out, width], expected));
}

/** Two integers of 4 bits a byte [out, blocks, 16], the first in the low bits, and a scale for each 32; some negative. */
function int4Weight(out: number, width: number, name = 'w'): Quantized {
  const data = Uint8Array.from({ length: (out * width) / 2 }, (_, i) => (i * 29 + 5) % 256);
  const scales = randomFloats([out, width / 32], out).data.map((value) => 0.1 * value);
  const expected = new Float32Array(out * width);
  for (let i = 0; i < expected.length; i++) {
    const byte = data[Math.floor(i / 2)]!;
    const nibble = i % 2 === 0 ? byte % 16 : Math.floor(byte / 16);
    expected[i] = (nibble - 8) * scales[Math.floor(i / 32)]!;
  }
  const integers: t.TensorData = { dtype: 'uint8', shape: [out, width / 32, 16], data };
  return quantized('int4', name, integers, t.floats([out, width / 32], scales), t.floats([out, width], expected));
}

const weights = { int8: int8Weight, int4: int4Weight };

async function run(
  result: t.Tensor,
  x: t.FloatTensor,
  weight: Pick<Quantized, 'values'>,
  runtime: Runtime = cpu,
): Promise<t.FloatTensor> {
  const executable = await runtime.compile({ outputs: { result } }, { bind: ({ name }) => weight.values[name!]! });
  try {
    return (await executable.run({ x })).result as t.FloatTensor;
  } finally {
    await executable.dispose();
  }
}

/** x W^T in double precision. */
function product(x: t.FloatTensor, { shape, data: weight }: t.FloatTensor): Float64Array {
  const [out, width] = shape as [number, number];
  const result = new Float64Array((x.data.length / width) * out);
  for (let i = 0; i < result.length; i++) {
    const [row, column] = [Math.floor(i / out), i % out];
    for (let k = 0; k < width; k++) result[i]! += x.data[row * width + k]! * weight[column * width + k]!;
  }
  return result;
}

/** Most that rounding each row of x to 127 steps either way may change the product by. */
function roundingBound(x: t.FloatTensor, { shape, data: weight }: t.FloatTensor): Float64Array {
  const [out, width] = shape as [number, number];
  const result = new Float64Array((x.data.length / width) * out);
  for (let i = 0; i < result.length; i++) {
    const [row, column] = [Math.floor(i / out), i % out];
    const step = Math.max(...x.data.subarray(row * width, (row + 1) * width).map(Math.abs)) / 127;
    const magnitudes = weight.subarray(column * width, (column + 1) * width).reduce((sum, w) => sum + Math.abs(w), 0);
    result[i] = (step / 2) * magnitudes * 1.001 + 1e-6;
  }
  return result;
}

/** The largest error in units of what is allowed. */
function worstShare(actual: t.FloatTensor, expected: Float64Array, allowed: Float64Array): number {
  expect(actual.data.length).toBe(expected.length);
  return expected.reduce((worst, value, i) => {
    const share = Math.abs(actual.data[i]! - value) / allowed[i]!;
    return Math.max(worst, share);
  }, 0);
}

describe.each(['int8', 'int4'] as const)('%s weights', (precision) => {
  const make = weights[precision];

  it.each([
    ['on the CPU', cpu],
    ['in the form for other devices', other],
  ])('stand for their integers times their scales, %s', async (_, runtime) => {
    const weight = make(6, 64);
    const x = randomFloats([6, 64]);
    // A sum, so that the weight itself is computed and not a product with it.
    const sum = await run(t.add(weight.weight, inputLike('x', x)), x, weight, runtime);
    const expected = weight.expected.data.map((value, i) => value + x.data[i]!);
    expect(maxDifference(sum, { data: expected })).toBeLessThan(1e-6);
  });

  it.each([[[64]], [[1, 64]], [[5, 64]], [[2, 3, 64]], [[2, 1, 3, 64]]])(
    'multiply x of the shape %j within its rounding to 8 bits',
    async (shape) => {
      const weight = make(6, 64);
      const x = randomFloats(shape, 7);
      const result = await run(t.linear(inputLike('x', x), weight.weight), x, weight);
      expect(result.shape).toEqual([...shape.slice(0, -1), 6]);
      expect(worstShare(result, product(x, weight.expected), roundingBound(x, weight.expected))).toBeLessThan(1);
    },
  );

  it('take as many rows as there are when the program runs', async () => {
    const weight = make(6, 64);
    const program = t.linear(t.input('x', 'float32', [t.symbol('batch'), t.symbol('tokens'), 64]), weight.weight);
    for (const shape of [
      [1, 1, 64],
      [3, 17, 64],
    ]) {
      const x = randomFloats(shape, 5);
      const result = await run(program, x, weight);
      expect(result.shape).toEqual([...shape.slice(0, -1), 6]);
      expect(worstShare(result, product(x, weight.expected), roundingBound(x, weight.expected))).toBeLessThan(1);
    }
  });

  // ONNX Runtime makes MatMulNBits of DequantizeLinear and MatMul, which would round x to 8 bits if it were let.
  it('multiply in floating point where that is asked for', async () => {
    const weight = make(6, 64);
    const x = randomFloats([5, 64], 7);
    const exact = t.linear(inputLike('x', x), weight.weight, undefined, { exact: true });
    expect(maxDifference(await run(exact, x, weight), { data: product(x, weight.expected) })).toBeLessThan(2e-5);
  });

  it('keep small values beside a huge one where that is asked for', async () => {
    const weight = make(6, 64);
    const x = randomFloats([3, 64], 2);
    x.data[64 + 40] = 3e5;
    const expected = product(x, weight.expected);
    const exact = await run(t.linear(inputLike('x', x), weight.weight, undefined, { exact: true }), x, weight);
    const largest = Math.max(...expected.map(Math.abs));
    expect(maxDifference(exact, { data: expected })).toBeLessThan(1e-6 * largest);
  });

  it('give about the same in the form for other devices', async () => {
    const weight = make(6, 64);
    const x = randomFloats([5, 64], 7);
    for (const exact of [false, true]) {
      const result = await run(t.linear(inputLike('x', x), weight.weight, undefined, { exact }), x, weight, other);
      expect(worstShare(result, product(x, weight.expected), roundingBound(x, weight.expected))).toBeLessThan(1);
    }
  });

  it('give zero for a row of zeros, and the bias with one', async () => {
    const weight = make(6, 64);
    const x = t.floats([2, 64], randomFloats([2, 64]).data.fill(0, 0, 64));
    const result = await run(t.linear(inputLike('x', x), weight.weight), x, weight);
    expect([...result.data.subarray(0, 6)].map(Math.abs)).toEqual([0, 0, 0, 0, 0, 0]);
    expect(Math.max(...result.data.subarray(6).map(Math.abs))).toBeGreaterThan(0.1);
    const bias = randomFloats([6], 3);
    const biased = await run(t.linear(inputLike('x', x), weight.weight, t.constant(bias)), x, weight);
    expect([...biased.data.subarray(0, 6)]).toEqual([...bias.data]);
  });

  it('lose small values beside a huge one in the same row only', async () => {
    const weight = make(6, 64);
    const x = randomFloats([3, 64], 2);
    x.data[64 + 40] = 3e5;
    const expected = product(x, weight.expected);
    const result = await run(t.linear(inputLike('x', x), weight.weight), x, weight);
    expect(worstShare(result, expected, roundingBound(x, weight.expected))).toBeLessThan(1);
    const rest = (values: ArrayLike<number>) => ({ data: Array.from(values).filter((_, i) => i < 6 || i >= 12) });
    expect(maxDifference(rest(result.data), rest(expected))).toBeLessThan(0.2);
  });

  it('may be joined of parts, with a bias in one piece or in as many', async () => {
    const parts = ['a', 'b', 'c'].map((name) => make(name === 'b' ? 4 : 6, 64, name));
    const values = Object.assign({}, ...parts.map((part) => part.values));
    const weight = t.concat(
      parts.map((part) => part.weight),
      0,
    );
    const expected = t.floats([16, 64], Float32Array.from(parts.flatMap((part) => [...part.expected.data])));
    const x = randomFloats([2, 5, 64], 4);
    const bias = randomFloats([16], 6);
    const pieces = [bias.data.slice(0, 6), bias.data.slice(6, 10), bias.data.slice(10)];
    const joined = t.concat(
      pieces.map((piece) => t.constant(t.floats([piece.length], piece))),
      0,
    );
    const reference = product(x, expected).map((value, i) => value + bias.data[i % 16]!);
    for (const given of [t.constant(bias), joined]) {
      const result = await run(t.linear(inputLike('x', x), weight, given), x, { values });
      expect(result.shape).toEqual([2, 5, 16]);
      expect(worstShare(result, reference, roundingBound(x, expected))).toBeLessThan(1);
    }
  });

  it('may have a low-rank change, which is computed in floating point', async () => {
    const weight = make(6, 64);
    const [up, down] = [randomFloats([6, 2], 8), randomFloats([2, 64], 9)];
    const changed = t.lowRankSum(weight.weight, t.constant(up), t.constant(down));
    const x = randomFloats([5, 64], 4);
    const sums = weight.expected.data.map((value, i) => {
      const [row, column] = [Math.floor(i / 64), i % 64];
      return value + up.data[2 * row]! * down.data[column]! + up.data[2 * row + 1]! * down.data[64 + column]!;
    });
    const expected = product(x, t.floats([6, 64], sums));
    for (const runtime of [cpu, other]) {
      const result = await run(t.linear(inputLike('x', x), changed), x, weight, runtime);
      expect(worstShare(result, expected, roundingBound(x, weight.expected))).toBeLessThan(1);
    }
  });

  it('pass gradients on to x alone, with the weight in floating point', async () => {
    const weight = make(6, 64);
    const upstream = randomFloats([5, 6], 3);
    const x = randomFloats([5, 64], 4);
    const input = inputLike('x', x);
    const value = t.sum(t.multiply(t.linear(input, weight.weight), t.constant(upstream)));
    const [gradient] = t.gradients(value, [input]) as [t.Tensor];
    for (const runtime of [cpu, other]) {
      const result = await run(gradient, x, weight, runtime);
      for (let row = 0; row < 5; row++) {
        for (let column = 0; column < 64; column++) {
          let expected = 0;
          for (let out = 0; out < 6; out++) {
            expected += upstream.data[row * 6 + out]! * weight.expected.data[out * 64 + column]!;
          }
          expect(result.data[row * 64 + column]).toBeCloseTo(expected, 4);
        }
      }
    }
  });
});

describe('the product in 8-bit integers', () => {
  it('rounds each row by its own largest magnitude and adds up integers', async () => {
    const [out, width] = [5, 48];
    const weight = int8Weight(out, width);
    const x = randomFloats([7, width], 11);
    for (let i = 0; i < x.data.length; i++) x.data[i]! *= 10 ** (Math.floor(i / width) - 3);
    const result = await run(t.linear(inputLike('x', x), weight.weight), x, weight);
    const integers = weight.values.w!.data as Int8Array;
    const scales = weight.values['w.scales']!.data as Float32Array;
    for (let row = 0; row < 7; row++) {
      const values = x.data.subarray(row * width, (row + 1) * width);
      const step = Math.max(...values.map(Math.abs)) / 127;
      for (let column = 0; column < out; column++) {
        let sum = 0;
        for (let k = 0; k < width; k++) sum += Math.round(values[k]! / step) * integers[k * out + column]!;
        const expected = sum * step * scales[column]!;
        expect(result.data[row * out + column]! / step).toBeCloseTo(expected / step, 2);
      }
    }
  });

  it('is exact for a row of whole numbers up to 127', async () => {
    const weight = int8Weight(4, 16);
    const x = t.floats(
      [1, 16],
      Array.from({ length: 16 }, (_, i) => 127 - 15 * i),
    );
    const result = await run(t.linear(inputLike('x', x), weight.weight), x, weight);
    expect(maxDifference(result, { data: product(x, weight.expected) })).toBeLessThan(1e-3);
  });
});

describe('dequantize refuses', () => {
  it.each([
    ['int8', 'uint8', [4, 6], [6], /int8 needs values \[in, out\]/],
    ['int8', 'int8', [4, 6], [4], /a scale for each output/],
    ['int8', 'int8', [2, 4, 6], [12], /int8 needs values \[in, out\]/],
    ['int4', 'int8', [4, 2, 16], [4, 2], /int4 needs values \[out, blocks, 16\]/],
    ['int4', 'uint8', [4, 32], [4], /int4 needs/],
    ['int4', 'uint8', [4, 2, 16], [4], /a scale for each block/],
  ] as const)('%s weights of the type %s and shape %j with scales %j', (precision, dtype, shape, scales, message) => {
    const values = t.parameter('values', dtype, shape);
    expect(() => t.dequantize(precision, values, t.parameter('scales', 'float32', scales))).toThrow(message);
  });
});
