import { describe, expect, it } from 'vitest';
import { T5_XXL } from '../../src/models/config.ts';
import { bucketOf, relativeBuckets } from '../../src/models/t5.ts';
import { golden, readGolden } from '../support/golden.ts';

describe('relative position buckets', () => {
  it('agree with the reference for every distance', () => {
    const expected = [...golden(readGolden('text'), 't5.rel_buckets').data];
    const distances = Array.from({ length: 511 }, (_, i) => i - 255);
    expect(distances.map((distance) => bucketOf(distance, T5_XXL.buckets, T5_XXL.maxDistance))).toEqual(expected);
  });

  it('are laid out by query, then key', () => {
    const { data, shape } = relativeBuckets(3, T5_XXL);
    expect(shape).toEqual([3, 3]);
    expect([...data]).toEqual([0, 17, 18, 1, 0, 17, 2, 1, 0]);
  });
});
