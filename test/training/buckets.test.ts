import { readFileSync } from 'node:fs';
import { describe, expect, it, test } from 'vitest';
import { MmditxError } from '../../src/errors.ts';
import { aspectBuckets, coverFit } from '../../src/training/buckets.ts';

type Size = [number, number];
interface Choice {
  image: Size;
  bucket: Size;
  resized: Size;
}
interface Case {
  resolution: Size;
  min: number;
  max: number;
  step: number;
  buckets: Size[];
  select: Choice[];
  select_no_upscale: Choice[];
}
const { cases }: { cases: Case[] } = JSON.parse(
  readFileSync(new URL('../golden/buckets.json', import.meta.url), 'utf8'),
);

describe.each(cases)("kohya's buckets for $resolution by $step from $min to $max", (golden) => {
  const { resolution, min, max, step } = golden;

  it('have the same sizes', () => {
    expect(aspectBuckets({ resolution, min, max, step }).sizes).toEqual(golden.buckets);
  });

  it('are chosen for the same pictures', () => {
    const buckets = aspectBuckets({ resolution, min, max, step });
    for (const { image, ...expected } of golden.select) expect(buckets.fit(image)).toMatchObject(expected);
    expect(golden.select.length).toBeGreaterThan(0);
  });

  it('are chosen for the same pictures without enlarging', () => {
    const buckets = aspectBuckets({ resolution, min, max, step, upscale: false });
    for (const { image, ...expected } of golden.select_no_upscale) expect(buckets.fit(image)).toMatchObject(expected);
    expect(golden.select_no_upscale.length).toBeGreaterThan(0);
  });
});

describe('a bucket', () => {
  it('has the defaults of kohya', () => {
    expect(aspectBuckets({ resolution: 512 })).toMatchObject({ sizes: cases[1]!.buckets });
  });

  it('leaves a picture of its size as it is', () => {
    const buckets = aspectBuckets({ resolution: [512, 256], min: 128, max: 1024, step: 64 });
    for (const size of buckets.sizes)
      expect(buckets.fit(size)).toEqual({ bucket: size, resized: size, cropped: 0, scale: 1 });
  });

  it('tells how much is cropped and enlarged', () => {
    const buckets = aspectBuckets({ resolution: 512 });
    const { cropped, scale } = buckets.fit([640, 480]); // 597 x 448, of which 576 x 448 is shown
    expect(cropped).toBeCloseTo(21 / 597, 10);
    expect(scale).toBeCloseTo(448 / 480, 2);
    expect(buckets.fit([100, 100]).scale).toBe(5.12);
  });

  it('is never smaller than a step, nor its picture smaller than it', () => {
    const buckets = aspectBuckets({ resolution: 512, upscale: false });
    for (const image of [
      [10, 20],
      [1, 5000],
      [63, 1000],
      [20_000, 1],
      [3, 200_000],
    ] satisfies Size[]) {
      const { bucket, resized } = buckets.fit(image);
      for (const side of [0, 1] as const) {
        expect(bucket[side] % 64).toBe(0);
        expect(bucket[side]).toBeGreaterThan(0);
        expect(resized[side]).toBeGreaterThanOrEqual(bucket[side]);
      }
    }
  });
});

test('a picture of an exact size is covered by the smallest that has its proportions', () => {
  expect(coverFit([200, 100], [64, 64])).toEqual({ bucket: [64, 64], resized: [128, 64], cropped: 0.5, scale: 0.64 });
  expect(coverFit([100, 300], [64, 64]).resized).toEqual([64, 192]);
});

test.each([
  [{ resolution: 512, step: 20 }, 'multiple of 8'],
  [{ resolution: 512, step: 0 }, 'step is 0'],
  [{ resolution: 512, step: 0.5 }, 'step is 0.5'],
  [{ resolution: Number.NaN }, 'width is NaN'],
  [{ resolution: 512, max: 1e9 }, 'max is 1000000000'],
  [{ resolution: 512, min: 250 }, 'min is 250'],
  [{ resolution: 512, max: 1000 }, 'multiple of step'],
  [{ resolution: 128 }, 'lower min'],
  [{ resolution: [512, 2048] as const }, 'raise max'],
])('refuses %j', (options, words) => {
  expect(() => aspectBuckets(options)).toThrow(MmditxError);
  expect(() => aspectBuckets(options)).toThrow(words);
});
