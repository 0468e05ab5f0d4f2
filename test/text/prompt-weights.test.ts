import { describe, expect, it } from 'vitest';
import { MmditxError } from '../../src/errors.ts';
import { type PromptSyntax, parsePromptWeights } from '../../src/text/prompt-weights.ts';

/** Segments as `text|weight`, weights to six digits. */
function parse(prompt: string, syntax?: PromptSyntax): string[] {
  return parsePromptWeights(prompt, syntax).map(({ text, weight }) => `${text}|${Number(weight.toPrecision(6))}`);
}

// What ComfyUI's parser gives for each of these, worked out from its rules (brackets, then the last colon).
describe("prompt weights, 'comfy' (the default)", () => {
  it.each([
    ['', []],
    ['plain text', ['plain text|1']],
    ['a (red:1.3) ball', ['a |1', 'red|1.3', ' ball|1']],
    ['((blue)) cube', ['blue|1.21', ' cube|1']],
    ['(a (b:0.5) c:2)', ['a |2', 'b|0.5', ' c|2']],
    ['((a:1.5))', ['a|1.5']],
    ['(a (b) c)', ['a |1.1', 'b|1.21', ' c|1.1']],
    ['(time 12:30: night)', ['time 12:30: night|1.1']],
    ['(ratio 16:9)', ['ratio 16|9']],
    ['(a: 1.2 )', ['a|1.2']],
    ['(a:-0.5)(b:.5)(c:1e-1)', ['a|-0.5', 'b|0.5', 'c|0.1']],
    ['(a:nan) (b:inf) (c:1e99) (d:)', ['a:nan|1.1', ' |1', 'b:inf|1.1', ' |1', 'c:1e99|1.1', ' |1', 'd:|1.1']],
    ['(:1.2)', [':1.2|1.1']],
    ['()', []],
    ['[word]', ['[word]|1']],
    ['smile \\:\\) \\(not weighted\\)', ['smile \\:) (not weighted)|1']],
    ['(open \\(:1.4)', ['open (|1.4']],
    ['C:\\\\(x)', ['C:\\(x)|1']],
    ['(unclosed', ['(unclosed|1']],
    ['a ((b) c', ['a |1', '((b) c|1']],
    ['((b)', ['(b|1.1']],
    ['stray) and (b)', ['stray) and (b)|1']],
  ])('reads %j', (prompt, expected) => {
    expect(parse(prompt)).toEqual(expected);
  });
});

describe("prompt weights, 'a1111'", () => {
  it.each([
    ['', []],
    ['an (important) word', ['an |1', 'important|1.1', ' word|1']],
    ['less [of this] please', ['less |1', 'of this|0.909091', ' please|1']],
    ['(a (b:0.5) c:2)', ['a |2', 'b|1', ' c|2']],
    ['[(a)]', ['a|1']],
    ['(x)(y)', ['xy|1.1']],
    ['(unbalanced', ['unbalanced|1.1']],
    ['\\(literal\\] \\\\ [\\[]', ['(literal] \\ |1', '[|0.909091']],
    ['12:30) [a:0.5]', ['12:30) |1', 'a:0.5|0.909091']],
    ['(a:1.2.3)', ['a:1.2.3)|1.1']],
  ])('reads %j', (prompt, expected) => {
    expect(parse(prompt, 'a1111')).toEqual(expected);
  });
});

describe('prompt weights, any syntax', () => {
  it("changes nothing with 'none'", () => {
    expect(parse('a (red:1.3) \\(ball\\) [x]', 'none')).toEqual(['a (red:1.3) \\(ball\\) [x]|1']);
    expect(parse('', 'none')).toEqual([]);
  });

  it('names an unknown syntax', () => {
    expect(() => parse('x', 'a11' as PromptSyntax)).toThrow(/'a11' is not one of comfy, a1111, none/);
  });

  it.each(['comfy', 'a1111'] as const)('refuses hostile nesting (%s)', (syntax) => {
    expect(parse(`${'('.repeat(100)}x${')'.repeat(100)}`, syntax)).toHaveLength(1);
    expect(() => parse(`${'('.repeat(5000)}x${')'.repeat(5000)}`, syntax)).toThrow(MmditxError);
  });

  it.each(['comfy', 'a1111'] as const)('is quick on 100,000 hostile characters (%s)', (syntax) => {
    const started = performance.now();
    for (const prompt of [
      `(${':'.repeat(1e5)})`,
      `(:${' '.repeat(1e5)}`,
      `(a:${'1'.repeat(1e5)}x)`,
      '(a:1)'.repeat(2e4),
      '(a:1'.repeat(20).padEnd(1e5, ':'),
      '\\'.repeat(1e5),
      ')'.repeat(1e5),
    ]) {
      parse(prompt, syntax);
    }
    expect(performance.now() - started).toBeLessThan(5000);
  });
});
