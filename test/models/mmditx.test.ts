import { describe, expect, it } from 'vitest';
import { centreCorner, timestepEmbedding } from '../../src/models/mmditx.ts';
import { positionTable } from '../../src/training/initial.ts';
import { golden, readGolden } from '../support/golden.ts';
import { maxDifference } from '../support/run.ts';

const tensors = readGolden('mmdit');

describe('timestep embedding', () => {
  it('agrees with the reference up to the last bit of two frequencies', () => {
    const embedding = timestepEmbedding([731.25, 88], 256);
    expect(maxDifference(embedding, golden(tensors, 'A.mid.t_freq'))).toBeLessThan(3e-5);
    const exact = timestepEmbedding([1000], 256);
    const reference = golden(tensors, 'B.mid.t_freq').data;
    const differing = [...exact.data].filter((value, i) => Math.abs(value - Number(reference[i])) > 1e-6);
    expect(differing.length).toBeLessThanOrEqual(4);
  });
});

describe('position table', () => {
  it('agrees with the reference at the small size', () => {
    const table = positionTable({ tableSize: 24, hiddenSize: 128 }, { grid: 8, span: 2 });
    expect(table.shape).toEqual([1, 576, 128]);
    expect(maxDifference(table, golden(tensors, 'pos.table_tiny'))).toBeLessThan(1e-6);
  });

  it('agrees with the reference at the released size', () => {
    const width = 1536;
    const rows = [0, 1, 159, 160, 223, 224, 383];
    const expected = golden(tensors, 'pos.table_real_diag').data as Float32Array;
    for (const [i, row] of rows.entries()) {
      // A table of one entry that lies where this one does in the released table: (row - 160) / 4.
      const position = (row - 160) / 4;
      const table = positionTable(
        { tableSize: 1, hiddenSize: width },
        { grid: 1 + 2 * position, span: 1 + 2 * position },
      );
      expect(maxDifference(table, { data: expected.subarray(i * width, (i + 1) * width) })).toBeLessThan(1e-6);
    }
  });

  it('is cropped in its middle', () => {
    expect([...centreCorner(384, 64, 91).data]).toEqual([160n, 146n]);
  });
});
