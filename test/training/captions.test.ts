import { describe, expect, it, test } from 'vitest';
import { MmditxError } from '../../src/errors.ts';
import { torchGenerator } from '../../src/sampling/noise.ts';
import { type CaptionOptions, captionVariants, drawCaption } from '../../src/training/captions.ts';

/** How often each text comes in many draws. */
function counts(captions: readonly string[], options: CaptionOptions, draws = 2000): Map<string, number> {
  const random = torchGenerator(7);
  const found = new Map<string, number>();
  for (let i = 0; i < draws; i++) {
    const text = drawCaption(captions, options, random);
    found.set(text, (found.get(text) ?? 0) + 1);
  }
  return found;
}

const only = (captions: readonly string[], options: CaptionOptions) => [...counts(captions, options, 50).keys()];

/** Each text came about as often as this share: five standard deviations. */
function expectShares(found: Map<string, number>, shares: Record<string, number>, draws = 2000): void {
  expect([...found.keys()].sort()).toEqual(Object.keys(shares).sort());
  for (const [text, share] of Object.entries(shares)) {
    expect(Math.abs(found.get(text)! - draws * share)).toBeLessThan(5 * Math.sqrt(draws * share * (1 - share)));
  }
}

describe('drawCaption', () => {
  it('leaves a caption as it is written by default', () => {
    expect(only(['  a cat,dog ,  {x} '], {})).toEqual(['  a cat,dog ,  {x} ']);
    expect(only([], {})).toEqual(['']);
    expect(only([''], {})).toEqual(['']);
  });

  it('repeats itself with an equal generator', () => {
    const options = { shuffle: true, dropRate: 0.2, tagDropRate: 0.3 };
    const draw = () => {
      const random = torchGenerator(3);
      return Array.from({ length: 20 }, () => drawCaption(['a, b, {c|d}', 'e, f'], options, random));
    };
    expect(draw()).toEqual(draw());
    expect(new Set(draw()).size).toBeGreaterThan(5);
  });

  it('chooses one of several captions, or takes the first', () => {
    expectShares(counts(['a', 'b', 'c', 'c'], {}), { a: 0.25, b: 0.25, c: 0.5 });
    expect(only(['a', 'b'], { wildcards: false })).toEqual(['a']);
  });

  it('chooses parts in braces, and knows braces that are meant', () => {
    expectShares(counts(['a {red|dark blue|} {x|y}'], {}), {
      'a red x': 1 / 6,
      'a red y': 1 / 6,
      'a dark blue x': 1 / 6,
      'a dark blue y': 1 / 6,
      'a  x': 1 / 6,
      'a  y': 1 / 6,
    });
    expect(only(['{{a|b}} {c} {} {d'], {})).toEqual(['{a|b} {c} {} {d']);
    expect(only(['{a|b} {{c}}'], { wildcards: false })).toEqual(['{a|b} {{c}}']);
  });

  it('replaces the names it knows by their words, which may have choices', () => {
    const words = { ground: 'white', sky: '{grey|blue}', $1: '$&' };
    expect(only(['on {ground} {other} {$1}'], { words })).toEqual(['on white {other} $&']);
    expect(only(['on {ground}'], { words, wildcards: false })).toEqual(['on white']);
    expect(only(['{{ground}}'], { words })).toEqual(['{ground}']);
    expectShares(counts(['{sky}'], { words }), { grey: 0.5, blue: 0.5 });
    expectShares(counts(['{no|{ground}} ground'], { words }), { 'no ground': 0.5, 'white ground': 0.5 });
    expect(only(['{toString} {__proto__}'], { words })).toEqual(['{toString} {__proto__}']);
  });

  it('sets prefix and suffix around each of several captions, and replaces in them, too', () => {
    const options = { prefix: 'photo of', suffix: 'on {ground}', words: { ground: 'grass' } };
    expectShares(counts(['a cat', 'a dog'], options), {
      'photo of a cat on grass': 0.5,
      'photo of a dog on grass': 0.5,
    });
    expect(only([''], options)).toEqual(['photo of on grass']);
  });

  it('shuffles tags but those kept at the start', () => {
    const sixth = 1 / 6;
    expectShares(counts(['a,b , c'], { shuffle: true }), {
      'a, b, c': sixth,
      'a, c, b': sixth,
      'b, a, c': sixth,
      'b, c, a': sixth,
      'c, a, b': sixth,
      'c, b, a': sixth,
    });
    expectShares(counts(['a, b, c'], { shuffle: true, keepTokens: 1 }), { 'a, b, c': 0.5, 'a, c, b': 0.5 });
    expect(only(['a, b'], { shuffle: true, keepTokens: 9 })).toEqual(['a, b']);
    expectShares(counts(['a, x; b'], { shuffle: true, separator: ';' }), { 'a, x, b': 0.5, 'b, a, x': 0.5 });
  });

  it('keeps tags up to a separator, and from a second one on', () => {
    expectShares(counts(['a, b ||| c, d ||| e'], { shuffle: true, keepTokens: 1 }), {
      'a, b, c, d, e': 0.5,
      'a, b, d, c, e': 0.5,
    });
    expect(only(['a ||| b, c'], {})).toEqual(['a, b, c']);
    expect(only(['a ||| b'], { keepTokensSeparator: '' })).toEqual(['a ||| b']);
  });

  it('leaves tags out, but none of those kept', () => {
    expectShares(counts(['a, b, c'], { tagDropRate: 0.25, keepTokens: 1 }), {
      'a, b, c': 0.75 ** 2,
      'a, b': 0.75 * 0.25,
      'a, c': 0.75 * 0.25,
      a: 0.25 ** 2,
    });
    expect(only(['a, b ||| c, d'], { tagDropRate: 1 })).toEqual(['a, b']);
  });

  it('drops whole captions, prefix and all', () => {
    expectShares(counts(['a'], { dropRate: 0.1, prefix: 'b' }), { 'b a': 0.9, '': 0.1 });
    expect(only(['a'], { dropRate: 1 })).toEqual(['']);
  });

  test.each([
    [{ dropRate: 1.1 }, 'dropRate is 1.1'],
    [{ tagDropRate: Number.NaN }, 'tagDropRate is NaN'],
    [{ keepTokens: -1 }, 'keepTokens is -1'],
    [{ separator: '' }, 'separator'],
  ])('refuses %j', (options, words) => {
    expect(() => drawCaption(['a'], options, torchGenerator(0))).toThrow(MmditxError);
    expect(() => drawCaption(['a'], options, torchGenerator(0))).toThrow(words);
  });

  it('takes time in proportion to the text', () => {
    const long = `${'{|'.repeat(50_000)}${'|'.repeat(50_000)}${'a,'.repeat(50_000)}`;
    const start = performance.now();
    drawCaption([long], { shuffle: true, tagDropRate: 0.5, words: { a: 'b' } }, torchGenerator(0));
    expect(performance.now() - start).toBeLessThan(1000);
  });
});

