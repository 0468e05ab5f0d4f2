import { describe, expect, it } from 'vitest';
import * as t from '../../src/tensor/index.ts';
import { cpu, inputLike, randomFloats } from '../support/run.ts';

type Build = (...inputs: t.Tensor[]) => t.Tensor;
interface Case {
  shapes: readonly (readonly number[])[];
  build: Build;
  /** Moves the random inputs into the operation's domain. */
  domain?: (value: number) => number;
}

const positive = (value: number) => 0.6 + 0.4 * value;
const ids = t.constant({ dtype: 'int32', shape: [2, 3], data: Int32Array.of(0, 2, 2, 1, 0, 2) });

/** Every differentiable operation. */
const cases: Record<string, Case> = {
  add: { shapes: [[2, 3], [3]], build: t.add as Build },
  subtract: {
    shapes: [
      [2, 1],
      [2, 3],
    ],
    build: t.subtract as Build,
  },
  multiply: {
    shapes: [
      [2, 3],
      [1, 3],
    ],
    build: t.multiply as Build,
  },
  divide: {
    shapes: [
      [2, 3],
      [2, 1],
    ],
    build: t.divide as Build,
    domain: positive,
  },
  negate: { shapes: [[3]], build: t.negate },
  exponential: { shapes: [[3]], build: t.exponential },
  logarithm: { shapes: [[3]], build: t.logarithm, domain: positive },
  squareRoot: { shapes: [[3]], build: t.squareRoot, domain: positive },
  sine: { shapes: [[3]], build: t.sine },
  cosine: { shapes: [[3]], build: t.cosine },
  sigmoid: { shapes: [[3]], build: t.sigmoid },
  absolute: { shapes: [[4]], build: t.absolute },
  errorFunction: { shapes: [[4]], build: t.errorFunction },
  silu: { shapes: [[4]], build: t.silu },
  quickGelu: { shapes: [[4]], build: t.quickGelu },
  gelu: { shapes: [[4]], build: t.gelu },
  geluTanh: { shapes: [[4]], build: t.geluTanh },
  reshape: { shapes: [[2, 6]], build: (x) => t.reshape(x!, [3, -1]) },
  transpose: { shapes: [[2, 3, 4]], build: (x) => t.transpose(x!, [2, 0, 1]) },
  concat: {
    shapes: [
      [2, 3],
      [2, 2],
    ],
    build: (a, b) => t.concat([a!, b!], 1),
  },
  slice: { shapes: [[2, 5]], build: (x) => t.slice(x!, 1, 1, 3) },
  pad: { shapes: [[2, 3]], build: (x) => t.pad(x!, 1, 1, 2) },
  expand: { shapes: [[2, 1, 3]], build: (x) => t.expand(x!, [4, 2, 5, 3]) },
  gather: { shapes: [[3, 4]], build: (table) => t.gather(table!, ids) },
  upsampleNearest: { shapes: [[1, 2, 2, 3]], build: t.upsampleNearest },
  sum: { shapes: [[2, 3]], build: (x) => t.sum(x!, [1]) },
  mean: { shapes: [[2, 3]], build: (x) => t.mean(x!, [0], { keepAxes: true }) },
  softmax: { shapes: [[2, 4]], build: t.softmax },
  linear: { shapes: [[2, 3, 4], [5, 4], [5]], build: t.linear as Build },
  matmul: {
    shapes: [
      [2, 3, 4],
      [2, 4, 5],
    ],
    build: t.matmul,
  },
  layerNorm: { shapes: [[2, 5]], build: (x) => t.layerNorm(x!, 1e-6) },
  rmsNorm: { shapes: [[2, 5], [5]], build: (x, weight) => t.rmsNorm(x!, weight!, 1e-6) },
  groupNorm: { shapes: [[2, 4, 2, 3]], build: (x) => t.groupNorm(x!, 2, 1e-6) },
  convolution: {
    shapes: [[2, 3, 4, 5], [2, 3, 3, 3], [2]],
    build: (x, w, b) => t.convolution(x!, w!, b, { padding: [1, 1, 1, 1] }),
  },
  'convolution 1x1': {
    shapes: [
      [1, 3, 2, 2],
      [2, 3, 1, 1],
    ],
    build: (x, w) => t.convolution(x!, w!),
  },
  'convolution with a stride': {
    shapes: [[1, 2, 6, 4], [3, 2, 3, 3], [3]],
    build: (x, w, b) => t.convolution(x!, w!, b, { stride: 2, padding: [0, 0, 1, 1] }),
  },
  attention: {
    shapes: [
      [2, 3, 8],
      [2, 5, 8],
      [2, 5, 8],
    ],
    build: (q, k, v) => t.attention(q!, k!, v!, { heads: 2 }),
  },
  'attention with a bias': {
    shapes: [
      [1, 3, 8],
      [1, 3, 8],
      [1, 3, 8],
      [1, 2, 3, 3],
    ],
    build: (q, k, v, bias) => t.attention(q!, k!, v!, { heads: 2, bias: bias!, scale: 1 }),
  },
};

