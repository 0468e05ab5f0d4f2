import { describe, expect, it } from 'vitest';
import { blendWeights, evenSample, inTiles, tileSpans, tilesOf } from '../../src/models/tiles.ts';
import { type FloatTensor, floats } from '../../src/tensor/index.ts';
import { maxDifference, randomFloats } from '../support/run.ts';

/** Sizes around a tile, multiples of it and others; overlaps from none to nearly all. */
const CASES = [1, 7, 16, 17, 31, 32, 33, 100, 128, 129].flatMap((size) =>
  [8, 16, 31].flatMap((tile) => [0, 1, 4, 7].map((overlap) => ({ size, tile, overlap }))),
);

describe('tileSpans', () => {
  it('covers every size with tiles of one length that overlap by as much as asked for', () => {
    for (const { size, tile, overlap } of CASES) {
      const spans = tileSpans(size, { size: tile, overlap });
      const name = `${size} in ${tile} - ${overlap}`;
      expect(spans[0]!.start, name).toBe(0);
      expect(spans.at(-1)!.end, name).toBe(size);
      const lengths = new Set(spans.map(({ start, end }) => end - start));
      expect(lengths.size, name).toBe(1);
      expect(Math.max(...lengths), name).toBeLessThanOrEqual(tile);
      for (const [i, { start }] of spans.slice(1).entries()) {
        expect(spans[i]!.end - start, name).toBeGreaterThanOrEqual(overlap);
      }
    }
  });

  it('takes as few tiles as do', () => {
    for (const { size, tile, overlap } of CASES) {
      let count = 1;
      while (count * tile - (count - 1) * overlap < size) count++;
      expect(tileSpans(size, { size: tile, overlap })).toHaveLength(count);
    }
  });

  it('spaces tiles evenly and makes them no longer than they have to be', () => {
    expect(tileSpans(128, { size: 64, overlap: 6 })).toEqual([
      { start: 0, end: 47 },
      { start: 40, end: 87 },
      { start: 81, end: 128 },
    ]);
  });

  it('refuses an overlap that leaves nothing of a tile', () => {
    expect(() => tileSpans(100, { size: 8, overlap: 8 })).toThrow(RangeError);
    expect(() => tileSpans(100, { size: 8, overlap: -1 })).toThrow(RangeError);
    expect(() => tileSpans(100, { size: Number.NaN, overlap: 0 })).toThrow(RangeError);
  });
});

describe('blendWeights', () => {
  it('sum to 1 at every position, also where three tiles meet', () => {
    for (const { size, tile, overlap } of CASES) {
      const spans = tileSpans(size, { size: tile, overlap });
      const sums = new Float64Array(size);
      for (const [i, weights] of blendWeights(spans).entries()) {
        expect(Math.min(...weights)).toBeGreaterThanOrEqual(0);
        for (const [x, weight] of weights.entries()) sums[spans[i]!.start + x]! += weight;
      }
      for (const sum of sums) expect(Math.abs(sum - 1)).toBeLessThan(1e-12);
    }
  });

  it('fade over the middle quarter of an overlap', () => {
    const weights = blendWeights([
      { start: 0, end: 20 },
      { start: 4, end: 24 },
    ]);
    // The overlap is 16 long: 6 of one tile, 4 in which they change, 6 of the other.
    const rise = [0.125, 0.375, 0.625, 0.875];
    expect([...weights[0]!]).toEqual([...Array(10).fill(1), ...rise.toReversed(), ...Array(6).fill(0)]);
    expect([...weights[1]!]).toEqual([...Array(6).fill(0), ...rise, ...Array(10).fill(1)]);
  });
});

/** Twice as large per side, each value repeated: what one value becomes hangs on nothing else. */
function doubled({ shape, data }: FloatTensor): FloatTensor {
  const [batch, channels, height, width] = shape as [number, number, number, number];
  const result = new Float32Array(4 * data.length);
  for (let i = 0; i < result.length; i++) {
    const x = i % (2 * width);
    const row = Math.floor(i / (2 * width));
    const image = Math.floor(row / (2 * height));
    const y = row % (2 * height);
    result[i] = Math.fround(3 * data[(image * height + (y >> 1)) * width + (x >> 1)]! + 1);
  }
  return floats([batch, channels, 2 * height, 2 * width], result);
}

/** One value for each 4 x 4 and a second channel with its negative. */
function reduced({ shape, data }: FloatTensor): FloatTensor {
  const [batch, , height, width] = shape as [number, number, number, number];
  const [rows, columns] = [height / 4, width / 4];
  const result = new Float32Array(batch * 2 * rows * columns);
  for (let b = 0; b < batch; b++) {
    for (let y = 0; y < rows; y++) {
      for (let x = 0; x < columns; x++) {
        const value = data[(b * height + 4 * y + 1) * width + 4 * x + 2]!;
        result[(2 * b * rows + y) * columns + x] = value;
        result[((2 * b + 1) * rows + y) * columns + x] = -value;
      }
    }
  }
  return floats([batch, 2, rows, columns], result);
}