describe('captionVariants', () => {
  test.each<[string[], CaptionOptions]>([
    [['a', 'b', 'b'], {}],
    [['a', 'b'], { wildcards: false }],
    [['{a|b|a} {c|d}', 'e'], { dropRate: 0.1, prefix: 'x', words: { y: 'z' } }],
    [['a, b, c, d'], { shuffle: true, keepTokens: 1 }],
    [['a, b, {c|c, d}'], { shuffle: true, tagDropRate: 0.4 }],
    [['a, b ||| c, d'], { tagDropRate: 0.4, dropRate: 0.3 }],
    [['a, b'], { tagDropRate: 1 }],
    [[], {}],
  ])('gives what comes up in many draws of %j with %j', (captions, options) => {
    const variants = captionVariants(captions, options)!;
    expect(new Set(variants).size).toBe(variants.length);
    expect([...variants].sort()).toEqual([...counts(captions, options, 5000).keys()].sort());
  });

  it('gives the empty text alone where all captions are dropped', () => {
    expect(captionVariants(['a'], { dropRate: 1 })).toEqual(['']);
  });

  it('gives up soon where there are too many', () => {
    const start = performance.now();
    const tags = Array.from({ length: 40 }, (_, i) => `tag ${i}`).join(', ');
    expect(captionVariants([tags], { shuffle: true })).toBeUndefined();
    expect(captionVariants([tags], { tagDropRate: 0.1 })).toBeUndefined();
    expect(captionVariants(['{a|b}'.repeat(1000)], {})).toBeUndefined();
    expect(captionVariants(['a, b, c, d, e, f, g'], { shuffle: true })).toBeUndefined(); // 7! = 5040
    expect(performance.now() - start).toBeLessThan(200);
    expect(captionVariants(['a, b, c, d, e, f'], { shuffle: true })).toHaveLength(720);
  });

  it('counts the texts of all captions together', () => {
    expect(captionVariants(['a', 'b', 'c'], {}, 3)).toHaveLength(3);
    expect(captionVariants(['a', 'b', 'c', 'd'], {}, 3)).toBeUndefined();
    expect(captionVariants(['{a|b|c}'], {}, 3)).toHaveLength(3);
    expect(captionVariants(['{a|b|c|d}'], {}, 3)).toBeUndefined();
    expect(captionVariants(['a', 'b', 'c'], { dropRate: 0.5 }, 3)).toBeUndefined();
  });
});
