import { describe, expect, it } from 'vitest';
import { MmditxError } from '../../src/errors.ts';
import { clipTokenizer, t5Tokenizer } from '../../src/text/tokenizer.ts';
import { trainClipTokenizer, trainT5Tokenizer } from '../../src/training/tokenizer-training.ts';

const captions = Array.from({ length: 4 }, () => 'a red apple and a green pear');
const clipJson = trainClipTokenizer(captions, { vocabularySize: 560 });
const t5Json = trainT5Tokenizer(captions, { vocabularySize: 120 });

describe('clipTokenizer', () => {
  it('gives the ids of a text without the ids around it, which it reads from the file', () => {
    const tokenizer = clipTokenizer(clipJson);
    const { model } = JSON.parse(clipJson) as { model: { vocab: Record<string, number> } };
    expect(tokenizer.start).toBe(model.vocab['<|startoftext|>']);
    expect(tokenizer.end).toBe(model.vocab['<|endoftext|>']);
    expect(tokenizer.encode('Red  Apple')).toEqual([model.vocab['red</w>'], model.vocab['apple</w>']]);
    expect(tokenizer.encode('')).toEqual([]);
  });

  it('encodes texts of any length without cutting', () => {
    expect(clipTokenizer(clipJson).encode('apple '.repeat(5000))).toHaveLength(5000);
  });
});

describe('t5Tokenizer', () => {
  it('gives the ids of a text without the end id, which it reads from the file', () => {
    const tokenizer = t5Tokenizer(t5Json);
    const { model } = JSON.parse(t5Json) as { model: { vocab: [string, number][] } };
    const id = (piece: string) => model.vocab.findIndex(([text]) => text === piece);
    expect([tokenizer.pad, tokenizer.end]).toEqual([0, 1]);
    expect(tokenizer.encode(' red   pear ')).toEqual([id('▁red'), id('▁pear')]);
    expect(tokenizer.encode('')).toEqual([]);
  });
});

describe('a file that is no tokenizer', () => {
  it.each([
    ['broken JSON', '{"model": '],
    ['no object', '[]'],
    ['null', 'null'],
    ['a model without a vocabulary', '{"model": {"type": "BPE"}, "added_tokens": []}'],
    ['a model of an unknown type', '{"model": {"type": "XYZ"}}'],
    ['a pre-tokenizer of an unknown type', clipJson.replace('"ByteLevel"', '"XYZ"')],
  ])('is refused: %s', (_, json) => {
    for (const read of [clipTokenizer, t5Tokenizer]) {
      expect(() => read(json)).toThrow(MmditxError);
      expect(() => read(json)).toThrow(/^The tokenizer\.json for (CLIP|T5) cannot be used: .+\.$/);
    }
  });

  it("is refused: the other encoder's", () => {
    expect(() => clipTokenizer(t5Json)).toThrow(/one token before and one after a text/);
    expect(() => t5Tokenizer(clipJson)).toThrow(/one token after a text/);
  });
});
