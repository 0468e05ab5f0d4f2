import { describe, expect, it } from 'vitest';
import { decimal, layers, seed, shape, size, wholeNumber } from '../../src/cli/values.ts';

describe('values of options', () => {
  it.each([
    [wholeNumber, '28', 28],
    [wholeNumber, '-1', -1],
    [decimal, '4.5', 4.5],
    [decimal, '-.5', -0.5],
    [decimal, '1e-3', 0.001],
    [seed, '9007199254740991', 9007199254740991],
    [seed, '9007199254740993', 9007199254740993n],
    [size, '1024x768', { width: 1024, height: 768 }],
    [layers, '7,8,9', [7, 8, 9]],
    [shape, '1x16x8x8', [1, 16, 8, 8]],
  ])('%o reads %s', (parse, text, value) => {
    expect(parse(text)).toEqual(value);
  });

  it.each([
    [wholeNumber, ['', '1.5', 'ten', '1e3', '0x10', '9'.repeat(30)]],
    [decimal, ['', ' ', 'high', 'NaN', 'Infinity', '1,5', '--1']],
    [seed, ['', '-1', '1.0', 'random', '9'.repeat(21)]],
    [size, ['', '1024', '1024x', 'x768', '1024*768', '-8x8', '1x2x3']],
    [layers, ['', '7;8', '-1', '7,', 'a fox']],
    [shape, ['', '0x1', '1x', '1,16', '-1', '1x1x1x1x1x1x1x1x1']],
  ])('%o refuses what is none', (parse, texts) => {
    for (const text of texts) expect(() => parse(text), text).toThrow(/^give /);
  });
});
