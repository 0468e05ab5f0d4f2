/** Weights that are joined or changed, and norms with a modulation: the forms that inference gives programs. */

import { fromBinary } from '@bufbuild/protobuf';
import { InferenceSession, Tensor } from 'onnxruntime-node';
import { describe, expect, it } from 'vitest';
import { createRuntime } from '../../src/runtime/runtime.ts';
import * as t from '../../src/tensor/index.ts';
import { ModelProtoSchema } from '../../src/tensor/onnx_pb.ts';
import { cpu, evaluateProgram, inputLike, maxDifference, randomFloats } from '../support/run.ts';

/** The forms that other devices get, on ONNX Runtime's CPU kernels. */
const other = createRuntime({
  device: 'webgpu',
  Tensor,
  remedy: '',
  createSession: ({ bytes }) => InferenceSession.create(bytes, { executionProviders: ['cpu'], logSeverityLevel: 3 }),
});
const runtimes = { 'on the CPU': cpu, 'in the form for other devices': other };

type Build = (...inputs: t.Tensor[]) => t.Tensor;

async function evaluate(build: Build, values: readonly t.FloatTensor[], runtime = cpu): Promise<t.FloatTensor> {
  const inputs = values.map((value, i) => inputLike(`x${i}`, value));
  const feeds = Object.fromEntries(values.map((value, i) => [`x${i}`, value]));
  return (await evaluateProgram({ result: build(...inputs) }, feeds, runtime)).result as t.FloatTensor;
}

/** Types of the nodes of a program. */
function nodesOf(result: t.Tensor, cpu = true): string[] {
  const { bytes } = t.writeOnnx({ outputs: { result } }, () => 'input', { cpu });
  return fromBinary(ModelProtoSchema, bytes).graph!.node.map(({ opType }) => opType);
}

describe('gradient rules agree with central differences', () => {
  const modulated: Build = (x, scale, shift) => t.layerNorm(x!, 1e-6, { scale: scale!, shift: shift! });
  const cases: Record<string, { shapes: readonly (readonly number[])[]; build: Build }> = {
    'layerNorm with a modulation': {
      shapes: [
        [2, 3, 5],
        [2, 1, 5],
        [2, 1, 5],
      ],
      build: modulated,
    },
    'lowRankSum as a matrix': {
      shapes: [
        [4, 3],
        [4, 2],
        [2, 3],
      ],
      build: t.lowRankSum as Build,
    },
    'linear with a low-rank sum': {
      shapes: [[2, 3], [4, 3], [4, 2], [2, 3], [4]],
      build: (x, base, up, down, bias) => t.linear(x!, t.lowRankSum(base!, up!, down!), bias),
    },
    'linear with a low-rank sum of a joined weight': {
      shapes: [
        [2, 3],
        [2, 3],
        [2, 3],
        [4, 2],
        [2, 3],
      ],
      build: (x, first, second, up, down) => t.linear(x!, t.lowRankSum(t.concat([first!, second!], 0), up!, down!)),
    },
    'split of a join': {
      shapes: [
        [2, 3],
        [2, 3],
      ],
      build: (a, b) => {
        const [first, second] = t.split(t.concat([a!, b!], 1), 2, 1) as [t.Tensor, t.Tensor];
        return t.multiply(first, t.add(second, second));
      },
    },
  };

  it.each(Object.entries(cases))('%s', async (_, { shapes, build }) => {
    const values = shapes.map((shape, i) => randomFloats(shape, i + 3));
    const inputs = values.map((value, i) => inputLike(`x${i}`, value));
    const output = build(...inputs);
    // A weighted sum, so that every output element has a gradient of its own.
    const loss = t.sum(t.multiply(output, t.constant(randomFloats(output.shape as number[], 9))));
    const gradients = Object.fromEntries(t.gradients(loss, inputs).map((gradient, i) => [`g${i}`, gradient]));
    const executable = await cpu.compile({ outputs: { loss, ...gradients } }, { bind: () => 'input' });
    const at = (changed: readonly t.FloatTensor[]) =>
      executable.run(Object.fromEntries(changed.map((value, i) => [`x${i}`, value])));
    const analytic = await at(values);
    const step = 1e-2;
    for (const [i, value] of values.entries()) {
      expect(analytic[`g${i}`]!.shape).toEqual(value.shape);
      for (let element = 0; element < value.data.length; element++) {
        const lossAt = async (delta: number) => {
          const data = value.data.slice();
          data[element]! += delta;
          return Number((await at(values.with(i, t.floats(value.shape, data)))).loss!.data[0]);
        };
        const near = (await lossAt(step)) - (await lossAt(-step));
        const far = (await lossAt(2 * step)) - (await lossAt(-2 * step));
        const numeric = (8 * near - far) / (12 * step);
        expect(Number(analytic[`g${i}`]!.data[element]), `input ${i}, element ${element}`).toBeCloseTo(numeric, 2.5);
      }
    }
    await executable.dispose();
  });
});