describe('gradient rules agree with central differences', () => {
  for (const [name, { shapes, build, domain }] of Object.entries(cases)) {
    it(name, async () => {
      const values = shapes.map((shape, i) => {
        const { data } = randomFloats(shape, i + 3);
        return t.floats(shape, domain ? data.map(domain) : data);
      });
      const inputs = values.map((value, i) => inputLike(`x${i}`, value));
      const output = build(...inputs);
      // A weighted sum, so that every output element has a gradient of its own.
      const weights = t.constant(randomFloats(output.shape as number[], 9));
      const loss = t.sum(t.multiply(output, weights));
      const outputs = Object.fromEntries(t.gradients(loss, inputs).map((gradient, i) => [`g${i}`, gradient]));
      const executable = await cpu.compile({ outputs: { loss, ...outputs } }, { bind: () => 'input' });
      const at = (changed = values) => executable.run(Object.fromEntries(changed.map((value, i) => [`x${i}`, value])));
      const analytic = await at();
      const step = 1e-2;
      for (const [i, value] of values.entries()) {
        const gradient = analytic[`g${i}`]!;
        expect(gradient.shape).toEqual(value.shape);
        for (let element = 0; element < value.data.length; element++) {
          const lossAt = async (delta: number) => {
            const data = value.data.slice();
            data[element]! += delta;
            return Number((await at(values.with(i, t.floats(value.shape, data)))).loss!.data[0]);
          };
          // Fourth order, so that the step can be large against float32's rounding.
          const [a, b, c, d] = [
            await lossAt(-2 * step),
            await lossAt(-step),
            await lossAt(step),
            await lossAt(2 * step),
          ];
          const numeric = (a! - 8 * b! + 8 * c! - d!) / (12 * step);
          expect(Number(gradient.data[element]), `input ${i}, element ${element}`).toBeCloseTo(numeric, 2.5);
        }
      }
      await executable.dispose();
    });
  }

  it('adds up over every use of a tensor', async () => {
    const x = t.input('x', 'float32', [2]);
    const loss = t.sum(t.add(t.multiply(x, x), t.multiply(x, 3)));
    const [gradient] = t.gradients(loss, [x]);
    const executable = await cpu.compile({ outputs: { gradient: gradient! } }, { bind: () => 'input' });
    const result = await executable.run({ x: t.floats([2], [1, -2]) });
    expect([...(result.gradient!.data as Float32Array)]).toEqual([5, -1]);
    await executable.dispose();
  });

  it('refuses a loss that does not depend on the tensor', () => {
    const x = t.input('x', 'float32', [2]);
    expect(() => t.gradients(t.sum(t.input('y', 'float32', [2])), [x])).toThrow(/does not depend on x/);
  });
});
