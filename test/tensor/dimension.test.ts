import { describe, expect, it } from 'vitest';
import {
  type Dimension,
  dimensionText,
  dividedBy,
  evaluate,
  exactQuotient,
  plus,
  sameDimension,
  sameShape,
  symbol,
  times,
  volume,
} from '../../src/tensor/dimension.ts';

const [rows, columns, batch] = ['rows', 'columns', 'batch'].map(symbol) as [Dimension, Dimension, Dimension];
const sizes = new Map([
  ['rows', 5],
  ['columns', 7],
  ['batch', 2],
]);

describe('sizes that are known only when a program runs', () => {
  it('are equal whatever the order they were computed in', () => {
    expect(sameDimension(times(rows, columns), times(columns, rows))).toBe(true);
    expect(sameDimension(plus(rows, columns, 1), plus(1, plus(columns, rows)))).toBe(true);
    expect(sameDimension(times(plus(rows, 1), columns), plus(times(rows, columns), columns))).toBe(true);
    expect(sameDimension(times(rows, rows), times(2, rows))).toBe(false);
    expect(sameDimension(rows, 5)).toBe(false);
  });

  it('become numbers again where the symbols cancel', () => {
    expect(plus(rows, times(-1, rows))).toBe(0);
    expect(plus(rows, 3, times(-1, rows))).toBe(3);
    expect(times(rows, 0)).toBe(0);
    expect(volume([2, 3, 4])).toBe(24);
    expect(volume([])).toBe(1);
  });

  it('have the value of the same arithmetic on numbers', () => {
    const compute = (a: Dimension, b: Dimension, c: Dimension) =>
      times(plus(times(2, a, a), b, -3), plus(c, times(b, a)));
    expect(evaluate(compute(rows, columns, batch), sizes)).toBe(compute(5, 7, 2));
    expect(evaluate(42, new Map())).toBe(42);
    expect(() => evaluate(times(rows, symbol('depth')), sizes)).toThrow(/"depth" is not known/);
  });

  it('are floor-divided where the result does not depend on the symbols', () => {
    expect(dividedBy(9, 2)).toBe(4);
    expect(dividedBy(-1, 2)).toBe(-1);
    // (4 rows + 3) / 2 is 2 rows + 1 for every number of rows.
    expect(sameDimension(dividedBy(plus(times(4, rows), 3), 2)!, plus(times(2, rows), 1))).toBe(true);
    expect(dividedBy(plus(times(3, rows), 4), 2)).toBeUndefined();
  });

  it('are divided exactly or not at all', () => {
    const area = times(6, rows, columns);
    expect(sameDimension(exactQuotient(area, times(2, columns))!, times(3, rows))).toBe(true);
    expect(exactQuotient(area, area)).toBe(1);
    expect(exactQuotient(area, 4)).toBeUndefined();
    expect(exactQuotient(area, batch)).toBeUndefined();
    expect(exactQuotient(area, times(rows, rows))).toBeUndefined();
    expect(exactQuotient(plus(area, rows), times(2, rows))).toBeUndefined();
    expect(exactQuotient(plus(rows, 1), plus(rows, 1))).toBe(1);
    expect(exactQuotient(plus(rows, 1), plus(columns, 1))).toBeUndefined();
    expect(exactQuotient(7, 2)).toBeUndefined();
    expect(exactQuotient(6, 0)).toBeUndefined();
  });

  it('are compared axis by axis', () => {
    expect(sameShape([batch, times(rows, 2)], [batch, plus(rows, rows)])).toBe(true);
    expect(sameShape([batch], [batch, 1])).toBe(false);
  });

  it('are written for people', () => {
    expect(dimensionText(plus(times(2, rows, columns), batch, -1))).toMatch(/2\*columns\*rows/);
    expect(dimensionText(plus(rows, 2))).toBe('rows + 2');
    expect(dimensionText(times(3, rows))).toBe('3*rows');
  });
});
