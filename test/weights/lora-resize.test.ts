import { describe, expect, it } from 'vitest';
import { floats, type TensorData } from '../../src/tensor/data.ts';
import { type ResizeOptions, resizeLora } from '../../src/weights/lora-resize.ts';
import type { LoraLayer } from '../../src/weights/lora-write.ts';
import { maxDifference, randomFloats } from '../support/run.ts';

const UP = [
  [-8, -1, -7, 8],
  [0, 4, -2, -7],
  [-8, -4, 1, -4],
  [3, 4, -8, 1],
  [0, 1, 6, -2],
  [1, -1, 4, -7],
  [7, 5, 4, -7],
];
const DOWN = [
  [-6, -4, -2, 0, 2, 4],
  [-1, -6, 2, 4, 3, -4],
  [1, -4, 2, -5, 1, 5],
  [0, 6, -1, -1, 6, -3],
];
/** Of UP @ DOWN, by numpy.linalg.svd: shares of the Frobenius norm in the first 1 to 4 singular values. */
const SHARES = [0.8584733032083046, 0.9590599119062532, 0.9959592795453603, 1];
/** The nearest matrix of rank 2, by numpy. */
const NEAREST = [
  [32.401575, 121.091967, -15.489041, 17.264558, 27.258659, -77.911504],
  [-24.381322, -45.40685, 0.627557, 9.098349, 1.132935, 15.285998],
  [41.911323, 35.220558, 9.254446, -36.338655, -22.229072, 14.334985],
  [-33.471771, 3.921311, -15.122599, 44.508757, 32.928292, -41.835432],
  [-0.372842, -37.290825, 8.838175, -17.545564, -17.311013, 34.931768],
  [-1.649193, -56.103532, 12.835992, -25.011569, -25.033961, 51.31506],
  [-47.39506, -112.635056, 7.098552, 5.910741, -9.336007, 52.818766],
];

function layer(up: TensorData, down: TensorData, alpha = 4): LoraLayer {
  const matrix = ({ shape, data }: TensorData) => floats(shape, Float32Array.from(data as Float32Array));
  return { part: 'transformer', weight: 'context_embedder.weight', up: matrix(up), down: matrix(down), alpha };
}

const known = layer(floats([7, 4], UP.flat()), floats([4, 6], DOWN.flat()), 3);

/** `alpha / rank * up @ down`. */
function change({ up, down, alpha }: LoraLayer): { data: number[] } {
  const [rank, inputs] = down.shape as [number, number];
  const data = Array.from({ length: up.shape[0]! * inputs }, (_, at) => {
    const [row, column] = [Math.floor(at / inputs), at % inputs];
    let sum = 0;
    for (let i = 0; i < rank; i++) sum += up.data[row * rank + i]! * down.data[i * inputs + column]!;
    return (alpha / rank) * sum;
  });
  return { data };
}

function resizeOne(one: LoraLayer, options: ResizeOptions) {
  const { layers, report } = resizeLora([one], options);
  return { layer: layers[0]!, report: report[0]! };
}

