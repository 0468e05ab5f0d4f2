import { describe, expect, it } from 'vitest';
import * as t from '../../src/tensor/index.ts';
import { evaluateProgram, inputLike, randomFloats } from '../support/run.ts';

describe('the largest attention logit', () => {
  it('is that of all heads and all attentions of a program', async () => {
    const [heads, tokens, width] = [2, 3, 8];
    const values = { q: randomFloats([1, tokens, width], 1), k: randomFloats([1, tokens, width], 2) };
    const [q, k] = [inputLike('q', values.q), inputLike('k', values.k)];
    const first = t.attention(q, k, k, { heads });
    const result = t.attention(t.multiply(first, 10), k, k, { heads, scale: 2 });
    const logit = t.largestAttentionLogit([result])!;
    const outputs = await evaluateProgram({ logit, first }, values);

    const logits = (queries: ArrayLike<number>, scale: number) => {
      let most = 0;
      for (let head = 0; head < heads; head++) {
        for (let i = 0; i < tokens; i++) {
          for (let j = 0; j < tokens; j++) {
            let sum = 0;
            for (let c = 0; c < width / heads; c++) {
              const column = (head * width) / heads + c;
              sum += queries[i * width + column]! * values.k.data[j * width + column]!;
            }
            most = Math.max(most, Math.abs(sum * scale));
          }
        }
      }
      return most;
    };
    const second = Float32Array.from(outputs.first!.data as Float32Array, (value) => 10 * value);
    const expected = Math.max(logits(values.q.data, 0.5), logits(second, 2));
    expect(Number(outputs.logit!.data[0])).toBeCloseTo(expected, 4);
  });

  it('is undefined without attention', () => {
    expect(t.largestAttentionLogit([t.input('x', 'float32', [2])])).toBeUndefined();
  });
});