describe('inTiles', () => {
  const tile = { size: 16, overlap: 6 };

  it('gives the very same as the whole for work on single pixels', async () => {
    for (const shape of [
      [1, 3, 50, 50],
      [2, 2, 23, 61],
      [1, 1, 16, 40],
      [3, 1, 5, 7],
    ]) {
      const input = randomFloats(shape);
      const result = await inTiles(input, { tile }, async (piece) => doubled(piece));
      expect(result.shape).toEqual(doubled(input).shape);
      expect(result.data).toEqual(doubled(input).data);
    }
  });

  it('does the same for work that makes pictures smaller, in units of what becomes one pixel', async () => {
    const input = randomFloats([2, 1, 92, 124]);
    const seen = new Set<string>();
    const result = await inTiles(input, { tile: { size: 8, overlap: 2 }, unit: 4 }, async (piece) => {
      seen.add(piece.shape.join());
      return reduced(piece);
    });
    expect(result).toEqual(reduced(input));
    // 23 and 31 units in 4 and 5 tiles.
    expect([...seen]).toEqual(['2,1,32,32']);
  });

  it('keeps a constant picture constant to the last bit', async () => {
    const result = await inTiles(floats([1, 1, 37, 53], new Float32Array(37 * 53)), { tile }, async ({ shape }) =>
      floats(shape, new Float32Array(shape[2]! * shape[3]!).fill(0.1)),
    );
    expect(new Set(result.data)).toEqual(new Set([Math.fround(0.1)]));
  });

  it('blends tiles that differ by their weights', async () => {
    let count = 0;
    const input = floats([1, 1, 24, 24], new Float32Array(576));
    const result = await inTiles(input, { tile: { size: 20, overlap: 16 } }, async ({ shape }) =>
      floats(shape, new Float32Array(400).fill(count++)),
    );
    const spans = tileSpans(24, { size: 20, overlap: 16 });
    const weights = blendWeights(spans);
    const weight = (tile: number, x: number) => weights[tile]![x - spans[tile]!.start] ?? 0;
    for (let y = 0; y < 24; y++) {
      for (let x = 0; x < 24; x++) {
        // The four tiles are 0 and 1 above, 2 and 3 below.
        expect(result.data[y * 24 + x]).toBeCloseTo(weight(1, x) + 2 * weight(1, y), 6);
      }
    }
  });

  it('works on one tile at a time', async () => {
    let [running, most, calls] = [0, 0, 0];
    await inTiles(randomFloats([1, 1, 40, 40]), { tile }, async (piece) => {
      most = Math.max(most, ++running);
      calls++;
      await new Promise((resolve) => setTimeout(resolve));
      running--;
      return piece;
    });
    expect({ most, calls }).toEqual({ most: 1, calls: 16 });
  });

  it('stops between two tiles when it is aborted', async () => {
    const controller = new AbortController();
    let calls = 0;
    const work = inTiles(randomFloats([1, 1, 40, 40]), { tile, signal: controller.signal }, async (piece) => {
      if (++calls === 3) controller.abort(new Error('enough'));
      return piece;
    });
    await expect(work).rejects.toThrow('enough');
    expect(calls).toBe(3);
  });
});

describe('tilesOf', () => {
  it('cuts out what lies at each place', () => {
    const input = floats(
      [1, 1, 4, 6],
      Float32Array.from({ length: 24 }, (_, i) => i),
    );
    const tiles = [...tilesOf(input, { tile: { size: 2, overlap: 1 }, unit: 2 })];
    expect(tiles.map(({ tile }) => [...tile.data])).toEqual([
      [0, 1, 2, 3, 6, 7, 8, 9, 12, 13, 14, 15, 18, 19, 20, 21],
      [2, 3, 4, 5, 8, 9, 10, 11, 14, 15, 16, 17, 20, 21, 22, 23],
    ]);
  });
});

describe('evenSample', () => {
  const rows = (size: number, share: number) => {
    const input = floats(
      [1, 1, size, 2],
      Float32Array.from({ length: 2 * size }, (_, i) => i >> 1),
    );
    return [...evenSample(input, share).data].filter((_, i) => i % 2 === 0);
  };

  it('takes pairs that begin in even places, from all over', () => {
    expect(rows(16, 0.5)).toEqual([2, 3, 6, 7, 10, 11, 14, 15]);
    expect(rows(16, 0.7)).toEqual([0, 1, 4, 5, 8, 9, 10, 11, 14, 15]);
    expect(rows(100, 0.04)).toEqual([24, 25, 74, 75]);
  });

  it('takes everything of an even size where the share is 1, and a pair at least', () => {
    const input = randomFloats([2, 3, 8, 6]);
    expect(maxDifference(evenSample(input, 1), input)).toBe(0);
    expect(rows(9, 1)).toEqual([0, 1, 2, 3, 4, 5, 6, 7]);
    expect(rows(8, 0.01)).toEqual([4, 5]);
    expect(rows(1, 0.5)).toEqual([0, 0]);
  });
});