describe('resizeLora', () => {
  it('to a rank gives the nearest matrix of that rank', () => {
    const { layer: resized, report } = resizeOne(known, { rank: 2 });
    expect(resized.up.shape).toEqual([7, 2]);
    expect(resized.down.shape).toEqual([2, 6]);
    const scaled = NEAREST.flat().map((value) => (3 / 4) * value);
    expect(maxDifference(change(resized), { data: scaled })).toBeLessThan(2e-5);
    expect(report).toMatchObject({ weight: 'context_embedder.weight', part: 'transformer', from: 4, to: 2 });
    expect(report.kept).toBeCloseTo(SHARES[1]!, 12);
  });

  it('keeps the factor alpha / rank and gives both matrices one size', () => {
    const { layer: resized } = resizeOne(known, { rank: 2 });
    expect(resized.alpha).toBe(1.5);
    const norms = [resized.up, resized.down].map(({ data }) => data.reduce((sum, value) => sum + value * value, 0));
    expect(norms[0]! / norms[1]!).toBeCloseTo(1, 5);
  });

  it.each([
    [0.5, 1],
    [0.858, 1],
    [0.859, 2],
    [0.959, 2],
    [0.96, 3],
    [0.9959, 3],
    [0.997, 4],
  ])('to keep %d of the norm takes rank %d', (keep, rank) => {
    const { report } = resizeOne(known, { keep });
    expect(report.to).toBe(rank);
    expect(report.kept).toBeCloseTo(SHARES[rank - 1]!, 12);
  });

  it('takes no more ranks than allowed, whatever is to be kept', () => {
    const { report } = resizeOne(known, { keep: 0.999, maxRank: 2 });
    expect(report.to).toBe(2);
    expect(report.kept).toBeCloseTo(SHARES[1]!, 12);
  });

  it('changes nothing where the rank is lower already', () => {
    for (const rank of [4, 9]) {
      const { layer: resized, report } = resizeOne(known, { rank });
      expect(resized).toEqual(known);
      expect(report).toMatchObject({ from: 4, to: 4, kept: 1 });
    }
  });

  it.each([
    ['taller than wide', 40, 3, 6],
    ['wider than tall', 3, 40, 6],
    ['of a rank above both sides', 4, 5, 9],
    ['of a rank between its sides', 12, 4, 7],
  ])('keeps the whole of a change %s', (_, outputs, inputs, rank) => {
    const one = layer(randomFloats([outputs, rank], 3), randomFloats([rank, inputs], 4));
    const { layer: resized, report } = resizeOne(one, { keep: 1 - 1e-9 });
    expect(report.to).toBeLessThanOrEqual(Math.min(outputs, inputs, rank));
    expect(maxDifference(change(resized), change(one))).toBeLessThan(3e-6);
  });

  it('finds that layers stacked upon each other are one', () => {
    const [up, down] = [randomFloats([9, 2], 5), randomFloats([2, 8], 6)];
    const twice = (values: TensorData, copy: (at: number) => number, shape: number[]) =>
      floats(
        shape,
        Array.from({ length: 2 * values.data.length }, (_, at) => Number(values.data[copy(at)])),
      );
    const stacked = layer(
      twice(up, (at) => Math.floor(at / 4) * 2 + (at % 2), [9, 4]),
      twice(down, (at) => at % 16, [4, 8]),
    );
    const { layer: resized, report } = resizeOne(stacked, { keep: 0.999999 });
    expect(report.to).toBe(2);
    expect(maxDifference(change(resized), change(stacked))).toBeLessThan(1e-6);
  });

  it('keeps one rank of a change of nothing', () => {
    const nothing = layer(floats([5, 3], new Float32Array(15)), randomFloats([3, 4]));
    for (const options of [{ rank: 2 }, { keep: 0.9 }]) {
      const { layer: resized, report } = resizeOne(nothing, options);
      expect(report.kept).toBe(1);
      expect(resized.up.data.every((value) => value === 0)).toBe(true);
      expect(resized.down.data.every(Number.isFinite)).toBe(true);
    }
  });

  it('works with values of any size', () => {
    for (const size of [1e-12, 1e12]) {
      const one = layer(
        floats(
          [7, 4],
          known.up.data.map((value) => value * size),
        ),
        known.down,
      );
      const { report } = resizeOne(one, { rank: 1 });
      expect(report.kept).toBeCloseTo(SHARES[0]!, 6);
    }
  });

  it('tells its progress', () => {
    const seen: string[] = [];
    resizeLora([known, { ...known, weight: 'y_embedder.mlp.0.weight' }], { rank: 1 }, (done, total) =>
      seen.push(`${done}/${total}`),
    );
    expect(seen).toEqual(['1/2', '2/2']);
  });

  it.each([
    [{}, /either the rank/],
    [{ rank: 2, keep: 0.5 }, /either the rank/],
    [{ rank: 0 }, /rank is 0/],
    [{ rank: 1.5 }, /rank is 1\.5/],
    [{ keep: 0 }, /share to keep is 0/],
    [{ keep: 1.1 }, /share to keep is 1\.1/],
    [{ keep: Number.NaN }, /share to keep is NaN/],
    [{ keep: 0.5, maxRank: 0 }, /largest rank is 0/],
    [{ rank: 4, maxRank: 2 }, /goes with the share/],
  ])('refuses %j', (options, message) => {
    expect(() => resizeLora([known], options)).toThrow(message);
    expect(() => resizeLora([known], options)).toThrow(expect.objectContaining({ code: 'bad-option' }));
  });
});