describe('layerNorm with a modulation', () => {
  it.each(Object.entries(runtimes))('normalises, scales and shifts each item by its own, %s', async (_, runtime) => {
    const [batch, tokens, width] = [3, 4, 8];
    const [x, scale, shift] = [
      randomFloats([batch, tokens, width], 1),
      randomFloats([batch, 1, width], 2),
      randomFloats([batch, 1, width], 3),
    ];
    const expected = new Float64Array(x.data.length);
    for (let row = 0; row < batch * tokens; row++) {
      const values = [...x.data.subarray(row * width, (row + 1) * width)];
      const mean = values.reduce((sum, value) => sum + value, 0) / width;
      const variance = values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / width;
      const item = Math.floor(row / tokens) * width;
      for (const [i, value] of values.entries()) {
        const normal = (value - mean) / Math.sqrt(variance + 1e-6);
        expected[row * width + i] = normal * scale.data[item + i]! + shift.data[item + i]!;
      }
    }
    const build: Build = (x, scale, shift) => t.layerNorm(x!, 1e-6, { scale: scale!, shift: shift! });
    const result = await evaluate(build, [x, scale, shift], runtime);
    expect(maxDifference(result, { data: expected })).toBeLessThan(5e-6);
  });

  it('refuses a modulation of another shape', () => {
    const x = t.input('x', 'float32', [2, 3, 8]);
    const wanted = t.input('a', 'float32', [2, 1, 8]);
    for (const wrong of [
      [2, 8],
      [1, 1, 8],
      [2, 3, 8],
      [2, 1, 4],
    ]) {
      const other = t.input('b', 'float32', wrong);
      expect(() => t.layerNorm(x, 1e-6, { scale: wanted, shift: other })).toThrow(/\[batch, 1, width\]/);
      expect(() => t.layerNorm(x, 1e-6, { scale: other, shift: wanted })).toThrow(/\[batch, 1, width\]/);
    }
  });
});

/** x W^T, with a bias if given. */
function product(x: t.FloatTensor, weight: t.FloatTensor, bias?: t.FloatTensor): Float64Array {
  const [out, width] = weight.shape as [number, number];
  return Float64Array.from({ length: (x.data.length / width) * out }, (_, i) => {
    const [row, column] = [Math.floor(i / out), i % out];
    let sum = bias?.data[column] ?? 0;
    for (let k = 0; k < width; k++) sum += x.data[row * width + k]! * weight.data[column * width + k]!;
    return sum;
  });
}

function stacked(pieces: readonly t.FloatTensor[]): t.FloatTensor {
  const [first] = pieces as [t.FloatTensor];
  const rows = pieces.reduce((sum, { shape }) => sum + shape[0]!, 0);
  return t.floats([rows, ...first.shape.slice(1)], Float32Array.from(pieces.flatMap(({ data }) => [...data])));
}

describe('linear', () => {
  const x = randomFloats([2, 3, 4], 1);
  const pieces = [randomFloats([2, 4], 2), randomFloats([3, 4], 3), randomFloats([2, 4], 4)];
  const bias = randomFloats([7], 5);

  it('multiplies with each part of a joined weight and joins the products', async () => {
    const build: Build = (x, bias, ...parts) => t.linear(x!, t.concat(parts, 0), bias);
    const result = await evaluate(build, [x, bias, ...pieces]);
    expect(result.shape).toEqual([2, 3, 7]);
    expect(maxDifference(result, { data: product(x, stacked(pieces), bias) })).toBeLessThan(1e-6);
  });

  it('gives each part its own bias, whether that is joined of the same parts or others', async () => {
    for (const sizes of [
      [2, 3, 2],
      [2, 5],
    ]) {
      const biases = sizes.map((size, i) => {
        const start = sizes.slice(0, i).reduce((sum, other) => sum + other, 0);
        return t.floats([size], bias.data.slice(start, start + size));
      });
      const build: Build = (x, ...rest) => t.linear(x!, t.concat(rest.slice(0, 3), 0), t.concat(rest.slice(3), 0));
      const result = await evaluate(build, [x, ...pieces, ...biases]);
      expect(maxDifference(result, { data: product(x, stacked(pieces), bias) })).toBeLessThan(1e-6);
    }
  });

  it('leaves the base of a low-rank sum as it is', async () => {
    const [base, up, down] = [randomFloats([7, 4], 6), randomFloats([7, 2], 7), randomFloats([2, 4], 8)];
    const expected = product(x, base, bias);
    const change = product(t.floats([6, 2], Float32Array.from(product(x, down))), up);
    const build: Build = (x, bias, base, up, down) => t.linear(x!, t.lowRankSum(base!, up!, down!), bias);
    const result = await evaluate(build, [x, bias, base, up, down]);
    expect(maxDifference(result, { data: expected.map((value, i) => value + change[i]!) })).toBeLessThan(1e-6);
    const inputs = [x, bias, base, up, down].map((value, i) => inputLike(`x${i}`, value));
    // Three products, none of them of up and down; no sum of matrices.
    expect(nodesOf(build(...inputs)).filter((type) => type === 'Gemm')).toHaveLength(3);
    expect(nodesOf(build(...inputs))).not.toContain('MatMul');
  });

  it('changes each part of a joined weight by its rows', async () => {
    const [up, down] = [randomFloats([7, 2], 7), randomFloats([2, 4], 8)];
    const build: Build = (x, up, down, ...parts) => t.linear(x!, t.lowRankSum(t.concat(parts, 0), up!, down!));
    const result = await evaluate(build, [x, up, down, ...pieces]);
    const change = product(t.floats([6, 2], Float32Array.from(product(x, down))), up);
    const expected = product(x, stacked(pieces)).map((value, i) => value + change[i]!);
    expect(maxDifference(result, { data: expected })).toBeLessThan(1e-6);
  });

  it('refuses a change that does not fit', () => {
    const matrix = (name: string, ...shape: number[]) => t.input(name, 'float32', shape);
    const base = matrix('w', 7, 4);
    expect(() => t.lowRankSum(base, matrix('up', 6, 2), matrix('down', 2, 4))).toThrow(/\[out, rank\]/);
    expect(() => t.lowRankSum(base, matrix('up', 7, 3), matrix('down', 2, 4))).toThrow(/\[out, rank\]/);
    expect(() => t.lowRankSum(base, matrix('up', 7, 2), matrix('down', 2, 5))).toThrow(/\[out, rank\]/);
  });
});

