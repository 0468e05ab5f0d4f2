/** Texts from outside: tokenizers and the list of a model's shards. */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import fc from 'fast-check';
import { afterAll, expect } from 'vitest';
import { clipTokenizerJson } from '../../src/text/clip-vocabulary.ts';
import { clipTokenizer, t5Tokenizer } from '../../src/text/tokenizer.ts';
import { trainClipTokenizer, trainT5Tokenizer } from '../../src/training/tokenizer-training.ts';
import { modelFiles } from '../../src/weights/folder.node.ts';
import { fuzz } from '../support/fuzz.ts';
import { byteChanges, changedBytes, changedJson, jsonChanges } from '../support/mutations.ts';

const captions = Array.from({ length: 4 }, () => 'a red apple and a green pear');
const clipJson = trainClipTokenizer(captions, { vocabularySize: 560 });
const t5Json = trainT5Tokenizer(captions, { vocabularySize: 120 });
const prompts = ['', 'a red apple', '  Ünïcode 猫 🐈 \n ﷺ', '<|endoftext|></s><pad>a</w>', 'apple '.repeat(200)];

/** Half of the changes where the layout is, as nearly all values of a tokenizer are in its vocabulary. */
const changedTokenizer = fc.record({ layout: jsonChanges, whole: fc.oneof(fc.constant([]), jsonChanges) });
type ChangedTokenizer = typeof changedTokenizer extends fc.Arbitrary<infer Input> ? Input : never;

function tokenizerText(json: string, { layout, whole }: ChangedTokenizer): string {
  const { model, ...rest } = JSON.parse(json);
  const changed = changedJson(JSON.stringify(rest), layout);
  // Members of a text that is changed need not be JSON any more.
  const joined = `${changed.trimEnd().replace(/\}$/, '')},"model":${JSON.stringify(model)}}`;
  return changedJson(joined, whole);
}

function expectIds(ids: readonly number[]): void {
  expect(ids.every((id) => Number.isInteger(id) && id >= 0 && id < 2 ** 31)).toBe(true);
}

for (const [name, json, open] of [
  ['CLIP', clipJson, clipTokenizer],
  ['T5', t5Json, t5Tokenizer],
] as const) {
  fuzz(`the tokenizer.json of ${name}`, changedTokenizer, (input) => {
    const text = tokenizerText(json, input);
    return {
      size: text.length,
      read() {
        const tokenizer = open(text);
        expectIds([tokenizer.end, 'start' in tokenizer ? tokenizer.start : tokenizer.pad]);
        for (const prompt of prompts) {
          const ids = tokenizer.encode(prompt);
          expectIds(ids);
          expect(ids.length).toBeLessThanOrEqual(20 * prompt.length + 100);
        }
      },
    };
  });
}

const { vocab, merges } = JSON.parse(clipJson).model as { vocab: Record<string, number>; merges: string[] };
const small = JSON.stringify(
  Object.fromEntries(['a', 'b', 'a</w>', 'b</w>', 'ab</w>', '<|startoftext|>', '<|endoftext|>'].map((t, i) => [t, i])),
);
const vocabularies = [
  [JSON.stringify(vocab), `#version: 0.2\n${merges.map((merge) => [merge].flat().join(' ')).join('\n')}\n`],
  [small, '#version: 0.2\na b</w>\n'],
] as const;

fuzz(
  'vocab.json and merges.txt',
  fc.record({ pair: fc.nat({ max: 1 }), vocabulary: jsonChanges, merges: fc.oneof(fc.constant([]), byteChanges) }),
  ({ pair, vocabulary, merges }) => {
    const [tokens, joins] = vocabularies[pair]!;
    const first = changedJson(tokens, vocabulary);
    const second = new TextDecoder().decode(changedBytes(Buffer.from(joins), merges));
    return {
      size: first.length + second.length,
      read() {
        const tokenizer = clipTokenizer(clipTokenizerJson(first, second));
        for (const prompt of prompts) expectIds(tokenizer.encode(prompt));
      },
    };
  },
);

const folder = mkdtempSync(join(tmpdir(), 'mmditx-fuzz-'));
afterAll(() => rmSync(folder, { recursive: true }));
const INDEX = 'diffusion_pytorch_model.safetensors.index.json';
const index = readFileSync(new URL(`../fixtures/layouts/diffusers/transformer/${INDEX}`, import.meta.url), 'utf8');
const { metadata, weight_map } = JSON.parse(index) as { metadata: object; weight_map: Record<string, string> };
const entries = Object.entries(weight_map);
for (const [, file] of entries) writeFileSync(join(folder, file), '');
const indices = [JSON.stringify({ metadata, weight_map: Object.fromEntries(entries.slice(0, 6)) }), index];

fuzz(
  'an index of shards',
  fc.record({
    file: fc.nat({ max: 1 }),
    json: jsonChanges,
    bytes: fc.oneof({ weight: 3, arbitrary: fc.constant([]) }, byteChanges),
  }),
  ({ file, json, bytes }) => {
    const text = changedBytes(Buffer.from(changedJson(indices[file]!, json)), bytes);
    writeFileSync(join(folder, INDEX), text);
    return {
      size: text.length,
      async read() {
        const files = await modelFiles(folder);
        expect(files.length).toBeGreaterThan(0);
        for (const path of files) expect(dirname(path)).toBe(folder);
      },
    };
  },
  { cases: 150 },
);
