import { expect, test } from 'vitest';
import { z } from 'zod';
import { isCount, isFiniteNumber, isText, listOf, parseJson, recordOf, shortList } from '../../src/weights/json.ts';

const refuse = (fault: string) => new Error(`it ${fault}`);

test('a text is parsed, or refused with what is wrong', () => {
  expect(parseJson(' {"a": [1]} ', refuse)).toEqual({ a: [1] });
  expect(() => parseJson('{"a": \n', refuse)).toThrow(/^it is not JSON$/);
  expect(() => parseJson(`"${'a'.repeat(2 ** 24)}"`, refuse)).toThrow(/^it is longer than 16777216 characters$/);
});

test('a record is an object whose values all pass', () => {
  const texts = recordOf(isText);
  const odd = JSON.parse('{"__proto__": "b", "": "c"}');
  expect(texts.parse(odd)).toBe(odd);
  for (const wrong of [null, 1, 'a', ['a'], { a: 'b', c: 1 }, JSON.parse('{"__proto__": 1}')]) {
    expect(texts.safeParse(wrong).success).toBe(false);
  }
});

test('a list is an array whose items all pass', () => {
  expect(listOf(isCount).parse([0, 2 ** 53 - 1])).toEqual([0, 2 ** 53 - 1]);
  for (const wrong of [null, { length: 0 }, [1, -1], [0.5], [2 ** 53], ['1'], [null]]) {
    expect(listOf(isCount).safeParse(wrong).success).toBe(false);
  }
  expect(listOf(isFiniteNumber).safeParse(JSON.parse('[1e999]')).success).toBe(false);
});

test('a short list is measured before its items are looked at', () => {
  const list = shortList(z.string(), 2);
  expect(list.parse(['a', 'b'])).toEqual(['a', 'b']);
  expect(list.safeParse([1]).error!.issues[0]!.path).toEqual([0]);
  expect(list.safeParse([1, 2, 3]).error!.issues).toMatchObject([{ code: 'too_big' }]);
});

test('a long list of wrong values has one issue', () => {
  const wrong = Array(1000).fill(1);
  expect(listOf(isText).safeParse(wrong).error!.issues).toHaveLength(1);
  expect(recordOf(isText).safeParse({ ...wrong }).error!.issues).toHaveLength(1);
});