describe('joined tensors', () => {
  const part = (name: string, ...shape: number[]) => t.input(name, 'float32', shape);
  const [a, b, c, d] = ['a', 'b', 'c', 'd'].map((name) => part(name, 2, 3)) as [t.Tensor, t.Tensor, t.Tensor, t.Tensor];

  it('tell what they are joined of, along that axis alone', () => {
    expect(t.joinedParts(t.concat([a, b], 1), 1)).toEqual([a, b]);
    expect(t.joinedParts(t.concat([a, b], 1), -1)).toEqual([a, b]);
    expect(t.joinedParts(t.concat([a, b], -1), 1)).toEqual([a, b]);
    expect(t.joinedParts(t.concat([a, b], 1), 0)).toBeUndefined();
    expect(t.joinedParts(a, 0)).toBeUndefined();
  });

  it('come apart where they were joined, without a slice', () => {
    const [first, second] = t.split(t.concat([a, b, c, d], 1), 2, 1) as [t.Tensor, t.Tensor];
    expect(t.joinedParts(first, 1)).toEqual([a, b]);
    expect(t.joinedParts(second, 1)).toEqual([c, d]);
    expect(t.split(t.concat([a, b], 0), 2, 0)).toEqual([a, b]);
  });

  it.each([
    ['parts of another number', [3, 3], 3],
    ['parts of other sizes', [2, 4], 2],
    ['parts of other sizes, as many as pieces', [1, 3, 2], 3],
    ['another axis', [3, 3], 2],
  ] as const)('are cut where they have %s', async (what, sizes, pieces) => {
    const values = sizes.map((size, i) => randomFloats([2, size], i + 1));
    const axis = what === 'another axis' ? 0 : 1;
    const build: Build = (...parts) => t.concat(t.split(t.concat(parts, 1), pieces, axis).toReversed(), axis);
    const result = await evaluate(build, values);
    const rows = [0, 1].map((row) =>
      values.flatMap(({ shape, data }) => [...data.subarray(row * shape[1]!, (row + 1) * shape[1]!)]),
    );
    const length = 6 / pieces;
    const expected =
      axis === 0
        ? rows.toReversed().flat()
        : rows.flatMap((row) =>
            Array.from({ length: pieces }, (_, i) => row.slice(i * length, (i + 1) * length))
              .toReversed()
              .flat(),
          );
    expect([...result.data]).toEqual(expected);
  });
});

describe('the graph', () => {
  it('tells the symbolic shape of every result that has one', () => {
    const [batch, tokens] = [t.symbol('batch'), t.symbol('tokens')];
    const x = t.input('x', 'float32', [batch, tokens, 4]);
    const result = t.reshape(t.multiply(x, 2), [t.times(batch, tokens), 4]);
    const { bytes } = t.writeOnnx({ outputs: { result } }, () => 'input');
    const { node, valueInfo } = fromBinary(ModelProtoSchema, bytes).graph!;
    const shapes = valueInfo.map(({ name, type }) => {
      const value = type!.value;
      if (value.case !== 'tensorType') throw new Error('not a tensor');
      const { dim } = value.value.shape!;
      return [name, dim.map(({ value }) => (value.case === 'dimParam' ? value.value : Number(value.value)))];
    });
    const named = (type: string) => node.find(({ opType }) => opType === type)!.output[0]!;
    expect(Object.fromEntries(shapes)).toEqual({
      [named('Mul')]: ['batch', 'tokens', 4],
      [named('Reshape')]: ['batch*tokens', 4],
    });
  });
});
