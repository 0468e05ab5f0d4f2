import { createHash } from 'node:crypto';
import { existsSync, readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { clipTokenizerJson } from '../../src/text/clip-vocabulary.ts';
import { clipTokenizer } from '../../src/text/tokenizer.ts';

interface TokenizerFile {
  model: { vocab: Record<string, number>; merges: string[] };
}

/** What git, and with it the hub, calls a file. */
const gitHash = (text: string) =>
  createHash('sha1')
    .update(`blob ${Buffer.byteLength(text)}\0${text}`)
    .digest('hex');

const vocabularyFile = (tokens: readonly string[]) =>
  JSON.stringify(Object.fromEntries(tokens.map((token, id) => [token, id])));
const small = vocabularyFile(['a', 'b', 'a</w>', 'b</w>', 'ab</w>', '<|startoftext|>', '<|endoftext|>']);

describe('clipTokenizerJson', () => {
  it('makes a tokenizer of the two files', () => {
    const tokenizer = clipTokenizer(clipTokenizerJson(small, '#version: 0.2\na b</w>\n'));
    expect([tokenizer.start, tokenizer.end]).toEqual([5, 6]);
    expect(tokenizer.encode('AB  b a')).toEqual([4, 3, 2]);
  });

  it('reads merges with other line ends and without a version', () => {
    expect(clipTokenizerJson(small, 'a b</w>\r\n')).toBe(clipTokenizerJson(small, '#version: 0.2\na b</w>'));
  });

  it.each([
    ['no JSON', '{', /vocab\.json .* not JSON/],
    ['a list', '["a"]', /vocab\.json .* an id/],
    ['an id that is no number', '{"a": "0"}', /vocab\.json .* an id/],
    ['an id beyond the tokens', '{"a": 4000000000}', /"a" has id 4000000000, but there are 1 tokens/],
    ['an id twice', '{"a": 0, "b": 0}', /same id/],
    ['no end token', vocabularyFile(['a', '<|startoftext|>']), /lacks <\|endoftext\|>/],
  ])('refuses a vocabulary with %s', (_, vocabulary, message) => {
    expect(() => clipTokenizerJson(vocabulary, '')).toThrow(message);
  });

  it.each([
    ['a line of one token', 'a', /merges\.txt .*"a" is not a pair/],
    ['a line of three tokens', 'a b a', /"a b a" is not a pair/],
    ['a token that is not in the vocabulary', 'a c</w>', /has no "c<\/w>"/],
    ['a pair whose join is not in the vocabulary', 'b b</w>', /has no "bb<\/w>"/],
  ])('refuses merges with %s', (_, merges, message) => {
    expect(() => clipTokenizerJson(small, merges)).toThrow(message);
  });
});

const published = new URL('../../../shared/tokenizers/clip/tokenizer.json', import.meta.url);
const absent = !existsSync(published);

describe.skipIf(absent)(`the published files${absent ? ' (skipped: no ../shared/tokenizers)' : ''}`, () => {
  it('become the published tokenizer.json', () => {
    const expected = JSON.parse(readFileSync(published, 'utf8')) as TokenizerFile;
    const { vocab, merges } = expected.model;
    // The two files as they are on the hub, which their names there prove: sorted by token, not by id.
    const lines = Object.keys(vocab)
      .sort()
      .map((token) => `  ${JSON.stringify(token)}: ${vocab[token]}`);
    const vocabularyText = `{\n${lines.join(',\n')}\n}\n`;
    const mergesText = `#version: 0.2\n${merges.join('\n')}\n`;
    expect(gitHash(vocabularyText)).toBe('469be27c5c010538f845f518c4f5e8574c78f7c8');
    expect(gitHash(mergesText)).toBe('76e821f1b6f0a9709293c3b6b51ed90980b3166b');
    expect(JSON.parse(clipTokenizerJson(vocabularyText, mergesText))).toEqual(expected);
  });
});
