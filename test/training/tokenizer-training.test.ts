import { Tokenizer } from '@huggingface/tokenizers';
import { describe, expect, it } from 'vitest';
import { MmditxError } from '../../src/errors.ts';
import { clipTokenizer, t5Tokenizer } from '../../src/text/tokenizer.ts';
import { trainClipTokenizer, trainT5Tokenizer } from '../../src/training/tokenizer-training.ts';

const styles = ['flat', 'glossy', 'hand-drawn'];
const colours = ['red', 'green', 'dark blue', 'yellow', 'white'];
const things = ['apple', 'banana', 'car', 'dog', 'rocket', 'house', 'tree', 'penguin', 'umbrella', 'guitar', 'pizza'];
const captions = styles.flatMap((style) =>
  things.flatMap((thing) => colours.map((colour) => `A ${style} picture of a ${thing}, on a ${colour} background`)),
);
const sentence = 'A glossy picture of a penguin, on a dark blue background';

function decode(json: string, ids: readonly number[]): string {
  return new Tokenizer(JSON.parse(json) as object, { clean_up_tokenization_spaces: false }).decode([...ids], {
    skip_special_tokens: true,
  });
}

function tokens(json: string, text: string): string[] {
  return new Tokenizer(JSON.parse(json) as object, {}).encode(text, { add_special_tokens: false }).tokens;
}

describe('trainClipTokenizer', () => {
  const json = trainClipTokenizer(captions, { vocabularySize: 700 });
  const tokenizer = clipTokenizer(json);

  it('makes one token of each word that the captions repeat', () => {
    expect(tokens(json, sentence)).toEqual(
      ['a', 'glossy', 'picture', 'of', 'a', 'penguin', ',', 'on', 'a', 'dark', 'blue', 'background'].map(
        (word) => `${word}</w>`,
      ),
    );
  });

  it('gives the captions back, in lower case', () => {
    expect(decode(json, tokenizer.encode(sentence)).replace(' ,', ',')).toBe(sentence.toLowerCase());
  });

  it('spells words it has never seen, in any script', () => {
    for (const text of ['zebra', 'penguinlike', 'naïve', '日本 👩‍🚀']) {
      const ids = tokenizer.encode(text);
      expect(ids.length).toBeGreaterThan(1);
      expect(ids).not.toContain(tokenizer.end);
      expect(decode(json, ids)).toBe(text);
    }
  });

  it('lays the vocabulary out as the published one: bytes, bytes at the end of a word, merges, start, end', () => {
    const { vocab, merges } = (JSON.parse(json) as { model: { vocab: Record<string, number>; merges: string[] } })
      .model;
    const size = Object.keys(vocab).length;
    expect([vocab['!'], vocab.a, vocab['!</w>'], vocab['a</w>']]).toEqual([0, 64, 256, 320]);
    expect(vocab[merges[0]!.replace(' ', '')]).toBe(512);
    expect(size).toBeLessThanOrEqual(700);
    expect([tokenizer.start, tokenizer.end]).toEqual([size - 2, size - 1]);
    expect(new Set(Object.values(vocab)).size).toBe(size);
  });

  it('stops at the vocabulary size, having merged the most frequent pairs', () => {
    const small = trainClipTokenizer(captions, { vocabularySize: 540 });
    expect(clipTokenizer(small).end).toBe(539);
    expect(tokens(small, 'picture').length).toBeLessThan('picture'.length);
    expect(tokens(small, 'zebra').length).toBe(5);
  });

  it('is the same on every run', () => {
    expect(trainClipTokenizer(captions, { vocabularySize: 700 })).toBe(json);
  });

  it('refuses a vocabulary without room for the bytes', () => {
    expect(() => trainClipTokenizer(captions, { vocabularySize: 513 })).toThrow(MmditxError);
    expect(clipTokenizer(trainClipTokenizer([], { vocabularySize: 514 })).end).toBe(513);
  });
});

describe('trainT5Tokenizer', () => {
  const json = trainT5Tokenizer(captions, { vocabularySize: 200 });
  const tokenizer = t5Tokenizer(json);
  const unknown = 2;

  it('makes one token of each word that the captions repeat', () => {
    expect(tokens(json, sentence)).toEqual([
      '▁A',
      '▁glossy',
      '▁picture',
      '▁of',
      '▁a',
      '▁penguin',
      ',',
      '▁on',
      '▁a',
      '▁dark',
      '▁blue',
      '▁background',
    ]);
  });

  it('gives the captions back, case and punctuation kept', () => {
    expect(captions.map((caption) => decode(json, tokenizer.encode(caption)))).toEqual(captions);
  });

  it('spells words it has never seen with known pieces', () => {
    for (const text of ['zebra', 'Quixotic Jazz', '42% "grape" {x}~', 'penguinlike']) {
      const ids = tokenizer.encode(text);
      expect(ids.length).toBeGreaterThan(1);
      expect(ids).not.toContain(unknown);
      expect(decode(json, ids)).toBe(text);
    }
    expect(tokenizer.encode('日本')).toContain(unknown);
  });

  it('starts with pad, end and unknown, then goes from the most to the least probable piece', () => {
    const { vocab } = (JSON.parse(json) as { model: { vocab: [string, number][] } }).model;
    expect(vocab.slice(0, 3).map(([piece]) => piece)).toEqual(['<pad>', '</s>', '<unk>']);
    expect([tokenizer.pad, tokenizer.end]).toEqual([0, 1]);
    const scores = vocab.slice(3).map(([, score]) => score);
    expect(scores).toEqual(scores.toSorted((a, b) => b - a));
    expect(scores.reduce((sum, score) => sum + Math.exp(score), 0)).toBeCloseTo(1, 1);
    expect(vocab[3]![0]).toBe('▁a');
  });

  it('keeps the pieces that matter most when the vocabulary is tight', () => {
    // 94 printable ASCII characters, the word start and three special tokens leave room for 12 pieces.
    const small = trainT5Tokenizer(captions, { vocabularySize: 110 });
    const { vocab } = (JSON.parse(small) as { model: { vocab: unknown[] } }).model;
    expect(vocab).toHaveLength(110);
    expect(tokens(small, 'a picture background')).toEqual(['▁a', '▁picture', '▁background']);
    expect(tokens(small, 'umbrella').length).toBeGreaterThan(2);
    expect(decode(small, t5Tokenizer(small).encode(sentence))).toBe(sentence);
  });

  it('reads in lower case when asked to', () => {
    const uncased = t5Tokenizer(trainT5Tokenizer(captions, { vocabularySize: 200, lowercase: true }));
    expect(uncased.encode('A Red APPLE')).toEqual(uncased.encode('a red apple'));
    expect(tokenizer.encode('A Red APPLE')).not.toEqual(tokenizer.encode('a red apple'));
  });

  it('is the same on every run', () => {
    expect(trainT5Tokenizer(captions, { vocabularySize: 200 })).toBe(json);
  });

  it('refuses a vocabulary without room for the characters', () => {
    expect(() => trainT5Tokenizer(captions, { vocabularySize: 97 })).toThrow(/at least 98/);
  });
});
